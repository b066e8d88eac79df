//! The two ioctls of KVM's dirty log: kvm-ioctls has no CLEAR, and its GET allocates.
//!
//! KVM API documentation, sections 4.8 and 4.117.

use kvm_bindings::{
    KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1, kvm_dirty_log, kvm_dirty_log__bindgen_ty_1,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// Reads the log of `slot` into `bitmap`, which must have a bit for each of the slot's pages.
pub(super) fn get(vm: &VmFd, slot: u32, bitmap: &mut [u64]) -> errno::Result<()> {
    let request = kvm_dirty_log {
        slot,
        padding1: 0,
        __bindgen_anon_1: kvm_dirty_log__bindgen_ty_1 { dirty_bitmap: bitmap.as_mut_ptr().cast() },
    };
    // SAFETY: KVM writes one bit for each page of the slot, and the bitmap was made for the slot's length.
    let answer = unsafe { ioctl_with_ref(vm, KVM_GET_DIRTY_LOG(), &request) };
    if answer == 0 { Ok(()) } else { errno::errno_result() }
}

/// Clears the pages of `bitmap` in the log of `slot`, bit 0 being `first_page` (a multiple of 64), and protects them.
pub(super) fn clear(vm: &VmFd, slot: u32, first_page: u64, bitmap: &[u64]) -> errno::Result<()> {
    let request = kvm_clear_dirty_log {
        slot,
        num_pages: bitmap.len() as u32 * 64,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: bitmap.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: KVM only reads the bitmap, which has a bit for each of `num_pages` pages.
    let answer = unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) };
    if answer == 0 { Ok(()) } else { errno::errno_result() }
}
