//! The one thread that serves the virtio devices: doorbells, the descriptors that devices wait for, and released output.
//!
//! A gate holds it still while the guest is paused: what happens meanwhile waits in the descriptors.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use devices::virtio::VirtioSlot;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

/// Why the devices cannot be served.
#[derive(Debug, Error)]
pub enum DeviceLoopError {
    /// The event manager.
    #[error("setting up the device loop: {0}")]
    Manager(#[from] event_manager::Error),
    /// Its thread or descriptors.
    #[error("starting the device loop: {0}")]
    Thread(#[from] io::Error),
    /// A descriptor that cannot be waited for.
    #[error("a {0} of a virtio device cannot be waited for")]
    Watch(&'static str),
}

/// Whether devices may work.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

struct GateState {
    closed: bool,
    working: bool,
    /// Whoever works may never come back: nobody waits for it any more.
    stuck: bool,
}

impl Default for GateState {
    fn default() -> Self {
        // A machine begins paused.
        Self { closed: true, working: false, stuck: false }
    }
}

impl Gate {
    /// Waits until the gate is open; it cannot be closed again before [`Self::leave`].
    fn enter(&self) {
        let mut state = self.lock();
        while state.closed {
            state = self.wait(state);
        }
        state.working = true;
    }

    fn leave(&self) {
        self.lock().working = false;
        self.changed.notify_all();
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        while state.working && !state.stuck {
            state = self.wait(state);
        }
    }

    fn open(&self) {
        let mut state = self.lock();
        state.closed = state.stuck;
        drop(state);
        self.changed.notify_all();
    }

    fn give_up(&self) {
        let mut state = self.lock();
        state.closed = true;
        state.stuck = true;
        drop(state);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, GateState>) -> MutexGuard<'a, GateState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }
}

/// Who is told that a device has output that waits.
type Listener = Arc<Mutex<Option<Box<dyn Fn() + Send + Sync>>>>;

/// The running loop; it ends when this is dropped.
pub(crate) struct DeviceLoop {
    gate: Arc<Gate>,
    wake: EventFd,
    stopped: Arc<AtomicBool>,
    listener: Listener,
    thread: Option<JoinHandle<()>>,
}

impl DeviceLoop {
    /// Serves `slots`. Nothing is served before the gate is opened.
    pub(crate) fn start(slots: &[VirtioSlot]) -> Result<Self, DeviceLoopError> {
        let gate = Arc::new(Gate::default());
        let stopped = Arc::new(AtomicBool::new(false));
        let wake = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let mut manager = EventManager::<Served>::new()?;
        let unwatched = Arc::new(Mutex::new(None));
        let listener = Listener::default();
        for slot in slots {
            manager.add_subscriber(Served {
                what: What::Device(slot.clone()),
                gate: Arc::clone(&gate),
                listener: Arc::clone(&listener),
                unwatched: Arc::clone(&unwatched),
            });
        }
        manager.add_subscriber(Served {
            what: What::All(slots.into(), wake.try_clone()?, Arc::clone(&stopped)),
            gate: Arc::clone(&gate),
            listener: Arc::clone(&listener),
            unwatched: Arc::clone(&unwatched),
        });
        if let Some(what) = *unwatched.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(DeviceLoopError::Watch(what));
        }
        let ended = Arc::clone(&stopped);
        let thread = thread::Builder::new()
            .name("devices".into())
            .spawn(move || while !ended.load(Ordering::Acquire) && manager.run().is_ok() {})?;
        Ok(Self { gate, wake, stopped, listener, thread: Some(thread) })
    }

    /// Returns when no device works any more, nor will until [`Self::open`].
    pub(crate) fn close(&self) {
        self.gate.close();
    }

    /// The loop may be stuck for ever: nobody waits for it, now or later, and it does nothing more.
    pub(crate) fn give_up(&self) {
        self.gate.give_up();
    }

    /// Lets the devices work.
    pub(crate) fn open(&self) {
        self.gate.open();
    }

    /// From now on `tell` is called after a device has worked whose output waits.
    pub(crate) fn tell_of_output(&self, tell: Box<dyn Fn() + Send + Sync>) {
        *self.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some(tell);
    }

    /// Lets every device look at its queues and carry out what it may, soon.
    pub(crate) fn attend(&self) {
        // It fails only if the counter is full: then the loop is being woken as it is.
        let _ = self.wake.write(1);
    }
}

impl Drop for DeviceLoop {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        self.gate.open();
        if let (Ok(()), Some(thread)) = (self.wake.write(1), self.thread.take()) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// What a descriptor of the loop is for.
enum What {
    /// A device's doorbells and sources.
    Device(VirtioSlot),
    /// All devices are to be attended to, or the loop is to end.
    All(Box<[VirtioSlot]>, EventFd, Arc<AtomicBool>),
}

struct Served {
    what: What,
    gate: Arc<Gate>,
    listener: Listener,
    unwatched: Arc<Mutex<Option<&'static str>>>,
}

impl Served {
    fn watch(&self, what: &'static str, events: Events, ops: &mut EventOps<'_>) {
        if ops.add(events).is_err() {
            *self.unwatched.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
        }
    }

    fn serve(&self, events: Events) {
        match &self.what {
            What::Device(slot) => {
                let index = events.data() as usize;
                match index.checked_sub(slot.doorbells().len()) {
                    None => slot.doorbell(index),
                    Some(source) => slot.ready(source),
                }
            }
            What::All(slots, wake, stopped) => {
                let _ = wake.read();
                if !stopped.load(Ordering::Acquire) {
                    slots.iter().for_each(VirtioSlot::attend);
                }
            }
        }
    }

    /// Whether a device that has just worked has output that waits.
    fn output_waits(&self) -> bool {
        match &self.what {
            What::Device(slot) => slot.output_waits(),
            What::All(slots, ..) => slots.iter().any(VirtioSlot::output_waits),
        }
    }
}

impl MutEventSubscriber for Served {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        self.gate.enter();
        self.serve(events);
        let waits = self.output_waits();
        self.gate.leave();
        if waits && let Some(tell) = &*self.listener.lock().unwrap_or_else(PoisonError::into_inner) {
            tell();
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        match &self.what {
            What::Device(slot) => {
                for (index, doorbell) in slot.doorbells().iter().enumerate() {
                    self.watch("doorbell", Events::with_data(doorbell, index as u32, EventSet::IN), ops);
                }
                let first = slot.doorbells().len();
                for (index, source) in slot.sources().into_iter().enumerate() {
                    let data = (first + index) as u32;
                    self.watch("source", Events::with_data_raw(source.fd, data, source.events), ops);
                }
            }
            What::All(_, wake, _) => {
                self.watch("wake", Events::new_raw(wake.as_raw_fd(), EventSet::IN), ops);
            }
        }
    }
}
