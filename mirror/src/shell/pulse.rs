//! A side's signs of life, from a thread of its own: whatever else it is busy with, it is heard of.
//!
//! They say no more than that the process runs. That it makes progress, its epochs say. All threads that a sign of life
//! goes through, on both sides, run before others: a guest that takes all processors must not look like a dead host.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::console::Console;
use crate::ids::{Epoch, Guid, Term};
use crate::link::FrameWriter;
use crate::wire::message::Message;

/// The priority of a thread that is to be heard of however busy the host is (setpriority(2)).
const URGENT: i32 = -20;

/// Lets this thread run before others, where the process may ask for that.
pub(super) fn hurry() {
    let this = rustix::thread::gettid();
    // Without the right to it, it takes its turn with the others.
    let _ = rustix::process::setpriority_process(Some(this), URGENT);
}

/// Lets this thread take its turn with the others again, and those that it starts: they inherit its priority.
pub(super) fn take_turns() {
    let process = rustix::process::getpid();
    // Both can only fail for a process that there is not.
    if let Ok(priority) = rustix::process::getpriority_process(Some(process)) {
        let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), priority);
    }
}

/// Does `work`, and has threads that it starts take their turn with the others.
pub(super) fn calmly<T>(work: impl FnOnce() -> T) -> T {
    let this = rustix::thread::gettid();
    let before = rustix::process::getpriority_process(Some(this));
    take_turns();
    let done = work();
    if let Ok(before) = before {
        // Without the right to it, it goes on with the others.
        let _ = rustix::process::setpriority_process(Some(this), before);
    }
    done
}

/// What a primary's heartbeats say.
pub(super) struct Pulse {
    pub(super) writer: FrameWriter,
    pub(super) guid: Guid,
    /// May change.
    pub(super) term: Arc<AtomicU64>,
    pub(super) console: Arc<Console>,
    /// Time between two of them, if nothing else is sent.
    pub(super) interval: Duration,
    /// Within how many milliseconds of an epoch the next makes progress; may change.
    pub(super) epoch_within_ms: Arc<AtomicU32>,
}

impl Pulse {
    /// Beats until the link ends.
    pub(super) fn start(self) -> io::Result<()> {
        thread::Builder::new().name("mirror-pulse".into()).spawn(move || {
            hurry();
            let stamp = || (self.guid, Term(self.term.load(Ordering::Acquire)), Epoch::NONE);
            loop {
                thread::sleep(self.interval / 2);
                let heartbeat = Message::Heartbeat {
                    released: self.console.written(),
                    epoch_within_ms: self.epoch_within_ms.load(Ordering::Relaxed),
                };
                if self.writer.break_silence(self.interval, stamp, &heartbeat).is_err() {
                    return;
                }
            }
        })?;
        Ok(())
    }
}
