//! The process of one guest, which may come later: who asks it to end, its events, its configuration, and its API.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use devices::metadata::Metadata;
use mirror::shell::primary::{Notifier, Outcome, StatusHandle};
use vmm::{DeviceLimits, Exit, ExitHandle};

use crate::cli::InstanceOptions;
use crate::config::{Draft, MirrorUpdate, Section};
use crate::events::EventLog;
use crate::guest::StartsMirrored;
use crate::log;
use crate::metrics::{self, Meters};
use crate::process;
use crate::run::RunError;
use crate::server::types::{BalloonStats, Progress};
use crate::server::{Instance, InstanceInfo, InstanceState, MirrorStatus, Request, Server, ServerError};

/// Where the answer to a request goes.
pub(crate) type Answer = Sender<Result<(), String>>;

/// What the main thread waits for.
pub(crate) enum Happening {
    GuestEnded(Exit),
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

/// The snapshot that is being taken, as others than its taker see it.
#[derive(Default)]
pub(crate) struct SnapshotWatch {
    progress: Mutex<Option<(Instant, u64, u64)>>,
    cancelled: AtomicBool,
}

impl SnapshotWatch {
    /// One begins.
    pub(crate) fn begin(&self) {
        self.cancelled.store(false, Ordering::Release);
        *lock(&self.progress) = Some((Instant::now(), 0, 0));
    }

    /// It is so far; whether it is to go on.
    pub(crate) fn tell(&self, done: u64, pages: u64) -> bool {
        if let Some(progress) = &mut *lock(&self.progress) {
            (progress.1, progress.2) = (done, pages);
        }
        !self.cancelled.load(Ordering::Acquire)
    }

    /// It has come to its end.
    pub(crate) fn end(&self) {
        *lock(&self.progress) = None;
    }
}

/// What the API tells of a guest that is there, and reaches without its owner.
pub(crate) struct RunningGuest {
    pub(crate) exit: ExitHandle,
    pub(crate) limits: DeviceLimits,
    pub(crate) mirror: MirrorPlace,
    pub(crate) paused: Arc<AtomicBool>,
    pub(crate) snapshot: Arc<SnapshotWatch>,
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
        let status = lock(&self.mirror).as_ref()?.status.status();
        status.map(|status| MirrorStatus::Primary(Box::new(status)))
    }

    fn notifier(&self) -> Result<Notifier, String> {
        let notifier = lock(&self.mirror).as_ref().and_then(|handles| handles.notifier.clone());
        notifier.ok_or_else(|| "the guest is not mirrored".into())
    }

    fn balloon_statistics(&self) -> Result<BalloonStats, String> {
        let figures = self.limits.balloon_figures().ok_or(NO_BALLOON)?;
        let tag = |tag| figures.by_tag.get(&tag).copied();
        Ok(BalloonStats {
            target_pages: figures.target,
            actual_pages: figures.actual,
            target_mib: figures.target / 256,
            actual_mib: figures.actual / 256,
            swap_in: tag(0),
            swap_out: tag(1),
            major_faults: tag(2),
            minor_faults: tag(3),
            free_memory: tag(4),
            total_memory: tag(5),
            available_memory: tag(6),
            disk_caches: tag(7),
            hugetlb_allocations: tag(8),
            hugetlb_failures: tag(9),
        })
    }
}

const NO_BALLOON: &str = "there is no balloon; put one before the guest is started";

/// The guest's place in the API.
struct Seat {
    id: String,
    draft: Mutex<Draft>,
    guest: OnceLock<RunningGuest>,
    /// The guest's, once there is a machine.
    metadata: Mutex<Metadata>,
    /// Bytes of it that are kept at most.
    metadata_limit: usize,
    happen: Sender<Happening>,
    meters: Arc<Meters>,
}

impl Seat {
    fn configure(&self, section: Section) -> Result<(), String> {
        let mut draft = lock(&self.draft);
        let mut next = draft.clone();
        let watched = matches!(section, Section::Logger(_) | Section::Metrics(_));
        next.put(section).map_err(|(field, reason)| format!("{field}: {reason}"))?;
        if watched {
            self.open(&next, &draft)?;
        }
        *draft = next;
        Ok(())
    }

    /// Opens what `next` says that messages and metrics go to, as far as `before` does not say the same.
    fn open(&self, next: &Draft, before: &Draft) -> Result<(), String> {
        if let Some(logger) = next.logger.as_ref().filter(|_| next.logger != before.logger) {
            log::configure(logger, &self.id).map_err(|error| error.to_string())?;
        }
        if let Some(section) = next.metrics.as_ref().filter(|_| next.metrics != before.metrics) {
            self.meters.write_to(section)?;
        }
        Ok(())
    }

    /// Has `request` done, which is possible now.
    fn answer(&self, request: Request, guest: Option<&RunningGuest>) -> Result<(), String> {
        match (request, guest) {
            (Request::Configure(section), _) => self.configure(*section),
            (Request::PutMetadata(document), _) => {
                let put = lock(&self.metadata).put(document, self.metadata_limit);
                put.map_err(|error| error.to_string())
            }
            (Request::PatchMetadata(patch), _) => {
                let patched = lock(&self.metadata).patch(patch, self.metadata_limit);
                patched.map_err(|error| error.to_string())
            }
            (Request::Attach(section), None) => self.configure(Section::Mirror(*section)),
            (Request::Failover, _) => {
                Err("this side runs its guest; a failover is asked of the standby, when its primary is lost"
                    .into())
            }
            (request, None) => self.order(request),
            (request, Some(guest)) => self.change(guest, request),
        }
    }

    /// Lets the main thread do it, and waits for the answer.
    fn order(&self, request: Request) -> Result<(), String> {
        let ending = || "the guest's process is ending".to_owned();
        let (sender, outcome) = channel();
        self.happen.send(Happening::Asked(request, sender)).map_err(|_| ending())?;
        outcome.recv().map_err(|_| ending())?
    }

    /// What is done without the main thread, which may be busy for long.
    fn change(&self, guest: &RunningGuest, request: Request) -> Result<(), String> {
        match request {
            Request::CancelSnapshot => {
                lock(&guest.snapshot.progress).ok_or("no snapshot is being taken")?;
                guest.snapshot.cancelled.store(true, Ordering::Release);
                Ok(())
            }
            Request::Balloon(mib) => {
                if !guest.limits.inflate_balloon(mib) {
                    return Err(NO_BALLOON.into());
                }
                if let Some(balloon) = &mut lock(&self.draft).balloon {
                    balloon.amount_mib = mib;
                }
                Ok(())
            }
            Request::BalloonStatistics(seconds) => {
                if !guest.limits.watch_balloon(seconds) {
                    return Err("stats_polling_interval_s can only be changed from one time to another: give at least 1, \
                                and put a balloon that has statistics before the guest is started"
                        .into());
                }
                if let Some(balloon) = &mut lock(&self.draft).balloon {
                    balloon.stats_polling_interval_s = seconds;
                }
                Ok(())
            }
            Request::FlushMetrics => self.meters.flush(self),
            Request::Detach => guest.notifier()?.detach(),
            Request::Retune(update) => self.retune(guest, update),
            Request::CtrlAltDel => guest.limits.press_ctrl_alt_del().map_err(|error| error.to_string()),
            Request::Pause | Request::Resume if guest.notifier().is_ok() => {
                pause_mirrored(guest, matches!(request, Request::Pause))
            }
            request => self.order(request),
        }
    }

    fn retune(&self, guest: &RunningGuest, update: MirrorUpdate) -> Result<(), String> {
        let notifier = guest.notifier()?;
        let mut draft = lock(&self.draft);
        let section = draft.mirror.as_mut().ok_or("the guest is not mirrored")?;
        update.apply(section).map_err(|(field, reason)| format!("{field}: {reason}"))?;
        notifier.retune(section.pacing());
        Ok(())
    }
}

/// A mirrored guest is stopped at an epoch, which both sides hold; its mirror goes on.
fn pause_mirrored(guest: &RunningGuest, pause: bool) -> Result<(), String> {
    let notifier = guest.notifier()?;
    if guest.paused.load(Ordering::Acquire) != pause {
        if pause {
            notifier.quiesce().ok_or("the mirror has ended meanwhile; try again")?;
        } else {
            notifier.unquiesce();
        }
        guest.paused.store(pause, Ordering::Release);
    }
    Ok(())
}

impl Instance for Seat {
    fn info(&self) -> InstanceInfo {
        let state = self.guest.get().map_or(InstanceState::NotStarted, RunningGuest::state);
        InstanceInfo::new(&self.id, state)
    }

    fn draft(&self) -> Draft {
        lock(&self.draft).clone()
    }

    fn mirror(&self) -> Option<MirrorStatus> {
        self.guest.get()?.status()
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }

    fn guest(&self) -> Option<DeviceLimits> {
        self.guest.get().map(|guest| guest.limits.clone())
    }

    fn snapshot_progress(&self) -> Option<Progress> {
        let (began, done, pages) = (*lock(&self.guest.get()?.snapshot.progress))?;
        Some(Progress { done, pages, elapsed_ms: began.elapsed().as_millis() as u64 })
    }

    fn metadata(&self) -> Option<serde_json::Value> {
        lock(&self.metadata).document()
    }

    fn balloon_statistics(&self) -> Result<BalloonStats, String> {
        self.guest.get().ok_or(crate::server::TOO_EARLY)?.balloon_statistics()
    }

    fn ask(&self, request: Request) -> Result<(), String> {
        let guest = self.guest.get();
        request.check(guest.is_some())?;
        let kind = request.clone();
        self.meters.time(&kind, || self.answer(request, guest))
    }

    fn switchover(&self) -> Result<Duration, String> {
        self.guest.get().ok_or(crate::server::TOO_EARLY)?.notifier()?.switchover()
    }
}

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
        let metadata_limit = options.mmds_size_limit.unwrap_or(options.http_api_max_payload_size);
        let metadata = match &options.metadata {
            Some(path) => metadata_of(path, metadata_limit)
                .map_err(|reason| RunError::Metadata { path: path.clone(), reason })?,
            None => Metadata::default(),
        };
        let seat = Arc::new(Seat {
            id: options.id.clone(),
            draft: Mutex::default(),
            guest: OnceLock::new(),
            metadata: Mutex::new(metadata),
            metadata_limit,
            happen: happen.clone(),
            meters: Arc::clone(events.meters()),
        });
        Ok(Some(Self { events, happen, happenings, ending, seat, server: None }))
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
    pub(crate) fn seat(&self, guest: RunningGuest) {
        // There is one guest.
        let _ = self.seat.guest.set(guest);
        metrics::write_regularly(Arc::downgrade(&self.seat));
    }

    /// The last line of metrics.
    pub(crate) fn flush_metrics(&self) {
        if let Err(reason) = self.seat.meters.flush(&*self.seat) {
            tracing::error!("{reason}");
        }
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
