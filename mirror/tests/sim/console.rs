//! The console without its thread: the marks and the policies of `mirror::console`.

use std::collections::VecDeque;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    Pass,
    Hold,
    Freeze,
}

/// The console of one side.
pub struct Console {
    bytes: VecDeque<u8>,
    written: u64,
    allowed: u64,
    policy: Policy,
    /// Position of the first byte of `history`.
    base: u64,
    /// Everything that this side knows of the stream.
    history: Vec<u8>,
}

impl Console {
    /// Goes on at position `start` with `bytes` that may leave at once.
    pub fn new(start: u64, bytes: Vec<u8>) -> Self {
        let allowed = start + bytes.len() as u64;
        let history = bytes.clone();
        Self { bytes: bytes.into(), written: start, allowed, policy: Policy::Pass, base: start, history }
    }

    /// Position after the last byte produced.
    pub fn produced(&self) -> u64 {
        self.written + self.bytes.len() as u64
    }

    /// Position after the last byte that has left.
    pub fn written(&self) -> u64 {
        self.written
    }

    /// Position after the last byte that may leave.
    pub fn allowed(&self) -> u64 {
        self.allowed
    }

    /// The guest prints.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        self.history.extend(bytes);
        if self.policy == Policy::Pass {
            self.allowed = self.produced();
        }
    }

    /// Holds what comes from now on.
    pub fn hold(&mut self) {
        if self.policy == Policy::Pass {
            self.policy = Policy::Hold;
        }
    }

    /// Lets what is before `end` leave.
    pub fn allow(&mut self, end: u64) {
        if self.policy != Policy::Freeze {
            self.allowed = self.allowed.max(end.min(self.produced()));
        }
    }

    /// Lets everything leave, now and later.
    pub fn pass(&mut self) {
        if self.policy != Policy::Freeze {
            self.policy = Policy::Pass;
            self.allowed = self.produced();
        }
    }

    /// Nothing leaves any more.
    pub fn freeze(&mut self) {
        self.policy = Policy::Freeze;
    }

    /// The bytes from `start` to `end`.
    pub fn copy(&self, start: u64, end: u64) -> Vec<u8> {
        let at = |position: u64| position.saturating_sub(self.written) as usize;
        self.bytes.range(at(start)..at(end)).copied().collect()
    }

    /// What leaves next, at most `most` bytes, and its position.
    pub fn drain(&mut self, most: usize) -> Option<(u64, Vec<u8>)> {
        if self.policy == Policy::Freeze || self.written == self.allowed {
            return None;
        }
        let start = self.written;
        let len = most.min((self.allowed - start) as usize);
        self.written += len as u64;
        Some((start, self.bytes.drain(..len).collect()))
    }

    /// What this side holds for the positions from `start` on, as far as it knows them.
    pub fn known(&self, start: u64) -> (u64, &[u8]) {
        let skip = (start.saturating_sub(self.base) as usize).min(self.history.len());
        (self.base + skip as u64, &self.history[skip..])
    }
}
