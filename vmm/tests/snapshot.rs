//! Snapshots of the embedded guest, which checks its own memory, and what is restored from them.

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use common::console;
use common::snapshots::{CPUS, Files, assert_same, restored, take, working};
use mirror::guest::Guest;
use mirror::memory::PAGE_SIZE;
use resources::protocol::{ExpectedCounter, Line};
use tempfile::TempDir;
use vmm::snapshot::pages::PageReader;
use vmm::snapshot::{
    FileError, Kind, RestoreError, RestoreMode, RestoreSource, Snapshot, SnapshotError, SnapshotRequest,
    merge,
};
use vmm::{Host, HostResources, Machine};

#[test]
fn restored_machine_goes_on_exactly_where_the_snapshot_was_taken() {
    for mode in [RestoreMode::Map, RestoreMode::Copy] {
        let folder = TempDir::new().unwrap();
        let files = Files::new(folder.path(), "full");
        let (mut machine, mut watch) = working();
        machine.stand_still().unwrap();
        let report = take(&mut machine, Kind::Full, &files).unwrap();
        assert!(report.pages > 100 && report.rounds == 0, "{report:?}");
        assert!(!machine.runs(), "a machine that stood still runs");
        drop(machine);
        watch.look();
        let before = fs::read(&files.memory).unwrap();

        let (mut machine, output) = restored(vec![files.open().unwrap()], mode);
        watch.go_on(output);
        machine.start();
        watch.more(30, 2);

        drop(machine);
        assert!(fs::read(&files.memory).unwrap() == before, "the guest wrote into the snapshot ({mode:?})");
    }
}

mod huge {
    use common::pool::Pool;
    use common::snapshots::working_in;
    use vmm::MachineConfig;

    use super::*;

    #[test]
    fn machine_of_huge_pages_goes_on_from_full_and_differential_snapshots() {
        let _pool = Pool::of(32);
        let folder = TempDir::new().unwrap();
        let [base, diff] = ["base", "diff"].map(|name| Files::new(folder.path(), name));
        let config = MachineConfig { huge_pages: true, ..MachineConfig::new(CPUS, 64).tracked() };
        let (mut machine, mut watch) = working_in(&config);
        take(&mut machine, Kind::Full, &base).unwrap();
        watch.more(20, 1);
        machine.stand_still().unwrap();
        let report = take(&mut machine, Kind::Diff, &diff).unwrap();
        assert!(report.pages < 64 << 8, "small pages are written, not huge ones: {report:?}");
        drop(machine);
        watch.look();

        let chain = vec![base.open().unwrap(), diff.open().unwrap()];
        let (mut machine, output) = restored(chain, RestoreMode::Copy);
        assert!(machine.config().huge_pages);
        watch.go_on(output);
        machine.start();
        watch.more(30, 2);
    }

    #[test]
    fn what_huge_pages_cannot_do_is_said() {
        let _pool = Pool::of(32);
        let folder = TempDir::new().unwrap();
        let files = Files::new(folder.path(), "full");
        let config = MachineConfig { huge_pages: true, ..MachineConfig::new(CPUS, 64).tracked() };
        let (mut machine, _watch) = working_in(&config);
        take(&mut machine, Kind::Full, &files).unwrap();
        drop(machine);
        for (mode, expected) in [
            (RestoreMode::Map, "of ordinary pages"),
            (RestoreMode::OnDemand { eager: false }, "huge pages cannot be provided on demand: copy it"),
        ] {
            let chain = vec![files.open().unwrap()];
            let resources = HostResources::default();
            let source = RestoreSource { chain, mode, resources, track_dirty_pages: false };
            let error = Machine::from_snapshot(&Host::open().unwrap(), &source, console().0);
            let error = error.err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

#[test]
fn guest_runs_while_its_pages_are_written_and_the_snapshot_is_of_one_moment() {
    let folder = TempDir::new().unwrap();
    let files = Files::new(folder.path(), "full");
    let (mut machine, mut watch) = working();
    let report = take(&mut machine, Kind::Full, &files).unwrap();
    assert!(report.rounds > 0, "{report:?}");
    assert!(report.pause < report.took, "{report:?}");
    let phases = report.stop + report.harvest + report.copy + report.capture;
    assert!(phases <= report.pause && !report.stop.is_zero(), "{report:?}");
    watch.more(20, 2);
    files.open().unwrap().verify().unwrap();

    // The twin goes on from some count, without a gap, and with memory that is whole.
    let (mut twin, mut output) = restored(vec![files.open().unwrap()], RestoreMode::Copy);
    twin.start();
    let mut last = [0_u64; CPUS as usize];
    let (mut lines, mut walks, mut seen) = (0, 0, 0);
    while lines < 60 || walks < 4 {
        output.wait_more(common::PATIENCE);
        let text = String::from_utf8_lossy(output.now()).into_owned();
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        // What was being printed at the moment of the snapshot begins in the middle.
        let from = if seen == 0 { text.find('\n').map_or(0, |end| end + 1) } else { seen };
        for line in text[from.min(whole)..whole].lines() {
            match Line::parse(line) {
                Some(Line::Count { cpu, n, sum }) => {
                    let mut counter = ExpectedCounter::new(cpu, 0);
                    let expected = (1..=n).map(|_| counter.advance()).last();
                    assert_eq!(expected, Some((n, sum)), "{line}");
                    let last = &mut last[cpu as usize];
                    assert!(*last == 0 || n == *last + 1, "after {last} comes {line}");
                    *last = n;
                    lines += 1;
                }
                Some(Line::Verify { wrong, .. }) => {
                    assert_eq!(wrong, 0, "{line}");
                    walks += 1;
                }
                other => panic!("{other:?} in {line:?}"),
            }
        }
        seen = whole.max(seen);
    }
}

#[test]
fn full_is_base_and_differences_byte_for_byte() {
    let folder = TempDir::new().unwrap();
    let files = |name| Files::new(folder.path(), name);
    let (mut machine, mut watch) = working();
    take(&mut machine, Kind::Full, &files("base")).unwrap();
    watch.more(20, 1);
    let first = take(&mut machine, Kind::Diff, &files("diff1")).unwrap();
    watch.more(20, 1);
    machine.stand_still().unwrap();
    let second = take(&mut machine, Kind::Diff, &files("diff2")).unwrap();
    let full = take(&mut machine, Kind::Full, &files("full")).unwrap();
    assert!(first.pages > 0 && second.pages < full.pages, "{first:?} {second:?} {full:?}");

    let chain = || Vec::from(["base", "diff1", "diff2"].map(|name| files(name).open().unwrap()));
    let (merged, whole) = (files("merged"), files("full"));
    merge(&chain(), &merged.state, &merged.memory).unwrap();
    assert_same(&merged, &whole);

    // And the machine goes on from base and differences.
    watch.look();
    let (mut twin, output) = restored(chain(), RestoreMode::Copy);
    watch.go_on(output);
    twin.start();
    watch.more(20, 1);
}

#[test]
fn restored_machine_can_be_snapshotted_differentially_in_turn() {
    for mode in [RestoreMode::Map, RestoreMode::Copy] {
        let folder = TempDir::new().unwrap();
        let files = |name| Files::new(folder.path(), name);
        let (mut machine, _watch) = working();
        take(&mut machine, Kind::Full, &files("base")).unwrap();
        drop(machine);
        let (mut machine, mut output) = restored(vec![files("base").open().unwrap()], mode);
        // It has written nothing yet; KVM has set its clock anew, in a page of its own.
        let nothing = take(&mut machine, Kind::Diff, &files("base2")).unwrap();
        assert!(nothing.pages < 4, "{nothing:?}");
        machine.start();
        output.wait_for(2000);
        machine.stand_still().unwrap();
        take(&mut machine, Kind::Diff, &files("diff")).unwrap();
        take(&mut machine, Kind::Full, &files("full")).unwrap();
        let chain = ["base", "base2", "diff"].map(|name| files(name).open().unwrap());
        let (merged, whole) = (files("merged"), files("full"));
        merge(&chain, &merged.state, &merged.memory).unwrap();
        assert_same(&merged, &whole);
    }
}

/// Checks that the next differential snapshot after `failure` still has everything.
fn assert_nothing_was_lost(failure: impl FnOnce(&mut Machine) -> SnapshotError) -> SnapshotError {
    let folder = TempDir::new().unwrap();
    let files = |name| Files::new(folder.path(), name);
    let (mut machine, mut watch) = working();
    take(&mut machine, Kind::Full, &files("base")).unwrap();
    watch.more(20, 1);
    let error = failure(&mut machine);
    watch.more(20, 1);
    machine.stand_still().unwrap();
    take(&mut machine, Kind::Diff, &files("diff")).unwrap();
    take(&mut machine, Kind::Full, &files("full")).unwrap();
    let chain = vec![files("base").open().unwrap(), files("diff").open().unwrap()];
    let (merged, whole) = (files("merged"), files("full"));
    merge(&chain, &merged.state, &merged.memory).unwrap();
    assert_same(&merged, &whole);
    error
}

/// A file system that is soon full.
struct SmallDisk(TempDir);

impl SmallDisk {
    fn new(kib: u32) -> Self {
        let folder = TempDir::new().unwrap();
        let options = format!("size={kib}k");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &options, "small"]).arg(folder.path()).status();
        assert!(mounted.unwrap().success(), "a tmpfs can be mounted");
        Self(folder)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}

mod mount {
    use super::*;

    #[test]
    fn full_disk_leaves_the_guest_running_and_nothing_is_missing_in_the_next_snapshot() {
        let disk = SmallDisk::new(256);
        let files = Files::new(disk.0.path(), "diff");
        let error = assert_nothing_was_lost(|machine| take(machine, Kind::Diff, &files).unwrap_err());
        assert!(error.to_string().contains("No space left"), "{error}");
        assert!(!files.are_there(), "half a snapshot is there");
        assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0, "and nothing beside it");
    }

    #[test]
    fn disk_that_is_full_again_and_again_takes_nothing_from_the_next_difference() {
        let disk = SmallDisk::new(256);
        let files = Files::new(disk.0.path(), "snapshot");
        assert_nothing_was_lost(|machine| {
            take(machine, Kind::Diff, &files).unwrap_err();
            take(machine, Kind::Full, &files).unwrap_err();
            machine.stand_still().unwrap();
            take(machine, Kind::Diff, &files).unwrap_err();
            assert!(!machine.runs(), "a machine that stood still runs");
            let error = take(machine, Kind::Full, &files).unwrap_err();
            machine.start();
            error
        });
        assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0);
    }

    #[test]
    fn memory_without_room_for_its_state_is_no_snapshot() {
        let (disk, folder) = (SmallDisk::new(4), TempDir::new().unwrap());
        let files = Files { state: disk.0.path().join("state"), memory: folder.path().join("memory") };
        let error = assert_nothing_was_lost(|machine| take(machine, Kind::Full, &files).unwrap_err());
        assert!(error.to_string().contains("state: No space left"), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(disk.0.path()).unwrap().count(), 0);
    }
}

#[test]
fn snapshot_that_is_broken_off_leaves_nothing_and_nothing_is_missing_in_the_next() {
    let folder = TempDir::new().unwrap();
    let files = Files::new(folder.path(), "diff");
    let error = assert_nothing_was_lost(|machine| {
        let request =
            SnapshotRequest { kind: Kind::Diff, state: files.state.clone(), memory: files.memory.clone() };
        machine.snapshot(&request, &mut |_, _| ControlFlow::Break(())).unwrap_err()
    });
    assert!(matches!(error, SnapshotError::Cancelled));
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn folder_that_is_not_there_is_told_and_the_guest_runs_on() {
    let missing = Files::new(Path::new("/nowhere/at/all"), "diff");
    let error = assert_nothing_was_lost(|machine| take(machine, Kind::Diff, &missing).unwrap_err());
    assert!(error.to_string().contains("/nowhere/at/all/diff.memory"), "{error}");
}

#[test]
fn folder_that_vanishes_meanwhile_is_told_and_the_guest_runs_on() {
    let folder = TempDir::new().unwrap();
    let files = Files::new(folder.path(), "diff");
    let error = assert_nothing_was_lost(|machine| {
        let request =
            SnapshotRequest { kind: Kind::Diff, state: files.state.clone(), memory: files.memory.clone() };
        let mut vanish = |_, _| {
            // It is gone after the first time.
            let _ = fs::remove_dir_all(folder.path());
            ControlFlow::Continue(())
        };
        machine.snapshot(&request, &mut vanish).unwrap_err()
    });
    assert!(error.to_string().contains("diff.memory"), "{error}");
}

#[test]
fn one_file_for_state_and_memory_is_refused_by_whatever_names() {
    let folder = TempDir::new().unwrap();
    let (mut machine, _watch) = working();
    let one = folder.path().join("one");
    for memory in [one.clone(), folder.path().join(".").join("one")] {
        let request = SnapshotRequest { kind: Kind::Full, state: one.clone(), memory };
        let error = machine.snapshot(&request, &mut |_, _| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(error, SnapshotError::OneFile(_)), "{error}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn difference_to_nothing_and_snapshot_of_a_mirrored_guest_are_refused() {
    let folder = TempDir::new().unwrap();
    let (mut machine, _watch) = working();
    let files = Files::new(folder.path(), "diff");
    assert!(matches!(take(&mut machine, Kind::Diff, &files), Err(SnapshotError::NoBase)));
    machine.start_tracking().unwrap();
    assert!(matches!(take(&mut machine, Kind::Full, &files), Err(SnapshotError::Mirrored)));
    machine.stop_tracking().unwrap();
    take(&mut machine, Kind::Full, &files).unwrap();
}

#[test]
fn what_the_mirror_has_harvested_is_in_the_next_difference() {
    let folder = TempDir::new().unwrap();
    let files = |name| Files::new(folder.path(), name);
    let (mut machine, mut watch) = working();
    take(&mut machine, Kind::Full, &files("base")).unwrap();
    machine.start_tracking().unwrap();
    watch.more(20, 1);
    let mut dirty = mirror::dirty::DirtySet::new(machine.layout().pages());
    Guest::harvest(&mut machine, &mut dirty).unwrap();
    assert!(!dirty.is_empty());
    machine.stop_tracking().unwrap();
    machine.stand_still().unwrap();
    take(&mut machine, Kind::Diff, &files("diff")).unwrap();
    take(&mut machine, Kind::Full, &files("full")).unwrap();
    let chain = vec![files("base").open().unwrap(), files("diff").open().unwrap()];
    merge(&chain, &files("merged").state, &files("merged").memory).unwrap();
    assert_same(&files("merged"), &files("full"));
}

#[test]
fn damaged_and_mixed_up_files_are_refused() {
    let folder = TempDir::new().unwrap();
    let files = |name| Files::new(folder.path(), name);
    let (mut machine, mut watch) = working();
    take(&mut machine, Kind::Full, &files("a")).unwrap();
    watch.more(20, 1);
    take(&mut machine, Kind::Diff, &files("b")).unwrap();
    watch.more(20, 1);
    take(&mut machine, Kind::Diff, &files("c")).unwrap();
    drop(machine);
    let open = |name| files(name).open().unwrap();

    let mixed = Snapshot::open(&files("a").state, &files("b").memory);
    assert!(matches!(mixed, Err(RestoreError::Pair { .. })));
    let merged = |chain: &[Snapshot]| merge(chain, &files("m").state, &files("m").memory);
    assert!(matches!(merged(&[open("b")]), Err(RestoreError::NotFull)));
    assert!(matches!(merged(&[open("a"), open("c")]), Err(RestoreError::Chain(1))));
    assert!(!files("m").are_there());
    let restore = |chain, mode| {
        let source =
            RestoreSource { chain, mode, resources: HostResources::default(), track_dirty_pages: false };
        Machine::from_snapshot(&Host::open().unwrap(), &source, Arc::clone(&console().0)).map(drop)
    };
    let mapped = restore(vec![open("a"), open("b")], RestoreMode::Map);
    assert!(matches!(mapped, Err(RestoreError::CannotMap)));
    for mode in [RestoreMode::Map, RestoreMode::Copy, RestoreMode::OnDemand { eager: true }] {
        assert!(matches!(restore(vec![open("b")], mode), Err(RestoreError::NotFull)), "{mode:?}");
        let skipped = restore(vec![open("a"), open("c")], mode);
        assert!(matches!(skipped, Err(RestoreError::Chain(1))), "{mode:?}");
        let out_of_order = restore(vec![open("a"), open("c"), open("b")], mode);
        assert!(matches!(out_of_order, Err(RestoreError::Chain(1))), "{mode:?}");
    }

    // The state file: of another version, cut off, a bit flipped in its header and in its content.
    let state = fs::read(&files("a").state).unwrap();
    let with_state = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = state.clone();
        change(&mut bytes);
        fs::write(files("a").state, bytes).unwrap();
        let error = files("a").open().err().map(|error| error.to_string()).unwrap_or_default();
        fs::write(files("a").state, &state).unwrap();
        error
    };
    let half = state.len() / 2;
    let path = files("a").state.display().to_string();
    for (error, what) in [
        (with_state(&|bytes| bytes[8] ^= 4), "was written in version"),
        (with_state(&|bytes| bytes.truncate(half)), "is truncated"),
        (with_state(&|bytes| bytes[half] ^= 4), "is damaged: the checksum of its content"),
        (with_state(&|bytes| bytes[18] ^= 4), "is damaged: the checksum of its header"),
    ] {
        assert!(error.contains(&path) && error.contains(what), "{error:?} for {what}");
    }

    let good = fs::read(&files("a").memory).unwrap();
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        fs::write(files("a").memory, bytes).unwrap();
        files("a").open()
    };
    assert!(matches!(
        with(&|bytes| bytes.truncate(bytes.len() - 1)),
        Err(RestoreError::File(FileError::Truncated { .. }))
    ));
    assert!(matches!(with(&|bytes| bytes[9] ^= 1), Err(RestoreError::File(FileError::Version { .. }))));
    for at in [0, 13, 20, 30] {
        assert!(with(&|bytes| bytes[at] ^= 1).is_err(), "byte {at} of the header");
    }
    let end = good.len() - 5;
    assert!(matches!(with(&|bytes| bytes[end] ^= 1), Err(RestoreError::File(FileError::Damaged { .. }))));
    // A page is looked at when it is read.
    let present = PageReader::open(&files("b").memory).unwrap().present().iter().next().unwrap();
    let at = (PAGE_SIZE as u64 * (present + 1)) as usize + 7;
    let damaged = with(&|bytes| bytes[at] ^= 1).unwrap();
    assert!(matches!(damaged.verify(), Err(FileError::Damaged { .. })));
    assert!(matches!(
        merge(&[damaged], &files("m").state, &files("m").memory),
        Err(RestoreError::File(FileError::Damaged { .. }))
    ));
    assert!(!files("m").are_there());
}
