//! Getting a vCPU out of KVM_RUN from another thread.
//!
//! A flag in the page that KVM shares makes the next KVM_RUN return at once, and a signal ends the one that runs. The
//! flag is set first, so whatever the vCPU thread is doing, it comes out. KVM API documentation, section 5
//! (`immediate_exit`).

use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::ptr::{self, NonNull};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use mirror::memory::PAGE_SIZE;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

/// The first page of a vCPU's shared memory, mapped for the kicker alone: it outlives the vCPU thread.
pub(crate) struct Kick {
    page: NonNull<u8>,
    /// Kernel thread ID of the vCPU thread; 0 before it runs.
    thread: AtomicI32,
}

// SAFETY: the mapping belongs to this value, and the one byte of it that is used is used as an atomic.
unsafe impl Send for Kick {}
// SAFETY: as above.
unsafe impl Sync for Kick {}

impl Kick {
    /// A kicker for the vCPU behind `vcpu`.
    pub(crate) fn new(vcpu: BorrowedFd<'_>) -> io::Result<Self> {
        static HANDLER: Once = Once::new();
        let mut registered = Ok(());
        HANDLER.call_once(|| registered = register_signal_handler(SIGRTMIN(), nothing));
        registered.map_err(|cause| io::Error::from_raw_os_error(cause.errno()))?;
        // SAFETY: a new mapping at an address of the kernel's choice; the file is at least one page long, as kvm_run is.
        let page = unsafe {
            mmap(ptr::null_mut(), PAGE_SIZE, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, vcpu, 0)
        }?;
        let page = NonNull::new(page.cast()).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { page, thread: AtomicI32::new(0) })
    }

    /// The calling thread is the one that runs the vCPU.
    pub(crate) fn adopt(&self) {
        // Whoever started this process may have blocked the signal. That the call fails is no case: the signal is valid.
        let _ = unblock_signal(SIGRTMIN());
        self.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
    }

    /// Makes the next KVM_RUN return at once.
    pub(crate) fn set(&self) {
        self.flag().store(1, Ordering::SeqCst);
    }

    /// Lets KVM_RUN run again.
    pub(crate) fn clear(&self) {
        self.flag().store(0, Ordering::SeqCst);
    }

    /// Ends the KVM_RUN that runs. After [`Self::set`].
    pub(crate) fn signal(&self) {
        let thread = self.thread.load(Ordering::Acquire);
        if thread != 0 {
            let process = rustix::process::getpid().as_raw_nonzero().get();
            // SAFETY: the call takes three integers. A thread that has ended is an error that does not matter, and a
            // thread of this process that has its number now only handles a signal that does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, process, thread, SIGRTMIN()) };
        }
    }

    fn flag(&self) -> &AtomicU8 {
        // SAFETY: the offset lies within the mapped page.
        let flag = unsafe { self.page.add(offset_of!(kvm_run, immediate_exit)) };
        // SAFETY: the byte is mapped as long as `self` lives, and only accessed atomically (by us) or by the kernel.
        unsafe { AtomicU8::from_ptr(flag.as_ptr()) }
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this length, and no reference into it outlives `self`.
        let _ = unsafe { munmap(self.page.as_ptr().cast(), PAGE_SIZE) };
    }
}

/// The handler: that the signal interrupts is all it is for.
extern "C" fn nothing(_signal: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {}
