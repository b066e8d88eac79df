//! What each drill does, and what must come of it.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use mirror::ids::Epoch;
use mirror::report::{Report, monotonic_us};
use rustix::process::Signal;

use super::network;
use super::options::Name;
use super::record::Outcome;
use super::relay::Way;
use super::scene::{Failure, PATIENCE, Scene};
use crate::client::{self, Method};
use crate::sides::Side;

/// The standby that is started when the first one is gone.
const SECOND: Side = Side(2);

/// The side that is started with the image of one that has lost the guest.
const RETURNED: Side = Side(3);

/// How long an order to a side may take.
const ORDER: Duration = Duration::from_secs(20);

/// How long a side that has no claim any more may take to stop.
const YIELD: Duration = Duration::from_secs(5);

/// Time between two tries to attach a standby.
const RETRY: Duration = Duration::from_millis(20);

/// Room on the disk that becomes full, in KiB.
const SMALL_DISK: u32 = 2048;

/// Carries out the drill of a scene that has begun.
pub(super) fn carry_out(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    match scene.plan.drill {
        Name::Kill | Name::All => kill(scene),
        Name::Stop => stop(scene),
        Name::Cut => cut(scene),
        Name::Slow => slow(scene),
        Name::Witness => witness(scene),
        Name::DiskFull => disk_full(scene),
        Name::Standby => standby(scene),
        Name::Switchover => switchover(scene),
    }
}

/// What must be there before anything is started.
///
/// # Errors
/// Why the drill cannot be run here.
pub(super) fn prepare(scene: &mut Scene<'_>) -> Result<(), io::Error> {
    if scene.plan.drill == Name::DiskFull {
        network::mount_small(&scene.image_folder(), SMALL_DISK)?;
    }
    Ok(())
}

/// What must be undone after everything has ended.
pub(super) fn clean_up(scene: &Scene<'_>) {
    if scene.plan.drill == Name::DiskFull {
        network::unmount(&scene.image_folder());
    }
}

fn kill(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.how = "SIGKILL to the primary".into();
    scene.pass_to_the_fault()?;
    scene.kill(Side::PRIMARY)?;
    takes_over(scene, Side::STANDBY)
}

fn stop(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.pass_to_the_fault()?;
    let stopped_us = scene.fault("SIGSTOP to the primary");
    scene.signal(Side::PRIMARY, Signal::STOP)?;
    scene.must_be_protected(stopped_us)?;
    takes_over(scene, Side::STANDBY)?;
    let asleep = scene.random.time(0, 800);
    scene.pass(asleep)?;
    let awake_us = scene.mark("SIGCONT to it");
    scene.signal(Side::PRIMARY, Signal::CONT)?;
    scene.how = format!("SIGSTOP to the primary, SIGCONT {} ms after the takeover", asleep.as_millis());
    yields(scene, Side::PRIMARY, awake_us)?;
    Ok(Outcome::Survived)
}

fn cut(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    let (ways, how): (&[Way], _) = match scene.random.below(3) {
        0 => (&[Way::Forth, Way::Back], "both ways"),
        1 => (&[Way::Forth], "towards the standby"),
        _ => (&[Way::Back], "towards the primary"),
    };
    scene.pass_to_the_fault()?;
    let cut_us = scene.fault(format!("link cut {how}"));
    for way in ways {
        scene.link()?.cut(*way);
    }
    scene.must_be_protected(cut_us)?;
    let winner = one_goes_on(scene, cut_us)?;
    let apart = scene.random.time(0, 800);
    scene.pass(apart)?;
    scene.mark("link healed");
    scene.link()?.heal();
    scene.how = format!("link cut {how}, healed {} ms after the decision", apart.as_millis());
    if winner == Side::STANDBY {
        yields(scene, Side::PRIMARY, cut_us)?;
        return Ok(Outcome::Survived);
    }
    let fenced = |scene: &Scene<'_>| {
        let side = scene.of(Side::STANDBY);
        side.closed || side.when(cut_us, |report| matches!(report, Report::Refused { .. })).is_some()
    };
    scene.until("the standby that lost its claim says so", ORDER, fenced)?;
    taken_back(scene, Side::PRIMARY, cut_us)
}

fn slow(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.pass_to_the_fault()?;
    let delay = Duration::from_micros(200 << scene.random.below(7));
    let slow_us = scene.mark(format!("link slowed by {delay:?} a 16 KiB"));
    scene.link()?.slow(delay);
    let slowness = scene.random.time(200, 1500);
    scene.pass(slowness)?;
    let lost = |scene: &Scene<'_>| {
        let is_lost =
            |report: &Report| matches!(report, Report::StandbyLost { .. } | Report::PrimaryLost { .. });
        [Side::PRIMARY, Side::STANDBY].iter().any(|side| scene.of(*side).when(slow_us, is_lost).is_some())
    };
    scene.how = format!("link slowed by {delay:?} a 16 KiB for {} ms", slowness.as_millis());
    if !lost(scene) {
        scene.how.push_str(", then SIGKILL to the primary");
        scene.kill(Side::PRIMARY)?;
        return takes_over(scene, Side::STANDBY);
    }
    // So slow that it counted as cut.
    scene.fault_us.get_or_insert(slow_us);
    scene.how.push_str(", which counted as cut");
    let winner = one_goes_on(scene, slow_us)?;
    scene.mark("link healed");
    scene.link()?.heal();
    if winner == Side::STANDBY {
        yields(scene, Side::PRIMARY, slow_us)?;
        return Ok(Outcome::Survived);
    }
    taken_back(scene, Side::PRIMARY, slow_us)
}

fn witness(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    let (here, away) = (scene.folder.path().join("witness"), scene.folder.path().join("witness-away"));
    scene.pass_to_the_fault()?;
    scene.mark("witness taken away");
    fs::rename(&here, &away)?;
    let (victim, heir) = if scene.random.below(2) == 0 {
        (Side::STANDBY, Side::PRIMARY)
    } else {
        (Side::PRIMARY, Side::STANDBY)
    };
    scene.kill(victim)?;
    let killed_us = scene.fault_us.unwrap_or_default();
    let alone = scene.random.time(300, 1300);
    scene.pass(alone)?;
    scene.how = format!(
        "witness away, SIGKILL to the {}, witness back {} ms later",
        victim.name(),
        alone.as_millis()
    );
    if let Some(side) = live_since(scene, killed_us) {
        let text = format!("the {} went on while nobody could ask the witness", side.name());
        scene.violations.push(text);
    }
    scene.mark("witness back");
    fs::rename(&away, &here)?;
    if heir == Side::STANDBY {
        return takes_over(scene, Side::STANDBY);
    }
    one_goes_on(scene, killed_us)?;
    protect_again(scene, Side::PRIMARY)
}

fn disk_full(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.pass_to_the_fault()?;
    scene.mark("disk full");
    let filler = scene.image_folder().join("filler");
    fill(&filler)?;
    let full = scene.random.time(200, 1000);
    let answered = scene.answered();
    scene.pass(full)?;
    if scene.plan.served && scene.answered() == answered {
        scene.violations.push("with the disk full, the guest answered nothing at all".into());
    }
    scene.mark("disk has room again");
    fs::remove_file(&filler)?;
    scene.pass_to_the_fault()?;
    scene.how = format!("disk full for {} ms, later SIGKILL to the primary", full.as_millis());
    scene.kill(Side::PRIMARY)?;
    takes_over(scene, Side::STANDBY)
}

/// Writes to a file until there is no room for more.
fn fill(path: &std::path::Path) -> io::Result<()> {
    use std::io::Write;
    let mut file = fs::File::create(path)?;
    for chunk in [64 << 10, 4 << 10] {
        loop {
            match file.write(&vec![0x55; chunk]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::StorageFull => break,
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

fn standby(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.pass_to_the_fault()?;
    scene.kill(Side::STANDBY)?;
    let killed_us = scene.fault_us.unwrap_or_default();
    one_goes_on(scene, killed_us)?;
    protect_again(scene, Side::PRIMARY)?;
    // Whether it is protected shows when the primary dies.
    scene.pass_to_the_fault()?;
    scene.kill(Side::PRIMARY)?;
    takes_over(scene, SECOND)?;
    scene.how = "SIGKILL to the standby, a new one attached, then SIGKILL to the primary".into();
    Ok(Outcome::Reprotected)
}

fn switchover(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.how = "switchover".into();
    scene.pass_to_the_fault()?;
    let ordered_us = scene.fault("switchover");
    let answer = client::switchover(&scene.api(Side::PRIMARY), None);
    if answer.is_err() {
        scene.must_be_protected(ordered_us)?;
    }
    answer.map_err(|error| Failure::Lost(format!("the guest was not handed over: {error}")))?;
    takes_over(scene, Side::STANDBY)?;
    yields(scene, Side::PRIMARY, ordered_us)?;
    Ok(Outcome::Switched)
}

/// Waits until `side` runs the guest.
fn takes_over(scene: &mut Scene<'_>, side: Side) -> Result<Outcome, Failure> {
    // What was decided before, on a machine that was too busy, does not count.
    let from_us = scene.fault_us.unwrap_or(0);
    let decision = |scene: &Scene<'_>| {
        let since = scene.of(side).told.iter().filter(|stamped| stamped.at_us >= from_us);
        let mut decisions = since.map(|stamped| stamped.report.clone());
        decisions.find(|report| matches!(report, Report::Active { .. } | Report::Refused { .. }))
    };
    let what = format!("the {} takes over", side.name());
    scene.until(&what, PATIENCE, |scene| scene.of(side).closed || decision(scene).is_some())?;
    if let Some(Report::Refused { reason }) = decision(scene) {
        let told = || scene.of(side).told.iter().map(|told| &told.report);
        let joined = told().filter(|report| matches!(report, Report::Joined { .. })).count();
        // It was being seeded once more, which the primary had no time to tell.
        if joined > 1 && told().any(|report| matches!(report, Report::PrimaryLost { epoch: Epoch::NONE, .. }))
        {
            return Err(Failure::Unprotected);
        }
        let joined = told().rev().find_map(|report| match report {
            Report::Joined { term, .. } => Some(*term),
            _ => None,
        });
        // The guest had gone on alone before, with a grant of which a primary that was killed had no time to tell.
        if scene.newest_term()? > joined {
            return Err(Failure::Unprotected);
        }
        return Err(Failure::Lost(format!("the {} did not take over: {reason}", side.name())));
    }
    if decision(scene).is_none() {
        return Err(Failure::Lost(format!("the {} ended", side.name())));
    }
    (scene.live, scene.partner) = (side, None);
    Ok(Outcome::Survived)
}

/// Which of the first two sides runs the guest by a claim made since `from_us`.
fn live_since(scene: &Scene<'_>, from_us: u64) -> Option<Side> {
    let goes_on = |report: &Report| matches!(report, Report::Active { .. } | Report::Solo { .. });
    [Side::PRIMARY, Side::STANDBY].into_iter().find(|side| scene.of(*side).when(from_us, goes_on).is_some())
}

/// Waits until one of the first two sides goes on with the guest.
fn one_goes_on(scene: &mut Scene<'_>, from_us: u64) -> Result<Side, Failure> {
    scene.until("one side goes on", PATIENCE, |scene| live_since(scene, from_us).is_some())?;
    let side = live_since(scene, from_us).ok_or_else(|| Failure::Lost("no side goes on".into()))?;
    (scene.live, scene.partner) = (side, None);
    Ok(side)
}

/// Waits until `side`, which another has followed, has given up the guest.
fn yields(scene: &mut Scene<'_>, side: Side, from_us: u64) -> Result<(), Failure> {
    let given_up = |report: &Report| {
        matches!(report, Report::Frozen { .. } | Report::HandedOver { .. } | Report::Listening { .. })
    };
    let stopped =
        |scene: &Scene<'_>| scene.of(side).closed || scene.of(side).when(from_us, given_up).is_some();
    scene.until(&format!("the {} that another has followed stops", side.name()), YIELD, stopped)
}

/// Waits until `side`, which went on alone after `from_us`, has its old standby again: it asks for one by itself.
fn taken_back(scene: &mut Scene<'_>, side: Side, from_us: u64) -> Result<Outcome, Failure> {
    let alone_us = |scene: &Scene<'_>| {
        scene.of(side).when(from_us, |report| matches!(report, Report::Solo { .. })).unwrap_or(u64::MAX)
    };
    scene.until("the guest is protected again", PATIENCE, |scene| {
        let since = alone_us(scene);
        scene.of(side).when(since, |report| matches!(report, Report::Protected { .. })).is_some()
    })?;
    scene.partner = Some(Side::STANDBY);
    scene.how.push_str("; then its old standby again");
    Ok(Outcome::Reprotected)
}

/// Whether the guest that `side` runs is protected by the standby that was attached at `from_us`; false if that is lost first.
fn comes_to_protection(scene: &mut Scene<'_>, side: Side, from_us: u64) -> Result<bool, Failure> {
    let seen =
        |scene: &Scene<'_>, wanted: fn(&Report) -> bool| scene.of(side).when(from_us, wanted).is_some();
    let protected = |report: &Report| matches!(report, Report::Protected { .. });
    let failed = |report: &Report| matches!(report, Report::Unprotected { .. } | Report::StandbyLost { .. });
    scene.until("the guest is protected again", PATIENCE, |scene| {
        seen(scene, protected) || seen(scene, failed)
    })?;
    Ok(seen(scene, protected))
}

/// Starts a new standby, attaches it to `side`, which runs the guest, and waits until that is protected.
fn protect_again(scene: &mut Scene<'_>, side: Side) -> Result<Outcome, Failure> {
    let listen = scene.start_standby(SECOND)?;
    scene.mark("new standby attached");
    attach(scene, side, &listen)?;
    scene.partner = Some(SECOND);
    scene.how.push_str(if scene.how.is_empty() { "" } else { "; then a new standby" });
    Ok(Outcome::Reprotected)
}

/// When all is over and nobody holds the guest's mirror: whoever had the guest before comes back as a standby, with the image
/// that it has, and both images become the same again.
pub(super) fn come_back(scene: &mut Scene<'_>) -> Result<(), Failure> {
    if scene.partner.is_some() || !scene.plan.is_replicated() {
        return Ok(());
    }
    let (live, before) = (scene.live, Side::PRIMARY);
    scene.dismiss(before)?;
    let listen = scene.start_returning(RETURNED, before)?;
    let from_us = scene.mark("old primary back as a standby");
    scene.returned_us = Some(from_us);
    attach(scene, live, &listen)?;
    scene.partner = Some(RETURNED);
    let sync = scene.of(live).told.iter().find_map(|told| match told.report {
        Report::DiskSync { bytes, left } if told.at_us >= from_us => Some((bytes, left)),
        _ => None,
    });
    let (bytes, left) = sync.ok_or_else(|| Failure::Lost("nothing was told of the returning disk".into()))?;
    let kib = |bytes: u64| bytes >> 10;
    let back = format!("; then the old primary again, sent {} of {} KiB of its disk", kib(left), kib(bytes));
    scene.how.push_str(&back);
    Ok(())
}

/// Attaches the standby at `listen` to `side`, which runs the guest, and waits until that is protected.
fn attach(scene: &mut Scene<'_>, side: Side, listen: &str) -> Result<(), Failure> {
    let section = scene.mirror_to(listen)?;
    let (api, until) = (scene.api(side), Instant::now() + PATIENCE);
    loop {
        let from_us = monotonic_us();
        match client::send(&api, Method::PUT, "/mirror", &section, ORDER) {
            Ok(()) if comes_to_protection(scene, side, from_us)? => return Ok(()),
            Err(error) if Instant::now() > until => {
                return Err(Failure::Lost(format!("no new standby can be attached: {error}")));
            }
            // It may not be done with the old one yet; or the new one was lost while it was seeded.
            _ => scene.pass(RETRY)?,
        }
    }
}
