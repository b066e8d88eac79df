//! Statics that vCPUs share or divide among themselves, without locks.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicBool, Ordering};

/// A value that one vCPU makes and all read.
pub struct Published<T> {
    value: UnsafeCell<Option<T>>,
    ready: AtomicBool,
}

// SAFETY: written once, before `ready`; only read after it.
unsafe impl<T: Sync> Sync for Published<T> {}

impl<T> Published<T> {
    /// Nothing yet.
    pub const fn new() -> Self {
        Self { value: UnsafeCell::new(None), ready: AtomicBool::new(false) }
    }

    /// Makes `value` visible to all.
    ///
    /// # Safety
    /// To be called once, and by one vCPU.
    pub unsafe fn publish(&self, value: T) {
        // SAFETY: nobody reads before `ready`, and by the contract nobody else writes.
        unsafe { *self.value.get() = Some(value) };
        self.ready.store(true, Ordering::Release);
    }

    /// The value, once there is one.
    pub fn get(&self) -> Option<&T> {
        if !self.ready.load(Ordering::Acquire) {
            return None;
        }
        // SAFETY: after `ready` the value is never written again.
        unsafe { (*self.value.get()).as_ref() }
    }
}

/// One value for each of `N` vCPUs.
pub struct PerCpu<T, const N: usize>(UnsafeCell<[T; N]>);

// SAFETY: no two vCPUs get the same element, by the contract of `take`.
unsafe impl<T: Send, const N: usize> Sync for PerCpu<T, N> {}

impl<T, const N: usize> PerCpu<T, N> {
    /// With these values.
    pub const fn new(values: [T; N]) -> Self {
        Self(UnsafeCell::new(values))
    }

    /// The value of `cpu`, for good.
    ///
    /// # Safety
    /// To be called once for each `cpu`, which must be below `N`.
    #[expect(clippy::mut_from_ref, reason = "each element is handed out once")]
    pub unsafe fn take(&'static self, cpu: u32) -> &'static mut T {
        // SAFETY: inside the array and without another reference, by the contract.
        unsafe { &mut *self.0.get().cast::<T>().wrapping_add(cpu as usize) }
    }
}
