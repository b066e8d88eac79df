//! The standby's threads: one accepts links, one for each link reads frames, one ticks. All feed one state machine.

use std::collections::{HashMap, VecDeque};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Watcher;
use crate::console::Console;
use crate::dirty::DirtySet;
use crate::guest::StandbyMachine;
use crate::ids::{Epoch, Guid, Term};
use crate::link::{Address, Frame, FrameReader, FrameWriter, Listener, ReadError, Stream};
use crate::memory::{Layout, PAGE_SIZE, PageMemory};
use crate::report::Report;
use crate::standby::{Action, Event, LinkId, Phase, Standby, WitnessView};
use crate::wire::header::FrameError;
use crate::wire::message::{Message, Refusal, Sense};
use crate::wire::pages::{BufferPool, PageBatch};
use crate::witness::{Claim, FileWitness, Witness};

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Most links at a time: the primary's, those that wait, those that ask.
const MAX_LINKS: usize = 64;

/// Frames received ahead of those that are acted on.
const FRAMES_AHEAD: usize = 8;

/// How long a link may be silent before it is looked at whether it may stay.
const IDLE: Duration = Duration::from_secs(10);

/// How long a small message may take to go.
const SEND_PATIENCE: Duration = Duration::from_millis(500);

/// What a standby needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name that the witness will know this side by; no other side may have it.
    pub name: String,
    /// Who decides which side lives; without one an operator promotes.
    pub witness: Option<FileWitness>,
}

/// Why a standby does not serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A thread cannot be started.
    #[error("cannot start the standby's threads: {0}")]
    Thread(#[from] std::io::Error),
}

/// What a standby is doing, in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = StandbyStatus))]
pub struct Status {
    /// "standby", or "active" once it runs the guest.
    pub role: String,
    /// The state machine's phase.
    pub phase: String,
    /// Where it listens.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub listen: Address,
    /// The guest that it holds an allocation of.
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub guid: Option<Guid>,
    /// The newest term it knows.
    pub term: Term,
    /// The last complete epoch.
    pub epoch: Epoch,
    /// Whether a witness is configured.
    pub witness: bool,
    /// Counters.
    pub sense: Sense,
}

struct Node<M> {
    inner: Mutex<Inner<M>>,
    pool: BufferPool,
    next_link: AtomicU64,
    stopped: AtomicBool,
}

struct Inner<M> {
    standby: Standby,
    machine: M,
    memory: Option<PageMemory>,
    /// Pages that something else than zeros was written to; all others are zero as they were allocated.
    touched: DirtySet,
    console: Arc<Console>,
    witness: Option<FileWitness>,
    address: Address,
    watcher: Watcher,
    links: HashMap<LinkId, FrameWriter>,
    began: Instant,
    ticked: Instant,
}

/// A serving standby.
pub struct Handle<M> {
    node: Arc<Node<M>>,
}

impl<M> Clone for Handle<M> {
    fn clone(&self) -> Self {
        Self { node: Arc::clone(&self.node) }
    }
}

impl<M: StandbyMachine + 'static> Handle<M> {
    /// What the standby is doing.
    pub fn status(&self) -> Status {
        let inner = self.node.lock();
        let phase = inner.standby.phase();
        Status {
            role: if phase == Phase::Active { "active" } else { "standby" }.into(),
            phase: phase.name().into(),
            listen: inner.address.clone(),
            guid: inner.standby.guid(),
            term: inner.standby.term(),
            epoch: inner.standby.epoch(),
            witness: inner.witness.is_some(),
            sense: inner.standby.sense(),
        }
    }

    /// An operator's word that the primary is dead: this side runs the guest.
    pub fn promote(&self) {
        self.node.feed(Event::Promote);
    }

    /// Looks at the machine under the standby, for instance to wait for the guest's end.
    pub fn with_machine<R>(&self, look: impl FnOnce(&mut M) -> R) -> R {
        look(&mut self.node.lock().machine)
    }

    /// Closes every link, as a network that fails does: each side decides what follows from it.
    pub fn cut(&self) {
        self.node.lock().links.values().for_each(|writer| writer.close(Shutdown::Both));
    }

    /// Waits until what the console may release has left.
    pub fn flush_console(&self) {
        let console = Arc::clone(&self.node.lock().console);
        console.flush();
    }

    /// Takes no more links and lets the ticks end. What runs goes on.
    pub fn stop(&self) {
        self.node.stopped.store(true, Ordering::Release);
        self.cut();
        // The accepting thread sees it with the next link: this one.
        drop(Stream::connect(&self.node.lock().address));
    }
}

/// Serves primaries on `listener` with threads of its own.
///
/// # Errors
/// [`ServeError`].
pub fn serve<M: StandbyMachine + 'static>(
    listener: Listener,
    machine: M,
    console: Arc<Console>,
    options: Options,
    watcher: Watcher,
) -> Result<Handle<M>, ServeError> {
    let address = listener.address();
    watcher(Report::Listening { address: address.to_string() });
    let node = Arc::new(Node {
        inner: Mutex::new(Inner {
            standby: Standby::new(options.name, machine.space()),
            machine,
            memory: None,
            touched: DirtySet::default(),
            console,
            witness: options.witness,
            address,
            watcher,
            links: HashMap::new(),
            began: Instant::now(),
            ticked: Instant::now(),
        }),
        pool: BufferPool::default(),
        next_link: AtomicU64::new(1),
        stopped: AtomicBool::new(false),
    });
    let ticking = Arc::clone(&node);
    thread::Builder::new().name("standby-tick".into()).spawn(move || ticking.tick())?;
    let accepting = Arc::clone(&node);
    thread::Builder::new().name("standby-accept".into()).spawn(move || accepting.accept(&listener))?;
    Ok(Handle { node })
}

impl<M: StandbyMachine + 'static> Node<M> {
    fn lock(&self) -> MutexGuard<'_, Inner<M>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn feed(&self, event: Event) {
        self.lock().feed(event);
    }

    fn tick(&self) {
        while !self.stopped.load(Ordering::Acquire) {
            let interval = {
                let mut inner = self.lock();
                inner.feed(Event::Tick);
                inner.standby.tick_interval()
            };
            thread::sleep(interval);
        }
    }

    fn accept(self: &Arc<Self>, listener: &Listener) {
        while !self.stopped.load(Ordering::Acquire) {
            // A refused connection is the peer's loss; without descriptors the next attempt waits a little.
            let Ok(stream) = listener.accept() else {
                thread::sleep(SEND_PATIENCE);
                continue;
            };
            let stream = Arc::new(stream);
            let link = self.next_link.fetch_add(1, Ordering::Relaxed);
            {
                let mut inner = self.lock();
                if inner.links.len() >= MAX_LINKS || stream.set_write_timeout(SEND_PATIENCE).is_err() {
                    continue;
                }
                inner.links.insert(link, FrameWriter::new(Arc::clone(&stream)));
            }
            let node = Arc::clone(self);
            let spawned = thread::Builder::new()
                .name("standby-link".into())
                .spawn(move || node.serve_link(link, stream));
            if spawned.is_err() {
                self.lock().links.remove(&link);
            }
        }
    }

    /// Two threads serve a link: one receives and verifies the next frames while this one acts on those before.
    fn serve_link(&self, link: LinkId, stream: Arc<Stream>) {
        let mut reader = FrameReader::new(stream, self.pool.clone());
        let (sender, received) = sync_channel(FRAMES_AHEAD);
        let reason = thread::scope(|scope| {
            let receiving =
                thread::Builder::new().name("standby-receive".into()).spawn_scoped(scope, move || {
                    let limited = reader.set_idle_limit(IDLE).map_err(ReadError::from);
                    let mut next = limited.and_then(|()| reader.receive());
                    // It ends with the link, or when nobody acts on its frames any more.
                    loop {
                        let last = next.is_err();
                        if sender.send(next).is_err() || last {
                            return;
                        }
                        next = reader.receive();
                    }
                });
            match receiving {
                Ok(_) => self.act_on(link, received),
                Err(error) => Some(error.to_string()),
            }
        });
        let mut inner = self.lock();
        if let (Some(_), Some(reason)) = (inner.links.remove(&link), reason) {
            inner.feed(Event::LinkLost { link, reason });
        }
    }

    /// Feeds what arrives on a link to the state machine until the link ends; says why it did, unless this side ended
    /// it.
    fn act_on(&self, link: LinkId, received: Receiver<Result<Option<Frame>, ReadError>>) -> Option<String> {
        for next in received {
            match next {
                Ok(Some(frame)) => {
                    let mut inner = self.lock();
                    if !inner.links.contains_key(&link) {
                        return None;
                    }
                    inner.feed(Event::Received { link, header: frame.header, body: frame.body });
                }
                Ok(None) if self.lock().standby.expects(link) => {}
                Ok(None) => return Some("nothing was heard on it".into()),
                Err(error) => {
                    self.explain(link, &error);
                    return Some(error.to_string());
                }
            }
        }
        None
    }

    /// Tells a peer that does not speak this protocol what is wrong, as far as it can understand.
    fn explain(&self, link: LinkId, error: &ReadError) {
        if let ReadError::Frame(error @ (FrameError::Version { .. } | FrameError::Payload { .. })) = error {
            let message = Message::Refused(Refusal::Protocol(error.to_string()));
            if let Some(writer) = self.lock().links.get_mut(&link) {
                let _ = writer.send((Guid::nil(), Term(0), Epoch::NONE), &message);
            }
        }
    }
}

impl<M: StandbyMachine> Inner<M> {
    /// Feeds the state machine and performs what it orders, until nothing more follows.
    fn feed(&mut self, event: Event) {
        // While frames come thick and fast their thread has the lock again before the ticking one gets it, so it ticks,
        // too: the primary must not take a busy standby for a dead one.
        let due = self.ticked.elapsed() >= self.standby.tick_interval();
        let mut events = VecDeque::from([event]);
        if due {
            self.ticked = Instant::now();
            events.push_back(Event::Tick);
        }
        let mut actions = Vec::new();
        while let Some(event) = events.pop_front() {
            self.standby.handle(self.began.elapsed(), event, &mut actions);
            for action in actions.drain(..) {
                events.extend(self.perform(action));
            }
        }
    }

    fn perform(&mut self, action: Action) -> Option<Event> {
        match action {
            Action::Send { link, stamp, message } => {
                let sent = self.links.get_mut(&link)?.send(stamp, &message);
                let reason = sent.err()?.to_string();
                self.links.remove(&link);
                return Some(Event::LinkLost { link, reason });
            }
            Action::Close(link) => {
                if let Some(writer) = self.links.remove(&link) {
                    // Only this direction: what was sent last must not be destroyed by what is unread.
                    writer.close(Shutdown::Write);
                }
            }
            Action::Allocate { machine, layout } => return Some(self.allocate(&machine, &layout)),
            Action::Write(batch) => self.write(&batch),
            Action::Apply(batches) => {
                self.apply(&batches);
                return Some(Event::Applied);
            }
            Action::Prepare { state } => {
                let outcome = self.machine.prepare(&state).map_err(|error| error.to_string());
                return Some(Event::Prepared(outcome));
            }
            Action::Claim { guid, expected } => return Some(Event::Claimed(self.claim(guid, expected))),
            Action::Activate { state, output_start, output } => {
                self.console.take_over(output_start, &output);
                let outcome = self.machine.activate(&state).map_err(|error| error.to_string());
                return Some(Event::Activated(outcome));
            }
            Action::Release => {
                self.memory = None;
                self.machine.release();
            }
            Action::Report(report) => (self.watcher)(report),
        }
        None
    }

    fn allocate(&mut self, machine: &[u8], layout: &Layout) -> Event {
        let machine = self.machine.allocate(machine, layout).and_then(|ram| {
            let memory = PageMemory::new(ram)?;
            if memory.layout() != layout {
                return Err("its memory came out in another layout".into());
            }
            self.touched = DirtySet::new(layout.pages());
            self.memory = Some(memory);
            Ok(())
        });
        let witness = self.witness.as_ref().map_or(WitnessView::None, |witness| match witness.read() {
            Ok(record) => WitnessView::Record(record),
            Err(error) => WitnessView::Failed(error.to_string()),
        });
        Event::Allocated { machine: machine.map_err(|error| error.to_string()), witness }
    }

    fn write(&mut self, batch: &PageBatch) {
        let Some(memory) = &self.memory else { return };
        let mut pages =
            batch.given_back().map(u64::from).filter(|&page| self.touched.contains(page)).peekable();
        let mut discarded = Vec::new();
        while let Some(first) = pages.next() {
            let mut count = 1;
            while pages.next_if(|&page| page == first + count).is_some() {
                count += 1;
            }
            if memory.discard(first, count) {
                discarded.push(first..first + count);
            }
        }
        drop(pages);
        discarded.into_iter().flatten().for_each(|page| self.touched.remove(page));
        for (page, body) in batch.iter() {
            let page = u64::from(page);
            // A page of zeros that is still untouched stays so: touching it is what costs, in time and in memory.
            if let Some(body) = body {
                self.touched.insert(page);
                // The batch was checked against this layout: the write cannot fail.
                let _ = memory.write(page, body);
            } else if self.touched.contains(page) {
                let _ = memory.write(page, &ZEROS);
            }
        }
    }

    /// Writes a whole epoch. A long one must not look like death to the primary: heartbeats go on.
    fn apply(&mut self, batches: &[PageBatch]) {
        let mut spoke = Instant::now();
        for batch in batches {
            self.write(batch);
            if spoke.elapsed() >= self.standby.tick_interval() {
                spoke = Instant::now();
                if let Some((link, stamp)) = self.standby.primary() {
                    let heartbeat = Message::Heartbeat { released: 0 };
                    // A broken link is noticed by its reader.
                    let _ = self.links.get_mut(&link).map(|writer| writer.send(stamp, &heartbeat));
                }
            }
        }
    }

    fn claim(&self, guid: Guid, expected: Term) -> Claim {
        match &self.witness {
            None => Claim::Unreachable("no witness is configured".into()),
            Some(witness) => witness
                .claim(guid, expected, self.standby.name())
                .unwrap_or_else(|error| Claim::Unreachable(error.to_string())),
        }
    }
}
