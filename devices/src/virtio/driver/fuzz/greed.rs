//! A guest that adds requests as fast as they are served.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::input::Input;
use super::{Driver, REGIONS, Subject, memory_of, settle};

/// Longest time that a call may take beside such a guest.
const PATIENCE: Duration = Duration::from_secs(20);
/// Requests that are served in all: many calls, for the guest may come to stand still in any of them.
const REQUESTS: u64 = 20_000;
/// Most requests that a device may serve in one of them, in lengths of the queue.
const MAX_SERVED: u16 = 16;

/// Checks that the doorbell of `queue` comes to an end although there is always another request, and that all are served
/// when the guest has had enough.
pub fn outlast(subject: &mut dyn Subject, queue: usize, choices: &[u8]) {
    let mut driver = Driver::start_in(memory_of(&REGIONS), subject.device(), 0);
    let (readable, writable) = subject.request(queue, &mut Input::new(choices));
    let readable: Vec<_> = readable.iter().map(Vec::as_slice).collect();
    // Its head is 0, and so are all heads in the ring: each entry is this request.
    assert_eq!(driver.add(queue, &readable, &writable).head, 0);
    let layout = driver.layout(queue);
    let enough = Arc::new(AtomicBool::new(false));
    let guest = {
        let (enough, ram, slot) = (Arc::clone(&enough), Arc::clone(&driver.ram), driver.mmio.slot().clone());
        let avail_event = layout.used + 4 + 8 * u64::from(layout.size);
        let [available, used, event] = [layout.available + 2, layout.used + 2, avail_event].map(GuestAddress);
        move || {
            let mut before = 1;
            while !enough.load(Ordering::Relaxed) {
                let done: u16 = ram.load(used, Ordering::Acquire).unwrap();
                let next = done.wrapping_add(layout.size / 2);
                ram.store(next, available, Ordering::Release).unwrap();
                fence(Ordering::SeqCst);
                // As virtio 1.2, 2.7.10 has it.
                let event: u16 = ram.load(event, Ordering::Acquire).unwrap();
                if next.wrapping_sub(event).wrapping_sub(1) < next.wrapping_sub(before) {
                    slot.doorbells()[queue].write(1).unwrap();
                }
                before = next;
            }
        }
    };
    let (slot, ram) = (driver.mmio.slot().clone(), Arc::clone(&driver.ram));
    thread::scope(|scope| {
        scope.spawn(guest);
        let (ended, end) = channel();
        scope.spawn(move || {
            let used = || -> u16 { ram.load(GuestAddress(layout.used + 2), Ordering::Acquire).unwrap() };
            let (mut most, mut all) = (0, 0);
            while all < REQUESTS {
                let before = used();
                slot.doorbell(queue);
                let served = used().wrapping_sub(before);
                most = most.max(served);
                all += u64::from(served);
            }
            // Nobody listens any more if it took too long.
            let _ = ended.send(most);
        });
        let outcome = end.recv_timeout(PATIENCE);
        enough.store(true, Ordering::Relaxed);
        let most = outcome.expect("the device serves other queues as well");
        assert!(
            most <= MAX_SERVED * layout.size,
            "the device serves {most} requests before others get their turn"
        );
    });
    assert!(!driver.needs_reset(), "{:?}", driver.mmio.slot().fault());
    let word = |driver: &Driver, at| u16::from_le_bytes(driver.read(at, 2).try_into().unwrap());
    let wanted = word(&driver, layout.available + 2).wrapping_sub(subject.kept(queue));
    // Some of it may wait for a timer of the device.
    let until = Instant::now() + PATIENCE;
    while word(&driver, layout.used + 2) != wanted {
        settle(&driver);
        assert!(Instant::now() < until, "the device forgets requests");
    }
}
