//! What is to be sent for the image of one standby.

use super::group::Group;
use super::log::Entry;
use super::regions::Regions;
use super::sync::BLOCK;

/// What becomes of what is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mode {
    /// What of it the standby has been sent already is to be sent again.
    Copying,
    /// It is logged, unless it is yet to be sent anyway.
    Logging,
}

/// The image of a standby, as the side knows it that runs the guest.
pub(super) struct Twin {
    pub(super) mode: Mode,
    /// Its group, once it has everything that it was sent.
    pub(super) group: Group,
    /// It takes part in epochs.
    pub(super) follows: bool,
    /// What was written and not sent yet.
    pub(super) log: Vec<u8>,
    /// Bytes of that which are of the epoch that was taken last.
    pub(super) cut: usize,
    /// Blocks that it is yet to be sent.
    pub(super) todo: Regions,
    /// Where the search for the next of them begins.
    pub(super) cursor: u64,
    /// Flags that its next section has.
    pub(super) flags: u8,
    /// The log of the epoch that was taken last has been sent.
    pub(super) in_epoch: bool,
    /// The last period of which it was sent everything.
    pub(super) sent: u64,
    /// The last one of which it has everything.
    pub(super) acknowledged: u64,
}

impl Twin {
    /// An image of `group`, of a disk of `len` bytes, that is to be sent what will be put in [`Self::todo`].
    pub(super) fn new(group: Group, len: u64, flags: u8) -> Self {
        Self {
            mode: Mode::Copying,
            group,
            follows: false,
            log: Vec::new(),
            cut: 0,
            todo: Regions::none(len, BLOCK),
            cursor: 0,
            flags,
            in_epoch: false,
            sent: 0,
            acknowledged: 0,
        }
    }

    /// `len` bytes from `at` were written: `bytes`, or zeros where there are none.
    pub(super) fn written(&mut self, at: u64, len: u64, bytes: &[u8]) {
        match self.mode {
            Mode::Copying => self.todo.extend(self.todo.touched(at, len)),
            Mode::Logging if bytes.is_empty() => Entry::Zero { at, len }.append_to(&mut self.log),
            Mode::Logging => Entry::Write { at, bytes }.append_to(&mut self.log),
        }
    }

    /// Bytes that were logged for the next epoch or round.
    pub(super) fn logged(&self) -> usize {
        if self.mode == Mode::Logging { self.log.len() - self.cut } else { 0 }
    }

    /// Whether it lacks nothing but what is in the logs.
    pub(super) fn is_in_step(&self) -> bool {
        self.mode == Mode::Logging && self.todo.count() == 0
    }

    /// How many bytes of `len` it lacks.
    pub(super) fn lacks(&self, len: u64) -> u64 {
        (self.todo.count() * BLOCK).min(len)
    }
}
