//! The interrupt of a virtio device: what it is for, and the line that tells the guest to look.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// InterruptStatus bit: the device has used a buffer (virtio 1.2, 4.2.2).
pub const USED_BUFFER: u32 = 1;
/// InterruptStatus bit: the device's configuration, or its need of a reset, has changed.
pub const CONFIG_CHANGE: u32 = 2;

struct Shared {
    status: AtomicU32,
    generation: AtomicU32,
    needs_reset: AtomicBool,
    line: EventFd,
}

/// A device's interrupt. Clones are the same interrupt: the device raises it, the transport shows and acknowledges it.
///
/// The line is an eventfd that KVM turns into an edge (KVM API, KVM_IRQFD). An edge that is still on its way when the
/// machine's state is captured is in no state; but the status is, and a status that is not zero raises the line again
/// on restore. A driver takes an interrupt too many as no news.
#[derive(Clone)]
pub struct Interrupt(Arc<Shared>);

impl Interrupt {
    /// An interrupt whose line is a new eventfd.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn new() -> io::Result<Self> {
        let line = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Shared {
            status: AtomicU32::new(0),
            generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            line,
        })))
    }

    /// The line, for KVM to listen to.
    pub fn line(&self) -> &EventFd {
        &self.0.line
    }

    /// The device has used a buffer that the driver wants to hear of.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// The device has changed its configuration space.
    pub fn config_changed(&self) {
        self.0.generation.fetch_add(1, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    /// The device cannot go on with what the driver has given it (virtio 1.2, 2.1.2).
    pub fn need_reset(&self) {
        self.0.needs_reset.store(true, Ordering::Release);
        self.raise(CONFIG_CHANGE);
    }

    /// InterruptStatus.
    pub fn status(&self) -> u32 {
        self.0.status.load(Ordering::Acquire)
    }

    /// InterruptACK: the driver has seen `bits`.
    pub fn acknowledge(&self, bits: u32) {
        self.0.status.fetch_and(!bits, Ordering::AcqRel);
    }

    /// ConfigGeneration: changes whenever the configuration space does.
    pub fn generation(&self) -> u32 {
        self.0.generation.load(Ordering::Acquire)
    }

    /// Whether the device waits for a reset.
    pub fn needs_reset(&self) -> bool {
        self.0.needs_reset.load(Ordering::Acquire)
    }

    pub(super) fn reset(&self) {
        self.0.needs_reset.store(false, Ordering::Release);
        self.0.status.store(0, Ordering::Release);
    }

    pub(super) fn restore(&self, status: u32, generation: u32, needs_reset: bool) {
        self.0.status.store(status, Ordering::Release);
        self.0.generation.store(generation, Ordering::Release);
        self.0.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// Raises the line again if the driver has not acknowledged all there is: after a restore.
    pub(super) fn raise_again(&self) {
        if self.status() != 0 {
            self.edge();
        }
    }

    fn raise(&self, bits: u32) {
        self.0.status.fetch_or(bits, Ordering::AcqRel);
        self.edge();
    }

    fn edge(&self) {
        // It fails only if the counter is full: then an edge is under way as it is.
        let _ = self.0.line.write(1);
    }
}
