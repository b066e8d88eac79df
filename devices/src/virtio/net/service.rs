//! The metadata service on a network card: frames for it never leave by the tap, and its answers come like frames from
//! there. Limits on the card are limits on its tap, and do not hold for what stays in the machine.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use serde::{Deserialize, Serialize};

use super::HEADER;
use super::receive::{MAX_FRAME, Pause, Receiver};
use crate::metadata::{Caller, FRAME_START, MAX_CALLERS, Metadata, MetadataConfig, MetadataState, Stack};
use crate::timer::Timer;
use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;
use crate::virtio::queue::VirtQueue;

/// What of the service is saved with a card.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// Where the guest's frames to it came from last.
    pub guest: [u8; 6],
    /// The connections under way.
    pub callers: Vec<Caller>,
    /// What it tells about, with the first card that it is on.
    pub metadata: Option<MetadataState>,
}

/// The metadata service on a card.
pub(super) struct Service {
    stack: Stack,
    timer: Timer,
    /// Whether this card saves what the service tells about.
    keeper: bool,
}

impl Service {
    pub(super) fn new(
        metadata: &Metadata,
        config: &MetadataConfig,
        mtu: u16,
        keeper: bool,
    ) -> io::Result<Self> {
        Ok(Self { stack: Stack::new(metadata, config, mtu)?, timer: Timer::new()?, keeper })
    }

    /// What tells that [`work`](Self::work) is to be called.
    pub(super) fn fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    pub(super) fn clear_timer(&self) {
        self.timer.clear();
    }

    /// Takes the frame in `chain` if it is for the service; says whether it is.
    pub(super) fn take(&mut self, chain: &Chain) -> bool {
        let mut start = [0; FRAME_START];
        let len = chain.read(HEADER, &mut start);
        if !self.stack.is_for_it(&start[..len]) {
            return false;
        }
        // The guest may have changed it since: it is looked at once more, as a whole.
        let len = chain.readable_len().min(MAX_FRAME).saturating_sub(HEADER);
        let mut frame = vec![0; len as usize];
        chain.read(HEADER, &mut frame);
        if self.stack.is_for_it(&frame) {
            self.stack.take(&frame);
        }
        true
    }

    /// Goes on with what there is to do now.
    pub(super) fn work(&mut self) {
        self.stack.work();
        self.set_timer();
    }

    fn set_timer(&mut self) {
        if let Some(wait) = self.stack.next_work() {
            self.timer.set(wait);
        }
    }

    /// Gives the guest the frames that wait for it, at most `most`, and says how many there were.
    pub(super) fn deliver(
        &mut self,
        receiver: &mut Receiver,
        queue: &mut VirtQueue,
        longest: u32,
        mergeable: bool,
        most: usize,
    ) -> Result<usize, DeviceError> {
        let mut frames = 0;
        while frames < most {
            let Some(frame) = self.stack.front() else {
                if frames == 0 {
                    return Ok(0);
                }
                // There is room for more now.
                self.stack.work();
                if self.stack.front().is_none() {
                    break;
                }
                continue;
            };
            match receiver.deliver(frame, queue, longest, mergeable)? {
                Ok(()) => {
                    self.stack.pop();
                    frames += 1;
                }
                Err(Pause::Empty) => break,
                Err(Pause::NoBuffers) => {
                    if !queue.listen()? {
                        break;
                    }
                    queue.silence()?;
                }
            }
        }
        self.set_timer();
        Ok(frames)
    }

    pub(super) fn reset(&mut self) {
        self.stack.reset();
    }

    /// A state with room for everything that may be saved.
    pub(super) fn room(&self) -> ServiceState {
        ServiceState {
            guest: [0; 6],
            callers: Vec::with_capacity(MAX_CALLERS),
            metadata: self.keeper.then(MetadataState::with_room),
        }
    }

    pub(super) fn save(&self, state: &mut ServiceState) {
        state.guest = self.stack.guest();
        state.callers.clear();
        state.callers.extend(self.stack.callers());
        if let Some(metadata) = &mut state.metadata {
            self.stack.metadata().save(metadata);
        }
    }

    /// Has what `state` says, and resets the connections that it knows of if the driver is `active`; false if it cannot be
    /// a state of this card.
    #[must_use]
    pub(super) fn restore(&mut self, state: &ServiceState, active: bool) -> bool {
        if active {
            self.stack.reset_callers(state.guest, state.callers.iter().copied());
        }
        match &state.metadata {
            Some(metadata) => self.keeper && self.stack.metadata().restore(metadata),
            None => !self.keeper,
        }
    }
}
