//! A vCPU: its thread, and the loop that runs the guest.

use std::slice;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use devices::virtio::counters::Counter;
use kvm_bindings::{KVM_EXIT_IO_OUT, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run};
use kvm_ioctls::{VcpuExit, VcpuFd};
use mirror::console::Console;
use mirror::memory::GuestRam;

use crate::crew::{Crew, Member, Order};
use crate::exit::{Exit, ExitHandle};
use crate::failure;
use crate::platform::Platform;
use crate::snapshot::pager::{MemoryLost, Pager};
use crate::vcpu_state::{VcpuCapture, VcpuState, VcpuStateError};

/// How often a vCPU that waits for the console to drain looks again. A pause reaches it without that.
const ROOM_POLL: Duration = Duration::from_millis(2);

/// A vCPU and what belongs to it. The thread holds the locks while it works, anybody while it stands still.
pub(crate) struct Vcpu {
    pub(crate) fd: Mutex<VcpuFd>,
    pub(crate) capture: Mutex<VcpuCapture>,
    /// What the next order to restore restores.
    pub(crate) incoming: Mutex<Option<VcpuState>>,
    /// What went wrong in the last order.
    pub(crate) failed: Mutex<Option<VcpuStateError>>,
}

/// How often vCPUs have left the guest for the VMM.
#[derive(Debug, Default)]
pub struct ExitCounters {
    /// To read from a port.
    pub port_in: Counter,
    /// To write to a port.
    pub port_out: Counter,
    /// To read from a device's registers.
    pub mmio_read: Counter,
    /// To write to a device's registers.
    pub mmio_write: Counter,
}

/// What all vCPU threads share.
pub(crate) struct Shared {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) crew: Crew,
    pub(crate) platform: Platform,
    pub(crate) console: Arc<Console>,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) exit: ExitHandle,
    pub(crate) exits: ExitCounters,
    pub(crate) tsc_control: bool,
    /// Who provides pages of memory that are missing still. Behind the devices: they may need it to the end.
    pub(crate) pager: Option<Arc<Pager>>,
}

impl Shared {
    /// Ends the run and tells whoever waits.
    pub(crate) fn end(&self, exit: Exit) {
        if self.crew.end() {
            self.exit.set(exit);
        }
    }

    /// Memory is lost: nothing runs on, and whoever waits for a missing page waits for ever.
    pub(crate) fn lose(&self, lost: &MemoryLost) {
        self.end(Exit::Error(lost.to_string()));
        self.platform.virtio.give_up();
        self.crew.give_up();
    }

    /// The body of the thread of vCPU `index`.
    pub(crate) fn work(&self, index: usize) {
        let mut member = self.crew.join(index);
        let vcpu = &self.vcpus[index];
        loop {
            match member.next_order() {
                Order::Run => self.run(&mut lock(&vcpu.fd), &member),
                Order::Park => member.report_parked(),
                Order::Capture => {
                    if member.park_with_all() {
                        vcpu.capture();
                        member.report_done();
                    }
                }
                Order::Restore => {
                    vcpu.restore(self.tsc_control);
                    member.report_parked();
                    member.report_done();
                }
                Order::Quit => return,
            }
        }
    }

    /// Runs the guest until there is another order or the run has ended.
    ///
    /// Leaves only from a KVM_RUN that was interrupted: before it looks for signals, KVM completes the access that the
    /// last exit was for, so that no access is half done in a state that is captured next.
    fn run(&self, fd: &mut VcpuFd, member: &Member<'_>) {
        loop {
            while !self.console.has_room() && !member.wait_to_leave(ROOM_POLL) {}
            match fd.run() {
                Ok(exit @ (VcpuExit::IoIn(..) | VcpuExit::IoOut(..))) => {
                    let out = matches!(exit, VcpuExit::IoOut(..));
                    if out { &self.exits.port_out } else { &self.exits.port_in }.add(1);
                    self.port_io(fd.get_kvm_run());
                    if let Some(exit) = self.platform.take_request() {
                        self.end(exit);
                    }
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    self.exits.mmio_read.add(1);
                    self.platform.mmio.read(address, data);
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    self.exits.mmio_write.add(1);
                    self.platform.mmio.write(address, data);
                }
                Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Shutdown | VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                    return self.end(Exit::Shutdown);
                }
                Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => return self.end(Exit::Reset),
                Ok(VcpuExit::InternalError) => {
                    return self.end(Exit::Error(failure::internal_error(fd, &self.ram)));
                }
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    let why = format!(
                        "the processor refused to enter the guest (reason {reason:#x}, host CPU {cpu})"
                    );
                    return self.fail(fd, &why);
                }
                Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
                    let why =
                        format!("memory fault at guest physical {gpa:#x}, {size} bytes, flags {flags:#x}");
                    return self.fail(fd, &why);
                }
                Ok(other) => {
                    let why = format!("KVM exit that is not handled: {other:?}");
                    return self.fail(fd, &why);
                }
                Err(cause) if cause.errno() == libc::EINTR => {
                    if member.must_leave() {
                        return;
                    }
                }
                // A vCPU that was just started by another.
                Err(cause) if cause.errno() == libc::EAGAIN => {}
                Err(cause) => return self.fail(fd, &format!("KVM_RUN: {cause}")),
            }
        }
    }

    fn fail(&self, fd: &VcpuFd, why: &str) {
        self.end(Exit::Error(format!("{why}; {}", failure::registers(fd))));
    }

    /// Carries out the port access that `run` tells of. A string instruction makes several of one size at one port.
    fn port_io(&self, run: &mut kvm_run) {
        // SAFETY: the exit reason says that this member of the union is the one that was written.
        let io = unsafe { run.__bindgen_anon_1.io };
        let (size, len) = (usize::from(io.size).max(1), usize::from(io.size) * io.count as usize);
        let start = ptr(run);
        // SAFETY: KVM puts the data at this offset of the area that begins with kvm_run, all of which is mapped.
        let data = unsafe { start.add(io.data_offset as usize) };
        // SAFETY: the data is `len` bytes, and nobody else uses the area while the vCPU is out of KVM_RUN.
        let data = unsafe { slice::from_raw_parts_mut(data, len) };
        for access in data.chunks_exact_mut(size) {
            if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                self.platform.pio.write(u64::from(io.port), access);
            } else {
                self.platform.pio.read(u64::from(io.port), access);
            }
        }
    }
}

fn ptr(run: &mut kvm_run) -> *mut u8 {
    (&raw mut *run).cast()
}

impl Vcpu {
    fn capture(&self) {
        let outcome = lock(&self.capture).capture(&lock(&self.fd));
        *lock(&self.failed) = outcome.err();
    }

    fn restore(&self, tsc_control: bool) {
        let outcome = match lock(&self.incoming).take() {
            Some(state) => lock(&self.capture).restore(&lock(&self.fd), &state, tsc_control),
            None => Ok(()),
        };
        *lock(&self.failed) = outcome.err();
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
