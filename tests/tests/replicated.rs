//! Disks of which each side has an image of its own: the guest's service stores blocks, a side dies, and its image and that
//! of the other are compared with what was answered.

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use mirror::report::Report;
use resources::protocol::{Reply, Request, read_block};
use rustix::process::Signal;
use tests::client::{Client, SERVICE};
use tests::lan::{GUEST, Lan, alone};
use tests::pair::{PATIENCE, await_report};
use tests::process::{Process, understudy};

/// Bytes of the disk: some regions of the note.
const DISK: u64 = 48 << 20;
/// Blocks that clients store to.
const BLOCKS: u64 = 512;
/// How often the images are compared until they are the same.
const GLANCE: Duration = Duration::from_millis(20);
/// The images of three sides, by which they are named.
const THREE: [&str; 3] = ["ours", "theirs", "third"];
/// As `Place::primary` has it: what is tried does not hang on how soon silence is noticed.
const PATIENT: [&str; 4] = ["--heartbeat-ms", "200", "--heartbeat-misses", "25"];

/// The folder in which everything is, with an image for each side.
struct Place(tempfile::TempDir);

impl Place {
    fn new(lan: &Lan) -> Self {
        understudy();
        lan.add_tap("tap0");
        lan.add_tap("tap1");
        let place = Self(tempfile::tempdir().unwrap());
        let mut ours = File::create(place.path("ours")).unwrap();
        ours.set_len(DISK).unwrap();
        // Something in places, holes elsewhere.
        for at in (BLOCKS * 4096..DISK).step_by(3 << 20) {
            ours.seek(SeekFrom::Start(at)).unwrap();
            ours.write_all(&vec![(at >> 20) as u8 + 1; 1 << 20]).unwrap();
        }
        ours.set_len(DISK).unwrap();
        let mut theirs = File::create(place.path("theirs")).unwrap();
        // What was there before is gone when the images are equal.
        theirs.write_all(&vec![0xee; DISK as usize]).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn standby(&self) -> Process {
        self.standby_with(&[])
    }

    fn standby_with(&self, more: &[&str]) -> Process {
        self.standby_at(&format!("unix:{}", self.text("standby")), "theirs", "tap1", more)
    }

    /// A side that waits at `listen`, with `image` and `tap`.
    fn standby_at(&self, listen: &str, image: &str, tap: &str, more: &[&str]) -> Process {
        let (drive, net) = (format!("disk={}", self.text(image)), format!("net={tap}"));
        let witness = self.text("witness");
        let options = ["--witness", &witness, "--net", &net, "--drive", &drive];
        Process::standby_with(listen, &[&options, more].concat())
    }

    /// Two sides, each of which becomes the other's standby when that goes on.
    fn turns(&self) -> (Process, Process) {
        let back = format!("unix:{}", self.text("back"));
        let second = ["--standby", &back, "--api-sock", &self.text("second-api")];
        let standby = self.standby_with(&[&second, &PATIENT[..]].concat());
        let primary = self.primary_with("", &["--listen", &back]);
        await_report(&primary.reports, protected);
        await_report(&standby.reports, protected);
        (primary, standby)
    }

    fn primary(&self) -> Process {
        self.primary_with("", &[])
    }

    /// With `drives` more, of which each begins with a comma.
    fn primary_with(&self, drives: &str, more: &[&str]) -> Process {
        self.start_primary(drives, more, &|config| config)
    }

    fn start_primary(&self, drives: &str, more: &[&str], change: &dyn Fn(String) -> String) -> Process {
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "count.rate=20 net.ip={GUEST}"}},
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
                "drives": [{{"drive_id": "disk", "path_on_host": "{}", "is_root_device": false,
                             "cache_type": "Writeback", "replication": {{"mode": "replicated"}}}}{drives}],
                "network-interfaces": [{{"iface_id": "net", "host_dev_name": "tap0"}}],
                "mirror": {{"standby": "unix:{}", "witness": "{}", "heartbeat_ms": 200, "heartbeat_misses": 25}}}}"#,
            self.text("ours"),
            self.text("standby"),
            self.text("witness")
        );
        fs::write(self.path("vm.json"), change(text)).unwrap();
        let run = ["run", "--config-file", &self.text("vm.json"), "--api-sock", &self.text("api")];
        Process::start(&[&run, more].concat())
    }

    /// One of three sides, each of which waits at its own address and mirrors the guest to both others once it runs it.
    fn one_of_three(&self, name: &str, tap: &str) -> Process {
        let others: Vec<String> =
            THREE.iter().filter(|other| **other != name).map(|other| self.address(other)).collect();
        let api = self.text(&format!("{name}.api"));
        let mut options = vec!["--api-sock", &api, "--standbys-at-once", "2"];
        for other in &others {
            options.extend(["--standby", other]);
        }
        self.standby_at(&self.address(name), name, tap, &[&options[..], &PATIENT[..]].concat())
    }

    fn address(&self, name: &str) -> String {
        format!("unix:{}", self.text(&format!("{name}.link")))
    }

    /// Makes what a third side needs.
    fn add_third(&self, lan: &Lan) {
        lan.add_tap("tap2");
        File::create(self.path("third")).unwrap().set_len(DISK).unwrap();
    }

    /// A guest that is in lockstep with two standbys, both of which hold its disk.
    fn three(&self, lan: &Lan) -> [Process; 3] {
        self.add_third(lan);
        let (second, third) = (self.one_of_three("theirs", "tap1"), self.one_of_three("third", "tap2"));
        let text = format!(
            r#"["{}", "{}"], "standbys_at_once": 2, "witness""#,
            self.address("theirs"),
            self.address("third")
        );
        let one = format!(r#""unix:{}", "witness""#, self.text("standby"));
        let first = self
            .start_primary("", &["--listen", &self.address("ours")], &|config| config.replace(&one, &text));
        await_report(&first.reports, gained);
        [first, second, third]
    }

    /// Waits until the images of both sides are the same, which they are soon when nobody writes.
    fn await_equality(&self) {
        self.await_equality_of("ours", "theirs");
    }

    fn await_equality_of(&self, one: &str, other: &str) {
        let until = Instant::now() + PATIENCE;
        while fs::read(self.path(one)).unwrap() != fs::read(self.path(other)).unwrap() {
            assert!(Instant::now() < until, "the images stay different");
            thread::sleep(GLANCE);
        }
    }
}

/// Stores ascending values to the blocks, round after round, until `enough`; gives the last value that was confirmed.
fn store(address: &str, from: u64, mut enough: impl FnMut(u64) -> bool) -> u64 {
    let mut client = Client::connect(address.parse().unwrap()).unwrap();
    let mut value = from;
    while !enough(value) {
        value += 1;
        let request = Request::Store { block: value % BLOCKS, value };
        assert_eq!(client.ask(&request).unwrap(), Reply::Done);
    }
    value
}

/// The value of `block` in the image at `path`.
fn stored(path: &Path, block: u64) -> Option<u64> {
    let image = fs::read(path).unwrap();
    read_block(image[block as usize * 4096..][..4096].try_into().unwrap(), block)
}

/// Every block of `image` holds the newest value that was confirmed up to `confirmed`, or a newer one.
fn check(image: &Path, confirmed: u64) {
    for value in (1..=confirmed).rev().take(BLOCKS as usize) {
        let found = stored(image, value % BLOCKS);
        assert!(found.is_some_and(|found| found >= value), "{value} was confirmed, {found:?} is there");
    }
}

/// Stores on one connection while `happens` does, and some more; gives the last value that was confirmed.
fn store_while(from: u64, happens: impl FnOnce()) -> u64 {
    let over = AtomicBool::new(false);
    let confirmed = thread::scope(|scope| {
        let over = &over;
        let (sender, begun) = std::sync::mpsc::channel();
        let storing = scope.spawn(move || {
            let mut more = 0;
            store(SERVICE, from, |value| {
                if value == from + 50 {
                    sender.send(()).unwrap();
                }
                more += u32::from(over.load(Ordering::Acquire));
                more > 50
            })
        });
        begun.recv().unwrap();
        happens();
        over.store(true, Ordering::Release);
        storing.join()
    });
    confirmed.unwrap()
}

/// The guest's disk holds what was confirmed, as it says.
fn check_by_the_guest(confirmed: u64) {
    let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
    for value in (1..=confirmed).rev().take(BLOCKS as usize) {
        assert_eq!(client.number(&Request::Load { block: value % BLOCKS }).unwrap(), value);
    }
}

fn active(report: &Report) -> bool {
    matches!(report, Report::Active { .. })
}

/// Which of two sides, each with the name of its image, has taken the guest over, and which has not.
fn winner<'a>(
    one: (Process, &'a str),
    other: (Process, &'a str),
) -> ((Process, &'a str), (Process, &'a str)) {
    let until = Instant::now() + PATIENCE;
    let runs = |side: &Process| side.reports.try_iter().any(|report| active(&report));
    loop {
        if runs(&one.0) {
            return (one, other);
        }
        if runs(&other.0) {
            return (other, one);
        }
        assert!(Instant::now() < until, "nobody has taken the guest over");
        thread::sleep(GLANCE);
    }
}

/// How much of the disks a side says that its standby is to be sent.
fn to_be_sent(side: &Process) -> (u64, u64) {
    let told = await_report(&side.reports, |report| matches!(report, Report::DiskSync { .. }));
    let Report::DiskSync { left, bytes } = told else { unreachable!() };
    (left, bytes)
}

/// A side sends its standby what that lacks of the disks, and not all of them.
fn assert_a_part_is_sent(side: &Process) {
    let (left, bytes) = to_be_sent(side);
    assert!(left < bytes, "{left} of {bytes} bytes were to be sent");
}

/// Two standbys hold the guest.
fn gained(report: &Report) -> bool {
    matches!(report, Report::StandbyGained { standbys: 2, .. })
}

fn protected(report: &Report) -> bool {
    matches!(report, Report::Protected { .. })
}

mod tap {
    mod kvm {
        use super::super::*;

        #[test]
        fn replica_of_a_primary_that_was_killed_holds_every_block_that_was_confirmed() {
            alone(|lan| {
                let place = Place::new(lan);
                let standby = place.standby();
                let primary = place.primary();
                await_report(&primary.reports, protected);
                let moved = AtomicBool::new(false);
                let confirmed = thread::scope(|scope| {
                    let moved = &moved;
                    let (sender, halfway) = std::sync::mpsc::channel();
                    let storing = scope.spawn(move || {
                        let before = store(SERVICE, 0, |value| value >= 200);
                        sender.send(()).unwrap();
                        // On the same connection, whatever happens to the guest.
                        let mut after = 0;
                        let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
                        let mut value = before;
                        while after < 300 {
                            after += u32::from(moved.load(Ordering::Acquire));
                            value += 1;
                            let request = Request::Store { block: value % BLOCKS, value };
                            assert_eq!(client.ask(&request).unwrap(), Reply::Done);
                        }
                        value
                    });
                    halfway.recv().unwrap();
                    primary.signal(Signal::KILL);
                    await_report(&standby.reports, |report| matches!(report, Report::Active { .. }));
                    moved.store(true, Ordering::Release);
                    storing.join().unwrap()
                });
                let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
                for value in (1..=confirmed).rev().take(BLOCKS as usize) {
                    let block = value % BLOCKS;
                    assert_eq!(client.number(&Request::Load { block }).unwrap(), value);
                }
                drop(standby);
                check(&place.path("theirs"), confirmed);
                let (ours, theirs) =
                    (fs::read(place.path("ours")).unwrap(), fs::read(place.path("theirs")).unwrap());
                let rest = (BLOCKS * 4096) as usize;
                assert!(ours[rest..] == theirs[rest..], "what nobody wrote to was sent as it was");
            });
        }

        #[test]
        fn standby_that_returns_is_sent_what_was_written_while_it_was_away() {
            alone(|lan| {
                let place = Place::new(lan);
                let standby = place.standby();
                let primary = place.primary();
                await_report(&primary.reports, protected);
                store(SERVICE, 0, |value| value >= 100);
                standby.signal(Signal::KILL);
                await_report(&primary.reports, |report| matches!(report, Report::Solo { .. }));
                let confirmed = store(SERVICE, 100, |value| value >= 300);

                drop(standby);
                let standby = place.standby();
                // It is found by the primary.
                let (left, bytes) = to_be_sent(&primary);
                assert!(bytes == DISK && left < DISK / 4, "{left} of {bytes} bytes were to be sent");
                await_report(&primary.reports, protected);
                primary.signal(Signal::KILL);
                await_report(&standby.reports, |report| matches!(report, Report::Active { .. }));
                let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
                for value in (1..=confirmed).rev().take(BLOCKS as usize) {
                    assert_eq!(client.number(&Request::Load { block: value % BLOCKS }).unwrap(), value);
                }
                drop(standby);
                check(&place.path("theirs"), confirmed);
            });
        }

        #[test]
        fn primary_that_slept_while_it_wrote_becomes_the_standby_with_the_same_disk() {
            alone(|lan| {
                let place = Place::new(lan);
                let (primary, standby) = place.turns();
                let confirmed = store_while(0, || {
                    primary.signal(Signal::STOP);
                    await_report(&standby.reports, active);
                    primary.signal(Signal::CONT);
                    await_report(&primary.reports, |report| matches!(report, Report::Frozen { .. }));
                    assert_a_part_is_sent(&standby);
                    await_report(&primary.reports, protected);
                });
                place.await_equality();
                check(&place.path("ours"), confirmed);

                // Whether it holds the guest's disk shows when it goes on with it.
                let confirmed = store_while(confirmed, || {
                    standby.signal(Signal::KILL);
                    await_report(&primary.reports, active);
                });
                check_by_the_guest(confirmed);
                drop(primary);
                check(&place.path("ours"), confirmed);
            });
        }

        #[test]
        fn guest_takes_its_disk_along_when_it_is_switched_over_there_and_back() {
            alone(|lan| {
                let place = Place::new(lan);
                let (primary, standby) = place.turns();
                let mut confirmed = 0;
                for (from, to, api) in [(&primary, &standby, "api"), (&standby, &primary, "second-api")] {
                    confirmed = store_while(confirmed, || {
                        understudy::client::switchover(&place.path(api), None).unwrap();
                        await_report(&to.reports, active);
                        assert_a_part_is_sent(to);
                        await_report(&to.reports, protected);
                        await_report(&from.reports, protected);
                    });
                    place.await_equality();
                    check_by_the_guest(confirmed);
                }
                check(&place.path("ours"), confirmed);
            });
        }

        #[test]
        fn disks_of_a_guest_are_replicated_together_and_told_of() {
            alone(|lan| {
                let place = Place::new(lan);
                let more = [("log", 9 << 20), ("tmp", 5 << 19)];
                let (mut options, mut drives) = (Vec::new(), Vec::new());
                for (name, len) in more {
                    let image = vec![name.as_bytes()[0]; len];
                    fs::write(place.path(name), image).unwrap();
                    File::create(place.path(&format!("{name}-theirs"))).unwrap().set_len(len as u64).unwrap();
                    options.extend(["--drive".into(), format!("{name}={}-theirs", place.text(name))]);
                    drives.push(format!(
                        r#", {{"drive_id": "{name}", "path_on_host": "{}", "is_root_device": false,
                               "replication": {{"mode": "replicated"}}}}"#,
                        place.text(name)
                    ));
                }
                let options: Vec<&str> = options.iter().map(String::as_str).collect();
                let standby = place.standby_with(&options);
                let primary = place.primary_with(&drives.concat(), &[]);
                let (left, bytes) = to_be_sent(&primary);
                assert_eq!((left, bytes), (bytes, DISK + (9 << 20) + (5 << 19)));
                await_report(&primary.reports, protected);
                let told = Command::new(understudy())
                    .args(["status", "--api-sock", &place.text("api")])
                    .output()
                    .unwrap();
                let told = String::from_utf8_lossy(&told.stdout).into_owned();
                assert!(told.contains("the standby has all of it"), "{told}");

                let confirmed = store_while(0, || {
                    primary.signal(Signal::KILL);
                    await_report(&standby.reports, active);
                });
                check_by_the_guest(confirmed);
                drop(standby);
                check(&place.path("theirs"), confirmed);
                for (name, _) in more {
                    let (ours, theirs) = (place.path(name), place.path(&format!("{name}-theirs")));
                    assert!(fs::read(ours).unwrap() == fs::read(theirs).unwrap(), "{name}");
                }
            });
        }

        #[test]
        fn guest_with_two_standbys_survives_two_hosts_and_the_third_lacks_little_of_its_disk() {
            alone(|lan| {
                let place = Place::new(lan);
                let [first, second, third] = place.three(lan);
                let confirmed = store_while(0, || {
                    first.signal(Signal::KILL);
                });
                // Whoever goes on sends the other one what it lacks, and nothing else.
                let (next, follower) = winner((second, "theirs"), (third, "third"));
                assert_a_part_is_sent(&next.0);
                await_report(&next.0.reports, protected);
                check_by_the_guest(confirmed);
                // The old primary's host is back; it, too, is sent what it lacks.
                drop(first);
                let back = place.one_of_three("ours", "tap0");
                assert_a_part_is_sent(&next.0);
                await_report(&next.0.reports, gained);
                let confirmed = store_while(confirmed, || {
                    next.0.signal(Signal::KILL);
                });
                let (last, follower) = winner((back, "ours"), follower);
                await_report(&last.0.reports, protected);
                check_by_the_guest(confirmed);
                place.await_equality_of(last.1, follower.1);
                drop(last);
                check(&place.path(follower.1), confirmed);
            });
        }

        #[test]
        fn standby_that_was_away_is_sent_what_was_written_and_can_be_given_the_guest() {
            alone(|lan| {
                let place = Place::new(lan);
                let [first, second, third] = place.three(lan);
                let confirmed = store_while(0, || {
                    third.signal(Signal::KILL);
                    await_report(&first.reports, |report| matches!(report, Report::Renewed { .. }));
                });
                drop(third);
                first.reports.try_iter().for_each(drop);
                let third = place.one_of_three("third", "tap2");
                assert_a_part_is_sent(&first);
                await_report(&first.reports, gained);
                let confirmed = store_while(confirmed, || ());
                // A copy for one takes nothing from the other.
                place.await_equality_of("ours", "theirs");
                place.await_equality_of("ours", "third");

                let to = place.address("third").parse().unwrap();
                let confirmed = store_while(confirmed, || {
                    understudy::client::switchover(&place.path("api"), Some(&to)).unwrap();
                    await_report(&third.reports, active);
                    assert_a_part_is_sent(&third);
                    await_report(&third.reports, gained);
                });
                check_by_the_guest(confirmed);
                place.await_equality_of("third", "theirs");
                place.await_equality_of("third", "ours");
                drop((first, second, third));
                check(&place.path("theirs"), confirmed);
                check(&place.path("third"), confirmed);
            });
        }

        #[test]
        fn slow_link_to_one_standby_does_not_hold_up_what_another_follows() {
            alone(|lan| {
                let place = Place::new(lan);
                let second = place.standby();
                place.add_third(lan);
                let third = place.standby_at("tcp:127.0.0.1:0", "third", "tap2", &[]);
                let relay = third.relay();
                // 5 MB a second: what a round was before takes longer than epochs may stand still.
                relay.slow(Duration::from_millis(3));
                let two = format!(
                    r#"["unix:{}", "tcp:{}"], "standbys_at_once": 2"#,
                    place.text("standby"),
                    relay.address()
                );
                let one = format!(r#""unix:{}""#, place.text("standby"));
                let primary = place.start_primary("", &[], &|config| config.replace(&one, &two));
                await_report(&primary.reports, protected);
                store(SERVICE, 0, |value| value >= 100);
                await_report(&primary.reports, gained);
                let lost = |report: &Report| matches!(report, Report::PrimaryLost { .. });
                assert!(!second.reports.try_iter().any(|report| lost(&report)));
                place.await_equality();
            });
        }

        #[test]
        fn standby_whose_image_does_not_fit_is_refused_and_the_other_goes_on_to_follow() {
            alone(|lan| {
                let place = Place::new(lan);
                let [first, second, third] = place.three(lan);
                third.signal(Signal::KILL);
                await_report(&first.reports, |report| matches!(report, Report::Renewed { .. }));
                drop(third);
                File::create(place.path("third")).unwrap().set_len(DISK / 2).unwrap();
                let third = place.one_of_three("third", "tap2");
                let refused = |report: &Report| matches!(report, Report::StandbyLeft { reason, standbys: 1, .. } if reason.contains("truncate -s"));
                await_report(&first.reports, refused);
                let confirmed = store_while(0, || ());
                drop((first, third));
                await_report(&second.reports, active);
                check_by_the_guest(confirmed);
            });
        }

        #[test]
        fn one_image_for_both_sides_is_refused() {
            alone(|lan| {
                let place = Place::new(lan);
                let listen = format!("unix:{}", place.text("standby"));
                let witness = place.text("witness");
                let _standby = Process::standby_with(&listen, &["--witness", &witness, "--net", "net=tap1"]);
                let primary = place.primary();
                let said = primary.errors.await_text(|text| text.contains("image of its own"));
                assert!(said.contains("--drive ID=PATH"), "{said}");
            });
        }
    }
}
