//! What runs inside the pause allocates nothing, on whichever thread.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Code, SMALL, machine};
use mirror::dirty::DirtySet;
use mirror::guest::Guest;
use vmm::MachineConfig;

/// Counts what is allocated by anybody.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: all calls go to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    work();
    ALLOCATIONS.load(Ordering::Relaxed) - before
}

// The only test of this file: another one would allocate at the same time.
#[test]
fn pause_capture_and_resume_allocate_nothing_and_harvest_one_vector_a_region() {
    let config = MachineConfig { vcpu_count: 2, ..SMALL };
    let (mut machine, _output) = machine(&config, &Code::new().spin());
    machine.start_tracking().unwrap();
    machine.start();
    let mut dirty = DirtySet::new(machine.layout().pages());
    let mut state = Vec::new();
    // Threads allocate when they start, and have all started when they have paused once.
    machine.pause().unwrap();
    machine.capture().unwrap();
    machine.resume().unwrap();
    for round in 0..50 {
        assert_eq!(allocations(|| machine.pause().unwrap()), 0, "pause, round {round}");
        // The bitmap of the VMM's own writes is given by vm-memory as a vector.
        assert_eq!(allocations(|| machine.harvest(&mut dirty).unwrap()), 1, "harvest, round {round}");
        assert_eq!(allocations(|| machine.capture().unwrap()), 0, "capture, round {round}");
        assert_eq!(allocations(|| machine.resume().unwrap()), 0, "resume, round {round}");
        state.clear();
        machine.encode_captured(&mut state).unwrap();
    }
}
