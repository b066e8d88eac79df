//! At a committed epoch both sides hold the same: every byte of memory, every field of the machine's state.

#[path = "../../vmm/tests/common/pool.rs"]
mod pool;

use mirror::guest::Guest;
use mirror::memory::{PAGE_SIZE, PageMemory};
use mirror::primary::Settings;
use mirror::report::Report;
use pool::Pool;
use tests::pair::{Pair, await_report};
use vmm::{MachineConfig, MachineState};

mod kvm {
    use super::*;

    #[test]
    fn both_sides_are_equal_at_a_committed_epoch() {
        for (vcpus, listen) in
            [(1, "unix:FOLDER/standby"), (2, "tcp:127.0.0.1:0"), (4, "unix:FOLDER/standby")]
        {
            sides_are_equal(&MachineConfig::new(vcpus, 64), listen);
        }
    }

    mod huge {
        use super::*;

        #[test]
        fn both_sides_of_huge_pages_are_equal_at_a_committed_epoch() {
            let _pool = Pool::of(96);
            let config = MachineConfig { huge_pages: true, ..MachineConfig::new(2, 64) };
            sides_are_equal(&config, "unix:FOLDER/standby");
        }
    }

    #[test]
    fn the_comparison_finds_a_single_changed_byte() {
        let config = MachineConfig::new(1, 32);
        let pair = Pair::start(&config, "workload=count", "unix:FOLDER/standby", Settings::default());
        pair.primary.quiesce().expect("lockstep");
        let twin = pair.standby.with_machine(|host| {
            PageMemory::new(std::sync::Arc::clone(host.machine().expect("a machine").ram()))
                .expect("whole pages")
        });
        let mut page = vec![0; PAGE_SIZE];
        twin.read(300, &mut page).unwrap();
        page[4095] ^= 1;
        twin.write(300, &page).unwrap();

        assert_eq!(differing_pages(&pair.primary_memory, &twin), [300]);
    }
}

/// Checks memory and state of a pair that has been in lockstep for a while.
fn sides_are_equal(config: &MachineConfig, listen: &str) {
    let cmdline = format!("workload=count,dirty,verify cpus={} dirty.rate=20000", config.vcpu_count);
    let pair = Pair::start(config, &cmdline, listen, Settings::default());
    // Some epochs with real work in them first.
    for _ in 0..20 {
        await_report(
            &pair.primary_reports,
            |report| matches!(report, Report::Committed { pages, .. } if *pages > 100),
        );
    }

    let epoch = pair.primary.quiesce().expect("lockstep");

    assert!(epoch.0 > 20);
    let twin = pair.standby.with_machine(|host| {
        let machine = host.machine().expect("a machine");
        PageMemory::new(std::sync::Arc::clone(machine.ram())).expect("whole pages")
    });
    assert_eq!(differing_pages(&pair.primary_memory, &twin), Vec::<u64>::new());
    assert!(pages_in_use(&twin) > 10_000, "the guest has filled its memory");
    // The guest stands still: what the primary says of itself now is what it said in the epoch.
    pair.primary.notifier().guest_ended("test");
    let (_, mut machine) = pair.primary.wait();
    let ours = machine.save().expect("the primary's state");
    let mut encoded = Vec::new();
    ours.encode(&mut encoded).expect("encodes");
    assert_eq!(MachineState::decode(&encoded).expect("decodes"), ours);
    let mut host = vmm::StandbyHost::new(mirror::console::Console::new(std::io::sink()).unwrap());
    mirror::guest::StandbyMachine::allocate(
        &mut host,
        mirror::ids::Guid::from_u128(1),
        &machine.describe(),
        twin.layout(),
    )
    .expect("a twin");
    host.restore(&encoded).expect("restores");
    let theirs = host.machine().expect("a machine").save().expect("the standby's state");
    assert_eq!(ours.differences(&theirs), Vec::<String>::new());
}

fn differing_pages(ours: &PageMemory, theirs: &PageMemory) -> Vec<u64> {
    assert_eq!(ours.layout(), theirs.layout());
    let (mut a, mut b) = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
    (0..ours.layout().pages())
        .filter(|&page| {
            ours.read(page, &mut a).expect("a page");
            theirs.read(page, &mut b).expect("a page");
            a != b
        })
        .collect()
}

fn pages_in_use(memory: &PageMemory) -> usize {
    let mut bytes = vec![0; PAGE_SIZE];
    (0..memory.layout().pages())
        .filter(|&page| {
            memory.read(page, &mut bytes).expect("a page");
            bytes.iter().any(|&byte| byte != 0)
        })
        .count()
}
