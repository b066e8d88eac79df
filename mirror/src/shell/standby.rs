//! The standby's threads: one accepts links, one for each link reads frames, one ticks. All feed one state machine.

use std::collections::{HashMap, VecDeque};
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::Watcher;
use super::pulse::{calmly, hurry};
use crate::console::Console;
use crate::dirty::DirtySet;
use crate::guest::{FenceOut, GuestError, StandbyMachine};
use crate::ids::{Epoch, Guid, Term};
use crate::link::frames::Stamp;
use crate::link::{Address, Frame, FrameReader, FrameWriter, LinkError, Listener, ReadError, Stream};
use crate::memory::{Layout, PAGE_SIZE, PageMemory};
use crate::report::Report;
use crate::resync::{self, Seed};
use crate::standby::{Action, Event, HEARTBEAT, LinkId, Phase, Standby, WitnessView};
use crate::wire::header::FrameError;
use crate::wire::message::{Message, Refusal, Sense};
use crate::wire::pages::{BufferPool, PageBatch};
use crate::witness::{Claim, Witness};

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// Most links at a time: the primary's, those that wait, those that ask.
const MAX_LINKS: usize = 64;

/// Frames received ahead of those that are acted on.
const FRAMES_AHEAD: usize = 8;

/// How long a link may be silent before it is looked at whether it may stay.
const IDLE: Duration = Duration::from_secs(10);

/// How long a small message may take to go.
const SEND_PATIENCE: Duration = Duration::from_millis(500);

/// Time between two attempts to fence an old primary out.
const FENCE_AGAIN: Duration = Duration::from_millis(200);

/// The phase of a side that runs no guest yet, because an old primary has to be fenced out first.
pub const FENCING: &str = "fencing";

/// What a standby needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The name that the witness will know this side by; no other side may have it.
    pub name: String,
    /// Who decides which side lives; without one an operator promotes.
    pub witness: Option<Arc<dyn Witness>>,
    /// This side runs a guest already, and is a standby only once that has gone ([`Handle::vacate`]).
    pub occupied: bool,
    /// Where primaries are to be heard besides: an address that they can reach, on another network at best.
    pub second_listen: Option<Address>,
}

/// Why a standby does not serve.
#[derive(Debug, Error)]
pub enum ServeError {
    /// A thread cannot be started.
    #[error("cannot start the standby's threads: {0}")]
    Thread(#[from] std::io::Error),
    /// The second address cannot be listened on.
    #[error(transparent)]
    Listen(#[from] LinkError),
}

/// What a standby is doing, in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = StandbyStatus))]
pub struct Status {
    /// "standby", or "active" once it runs the guest.
    pub role: String,
    /// The state machine's phase; "fencing" before the guest runs, if an old primary has to be kept from it first.
    pub phase: String,
    /// Where it listens.
    #[cfg_attr(feature = "schema", schema(value_type = String))]
    pub listen: Address,
    /// Where it hears its primary besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schema(value_type = Option<String>))]
    pub second_listen: Option<Address>,
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
    witness: Option<Arc<dyn Witness>>,
    /// The witness is being asked.
    claiming: bool,
    /// The guest is this side's, and waits until the old primary is fenced out.
    fencing: bool,
    /// For the thread that asks it.
    node: Weak<Node<M>>,
    address: Address,
    second: Option<Address>,
    watcher: Watcher,
    links: HashMap<LinkId, FrameWriter>,
    began: Instant,
    ticked: Instant,
}

/// What the guest goes on with.
struct Heir {
    state: Vec<u8>,
    output_start: u64,
    output: Vec<u8>,
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
            phase: if inner.fencing { FENCING } else { phase.name() }.into(),
            listen: inner.address.clone(),
            second_listen: inner.second.clone(),
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

    /// The guest that ran here has gone, and its machine with it: this side waits for a primary again.
    pub fn vacate(&self) {
        let mut inner = self.node.lock();
        let space = inner.machine.space();
        inner.feed(Event::Vacated { space });
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
        // The accepting threads see it with the next link: this one.
        let inner = self.node.lock();
        std::iter::once(&inner.address)
            .chain(&inner.second)
            .for_each(|address| drop(Stream::connect(address)));
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
    if let Some(address) = options.second_listen.clone().filter(Address::is_wildcard) {
        return Err(LinkError::Wildcard { address }.into());
    }
    let second = options.second_listen.as_ref().map(Listener::bind).transpose()?;
    let second_address = second.as_ref().map(Listener::address);
    for address in std::iter::once(&address).chain(&second_address) {
        watcher(Report::Listening { address: address.to_string() });
    }
    let node = Arc::new_cyclic(|node| Node {
        inner: Mutex::new(Inner {
            standby: Standby::new(options.name, machine.space())
                .with_second_link(second_address.as_ref().map(Address::to_string)),
            machine,
            memory: None,
            touched: DirtySet::default(),
            console,
            witness: options.witness.clone(),
            claiming: false,
            fencing: false,
            node: Weak::clone(node),
            address,
            second: second_address,
            watcher,
            links: HashMap::new(),
            began: Instant::now(),
            ticked: Instant::now(),
        }),
        pool: BufferPool::default(),
        next_link: AtomicU64::new(1),
        stopped: AtomicBool::new(false),
    });
    if options.occupied {
        node.feed(Event::Occupied);
    }
    let ticking = Arc::clone(&node);
    thread::Builder::new().name("standby-tick".into()).spawn(move || ticking.tick())?;
    for listener in std::iter::once(listener).chain(second) {
        let accepting = Arc::clone(&node);
        thread::Builder::new().name("standby-accept".into()).spawn(move || accepting.accept(&listener))?;
    }
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
        hurry();
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
        hurry();
        let mut reader = FrameReader::new(stream, self.pool.clone());
        let (sender, received) = sync_channel(FRAMES_AHEAD);
        let reason = thread::scope(|scope| {
            let receiving =
                thread::Builder::new().name("standby-receive".into()).spawn_scoped(scope, move || {
                    hurry();
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

impl<M: StandbyMachine + 'static> Inner<M> {
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
        // The machine's own threads begin with the priority of the one that starts them.
        let for_machine =
            matches!(action, Action::Allocate { .. } | Action::Prepare { .. } | Action::Activate { .. });
        if for_machine { calmly(|| self.carry_out(action)) } else { self.carry_out(action) }
    }

    fn carry_out(&mut self, action: Action) -> Option<Event> {
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
            Action::TellHeld { link, stamp } => {
                let reason = self.tell_held(link, stamp).err()?.to_string();
                self.links.remove(&link);
                return Some(Event::LinkLost { link, reason });
            }
            Action::Write(batch) => self.write(&batch),
            Action::Apply(batches) => {
                self.apply(&batches);
                return Some(Event::Applied);
            }
            Action::KeepLog { number, epoch, log } => return self.keep_log(number, epoch, log),
            Action::Prepare { state } => {
                let outcome = self.machine.prepare(&state).map_err(|error| error.to_string());
                return Some(Event::Prepared(outcome));
            }
            Action::Claim { guid, expected } => return self.claim(guid, expected).map(Event::Claimed),
            Action::Activate { state, output_start, output, handed_over } => {
                let heir = Heir { state, output_start, output };
                return match self.machine.fence_out(handed_over) {
                    None => Some(self.activate(&heir)),
                    Some(mut fence) => {
                        // A primary that has given the guest up has let go of what both reach: the guest runs here before
                        // that primary is told so.
                        let tell = |reason| (self.watcher)(Report::Fencing { reason });
                        match handed_over.then(|| fence(&mut |reason| tell(reason))) {
                            Some(Ok(())) => return Some(self.activate(&heir)),
                            Some(Err(error)) => tell(error.to_string()),
                            None => {}
                        }
                        self.fence_out(fence, heir)
                    }
                };
            }
            Action::Release => {
                self.memory = None;
                self.machine.release();
            }
            Action::Report(report) => (self.watcher)(report),
        }
        None
    }

    /// Runs the guest.
    fn activate(&mut self, heir: &Heir) -> Event {
        self.console.take_over(heir.output_start, &heir.output);
        let outcome = self.machine.activate(&heir.state).map_err(|error| error.to_string());
        // From now on its memory is nobody's but the guest's.
        (self.memory, self.touched) = (None, DirtySet::default());
        Event::Activated(outcome)
    }

    /// Runs the guest once `fence` is taken, for which another thread waits: until then this side is to be heard of.
    fn fence_out(&mut self, mut fence: FenceOut, heir: Heir) -> Option<Event> {
        let (node, watcher) = (Weak::clone(&self.node), Arc::clone(&self.watcher));
        let fencing = move || {
            let mut told = String::new();
            while let Err(error) = fence(&mut |reason| watcher(Report::Fencing { reason })) {
                // An end of this side ends the wait.
                if node.upgrade().is_none_or(|node| node.stopped.load(Ordering::Acquire)) {
                    return;
                }
                let reason = error.to_string();
                if reason != told {
                    told.clone_from(&reason);
                    watcher(Report::Fencing { reason });
                }
                thread::sleep(FENCE_AGAIN);
            }
            if let Some(node) = node.upgrade() {
                let mut inner = node.lock();
                inner.fencing = false;
                let activated = inner.activate(&heir);
                inner.feed(activated);
            }
        };
        self.fencing = true;
        let error = thread::Builder::new().name("standby-fence".into()).spawn(fencing).err()?;
        self.fencing = false;
        Some(Event::Activated(Err(format!("cannot start a thread to fence the primary out: {error}"))))
    }

    fn allocate(&mut self, machine: &[u8], layout: &Layout) -> Event {
        let guid = self.standby.guid().unwrap_or_else(Guid::nil);
        let machine = self.machine.allocate(guid, machine, layout).and_then(|ram| {
            let memory = PageMemory::new(ram)?;
            if memory.layout() != layout {
                return Err("its memory came out in another layout".into());
            }
            self.touched = DirtySet::new(layout.pages());
            self.machine.held(&mut self.touched)?;
            self.memory = Some(memory);
            Ok(self.machine.disks())
        });
        let witness = match (&self.witness, self.standby.guid()) {
            (Some(witness), Some(guid)) => match witness.read(guid) {
                Ok(record) => WitnessView::Record(record),
                Err(error) => WitnessView::Failed(error.to_string()),
            },
            _ => WitnessView::None,
        };
        Event::Allocated { machine: machine.map_err(|error| error.to_string()), witness }
    }

    fn tell_held(&mut self, link: LinkId, stamp: Stamp) -> std::io::Result<()> {
        let (Some(memory), Some(writer)) = (&self.memory, self.links.get_mut(&link)) else { return Ok(()) };
        let (guid, term, _) = stamp;
        resync::tell(memory, &self.touched, Seed::of(guid, term), |first, digests| {
            writer.send(stamp, &Message::Digests { first, digests }).map(drop)
        })
    }

    /// Has the machine make a write log durable; another thread tells when it is.
    fn keep_log(&mut self, number: u64, epoch: Epoch, log: Vec<u8>) -> Option<Event> {
        let node = Weak::clone(&self.node);
        let kept = move |outcome: Result<(), GuestError>| {
            if let Some(node) = node.upgrade() {
                let outcome = outcome.map_err(|error| error.to_string());
                node.feed(Event::LogKept { number, outcome });
            }
        };
        let refused = self.machine.keep_log(epoch, log, Box::new(kept)).err()?;
        Some(Event::LogKept { number, outcome: Err(refused.to_string()) })
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
                    // A broken link is noticed by its reader.
                    let _ = self.links.get_mut(&link).map(|writer| writer.send(stamp, &HEARTBEAT));
                }
            }
        }
    }

    /// Asks the witness in a thread of its own: it may take its time, and until it answers this side is to be heard of.
    /// Gives the claim's outcome if it is known at once.
    fn claim(&mut self, guid: Guid, expected: Term) -> Option<Claim> {
        if self.claiming {
            return None;
        }
        let Some(witness) = self.witness.clone() else {
            return Some(Claim::Unreachable("no witness is configured".into()));
        };
        let (owner, node) = (self.standby.name().to_owned(), Weak::clone(&self.node));
        let asking = move || {
            let claim = witness.claim(guid, expected, &owner);
            if let Some(node) = node.upgrade() {
                let mut inner = node.lock();
                inner.claiming = false;
                inner.feed(Event::Claimed(
                    claim.unwrap_or_else(|error| Claim::Unreachable(error.to_string())),
                ));
            }
        };
        match thread::Builder::new().name("standby-claim".into()).spawn(asking) {
            Ok(_) => self.claiming = true,
            Err(error) => {
                return Some(Claim::Unreachable(format!("cannot start a thread to ask it: {error}")));
            }
        }
        None
    }
}
