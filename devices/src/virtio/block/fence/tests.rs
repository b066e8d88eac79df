use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use proptest::prelude::*;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::NamedTempFile;

use super::watchdog::testing::keep_other;
use super::watchdog::{Leash, time_to_wait};
use super::*;
use crate::virtio::block::{
    Block, BlockConfig, CacheType, EngineKind, ImageFormat, Replication, WatchdogConfig,
};

fn image() -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn disk(image: &NamedTempFile, fence: FenceConfig) -> Block {
    let config = BlockConfig {
        id: "disk".into(),
        path: image.path().into(),
        format: ImageFormat::Raw,
        read_only: false,
        root: false,
        cache: CacheType::Writeback,
        engine: EngineKind::Threads,
        limits: None,
        replication: Replication::Shared(fence),
    };
    Block::create(&config).unwrap()
}

/// A side that has the image open, and its fences.
fn side(image: &NamedTempFile) -> (Block, Fences) {
    let disk = disk(image, FenceConfig::Lock);
    let mut fences = Fences::default();
    fences.add(&disk);
    (disk, fences)
}

/// A process that has the description of `of`'s image, and whatever lock that has.
fn heir_of(of: &Block) -> Child {
    let image = of.fenced().unwrap().image;
    let image = Stdio::from(image.try_clone().unwrap());
    Command::new("sleep").arg("1000").stdin(image).spawn().unwrap()
}

fn take_over(fences: &Fences) -> (Result<(), FenceError>, Vec<String>) {
    let mut told = Vec::new();
    let outcome = fences.take_over(Instant::now(), false, &mut |text| told.push(text));
    (outcome, told)
}

#[test]
fn image_is_one_sides_until_it_lets_go() {
    let image = image();
    let ((_a, ours), (_b, theirs)) = (side(&image), side(&image));
    ours.hold().unwrap();
    ours.hold().unwrap();
    let refused = theirs.hold().unwrap_err();
    assert!(matches!(refused, FenceError::Taken { .. }), "{refused}");
    ours.let_go();
    theirs.hold().unwrap();
    assert!(matches!(ours.hold_again(), Err(FenceError::Taken { .. })));
    theirs.let_go();
    ours.hold_again().unwrap();
}

#[test]
fn lock_lives_on_when_others_close_the_same_file() {
    let image = image();
    let ((_a, ours), (_b, theirs)) = (side(&image), side(&image));
    ours.hold().unwrap();
    drop(image.reopen().unwrap());
    drop(side(&image));
    theirs.hold().unwrap_err();
}

#[test]
fn lock_ends_with_the_last_that_can_write() {
    let image = image();
    let ((a, ours), (_b, theirs)) = (side(&image), side(&image));
    ours.hold().unwrap();
    drop(ours);
    theirs.hold().unwrap_err();
    drop(a);
    theirs.hold().unwrap();
}

#[test]
fn image_that_no_primary_has_locked_is_not_shared() {
    let image = image();
    let ((_a, ours), (_b, theirs)) = (side(&image), side(&image));
    let refused = theirs.check().unwrap_err();
    assert!(matches!(refused, FenceError::NotLocked { .. }), "{refused}");
    ours.hold().unwrap();
    theirs.check().unwrap();
}

#[test]
fn disk_that_is_only_read_needs_no_fence() {
    let image = image();
    let read_only = BlockConfig { read_only: true, ..disk(&image, FenceConfig::Lock).made_from };
    let mut fences = Fences::default();
    fences.add(&Block::create(&read_only).unwrap());
    assert!(fences.is_empty());
}

#[test]
fn old_owner_that_is_stopped_is_killed_at_once() {
    let image = image();
    let ((a, ours), (_b, theirs)) = (side(&image), side(&image));
    ours.hold().unwrap();
    let mut old = heir_of(&a);
    drop((a, ours));
    theirs.check().unwrap();
    kill_process(Pid::from_child(&old), Signal::STOP).unwrap();
    let began = Instant::now();
    let (taken, told) = take_over(&theirs);
    taken.unwrap();
    assert!(told.len() == 1 && told[0].contains("was killed"), "{told:?}");
    assert!(began.elapsed() < Duration::from_millis(900), "{:?}", began.elapsed());
    assert!(!old.wait().unwrap().success());
}

#[test]
fn old_owner_that_runs_has_time_to_let_go_by_itself() {
    let image = image();
    let ((a, ours), (_b, theirs)) = (side(&image), side(&image));
    ours.hold().unwrap();
    let mut old = heir_of(&a);
    theirs.check().unwrap();
    let letting_go = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(100));
        ours.let_go();
    });
    let (taken, told) = take_over(&theirs);
    taken.unwrap();
    letting_go.join().unwrap();
    assert!(told.is_empty() && old.try_wait().unwrap().is_none(), "{told:?}");
    old.kill().unwrap();
    old.wait().unwrap();
}

#[test]
fn whoever_has_the_lock_and_was_not_the_primary_is_not_killed() {
    let image = image();
    let ((_a, ours), (_b, theirs)) = (side(&image), side(&image));
    ours.hold().unwrap();
    theirs.check().unwrap();
    ours.let_go();
    let (c, third) = side(&image);
    third.hold().unwrap();
    let mut other = heir_of(&c);
    drop((c, third));
    let (taken, told) = take_over(&theirs);
    let error = taken.unwrap_err().to_string();
    assert!(error.contains(&format!("process {} (sleep)", other.id())) && told.is_empty(), "{error}");
    assert!(other.try_wait().unwrap().is_none());
    other.kill().unwrap();
    other.wait().unwrap();
    // The next attempt has it.
    take_over(&theirs).0.unwrap();
}

#[test]
fn watchdog_that_is_none_is_refused() {
    let image = image();
    let missing = WatchdogConfig { device: "/dev/none".into(), timeout_s: 10 };
    let file = WatchdogConfig { device: image.path().into(), timeout_s: 10 };
    let no_watchdog = WatchdogConfig { device: "/dev/null".into(), timeout_s: 10 };
    for config in [missing, file, no_watchdog] {
        let disk = disk(&image, FenceConfig::Watchdog(config.clone()));
        let mut fences = Fences::default();
        fences.add(&disk);
        let refused = fences.hold().unwrap_err().to_string();
        assert!(refused.contains(config.device.to_str().unwrap()), "{refused}");
    }
}

const T: Duration = Duration::from_secs(8);

#[test]
fn owner_without_a_standby_pets_for_ever() {
    let start = Instant::now();
    assert!(Leash::new(T, start).may_pet(start + 100 * T));
}

#[test]
fn proof_counts_from_its_capture_and_ages() {
    let start = Instant::now();
    let leash = Leash::new(T, start);
    leash.exposed(start + T);
    leash.captured(start + 2 * T);
    assert!(!leash.may_pet(start + 2 * T), "what was captured is not committed yet");
    leash.committed();
    assert!(leash.may_pet(start + 2 * T + T * 15 / 32));
    assert!(!leash.may_pet(start + 2 * T + T / 2));
}

#[test]
fn owner_that_has_lost_its_guest_does_not_pet() {
    let start = Instant::now();
    let leash = Leash::new(T, start);
    leash.lost();
    assert!(!leash.may_pet(start));
}

/// What a watchdog is given.
#[derive(Clone, Default)]
struct Bowl(Arc<Mutex<Vec<u8>>>);

impl Write for Bowl {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn watchdog_is_petted_with_proof_and_closed_in_order() {
    let bowl = Bowl::default();
    let leash = Arc::new(Leash::new(Duration::from_hours(1), Instant::now()));
    let stand_down = keep_other(bowl.clone(), Arc::clone(&leash), Duration::from_millis(8));
    while bowl.0.lock().unwrap().is_empty() {
        std::thread::yield_now();
    }
    stand_down();
    assert_eq!(bowl.0.lock().unwrap().last(), Some(&b'V'));
}

proptest! {
    /// An owner may be stopped between any two of its steps. Whatever it does, its host is reset before the new one, which was
    /// granted the guest after the last epoch that it committed, begins.
    #[test]
    fn host_is_reset_before_a_new_owner_begins(
        steps in prop::collection::vec((0_u64..9000, 0_u64..9000, any::<bool>()), 1..40),
        committed_until in 0_u64..20_000,
    ) {
        let start = Instant::now();
        let at = |millis: u64| start + Duration::from_millis(millis);
        let leash = Leash::new(T, start);
        leash.exposed(start);
        let granted = at(committed_until);
        let (mut now, mut petted) = (0, start);
        for (before, between, hears) in steps {
            now += before;
            if hears {
                // An answer of any age: the standby committed it before the grant.
                leash.captured(at(now.min(committed_until)));
                leash.committed();
            }
            let may = leash.may_pet(at(now));
            now += between;
            if at(now) >= petted + T {
                break;
            }
            if may {
                petted = at(now);
            }
        }
        prop_assert!(petted + T <= granted + time_to_wait(T));
    }
}
