//! One connection between a port of the guest and a Unix socket of the host.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{NO_RECEIVE, NO_SEND};

/// Bytes that the host side takes from the guest before they are passed on.
pub(super) const BUFFER: u32 = 256 << 10;
/// Bytes passed on after which the guest is told that there is room again.
const UPDATE_AFTER: u32 = BUFFER / 4;

/// The connection is at its end.
#[derive(Debug)]
pub(super) struct Broken;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest was asked and has not answered.
    Asked,
    /// Bytes flow.
    Open,
}

/// A connection.
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    pub(super) phase: Phase,
    /// There may be bytes to read.
    pub(super) readable: bool,
    /// From the guest, not yet passed on.
    out: VecDeque<u8>,
    /// Bytes passed on, of all time, and how many of them the guest knows of.
    forwarded: u32,
    told: u32,
    /// What the guest says of its own buffer, and bytes sent to it.
    peer_buffer: u32,
    peer_forwarded: u32,
    sent: u32,
    /// The host will send no more.
    host_done: bool,
    /// What the guest will do no more: [`NO_SEND`], [`NO_RECEIVE`].
    guest_done: u32,
    /// The host's socket knows that nothing more comes.
    shut: bool,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            readable: true,
            out: VecDeque::new(),
            forwarded: 0,
            told: 0,
            peer_buffer: 0,
            peer_forwarded: 0,
            sent: 0,
            host_done: false,
            guest_done: 0,
            shut: false,
        }
    }

    /// The guest says how much room it has.
    pub(super) fn note_credit(&mut self, buffer: u32, forwarded: u32) {
        (self.peer_buffer, self.peer_forwarded) = (buffer, forwarded);
    }

    /// Bytes that the guest has room for.
    pub(super) fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer.saturating_sub(under_way)
    }

    /// What the guest is told of this side: room, bytes passed on.
    pub(super) fn tell_credit(&mut self) -> (u32, u32) {
        self.told = self.forwarded;
        (BUFFER, self.forwarded)
    }

    /// Whether the guest should be told that there is room again.
    pub(super) fn should_tell(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= UPDATE_AFTER
    }

    /// Whether bytes can be sent to the guest now.
    pub(super) fn may_read(&self) -> bool {
        let wanted = self.guest_done & NO_RECEIVE == 0;
        self.phase == Phase::Open && self.readable && !self.host_done && wanted && self.credit() > 0
    }

    /// Reads bytes for the guest, as many as it has room for; none: there are none now. `Err`: the host sends no more.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, Broken> {
        let room = (self.credit() as usize).min(into.len());
        loop {
            match (&self.stream).read(&mut into[..room]) {
                Ok(0) => {
                    self.host_done = true;
                    return Err(Broken);
                }
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    return Ok(count);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(0);
                }
                Err(_) => {
                    self.host_done = true;
                    return Err(Broken);
                }
            }
        }
    }

    /// Takes bytes from the guest. An error: more than it was told there is room for, or it had said that it was done.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        if self.guest_done & NO_SEND != 0 || self.out.len() + bytes.len() > BUFFER as usize {
            return Err(Broken);
        }
        self.out.extend(bytes);
        self.pass_on()
    }

    /// Passes bytes on to the host as far as it takes them.
    pub(super) fn pass_on(&mut self) -> Result<(), Broken> {
        while !self.out.is_empty() {
            let (first, _) = self.out.as_slices();
            match (&self.stream).write(first) {
                Ok(count) => {
                    self.out.drain(..count);
                    self.forwarded = self.forwarded.wrapping_add(count as u32);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(_) => return Err(Broken),
            }
        }
        if self.guest_done & NO_SEND != 0 && !self.shut {
            // Once: the socket wakes its owner each time.
            self.shut = true;
            // A socket that is gone is noticed at the next read.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Ok(())
    }

    /// The guest will do no more of what `flags` say. Whether the connection is over.
    pub(super) fn shut_down(&mut self, flags: u32) -> bool {
        self.guest_done |= flags & (NO_SEND | NO_RECEIVE);
        let _ = self.pass_on();
        let over = NO_SEND | if self.host_done { 0 } else { NO_RECEIVE };
        self.guest_done & over == over && self.out.is_empty()
    }
}
