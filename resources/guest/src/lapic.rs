//! The local APIC of the vCPU that asks, used from ring 3 through a page that ring 0 mapped for it.
//!
//! Its timer counts nanoseconds: both KVM and QEMU give it a 1 GHz clock. It is used for idling only, where an error
//! would make the guest sluggish or eager, not wrong. One-shot and by count, not by TSC deadline: a deadline means
//! nothing on a host whose TSC stands elsewhere, a count survives the move (KVM goes on from the remaining count, and a
//! timer that had expired but was not delivered when the state was saved fires again at once).

use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

/// Where `ring0.s` maps the registers.
const REGISTERS: usize = 0x3fe0_0000;
const SPURIOUS_VECTOR: usize = 0xf0;
const COMMAND_LOW: usize = 0x300;
const COMMAND_HIGH: usize = 0x310;
const TIMER: usize = 0x320;
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
const TIMER_COUNT: usize = 0x380;
const TIMER_REMAINING: usize = 0x390;
const TIMER_DIVIDE: usize = 0x3e0;

const ENABLED: u32 = 0x100;
const MASKED: u32 = 0x1_0000;
const DIVIDE_BY_1: u32 = 0xb;
const INIT: u32 = 0x4500;
const STARTUP: u32 = 0x4600;

/// The vector of the timer.
pub const TIMER_VECTOR: u8 = 0x20;
/// The vector of spurious interrupts.
pub const SPURIOUS: u8 = 0xff;

unsafe extern "C" {
    /// In `ring0.s`.
    safe fn idle(timer_counts: u32);
    /// As above, but returns at once if a device has interrupted since [`forget_events`].
    safe fn idle_unless_event(timer_counts: u32);
    /// Set to 1 by the interrupts of devices, which go to vCPU 0.
    static device_events: AtomicU32;
}

/// Switches it on: the timer, one-shot, is the only interrupt.
pub fn set_up() {
    write(LINT0, MASKED);
    write(LINT1, MASKED);
    write(SPURIOUS_VECTOR, ENABLED | u32::from(SPURIOUS));
    write(TIMER_DIVIDE, DIVIDE_BY_1);
    write(TIMER, u32::from(TIMER_VECTOR));
}

/// Gives the processor away for `ns` nanoseconds, at least 1.
pub fn idle_for(ns: u32) {
    // A count of 0 would stop the timer, and nothing would end the wait.
    idle(ns.max(1));
}

/// From now on an interrupt of a device ends [`idle_until_event`], even if it comes before that.
pub fn forget_events() {
    // SAFETY: in `ring0.s`, four bytes, aligned, and used atomically by all.
    unsafe { device_events.store(0, Ordering::SeqCst) };
}

/// Gives the processor away until a device interrupts, or for `ns` nanoseconds, at least 1. For vCPU 0.
pub fn idle_until_event(ns: u32) {
    idle_unless_event(ns.max(1));
}

/// Runs `work` and returns how many nanoseconds the timer says that took (4 s at most).
pub fn time(work: impl FnOnce()) -> u32 {
    write(TIMER, MASKED | u32::from(TIMER_VECTOR));
    write(TIMER_COUNT, u32::MAX);
    work();
    let taken = u32::MAX - read(TIMER_REMAINING);
    write(TIMER_COUNT, 0);
    write(TIMER, u32::from(TIMER_VECTOR));
    taken
}

/// Resets another vCPU into waiting for [`send_startup`].
pub fn send_init(apic_id: u32) {
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND_LOW, INIT);
}

/// Lets a vCPU that waits run from `page` (4 KiB page number, below 256) in real mode.
pub fn send_startup(apic_id: u32, page: u8) {
    write(COMMAND_HIGH, apic_id << 24);
    write(COMMAND_LOW, STARTUP | u32::from(page));
}

fn read(register: usize) -> u32 {
    // SAFETY: the page is mapped, and reading these registers changes nothing.
    unsafe { ptr::read_volatile((REGISTERS + register) as *const u32) }
}

fn write(register: usize, value: u32) {
    // SAFETY: the page is mapped and holds no memory of ours.
    unsafe { ptr::write_volatile((REGISTERS + register) as *mut u32, value) };
}
