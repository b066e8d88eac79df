//! The process of one guest, which may come later: who asks it to end, its events, and its API.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use mirror::shell::primary::{Notifier, Outcome, StatusHandle};
use vmm::{Exit, ExitHandle};

use crate::cli::InstanceOptions;
use crate::events::EventLog;
use crate::guest::StartsMirrored;
use crate::process;
use crate::run::RunError;
use crate::server::types::SnapshotLoad;
use crate::server::{Instance, InstanceInfo, InstanceState, MirrorStatus, Order, Server, ServerError};

/// Where the answer to a request goes.
pub(crate) type Answer = Sender<Result<(), String>>;

/// What the main thread waits for.
pub(crate) enum Happening {
    GuestEnded(Exit),
    MirrorEnded(Outcome, Box<StartsMirrored>),
    EndRequested,
    Ordered(Order, Answer),
    /// A guest is to be run.
    Load(Box<SnapshotLoad>, Answer),
}

/// What the API tells of a guest that is there.
pub(crate) struct RunningGuest {
    pub(crate) exit: ExitHandle,
    pub(crate) mirror: Arc<OnceLock<(StatusHandle, Notifier)>>,
    pub(crate) paused: Arc<AtomicBool>,
}

impl RunningGuest {
    fn state(&self) -> InstanceState {
        let frozen = self.status().is_some_and(
            |status| matches!(status, MirrorStatus::Primary(primary) if primary.phase == "frozen"),
        );
        match self.exit.get() {
            Some(_) => InstanceState::NotStarted,
            None if frozen || self.paused.load(Ordering::Acquire) => InstanceState::Paused,
            None => InstanceState::Running,
        }
    }

    fn status(&self) -> Option<MirrorStatus> {
        self.mirror.get()?.0.status().map(|status| MirrorStatus::Primary(Box::new(status)))
    }
}

/// The guest's place in the API.
struct Seat {
    id: String,
    guest: OnceLock<RunningGuest>,
    happen: Sender<Happening>,
}

impl Seat {
    /// Lets the main thread do what `happening` makes of the answer's place, and waits for the answer.
    fn ask(&self, happening: impl FnOnce(Answer) -> Happening) -> Result<(), String> {
        let ending = || "the guest's process is ending".to_owned();
        let (sender, outcome) = channel();
        self.happen.send(happening(sender)).map_err(|_| ending())?;
        outcome.recv().map_err(|_| ending())?
    }
}

/// In Firecracker's words.
pub(crate) const TOO_LATE: &str = "The requested operation is not supported after starting the microVM";
const TOO_EARLY: &str = "The requested operation is not supported before starting the microVM";

impl Instance for Seat {
    fn info(&self) -> InstanceInfo {
        let state = self.guest.get().map_or(InstanceState::NotStarted, RunningGuest::state);
        InstanceInfo::new(&self.id, state)
    }

    fn mirror(&self) -> Option<MirrorStatus> {
        self.guest.get()?.status()
    }

    fn order(&self, order: Order) -> Result<(), String> {
        if self.guest.get().is_none() {
            return Err(TOO_EARLY.into());
        }
        self.ask(|answer| Happening::Ordered(order, answer))
    }

    fn load(&self, load: SnapshotLoad) -> Result<(), String> {
        if self.guest.get().is_some() {
            return Err(TOO_LATE.into());
        }
        self.ask(|answer| Happening::Load(Box::new(load), answer))
    }

    fn switchover(&self) -> Result<Duration, String> {
        let guest = self.guest.get().ok_or(TOO_EARLY)?;
        let (_, notifier) = guest.mirror.get().ok_or("it is not mirrored")?;
        notifier.switchover()
    }
}

/// The process of one guest.
pub(crate) struct Stage {
    pub(crate) events: Arc<EventLog>,
    pub(crate) happen: Sender<Happening>,
    pub(crate) happenings: Receiver<Happening>,
    /// The process was asked to end.
    pub(crate) ending: Arc<AtomicBool>,
    seat: Arc<Seat>,
    server: Option<Server>,
}

impl Stage {
    /// Sets the process up; `None` if its parent has gone already.
    pub(crate) fn open(options: &InstanceOptions) -> Result<Option<Self>, RunError> {
        if options.end_with_parent.map_or(Ok(true), process::end_with_parent).is_ok_and(|alive| !alive) {
            return Ok(None);
        }
        let events = EventLog::open(options.events.as_deref(), "primary")?;
        let (happen, happenings) = channel();
        let end = happen.clone();
        // At the end nobody waits for it any more; so with all that happens.
        let ending = Arc::new(AtomicBool::new(false));
        let asked_to_end = Arc::clone(&ending);
        process::on_end_request(move || {
            asked_to_end.store(true, Ordering::Release);
            drop(end.send(Happening::EndRequested));
        })?;
        let seat = Arc::new(Seat { id: options.id.clone(), guest: OnceLock::new(), happen: happen.clone() });
        Ok(Some(Self { events, happen, happenings, ending, seat, server: None }))
    }

    /// The API tells of `guest` from now on.
    pub(crate) fn seat(&self, guest: RunningGuest) {
        // There is one guest.
        let _ = self.seat.guest.set(guest);
    }

    /// Serves the API on `path`, if there is one and it is not served yet.
    pub(crate) fn serve(&mut self, path: Option<&Path>) -> Result<(), ServerError> {
        if let (Some(path), None) = (path, &self.server) {
            self.server = Some(Server::start(path, Arc::<Seat>::clone(&self.seat))?);
        }
        Ok(())
    }
}
