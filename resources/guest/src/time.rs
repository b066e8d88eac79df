//! Time from the TSC, which ring 3 reads without an exit.

use core::arch::x86_64::_rdtsc;
use core::cell::UnsafeCell;
use core::hint::spin_loop;
use core::ptr;

use crate::lapic;

/// How long the TSC is measured if nobody tells its frequency.
const MEASURED_TICKS: u64 = 20_000_000;

/// What KVM tells about its clock (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW).
#[repr(C, align(64))]
struct KvmClock {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
}

#[repr(transparent)]
struct KvmClockPage(UnsafeCell<KvmClock>);

// SAFETY: only KVM writes it, and it is read by volatile reads.
unsafe impl Sync for KvmClockPage {}

/// Registered with KVM by `ring0.s` on vCPU 0, if there is a kvmclock.
#[unsafe(no_mangle)]
static kvm_clock: KvmClockPage = KvmClockPage(UnsafeCell::new(KvmClock {
    version: 0,
    pad: 0,
    tsc_timestamp: 0,
    system_time: 0,
    tsc_to_system_mul: 0,
    tsc_shift: 0,
    flags: 0,
}));

/// Nanoseconds of a TSC tick, as a fraction of 2^32.
#[derive(Clone, Copy)]
pub struct Scale(u64);

impl Scale {
    /// As kvmclock says; without it, measured against the timer of the local APIC.
    pub fn find() -> Self {
        Self::of_kvm_clock().unwrap_or_else(Self::measured)
    }

    /// Nanoseconds of `ticks`.
    pub fn ns(self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.0)) >> 32) as u64
    }

    fn of_kvm_clock() -> Option<Self> {
        // SAFETY: a valid static; all bit patterns are valid.
        let clock = unsafe { ptr::read_volatile(kvm_clock.0.get()) };
        let (mul, shift) = (u64::from(clock.tsc_to_system_mul), clock.tsc_shift);
        let scale =
            if shift < 0 { mul >> u32::from(shift.unsigned_abs()).min(63) } else { mul << shift.min(31) };
        (scale > 0).then_some(Self(scale))
    }

    fn measured() -> Self {
        let begun = ticks();
        let mut taken = 1;
        let ns = lapic::time(|| {
            while taken < MEASURED_TICKS {
                spin_loop();
                taken = ticks().wrapping_sub(begun);
            }
        });
        Self((u64::from(ns).max(1) << 32) / taken)
    }
}

/// The TSC. It may be anywhere after a restore: only differences mean something, and not even all of those.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it, and nothing here sets CR4.TSD.
    unsafe { _rdtsc() }
}
