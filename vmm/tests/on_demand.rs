//! Guests that run on while their memory still comes from a snapshot.

mod common;

use std::fs::File;
use std::time::Duration;

use common::PATIENCE;
use common::snapshots::{Files, assert_same, restored, take, working};
use common::watch::Watch;
use mirror::dirty::DirtySet;
use mirror::guest::Guest;
use mirror::memory::{PAGE_SIZE, PageMemory};
use tempfile::TempDir;
use vmm::snapshot::pages::{DATA, PageReader};
use vmm::snapshot::{Kind, RestoreMode, SnapshotError, merge};
use vmm::{Exit, Machine};

/// Pages come when they are touched, and no others.
const LAZY: RestoreMode = RestoreMode::OnDemand { eager: false };
/// The rest comes, too.
const EAGER: RestoreMode = RestoreMode::OnDemand { eager: true };

/// A snapshot of a guest that stood still, and what the guest had said.
fn snapshot(folder: &TempDir) -> (Files, Watch) {
    let files = Files::new(folder.path(), "full");
    let (mut machine, mut watch) = working();
    machine.stand_still().unwrap();
    take(&mut machine, Kind::Full, &files).unwrap();
    drop(machine);
    watch.look();
    (files, watch)
}

fn missing(machine: &Machine) -> u64 {
    let (there, all) = machine.memory_fill().unwrap().pages();
    all - there
}

// Needs the right to use userfaultfd.
mod userfault {
    use super::*;

    #[test]
    fn guest_goes_on_exactly_while_its_pages_come_from_base_and_differences() {
        for mode in [LAZY, EAGER] {
            let folder = TempDir::new().unwrap();
            let files = |name| Files::new(folder.path(), name);
            let (mut machine, mut watch) = working();
            take(&mut machine, Kind::Full, &files("base")).unwrap();
            watch.more(20, 1);
            take(&mut machine, Kind::Diff, &files("first")).unwrap();
            watch.more(20, 1);
            machine.stand_still().unwrap();
            take(&mut machine, Kind::Diff, &files("second")).unwrap();
            drop(machine);
            watch.look();

            let chain = ["base", "first", "second"].map(|name| files(name).open().unwrap());
            let (mut machine, output) = restored(chain.into(), mode);
            watch.go_on(output);
            machine.start();
            watch.more(30, 2);
            if mode == EAGER {
                assert_eq!(machine.memory_fill().unwrap().wait(PATIENCE), Ok(true));
                assert_eq!(missing(&machine), 0);
            }
        }
    }

    #[test]
    fn snapshot_while_pages_are_missing_has_all_of_them() {
        let folder = TempDir::new().unwrap();
        let (files, mut watch) = snapshot(&folder);
        let (mut machine, output) = restored(vec![files.open().unwrap()], LAZY);
        assert!(missing(&machine) > 100);
        let named = |name| Files::new(folder.path(), name);
        // KVM has set the guest's clock anew, in a page of the guest's.
        let clock = take(&mut machine, Kind::Diff, &named("clock")).unwrap();
        assert!(clock.pages < 4, "{clock:?}");
        take(&mut machine, Kind::Full, &named("again")).unwrap();
        merge(
            &[files.open().unwrap(), named("clock").open().unwrap()],
            &named("merged").state,
            &named("merged").memory,
        )
        .unwrap();
        assert_same(&named("again"), &named("merged"));
        drop((machine, output));

        // And one of a guest that runs; differences to it come out right.
        let (mut machine, output) = restored(vec![files.open().unwrap()], LAZY);
        watch.go_on(output);
        machine.start();
        take(&mut machine, Kind::Full, &named("base")).unwrap();
        watch.more(20, 1);
        machine.stand_still().unwrap();
        take(&mut machine, Kind::Diff, &named("diff")).unwrap();
        take(&mut machine, Kind::Full, &named("whole")).unwrap();
        let chain = [named("base").open().unwrap(), named("diff").open().unwrap()];
        merge(&chain, &named("merged").state, &named("merged").memory).unwrap();
        assert_same(&named("merged"), &named("whole"));
    }

    #[test]
    fn difference_to_the_snapshot_that_memory_comes_from_is_right() {
        let folder = TempDir::new().unwrap();
        let (files, mut watch) = snapshot(&folder);
        let (mut machine, output) = restored(vec![files.open().unwrap()], LAZY);
        watch.go_on(output);
        machine.start();
        watch.more(10, 0);
        machine.stand_still().unwrap();
        let named = |name| Files::new(folder.path(), name);
        take(&mut machine, Kind::Diff, &named("diff")).unwrap();
        take(&mut machine, Kind::Full, &named("whole")).unwrap();
        let chain = [files.open().unwrap(), named("diff").open().unwrap()];
        merge(&chain, &named("merged").state, &named("merged").memory).unwrap();
        assert_same(&named("merged"), &named("whole"));
    }

    #[test]
    fn guest_is_paused_while_it_waits_for_pages_and_goes_on() {
        let folder = TempDir::new().unwrap();
        let (files, mut watch) = snapshot(&folder);
        let (mut machine, output) = restored(vec![files.open().unwrap()], LAZY);
        watch.go_on(output);
        for _ in 0..200 {
            machine.start();
            machine.stand_still().unwrap();
        }
        machine.start();
        watch.more(30, 1);
    }

    #[test]
    fn mirror_begins_when_all_pages_are_there() {
        let folder = TempDir::new().unwrap();
        let (files, _watch) = snapshot(&folder);
        let (mut machine, _output) = restored(vec![files.open().unwrap()], LAZY);
        assert!(missing(&machine) > 100);
        machine.start_tracking().unwrap();
        assert_eq!(missing(&machine), 0);
        // KVM has set the guest's clock anew, in a page of the guest's.
        let mut written = DirtySet::new(machine.layout().pages());
        Guest::harvest(&mut machine, &mut written).unwrap();
        let mut populated = DirtySet::new(machine.layout().pages());
        machine.populated(&mut populated).unwrap();
        let memory = PageMemory::new(machine.ram().clone()).unwrap();
        let pages = PageReader::open(&files.memory).unwrap();
        let (mut here, mut there) = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
        for page in pages.present().iter() {
            memory.read(page, &mut here).unwrap();
            pages.read(page, &mut there).unwrap();
            assert!(here == there || written.contains(page), "page {page}");
            assert!(populated.contains(page) || there.iter().all(|&byte| byte == 0), "page {page}");
        }
    }

    #[test]
    fn pages_that_cannot_be_read_end_the_run_and_nothing_hangs() {
        for damage in [cut_off as fn(&Files), flip_a_bit_in_every_page] {
            let folder = TempDir::new().unwrap();
            let (files, watch) = snapshot(&folder);
            let (mut machine, mut output) = restored(vec![files.open().unwrap()], LAZY);
            damage(&files);
            machine.start();
            let exit = machine.exit_handle().wait_timeout(PATIENCE);
            let Some(Exit::Error(why)) = exit else { panic!("{exit:?}") };
            assert!(why.contains(&files.memory.display().to_string()), "{why}");
            assert!(machine.memory_fill().unwrap().wait(Duration::ZERO).is_err());

            // It is as good as dead: whatever it is asked for is refused at once.
            assert!(machine.stand_still().is_err());
            assert!(machine.save().is_err());
            let again = Files::new(folder.path(), "again");
            let refused = take(&mut machine, Kind::Full, &again).unwrap_err();
            assert!(matches!(refused, SnapshotError::Machine(_)), "{refused}");
            assert!(refused.to_string().contains("cannot be fetched"), "{refused}");
            assert!(machine.start_tracking().is_err());
            assert!(!again.are_there());
            drop(machine);
            let said = output.now().len();
            assert_eq!(said, 0, "after {:?}", watch.counts);
        }
    }

    fn cut_off(files: &Files) {
        File::options().write(true).open(&files.memory).unwrap().set_len(DATA).unwrap();
    }

    fn flip_a_bit_in_every_page(files: &Files) {
        use std::os::unix::fs::FileExt;
        let file = File::options().read(true).write(true).open(&files.memory).unwrap();
        for page in PageReader::open(&files.memory).unwrap().present().iter() {
            let mut byte = [0];
            let at = DATA + page * PAGE_SIZE as u64 + 100;
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 4], at).unwrap();
        }
    }
}
