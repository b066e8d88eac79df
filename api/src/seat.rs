//! The guest's place in the API: what is told of the guest and changed in it, whoever runs it at the moment.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use devices::metadata::Metadata;
use mirror::link::Address;
use mirror::shell::primary::Notifier;
use vmm::{DeviceLimits, ExitHandle};

use crate::config::{Draft, MirrorUpdate, Section};
use crate::log;
use crate::metrics::{Meters, latency_of};
use crate::server::types::{BalloonStats, Progress};
use crate::server::{Instance, InstanceInfo, InstanceState, MirrorStatus, Request, TOO_EARLY};
use crate::stage::{Happening, MirrorPlace, lock};
use crate::standby::StandingBy;

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
    /// It was told to stand still.
    pub(crate) paused: Arc<AtomicBool>,
    /// It stands still because it has no standby.
    pub(crate) suspended: Arc<AtomicBool>,
    pub(crate) snapshot: Arc<SnapshotWatch>,
}

impl RunningGuest {
    fn state(&self) -> InstanceState {
        let frozen = self.status().is_some_and(
            |status| matches!(status, MirrorStatus::Primary(primary) if primary.phase == "frozen"),
        );
        match self.exit.get() {
            Some(_) => InstanceState::NotStarted,
            None if frozen
                || self.paused.load(Ordering::Acquire)
                || self.suspended.load(Ordering::Acquire) =>
            {
                InstanceState::Paused
            }
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

/// What a standby is not asked.
const NOT_HERE: &str = "this side waits for the guest of a primary; ask the side that runs the guest";

const NO_BALLOON: &str = "there is no balloon; put one before the guest is started";

/// The guest's place in the API.
pub(crate) struct Seat {
    pub(crate) id: String,
    pub(crate) draft: Mutex<Draft>,
    /// The guest, while it is this side's.
    pub(crate) guest: Mutex<Option<Arc<RunningGuest>>>,
    pub(crate) seated: Condvar,
    /// This side as a standby, if it is or was one.
    pub(crate) standby: Mutex<Option<Arc<StandingBy>>>,
    /// The guest's, once there is a machine.
    pub(crate) metadata: Mutex<Metadata>,
    /// Bytes of it that are kept at most.
    pub(crate) metadata_limit: usize,
    pub(crate) happen: Sender<Happening>,
    pub(crate) meters: Arc<Meters>,
}

/// How long a guest that has just been taken over may take to its seat.
const SEATING: Duration = Duration::from_secs(1);

impl Seat {
    fn running(&self) -> Option<Arc<RunningGuest>> {
        lock(&self.guest).clone()
    }

    /// The guest, also one that the standby has taken over this moment.
    fn guest_by_now(&self) -> Option<Arc<RunningGuest>> {
        let until = Instant::now() + SEATING;
        let mut guest = lock(&self.guest);
        while guest.is_none() && self.standing_by().is_some_and(|standby| standby.runs()) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.seated.wait_timeout(guest, left);
            (guest, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        guest.clone()
    }

    fn standing_by(&self) -> Option<Arc<StandingBy>> {
        lock(&self.standby).clone()
    }

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
    pub(crate) fn open(&self, next: &Draft, before: &Draft) -> Result<(), String> {
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
            (Request::Failover, Some(guest)) if guest.suspended.load(Ordering::Acquire) => {
                self.order(Request::Failover)
            }
            (Request::Failover, _) => {
                Err("this side runs its guest; a failover is asked of the standby, when its primary is lost"
                    .into())
            }
            (request, None) => self.order(request),
            (request, Some(guest)) => self.change(guest, request),
        }
    }

    /// Has `request` done while the guest is another side's.
    fn answer_as_standby(&self, request: Request, standby: &StandingBy) -> Result<(), String> {
        match request {
            Request::Failover => standby.promote(),
            Request::FlushMetrics => self.meters.flush(self),
            Request::Configure(section) if matches!(*section, Section::Logger(_) | Section::Metrics(_)) => {
                self.configure(*section)
            }
            // Of the guest that will run here.
            Request::Attach(section) => self.configure(Section::Mirror(*section)),
            _ => Err(NOT_HERE.into()),
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
        let state = self.running().map_or_else(
            || match self.standing_by() {
                Some(standby) if standby.runs() => InstanceState::Running,
                _ => InstanceState::NotStarted,
            },
            |guest| guest.state(),
        );
        InstanceInfo::new(&self.id, state)
    }

    fn draft(&self) -> Draft {
        lock(&self.draft).clone()
    }

    fn mirror(&self) -> Option<MirrorStatus> {
        let of_guest = self.running().and_then(|guest| guest.status());
        of_guest.or_else(|| self.standing_by().map(|standby| standby.status()))
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }

    fn guest(&self) -> Option<DeviceLimits> {
        self.running().map(|guest| guest.limits.clone())
    }

    fn snapshot_progress(&self) -> Option<Progress> {
        let (began, done, pages) = (*lock(&self.running()?.snapshot.progress))?;
        Some(Progress { done, pages, elapsed_ms: began.elapsed().as_millis() as u64 })
    }

    fn metadata(&self) -> Option<serde_json::Value> {
        lock(&self.metadata).document()
    }

    fn balloon_statistics(&self) -> Result<BalloonStats, String> {
        self.guest_by_now().ok_or(TOO_EARLY)?.balloon_statistics()
    }

    fn ask(&self, request: Request) -> Result<(), String> {
        let guest = self.guest_by_now();
        if let (None, Some(standby)) = (&guest, self.standing_by()) {
            return self.answer_as_standby(request, &standby);
        }
        request.check(guest.is_some())?;
        self.meters.time(latency_of(&request), || self.answer(request, guest.as_deref()))
    }

    fn switchover(&self, to: Option<Address>) -> Result<Duration, String> {
        match self.guest_by_now() {
            Some(guest) => guest.notifier()?.switchover(to),
            None if self.standing_by().is_some() => {
                Err("this side mirrors no guest that it could hand over; ask its primary".into())
            }
            None => Err(TOO_EARLY.into()),
        }
    }
}
