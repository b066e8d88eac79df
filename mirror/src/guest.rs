//! What the mirror asks of a virtual machine. `vmm` implements both traits; tests implement them over plain memory.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::dirty::DirtySet;
use crate::ids::{Epoch, Guid, LinkId};
use crate::memory::{GuestRam, Layout};

/// An error of the machine under the mirror, passed through to whoever started it.
pub type GuestError = Box<dyn std::error::Error + Send + Sync>;

/// How far the images of a standby are the primary's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct DiskSync {
    /// Bytes of all disks of which the standby has images of its own.
    pub bytes: u64,
    /// How many of them are still to be sent.
    pub left: u64,
    /// Whether they are too far behind for an epoch to be taken: a standby must not take over with them.
    pub lags: bool,
}

/// Tells that a log is durable, or why it is not; to be called from another thread than the one it was handed to.
pub type LogKept = Box<dyn FnOnce(Result<(), GuestError>) + Send>;

/// Keeps every other side from writing to what both can reach, or says why that is not certain yet; it can then be called
/// again. May take long. What it does is told by its argument.
pub type FenceOut = Box<dyn FnMut(&mut dyn FnMut(String)) -> Result<(), GuestError> + Send>;

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

    /// From now on `tell` is called, and nobody that was given before, when such a request comes. It may be called more often
    /// than that, from any thread, and returns at once. A guest that does not tell is asked now and then.
    fn tell_of_output(&mut self, _tell: Box<dyn Fn() + Send + Sync>) {}

    // Disks of which each side has an image of its own. What is written to them is part of an epoch as a log, which the
    // mirror carries and does not read. `capture` closes the logs of the epoch. For a guest without such disks there is
    // nothing to do.

    /// Agrees with the standby `link`, which has `disks` ([`StandbyMachine::disks`]): finds out in what its images differ.
    ///
    /// # Errors
    /// What of the standby's disks cannot become a replica.
    fn agree(&mut self, link: LinkId, disks: &[u8]) -> Result<(), GuestError>;

    /// Those standbys with which it has agreed, and that are among `links`, take part in the epoch that is taken next.
    ///
    /// # Errors
    /// Whatever keeps that from being noted.
    fn follow(&mut self, links: &[LinkId]) -> Result<(), GuestError>;

    /// The standby `link` is lost, or takes part no longer.
    fn part(&mut self, link: LinkId);

    /// After the pause: appends the log that [`capture`](Self::capture) has closed to `out`, as the standby `link` needs it.
    ///
    /// # Errors
    /// Whatever keeps the epoch from being one.
    fn encode_log(&mut self, link: LinkId, out: &mut Vec<u8>) -> Result<(), GuestError>;

    /// While the standby `link` is seeded: appends to `out` the next blocks in which its images differ, a bounded number of
    /// them. Those that were appended before are durable there.
    ///
    /// # Errors
    /// An image that cannot be read.
    fn sync_disks(&mut self, link: LinkId, out: &mut Vec<u8>) -> Result<(), GuestError>;

    /// How far the images of the standby `link` are; they lag behind, too, as long as nothing is agreed. `None`: of the one
    /// that lacks most.
    fn disk_sync(&self, link: Option<LinkId>) -> DiskSync;

    /// Returns when nothing that the guest, which stands still, asked for is still being carried out by this host, so that
    /// another may own what it works on. Should the guest go on here after all, [`resume`](Self::resume) or
    /// [`pass_output`](Self::pass_output) follows.
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

    /// Builds the twin of the machine of the guest `guid` that `description` ([`Guest::describe`]) tells of, with memory of
    /// `layout`: zeroed, or as this guest left it here.
    ///
    /// # Errors
    /// What of the description cannot be had here.
    fn allocate(
        &mut self,
        guid: Guid,
        description: &[u8],
        layout: &Layout,
    ) -> Result<Arc<GuestRam>, GuestError>;

    /// Adds every page of the memory that was allocated that may hold something else than zeros.
    ///
    /// # Errors
    /// Whatever keeps the machine from finding out.
    fn held(&mut self, _into: &mut DirtySet) -> Result<(), GuestError> {
        Ok(())
    }

    /// What it has of the disks of the machine that was allocated, for [`Guest::agree`]; empty without such disks.
    fn disks(&mut self) -> Vec<u8> {
        Vec::new()
    }

    /// Makes `log` ([`Guest::encode_log`] of this epoch, [`Guest::sync_disks`] under [`Epoch::NONE`]) durable, tells it by
    /// `kept`, and applies it: an epoch whose log is durable is committed.
    ///
    /// # Errors
    /// What is wrong with the log; `kept` is then not called.
    fn keep_log(&mut self, _epoch: Epoch, _log: Vec<u8>, _kept: LogKept) -> Result<(), GuestError> {
        Err("this standby has no disks of its own, and the primary has written to one".into())
    }

    /// Restores `state` ([`Guest::encode_captured`]), so that it is known that the guest can be run here, and does not run
    /// it. It may be restored again.
    ///
    /// # Errors
    /// What of the state cannot be restored.
    fn prepare(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// What must have been done before the guest may run here, if something must. `handed_over`: the primary has said that it
    /// has nothing more to do with the guest ([`Guest::drain`]).
    fn fence_out(&mut self, _handed_over: bool) -> Option<FenceOut> {
        None
    }

    /// Restores `state` ([`Guest::encode_captured`]) and runs the guest.
    ///
    /// # Errors
    /// What of the state cannot be restored; the guest has then not run a single instruction.
    fn activate(&mut self, state: &[u8]) -> Result<(), GuestError>;

    /// Gives the allocation back.
    fn release(&mut self);
}
