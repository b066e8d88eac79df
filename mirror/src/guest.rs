//! What the mirror asks of a virtual machine. `vmm` implements both traits; tests implement them over plain memory.

use std::sync::Arc;

use crate::dirty::DirtySet;
use crate::memory::{GuestRam, Layout};

/// An error of the machine under the mirror, passed through to whoever started it.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// The guest that a primary mirrors.
///
/// The pause is everything between [`pause`](Self::pause) and [`resume`](Self::resume): what runs in it allocates
/// nothing, logs nothing, takes no lock that is held elsewhere, and does no I/O.
pub trait Guest: Send {
    /// The guest's memory.
    fn ram(&self) -> &Arc<GuestRam>;

    /// A description of the machine (processors, devices, …) from which the standby builds its twin. Opaque to the
    /// mirror, versioned by whoever writes it.
    fn describe(&self) -> Vec<u8>;

    /// Starts dirty tracking: every page written after the return is in a later harvest.
    ///
    /// # Errors
    /// Whatever keeps the machine from tracking.
    fn start_tracking(&mut self) -> Result<(), GuestError>;

    /// Stops dirty tracking, so that the guest no longer pays for it.
    ///
    /// # Errors
    /// Whatever keeps the machine from it.
    fn stop_tracking(&mut self) -> Result<(), GuestError>;

    /// Adds every page that may hold something else than zeros.
    ///
    /// # Errors
    /// Whatever keeps the machine from finding out.
    fn populated(&mut self, into: &mut DirtySet) -> Result<(), GuestError>;

    /// Moves the pages written since the last harvest to `into`: the hypervisor's log OR the VMM's own bitmap.
    /// Called while the guest runs (seeding) and inside the pause.
    ///
    /// # Errors
    /// Whatever the hypervisor answers; the pages that were moved before the error are in `into`.
    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError>;

    /// How many pages a harvest would find now, without taking them; `None` where that cannot be known cheaply.
    ///
    /// # Errors
    /// Whatever the hypervisor answers.
    fn peek_dirty(&mut self) -> Result<Option<u64>, GuestError>;

    /// Stops every vCPU and device; returns when all stand still. Pausing a paused guest is no error.
    ///
    /// # Errors
    /// A vCPU that cannot be stopped.
    fn pause(&mut self) -> Result<(), GuestError>;

    /// Inside the pause: captures the state of vCPUs, VM and devices into buffers that the machine has at hand.
    ///
    /// # Errors
    /// Whatever cannot be read.
    fn capture(&mut self) -> Result<(), GuestError>;

    /// After the pause: appends the captured state to `out`, in the form that [`StandbyMachine::activate`] takes.
    ///
    /// # Errors
    /// Whatever cannot be encoded.
    fn encode_captured(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError>;

    /// Lets the guest run again.
    ///
    /// # Errors
    /// A vCPU that cannot be started.
    fn resume(&mut self) -> Result<(), GuestError>;

    /// Moves to `into` the pages that the guest has given back since the last call, or since the start of tracking: what
    /// they held no longer matters, and they are zeros. Called after each harvest: a page in both counts as written after it
    /// was given back.
    fn freed(&mut self, _into: &mut DirtySet) {}

    // Output of devices (frames, disk writes, …), by requests that are in flight, and part of the captured state, until
    // they are carried out. The console has its own way. For a guest without such devices there is nothing to do.

    /// From now on requests whose effect can be seen outside wait for the epoch that knows of them.
    fn hold_output(&mut self) {}

    /// The epoch of the last [`capture`](Self::capture) is committed: what it knew of is carried out.
    fn release_output(&mut self) {}

    /// Everything is carried out, now and later: nobody mirrors this guest any more, and it is the live one.
    fn pass_output(&mut self) {}

    /// Nothing is carried out any more: another side is the live one.
    fn freeze_output(&mut self) {}

    /// Whether a request waits that no capture knows of.
    fn output_waits(&self) -> bool {
        false
    }

    /// Returns when nothing that the guest asked for is still being carried out by this host, so that another may own
    /// what it works on.
    ///
    /// # Errors
    /// Work that cannot be waited for.
    fn drain(&mut self) -> Result<(), GuestError> {
        Ok(())
    }
}

/// The machine of a standby: nothing runs in it until it is activated.
pub trait StandbyMachine: Send {
    /// Guest memory in bytes that it can promise now.
    fn space(&self) -> u64;

    /// Builds the twin of the machine that `description` ([`Guest::describe`]) tells of, with zeroed memory of `layout`.
    ///
    /// # Errors
    /// What of the description cannot be had here.
    fn allocate(&mut self, description: &[u8], layout: &Layout) -> Result<Arc<GuestRam>, GuestError>;

    /// Restores `state` ([`Guest::encode_captured`]), so that it is known that the guest can be run here, and does not run
    /// it. It may be restored again.
    ///
    /// # Errors
    /// What of the state cannot be restored.
    fn prepare(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Restores `state` ([`Guest::encode_captured`]) and runs the guest.
    ///
    /// # Errors
    /// What of the state cannot be restored; the guest has then not run a single instruction.
    fn activate(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Gives the allocation back.
    fn release(&mut self);
}
