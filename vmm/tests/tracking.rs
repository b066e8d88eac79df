//! The pages that a harvest tells are exactly those that were written.

mod common;

use std::ops::Range;

use common::pool::Pool;
use common::{CODE, Code, DATA, Output, SMALL, boot, console, elf};
use mirror::dirty::DirtySet;
use mirror::guest::Guest;
use mirror::memory::PAGE_SIZE;
use vm_memory::{Bytes, GuestAddress};
use vmm::dirty::TrackerKind;
use vmm::{Host, Machine, MachineConfig};

const PAGE: u64 = PAGE_SIZE as u64;
/// The guest waits until this byte is set.
const GATE: u64 = DATA + 0x10_0000;
const WRITTEN: u64 = 300;

fn page(address: u64) -> u64 {
    address / PAGE
}

/// A guest that prints "a", waits at the gate, writes pages, prints "b" and spins.
fn writer(kind: TrackerKind, config: &MachineConfig) -> (Machine, Output) {
    let code = Code::new()
        .print("a")
        .wait_for_byte(GATE)
        .write_pages(DATA, WRITTEN as u32 / 2)
        .write_pages(DATA + 0x20_0000, WRITTEN as u32 / 2)
        .print("b")
        .spin();
    let host = Host::open().unwrap().with_tracker(kind);
    assert_eq!(host.tracker(), kind, "this host has the tracker under test");
    let (console, output) = console();
    let mut machine = Machine::create_on(&host, config, console).unwrap();
    machine.load(&boot(elf(&code.0, true))).unwrap();
    (machine, output)
}

fn harvest(machine: &mut Machine) -> Vec<u64> {
    let mut set = DirtySet::new(machine.layout().pages());
    machine.harvest(&mut set).unwrap();
    set.iter().collect()
}

fn written() -> impl Iterator<Item = u64> {
    let block = |start: u64| -> Range<u64> { page(start)..page(start) + WRITTEN / 2 };
    block(DATA).chain(block(DATA + 0x20_0000))
}

fn exactly_the_pages_written_are_harvested(kind: TrackerKind, config: &MachineConfig) {
    let (mut machine, mut output) = writer(kind, config);
    machine.start();
    output.wait_for(1);
    machine.start_tracking().unwrap();
    harvest(&mut machine);

    machine.ram().write_obj(1_u8, GuestAddress(GATE)).unwrap();
    output.wait_for(2);
    machine.pause().unwrap();
    let expected: Vec<u64> = {
        let mut pages: Vec<u64> = written().chain([page(GATE)]).collect();
        pages.sort_unstable();
        pages
    };
    match kind {
        TrackerKind::Manual => {
            assert_eq!(machine.peek_dirty().unwrap(), Some(WRITTEN), "the guest's own pages");
        }
        TrackerKind::Legacy => assert_eq!(machine.peek_dirty().unwrap(), None),
    }
    let found = harvest(&mut machine);
    assert_eq!(found, expected);
    assert_eq!(harvest(&mut machine), [0; 0], "a harvest takes the pages");
}

#[test]
fn manual_tracker_tells_exactly_the_pages_written() {
    exactly_the_pages_written_are_harvested(TrackerKind::Manual, &SMALL);
}

#[test]
fn legacy_tracker_tells_exactly_the_pages_written() {
    exactly_the_pages_written_are_harvested(TrackerKind::Legacy, &SMALL);
}

mod huge {
    use super::*;

    #[test]
    fn memory_of_huge_pages_is_tracked_in_small_ones() {
        let _pool = Pool::of(8);
        let huge = MachineConfig { huge_pages: true, ..SMALL };
        exactly_the_pages_written_are_harvested(TrackerKind::Manual, &huge);
        exactly_the_pages_written_are_harvested(TrackerKind::Legacy, &huge);
    }
}

#[test]
fn tracking_that_starts_later_tells_as_much() {
    let late = MachineConfig { track_dirty_pages: false, ..SMALL };
    exactly_the_pages_written_are_harvested(TrackerKind::Manual, &late);
    exactly_the_pages_written_are_harvested(TrackerKind::Legacy, &late);
}

#[test]
fn page_written_again_after_a_harvest_is_told_again() {
    // Writes one page for ever: mov edi, DATA; again: inc dword [edi]; jmp again. Prints once in between.
    let code = Code::new().bytes(&[0xbf]).bytes(&(DATA as u32).to_le_bytes());
    let start = code.0.len();
    let code = code.bytes(&[0x83, 0x07, 1]).print("x").jump(start);
    let (mut machine, mut output) = common::machine(&SMALL, &code);
    machine.start_tracking().unwrap();
    machine.start();
    for round in 1..20 {
        output.wait_for(round * 3);
        machine.pause().unwrap();
        assert!(harvest(&mut machine).contains(&page(DATA)), "round {round}");
        machine.resume().unwrap();
        let now = output.now().len();
        output.wait_for(now + 2);
    }
}

#[test]
fn writes_of_the_vmm_are_in_the_harvest_although_kvm_does_not_see_them() {
    let (mut machine, _output) = writer(TrackerKind::Manual, &SMALL);
    machine.start_tracking().unwrap();
    harvest(&mut machine);
    machine.ram().write_slice(&[1; 2 * PAGE_SIZE], GuestAddress(DATA + 100)).unwrap();
    assert_eq!(machine.peek_dirty().unwrap(), Some(0), "KVM's log has none of them");
    assert_eq!(harvest(&mut machine), [page(DATA), page(DATA) + 1, page(DATA) + 2]);
}

#[test]
fn what_the_loader_wrote_is_dirty_and_populated() {
    let (mut machine, _output) = writer(TrackerKind::Manual, &SMALL);
    let mut populated = DirtySet::new(machine.layout().pages());
    machine.populated(&mut populated).unwrap();
    let dirty = harvest(&mut machine);
    assert!(dirty.contains(&page(CODE)) && dirty.contains(&page(0x6000)));
    assert!(dirty.iter().all(|&page| populated.contains(page)));
    assert!(populated.count() < 20, "and hardly anything else: {}", populated.count());
}

#[test]
fn everything_that_is_not_zero_is_populated() {
    let (mut machine, mut output) = writer(TrackerKind::Manual, &SMALL);
    machine.ram().write_obj(1_u8, GuestAddress(GATE)).unwrap();
    machine.start();
    output.wait_for(2);
    machine.pause().unwrap();
    let mut populated = DirtySet::new(machine.layout().pages());
    machine.populated(&mut populated).unwrap();
    assert!(written().all(|page| populated.contains(page)));
    let mut content = vec![0; PAGE_SIZE];
    for page in (0..machine.layout().pages()).filter(|&page| !populated.contains(page)) {
        machine.ram().read_slice(&mut content, GuestAddress(page * PAGE)).unwrap();
        assert!(content.iter().all(|&byte| byte == 0), "page {page}");
    }
}

#[test]
fn without_tracking_the_guest_pays_nothing_and_nothing_is_told_of_it() {
    let late = MachineConfig { track_dirty_pages: false, ..SMALL };
    let (mut machine, mut output) = writer(TrackerKind::Manual, &late);
    machine.start_tracking().unwrap();
    machine.stop_tracking().unwrap();
    harvest(&mut machine);
    machine.ram().write_obj(1_u8, GuestAddress(GATE)).unwrap();
    machine.start();
    output.wait_for(2);
    assert_eq!(harvest(&mut machine), [page(GATE)]);
    assert_eq!(machine.peek_dirty().unwrap(), None);
}
