//! The process of one guest, which may come later, or from another side: who asks it to end, its events, and its API.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use devices::metadata::Metadata;
use mirror::link::{Address, Stream};
use mirror::report::Report;
use mirror::shell::primary::{Notifier, Outcome, StatusHandle};
use vmm::Exit;

use crate::cli::InstanceOptions;
use crate::config::Draft;
use crate::events::EventLog;
use crate::guest::StartsMirrored;
use crate::metrics;
use crate::process;
use crate::run::RunError;
use crate::seat::{RunningGuest, Seat};
use crate::server::{Request, Server, ServerError};
use crate::standby::StandingBy;

/// Where the answer to a request goes.
pub(crate) type Answer = Sender<Result<(), String>>;

/// What the main thread waits for.
pub(crate) enum Happening {
    /// The guest that came to this process as the so-manieth.
    GuestEnded(u64, Exit),
    /// A standby can be reached, or why none can.
    Sought(Result<(Address, Stream), String>),
    /// What this side has to tell as a standby.
    Told(Report),
    MirrorEnded(Outcome, Box<StartsMirrored>),
    EndRequested,
    Asked(Request, Answer),
}

/// The mirror, as others than its owner reach it.
pub(crate) struct MirrorHandles {
    pub(crate) status: StatusHandle,
    /// While it has the guest.
    pub(crate) notifier: Option<Notifier>,
}

/// Where they are, once the guest has been mirrored.
pub(crate) type MirrorPlace = Arc<Mutex<Option<MirrorHandles>>>;

/// The metadata in the file at `path`, which may have `limit` bytes.
fn metadata_of(path: &Path, limit: usize) -> Result<Metadata, String> {
    let text = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
    let document = serde_json::from_str(&text).map_err(|error| error.to_string())?;
    let metadata = Metadata::default();
    metadata.put(document, limit).map_err(|error| error.to_string())?;
    Ok(metadata)
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
    writes_metrics: bool,
}

impl Stage {
    /// Sets the process up; `None` if its parent has gone already.
    pub(crate) fn open(options: &InstanceOptions, role: &'static str) -> Result<Option<Self>, RunError> {
        if options.end_with_parent.map_or(Ok(true), process::end_with_parent).is_ok_and(|alive| !alive) {
            return Ok(None);
        }
        let events = EventLog::open(options.events.as_deref(), role)?;
        let (happen, happenings) = channel();
        let end = happen.clone();
        // At the end nobody waits for it any more; so with all that happens.
        let ending = Arc::new(AtomicBool::new(false));
        let asked_to_end = Arc::clone(&ending);
        process::on_end_request(move || {
            asked_to_end.store(true, Ordering::Release);
            drop(end.send(Happening::EndRequested));
        })?;
        let metadata_limit = options.mmds_size_limit.unwrap_or(options.http_api_max_payload_size);
        let metadata = match &options.metadata {
            Some(path) => metadata_of(path, metadata_limit)
                .map_err(|reason| RunError::Metadata { path: path.clone(), reason })?,
            None => Metadata::default(),
        };
        let seat = Arc::new(Seat {
            id: options.id.clone(),
            draft: Mutex::default(),
            guest: Mutex::default(),
            seated: Condvar::new(),
            standby: Mutex::default(),
            metadata: Mutex::new(metadata),
            metadata_limit,
            happen: happen.clone(),
            meters: Arc::clone(events.meters()),
        });
        Ok(Some(Self { events, happen, happenings, ending, seat, server: None, writes_metrics: false }))
    }

    /// What is configured.
    pub(crate) fn draft(&self) -> Draft {
        lock(&self.seat.draft).clone()
    }

    /// Takes over what is configured.
    ///
    /// # Errors
    /// Messages or metrics cannot go where it says.
    pub(crate) fn configure(&self, draft: Draft) -> Result<(), RunError> {
        self.seat.open(&draft, &Draft::default()).map_err(RunError::Operator)?;
        *lock(&self.seat.draft) = draft;
        Ok(())
    }

    /// Notes how the guest is mirrored now.
    pub(crate) fn note_mirror(&self, section: &crate::config::MirrorSection) {
        lock(&self.seat.draft).mirror = Some(section.clone());
    }

    /// Gives `metadata`, a machine's, what was put before there was a machine; it is what the API changes from now on.
    pub(crate) fn hand_over_metadata(&self, metadata: Metadata) {
        let mut before = lock(&self.seat.metadata);
        if let Some(serde_json::Value::Object(document)) = before.document() {
            // It was short enough before.
            let _ = metadata.put(document, usize::MAX);
        }
        *before = metadata;
    }

    /// The API tells of `guest` from now on.
    pub(crate) fn seat(&mut self, guest: RunningGuest) {
        *lock(&self.seat.guest) = Some(Arc::new(guest));
        self.seat.seated.notify_all();
        self.write_metrics();
    }

    /// The guest is another side's now.
    pub(crate) fn unseat(&self) {
        *lock(&self.seat.guest) = None;
        *lock(&self.seat.metadata) = Metadata::default();
    }

    /// The API tells of this side as a standby while it has no guest.
    pub(crate) fn stand_by(&mut self, standby: Arc<StandingBy>) {
        *lock(&self.seat.standby) = Some(standby);
        self.write_metrics();
    }

    fn write_metrics(&mut self) {
        if !std::mem::replace(&mut self.writes_metrics, true) {
            metrics::write_regularly(Arc::downgrade(&self.seat));
        }
    }

    /// The last line of metrics.
    pub(crate) fn flush_metrics(&self) {
        metrics::flush_last(&*self.seat);
    }

    /// Serves the API on `path`, if there is one and it is not served yet.
    pub(crate) fn serve(&mut self, path: Option<&Path>, max_body: usize) -> Result<(), ServerError> {
        if let (Some(path), None) = (path, &self.server) {
            self.server = Some(Server::start(path, Arc::<Seat>::clone(&self.seat), max_body)?);
        }
        Ok(())
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
