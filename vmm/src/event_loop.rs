//! The VMM's event loop: what comes in from a descriptor goes to the guest's serial port.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{
    EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberId, SubscriberOps,
};
use rustix::io::Errno;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

use crate::machine::SerialInput;

/// Most bytes read at once.
const CHUNK: usize = 4096;
/// How long input waits for the guest to make room, in milliseconds, before it is tried again.
const RETRY_MS: i32 = 20;

/// Why the event loop cannot be started.
#[derive(Debug, Error)]
pub enum EventLoopError {
    /// The event manager.
    #[error("setting up the event loop: {0}")]
    Manager(#[from] event_manager::Error),
    /// Its thread or descriptors.
    #[error("starting the event loop: {0}")]
    Thread(#[from] io::Error),
}

/// The running event loop; it ends when this is dropped.
pub struct EventLoop {
    stop: EventFd,
    stopped: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl EventLoop {
    /// Passes what can be read from `source` (a terminal, a pipe) on to `serial`.
    ///
    /// # Errors
    /// [`EventLoopError`]; a `source` that cannot be waited for (a regular file) is one.
    pub fn start(source: OwnedFd, serial: SerialInput) -> Result<Self, EventLoopError> {
        let stop = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let stopped = Arc::new(AtomicBool::new(false));
        let mut manager = EventManager::<Input>::new()?;
        let failed = Arc::new(AtomicBool::new(false));
        let input = manager.add_subscriber(Input {
            source,
            serial,
            stop: stop.try_clone()?,
            pending: Vec::with_capacity(CHUNK),
            failed: Arc::clone(&failed),
        });
        if failed.load(Ordering::Relaxed) {
            return Err(io::Error::other("the input cannot be waited for").into());
        }
        let ended = Arc::clone(&stopped);
        let thread = thread::Builder::new()
            .name("events".into())
            .spawn(move || while !ended.load(Ordering::Acquire) && turn(&mut manager, input).is_ok() {})?;
        Ok(Self { stop, stopped, thread: Some(thread) })
    }
}

/// One turn of the loop.
fn turn(manager: &mut EventManager<Input>, input: SubscriberId) -> Result<(), event_manager::Error> {
    let blocked = !manager.subscriber_mut(input)?.pending.is_empty();
    manager.run_with_timeout(if blocked { RETRY_MS } else { -1 })?;
    if blocked && manager.subscriber_mut(input)?.pass_on() {
        let source = manager.subscriber_mut(input)?.readable();
        manager.event_ops(input)?.add(source)?;
    }
    Ok(())
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        if let (Ok(()), Some(thread)) = (self.stop.write(1), self.thread.take()) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Input for the serial port.
struct Input {
    source: OwnedFd,
    serial: SerialInput,
    stop: EventFd,
    /// Read, but the guest has no room for it yet.
    pending: Vec<u8>,
    failed: Arc<AtomicBool>,
}

impl Input {
    fn readable(&self) -> Events {
        Events::new(&self.source, EventSet::IN)
    }

    /// Gives the guest what is pending; says whether all of it was taken.
    fn pass_on(&mut self) -> bool {
        // If the guest cannot be told of its input it finds it when it looks, so nothing is to be done about that.
        let taken = self.serial.send(&self.pending).unwrap_or(self.pending.len());
        self.pending.drain(..taken);
        self.pending.is_empty()
    }
}

impl MutEventSubscriber for Input {
    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if events.fd() == self.stop.as_raw_fd() {
            return;
        }
        let mut chunk = [0; CHUNK];
        let goes_on = match rustix::io::read(&self.source, &mut chunk) {
            Ok(0) => false,
            Ok(count) => {
                self.pending.extend(&chunk[..count]);
                self.pass_on()
            }
            Err(Errno::INTR | Errno::AGAIN) => true,
            Err(_) => false,
        };
        if !goes_on {
            // At the end of the input for good; otherwise until the guest has room.
            let _ = ops.remove(Events::empty(&self.source));
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let stop = ops.add(Events::new(&self.stop, EventSet::IN));
        let source = ops.add(self.readable());
        if stop.and(source).is_err() {
            self.failed.store(true, Ordering::Relaxed);
        }
    }
}
