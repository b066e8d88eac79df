//! One run, from an empty folder to what is known of it.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use mirror::report::monotonic_us;

use super::plan::Plan;
use super::record::{Outcome, Run, Timeline};
use super::scene::{self, Failure, Scene};
use super::{DrillError, faults, judge, network};
use crate::history::{self, Operation, image};

/// Answers that clients must get after the guest has gone on.
const AFTERWARDS: u64 = 60;

/// How often the consoles are judged while the guest checks its memory.
const JUDGEMENT: Duration = Duration::from_millis(250);

/// What came of a try.
pub(super) enum Tried {
    /// A run.
    Run(Box<Run>),
    /// This machine cannot do this one.
    Skipped,
    /// The guest was not protected when the fault came, which says nothing of the fault.
    Again,
}

/// A whole run.
///
/// # Errors
/// [`DrillError`]: there is none.
pub(super) fn run(
    plan: &Plan,
    histories: Option<&Path>,
    interrupted: &AtomicBool,
) -> Result<Tried, DrillError> {
    network::forget()?;
    let mut scene = Scene::new(plan, interrupted).map_err(DrillError::System)?;
    if let Err(error) = faults::prepare(&mut scene) {
        eprintln!("SKIPPED: the drill {}: cannot mount a small file system: {error}", plan.drill.text());
        return Ok(Tried::Skipped);
    }
    let ended = match perform(&mut scene) {
        Err(Failure::Error(error)) => Err(error),
        Err(Failure::Unprotected) => Ok(None),
        Err(lost @ Failure::Lost(_)) => {
            let Failure::Lost(text) = scene.with_last_words(lost) else { unreachable!("it is lost") };
            scene.violations.push(text);
            Ok(Some(Outcome::Lost))
        }
        Ok(outcome) => Ok(Some(outcome)),
    };
    let patience = matches!(ended, Ok(Some(outcome)) if outcome != Outcome::Lost);
    let history = scene.load.take().map(|load| load.finish(patience)).unwrap_or_default();
    let ended_us = monotonic_us();
    if patience {
        match compare_images(&mut scene) {
            Err(Failure::Lost(text)) => scene.violations.push(text),
            Err(Failure::Error(error)) => return Err(error),
            Err(Failure::Unprotected) => scene.how.push_str("; then protection was lost once more"),
            Ok(()) => {}
        }
    }
    let over = scene.end();
    let run = ended.and_then(|outcome| match over {
        Err(Failure::Error(error)) => Err(error),
        Err(Failure::Lost(text)) => Err(DrillError::System(io::Error::other(text))),
        Err(Failure::Unprotected) => Ok(None),
        Ok(()) => outcome.map(|outcome| sum_up(&mut scene, outcome, &history, ended_us)).transpose(),
    });
    faults::clean_up(&scene);
    let Some(run) = run? else { return Ok(Tried::Again) };
    if let Some(folder) = histories {
        let path = folder.join(format!("{}-{}.jsonl", plan.drill.text(), plan.run));
        let written = std::fs::create_dir_all(folder).and_then(|()| File::create(&path));
        let written = written.and_then(|file| history::write(&history, io::BufWriter::new(file)));
        written.map_err(|source| DrillError::Write { path, source })?;
    }
    Ok(Tried::Run(Box::new(run)))
}

/// Everything up to the moment from which nothing more is expected.
fn perform(scene: &mut Scene<'_>) -> Result<Outcome, Failure> {
    scene.begin()?;
    let outcome = faults::carry_out(scene)?;
    let answered = scene.answered();
    if scene.plan.served {
        scene.until("the service answers again", scene::PATIENCE, |scene| {
            scene.answered() >= answered + AFTERWARDS
        })?;
    }
    // Whoever took the guest over shows that its memory is whole.
    let failed_over = scene.observed.values().any(|side| side.tally.active.is_some());
    if failed_over && scene.plan.embedded {
        let (mut judge_at, mut complete) = (Instant::now(), false);
        scene.until("the guest has checked its memory", scene::PATIENCE, |scene| {
            if Instant::now() >= judge_at {
                let findings = judge::consoles(scene);
                complete = findings.complete || !findings.is_clean();
                judge_at = Instant::now() + JUDGEMENT;
            }
            complete
        })?;
    }
    faults::come_back(scene)?;
    Ok(outcome)
}

/// Nobody asks the guest for anything any more: soon the image of its standby must be its own.
fn compare_images(scene: &mut Scene<'_>) -> Result<(), Failure> {
    let Some(partner) = scene.partner.filter(|_| scene.plan.is_replicated()) else { return Ok(()) };
    let (live, held) = (scene.image(scene.live), scene.image(partner));
    let same = |_: &Scene<'_>| match (std::fs::read(&live), std::fs::read(&held)) {
        (Ok(live), Ok(held)) => live == held,
        _ => false,
    };
    let compared = scene.until("the images of both sides are the same", scene::PATIENCE, same);
    if matches!(compared, Err(Failure::Lost(_))) {
        // A standby that is lost has the image of an earlier epoch.
        scene.must_be_protected(monotonic_us())?;
    }
    scene.images_equal = compared.is_ok();
    compared
}

fn sum_up(
    scene: &mut Scene<'_>,
    outcome: Outcome,
    history: &[Operation],
    ended_us: u64,
) -> Result<Run, DrillError> {
    let mut service = history::check(history);
    if outcome == Outcome::Lost {
        // That nobody could read it at last is no news.
        service.violations.told.retain(|told| !told.contains("nobody read it"));
    }
    let console = judge::consoles(scene);
    let mut violations = std::mem::take(&mut scene.violations);
    violations.extend(judge::judge(scene, history, &service));
    violations.extend(console.problems.iter().map(|problem| format!("console: {problem}")));
    let mut image_blocks = 0;
    if scene.plan.has_own_disk() && scene.plan.served {
        let found = image::check(history, &scene.image(scene.live_at(ended_us)))?;
        image_blocks = found.blocks;
        violations.extend(found.violations.told);
    }
    let told = scene
        .observed
        .iter()
        .flat_map(|(side, observed)| observed.told.iter().map(|stamped| (*side, stamped.clone())));
    let timeline = Timeline {
        started_us: scene.started_us,
        told: told.collect(),
        ended: scene
            .observed
            .iter()
            .filter_map(|(side, observed)| Some((*side, observed.ended_us?)))
            .collect(),
        marks: scene.marks.clone(),
        requests: judge::answers(history).collect(),
    };
    Ok(Run {
        drill: scene.plan.drill,
        run: scene.plan.run,
        seed: scene.plan.seed,
        how: scene.how.clone(),
        outcome: if violations.is_empty() { outcome } else { Outcome::Lost },
        violations,
        times: judge::times(scene, history, ended_us),
        service,
        image_blocks,
        images_equal: scene.images_equal,
        console,
        timeline: Some(timeline),
    })
}
