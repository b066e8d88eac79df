//! A virtio console (virtio 1.2, 5.3) of one port: a Unix socket, a file or a terminal of the host is its other end.
//!
//! What the guest writes is taken from it at once, since its driver may wait for that with interrupts off, and the bytes
//! are held until the epoch that knows of them is committed; they are part of the state. While nobody listens the last
//! [`LIMIT`] bytes wait for whoever comes, also across a move; while somebody does, a guest that writes faster than they
//! read has to wait. What is sent to the guest is not held.

mod config;
mod peer;
#[cfg(test)]
mod tests;

use std::os::fd::AsRawFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;

use self::peer::{Peer, Written};
use super::device::{DeviceError, DeviceType, Source, VirtioDevice, read_config};
use super::held::{Held, OutputPolicy};
use super::queue::VirtQueue;
use super::slot::RestoreError;
use super::state::DeviceState;
use crate::timer::Timer;

pub use config::{COLUMNS, ConsoleConfig, ConsoleError, ConsolePlace, ROWS};

/// Descriptors of each queue.
pub const QUEUE_SIZE: u16 = 64;
/// Most bytes of output that wait, for their epoch or for somebody who reads.
pub const LIMIT: usize = 16 << 10;

/// Feature bits (virtio 1.2, 5.3.3): the configuration space has a size; it takes an emergency write.
const F_SIZE: u64 = 1 << 0;
const F_EMERGENCY_WRITE: u64 = 1 << 2;

/// Bytes copied at once.
const CHUNK: usize = 4096;
/// Most requests that are worked off before others get their turn.
const BATCH: u16 = QUEUE_SIZE;
/// How long to wait before the socket's path is tried again, which the old side may still have.
const RETRY: Duration = Duration::from_millis(50);
/// Where the configuration space has the character of an emergency write.
const EMERGENCY: u64 = 8;

/// What a console holds beyond its registers and queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// What the guest has written and nobody has got, at most [`LIMIT`] bytes.
    pub output: Vec<u8>,
    /// How much of the request that comes next is in the output already.
    pub taken: u32,
    /// Characters in a row.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A virtio console.
pub struct Console {
    columns: u16,
    rows: u16,
    /// The guest is to be told of its size.
    resized: bool,
    /// It has written something since it was set up.
    used: bool,
    peer: Peer,
    output: Held<u8>,
    policy: OutputPolicy,
    taken: u32,
    /// Wakes the device when there is something to do that no descriptor tells of.
    wake: Timer,
}

impl Console {
    /// A console whose socket, if it is to have one, is made when the guest runs here.
    ///
    /// # Errors
    /// [`ConsoleError`]
    pub fn create(config: &ConsoleConfig) -> Result<Self, ConsoleError> {
        let wake = Timer::new()?;
        wake.set(Duration::ZERO);
        Ok(Self {
            columns: config.columns,
            rows: config.rows,
            resized: false,
            used: false,
            peer: Peer::open(&config.place)?,
            output: Held::with_capacity(LIMIT),
            policy: OutputPolicy::Pass,
            taken: 0,
            wake,
        })
    }

    /// Tells the guest of another size. [`VirtioDevice::attend`] must follow.
    pub fn resize(&mut self, columns: u16, rows: u16) {
        (self.columns, self.rows, self.resized) = (columns, rows, true);
    }

    /// Writes what may leave, as far as somebody takes it.
    fn write_out(&mut self) {
        let mut chunk = [0; CHUNK];
        loop {
            let mut len = 0;
            while len < CHUNK
                && let Some(byte) = self.output.pop()
            {
                chunk[len] = byte;
                len += 1;
            }
            if len == 0 {
                return;
            }
            let done = match self.peer.write(&chunk[..len]) {
                Written::Some(count) => count,
                Written::Blocked | Written::Nobody => 0,
            };
            for &byte in chunk[done..len].iter().rev() {
                self.output.put_back(byte);
            }
            if done == 0 {
                return;
            }
        }
    }

    /// Makes room for `count` bytes, as far as it can be made by forgetting what was written before and nobody reads.
    /// Says for how many there is.
    fn make_room(&mut self, count: usize) -> usize {
        while self.output.len() + count > LIMIT && !self.peer.is_there() && self.output.pop().is_some() {}
        LIMIT.saturating_sub(self.output.len()).min(count)
    }

    /// Takes what the guest writes, as far as there is room; says whether there may be more to take at once.
    fn take(&mut self, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        let (mut any, mut left) = (false, BATCH);
        let outcome = loop {
            if left == 0 {
                break true;
            }
            left -= 1;
            let Some(chain) = queue.pop()? else {
                if queue.listen()? {
                    continue;
                }
                break false;
            };
            // Linux asks for the size of a console only when it is told that the size is another.
            self.resized |= !std::mem::replace(&mut self.used, true);
            let len = chain.readable_len();
            while self.taken < len {
                let mut chunk = [0; CHUNK];
                let room = self.make_room(CHUNK.min((len - self.taken) as usize));
                if room == 0 {
                    break;
                }
                let count = chain.read(self.taken, &mut chunk[..room]);
                chunk[..count].iter().for_each(|&byte| self.output.push(byte));
                self.taken += count as u32;
                self.write_out();
            }
            if self.taken < len {
                queue.undo_pop();
                break false;
            }
            self.taken = 0;
            queue.complete(chain.head(), 0)?;
            any = true;
        };
        if any {
            queue.notify()?;
        }
        Ok(outcome)
    }

    /// Gives the guest what has been sent to it; says whether there may be more to give at once.
    fn deliver(&mut self, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        let (mut any, mut left) = (false, BATCH);
        while left > 0 && self.peer.may_read() {
            left -= 1;
            let Some(chain) = queue.pop()? else {
                if queue.listen()? {
                    continue;
                }
                break;
            };
            let room = (chain.writable_len() as usize).min(CHUNK);
            if room == 0 {
                return Err(DeviceError::Request("a console buffer that has no room for input"));
            }
            let mut chunk = [0; CHUNK];
            let count = self.peer.read(&mut chunk[..room]);
            if count == 0 {
                queue.undo_pop();
            } else {
                chain.write(0, &chunk[..count]);
                queue.complete(chain.head(), count as u32)?;
                any = true;
            }
        }
        if any {
            queue.notify()?;
        }
        Ok(left == 0)
    }

    fn work(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if self.policy != OutputPolicy::Freeze {
            if !self.peer.listen() {
                self.wake.set(RETRY);
            }
            self.peer.hear();
        }
        self.write_out();
        let [receive, send] = queues else { return Ok(()) };
        let more_out = self.take(send)?;
        if std::mem::take(&mut self.resized) {
            send.interrupt().config_changed();
        }
        let more_in = self.deliver(receive)?;
        if more_out || more_in {
            self.wake.set(Duration::ZERO);
        }
        Ok(())
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn features(&self) -> u64 {
        F_SIZE | F_EMERGENCY_WRITE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; 12];
        config[..2].copy_from_slice(&self.columns.to_le_bytes());
        config[2..4].copy_from_slice(&self.rows.to_le_bytes());
        // The most ports: without the feature of several it says nothing, and there is one.
        config[4] = 1;
        read_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (EMERGENCY, Some(&byte)) = (offset, data.first())
            && self.make_room(1) == 1
        {
            self.output.push(byte);
            // The vCPU that is here has other things to do.
            self.wake.set(Duration::ZERO);
        }
    }

    fn activate(&mut self, _features: u64, _queues: &mut [VirtQueue]) {}

    fn reset(&mut self) {
        // What was written stays so: the guest was told that it was.
        self.taken = 0;
        self.used = false;
    }

    fn doorbell(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.work(queues)
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd| Source { fd, events: EventSet::IN };
        vec![source(self.peer.fd()), source(self.wake.as_raw_fd())]
    }

    fn ready(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.wake.clear();
        self.work(queues)
    }

    fn set_output(&mut self, policy: OutputPolicy) {
        self.output.set_policy(policy);
        if self.policy != OutputPolicy::Freeze {
            self.policy = policy;
        }
        if self.policy == OutputPolicy::Freeze {
            self.peer.close();
        }
        // Also for a console without a driver, which is not attended to.
        self.wake.set(Duration::ZERO);
    }

    fn release_output(&mut self) {
        self.output.release();
        if !self.output.is_empty() {
            self.wake.set(Duration::ZERO);
        }
    }

    fn output_waits(&self) -> bool {
        self.output.waits()
    }

    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.work(queues)
    }

    fn moved(&mut self) {
        self.wake.set(Duration::ZERO);
    }

    fn save(&mut self, state: &mut DeviceState) {
        if !matches!(state, DeviceState::Console(_)) {
            let output = Vec::with_capacity(LIMIT);
            *state = DeviceState::Console(ConsoleState { output, ..ConsoleState::default() });
        }
        if let DeviceState::Console(state) = state {
            let (first, second) = self.output.as_slices();
            state.output.clear();
            state.output.extend_from_slice(first);
            state.output.extend_from_slice(second);
            (state.taken, state.columns, state.rows) = (self.taken, self.columns, self.rows);
        }
        self.output.mark();
    }

    fn restore(&mut self, state: &DeviceState, _queues: &mut [VirtQueue]) -> Result<(), RestoreError> {
        let DeviceState::Console(state) = state else {
            return Err(RestoreError::Kind(DeviceType::Console));
        };
        if state.output.len() > LIMIT {
            let reason = "it holds more output than a console does";
            return Err(RestoreError::Field { device: DeviceType::Console, reason });
        }
        self.output.clear();
        state.output.iter().for_each(|&byte| self.output.push(byte));
        (self.taken, self.columns, self.rows) = (state.taken, state.columns, state.rows);
        Ok(())
    }
}
