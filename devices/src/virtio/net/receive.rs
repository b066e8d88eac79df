//! Frames from the tap into the guest's buffers.

use std::collections::VecDeque;
use std::io;

use super::HEADER;
use super::tap::Tap;
use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;
use crate::virtio::iovec::IoVecs;
use crate::virtio::queue::VirtQueue;

/// Longest frame with its header: what segmentation offload makes of an IP packet.
pub(super) const MAX_FRAME: u32 = 65_535 + 14 + 4 + HEADER;
/// Where the header says how many chains a frame fills.
const NUM_BUFFERS: u32 = 10;

/// Why no more frames are received for now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pause {
    /// The tap has none.
    Empty,
    /// The guest has given no buffers.
    NoBuffers,
}

/// What is done with buffers for frames that have not come yet.
#[derive(Default)]
pub(super) struct Receiver {
    /// Chains taken from the queue, in order.
    chains: VecDeque<Chain>,
    room: u32,
}

impl Receiver {
    /// Heads of the chains that are taken and not used yet.
    pub(super) fn heads(&self) -> impl Iterator<Item = u16> + '_ {
        self.chains.iter().map(Chain::head)
    }

    pub(super) fn clear(&mut self) {
        self.chains.clear();
        self.room = 0;
    }

    pub(super) fn add(&mut self, chain: Chain) {
        self.room = self.room.saturating_add(chain.writable_len());
        self.chains.push_back(chain);
    }

    /// Receives a frame of at most `longest` bytes with its header, into several chains if the driver can take it
    /// apart. Returns its length.
    pub(super) fn receive(
        &mut self,
        tap: &Tap,
        queue: &mut VirtQueue,
        longest: u32,
        mergeable: bool,
    ) -> Result<Result<usize, Pause>, DeviceError> {
        if !self.prepare(queue, longest, mergeable)? {
            return Ok(Err(Pause::NoBuffers));
        }
        let Some(first) = self.chains.front() else { return Ok(Err(Pause::NoBuffers)) };
        let mut vectors = IoVecs::writable(first, 0, MAX_FRAME);
        if mergeable {
            for chain in self.chains.iter().skip(1) {
                vectors.append(chain);
            }
        }
        let count = match tap.receive(&vectors) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return Ok(Ok(0)),
            // A tap that is gone or down has no frames either.
            Err(_) => return Ok(Err(Pause::Empty)),
        };
        self.use_chains(queue, count as u32, mergeable)?;
        Ok(Ok(count))
    }

    /// Gives the guest `frame`, which comes from within and has no header yet. One that it has no buffer of its length
    /// for is lost.
    pub(super) fn deliver(
        &mut self,
        frame: &[u8],
        queue: &mut VirtQueue,
        longest: u32,
        mergeable: bool,
    ) -> Result<Result<(), Pause>, DeviceError> {
        let len = HEADER + frame.len() as u32;
        if !self.prepare(queue, longest.max(len), mergeable)? || (mergeable && self.room < len) {
            return Ok(Err(Pause::NoBuffers));
        }
        let fits = self.chains.front().is_some_and(|chain| chain.writable_len() >= len);
        if !mergeable && !fits {
            return Ok(Ok(()));
        }
        let mut rest: &[u8] = &[&[0; HEADER as usize], frame].concat();
        for chain in &self.chains {
            let written = chain.write(0, rest);
            rest = &rest[written..];
            if rest.is_empty() {
                break;
            }
        }
        self.use_chains(queue, len, mergeable)?;
        Ok(Ok(()))
    }

    /// Takes chains until a frame of any length finds room; says whether there is any room at all.
    fn prepare(&mut self, queue: &mut VirtQueue, longest: u32, mergeable: bool) -> Result<bool, DeviceError> {
        while self.chains.is_empty() || (mergeable && self.room < longest) {
            let Some(chain) = queue.pop()? else { break };
            if chain.writable_len() < HEADER {
                return Err(DeviceError::Request("a buffer for frames that has no room for a header"));
            }
            if self.chains.len() >= usize::from(queue.size()) {
                return Err(DeviceError::Request("more buffers for frames than the queue is long"));
            }
            self.add(chain);
        }
        Ok(!self.chains.is_empty())
    }

    fn use_chains(&mut self, queue: &mut VirtQueue, len: u32, mergeable: bool) -> Result<(), DeviceError> {
        let (mut left, mut used) = (len, 0_u16);
        let header = self.chains.front().cloned();
        let mut heads = Vec::new();
        while used == 0 || left > 0 {
            let Some(chain) = self.chains.pop_front() else { break };
            let room = chain.writable_len();
            self.room = self.room.saturating_sub(room);
            heads.push((chain.head(), left.min(room)));
            left -= left.min(room);
            used += 1;
            if !mergeable {
                break;
            }
        }
        if let Some(header) = header {
            header.write(NUM_BUFFERS, &used.to_le_bytes());
        }
        for (head, len) in heads {
            queue.complete(head, len)?;
        }
        Ok(())
    }
}
