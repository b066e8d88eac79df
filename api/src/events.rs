//! Tells what happens: as JSON lines to whoever asked for them, and in words on stderr.
//!
//! Reports come from the mirror's own threads, which must not wait for a slow reader: a thread of its own writes.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use mirror::report::{Report, Stamped};
use thiserror::Error;
use tracing::Level;

use crate::log;
use crate::metrics::Meters;

/// Reports that may wait to be written; beyond that they are dropped, and the mirror goes on.
const WAITING: usize = 128;

/// Events cannot be written.
#[derive(Debug, Error)]
#[error("cannot write events to {path}: {source}; name a file, a FIFO or /dev/fd/N")]
pub struct EventsError {
    path: PathBuf,
    source: io::Error,
}

/// Where reports go.
pub struct EventLog {
    queue: Mutex<Option<SyncSender<(&'static str, Stamped)>>>,
    /// The side that tells.
    role: Mutex<&'static str>,
    writer: Mutex<Option<JoinHandle<()>>>,
    meters: Arc<Meters>,
}

impl EventLog {
    /// Writes JSON lines to `path` if there is one, and what people want to know to stderr, each line with `role`.
    ///
    /// # Errors
    /// [`EventsError`] if the file cannot be opened.
    pub fn open(path: Option<&Path>, role: &'static str) -> Result<Arc<Self>, EventsError> {
        let file = path
            .map(|path| {
                let opened = OpenOptions::new().append(true).create(true).open(path);
                opened.map_err(|source| EventsError { path: path.into(), source })
            })
            .transpose()?;
        let (queue, waiting) = sync_channel(WAITING);
        let writer = thread::Builder::new().name("events".into()).spawn(move || write(&waiting, file));
        let writer = writer
            .map_err(|source| EventsError { path: path.unwrap_or(Path::new("stderr")).into(), source })?;
        Ok(Arc::new(Self {
            queue: Mutex::new(Some(queue)),
            role: Mutex::new(role),
            writer: Mutex::new(Some(writer)),
            meters: Arc::default(),
        }))
    }

    /// From now on this side is another.
    pub fn speak_as(&self, role: &'static str) {
        *self.role.lock().unwrap_or_else(PoisonError::into_inner) = role;
    }

    /// Writes `report`, stamped with the time now, if there is room.
    pub fn tell(&self, report: Report) {
        let stamped = Stamped::now(report);
        self.meters.note(&stamped);
        let role = *self.role.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = &*self.queue.lock().unwrap_or_else(PoisonError::into_inner) {
            // Whoever reads too slowly misses some.
            if queue.try_send((role, stamped)).is_err() {
                self.meters.report_lost();
            }
        }
    }

    /// What is counted of them, and of all else.
    pub fn meters(&self) -> &Arc<Meters> {
        &self.meters
    }

    /// Writes everything that waits; what is told later is dropped.
    pub fn close(&self) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A writer that panicked has said so.
            let _ = writer.join();
        }
    }
}

fn write(waiting: &Receiver<(&'static str, Stamped)>, mut file: Option<impl Write>) {
    while let Ok((name, stamped)) = waiting.recv() {
        let text = words(&stamped.report);
        if log::is_on() {
            let text = text.unwrap_or_else(|| format!("{:?}", stamped.report));
            log::tell(importance(&stamped.report), name, &text);
        } else if let Some(text) = text {
            // A stderr that is gone is no reason to stop.
            let _ = writeln!(io::stderr(), "{name}: {text}");
        }
        if let (Some(out), Ok(mut line)) = (&mut file, serde_json::to_vec(&stamped)) {
            line.push(b'\n');
            // One write a line: a line is never torn by another writer or by the end of this process.
            if let Err(error) = out.write_all(&line) {
                let _ = writeln!(io::stderr(), "{name}: events are no longer written: {error}");
                file = None;
            }
        }
    }
}

/// How important a report is to whoever reads the log.
fn importance(report: &Report) -> Level {
    match report {
        Report::PrimaryLost { .. }
        | Report::StandbyLost { .. }
        | Report::Frozen { .. }
        | Report::Suspended { .. }
        | Report::Failed { .. }
        | Report::Refused { .. } => Level::ERROR,
        Report::Unprotected { .. }
        | Report::Solo { .. }
        | Report::AwaitingPromotion { .. }
        | Report::WitnessSilent { .. }
        | Report::Fencing { .. }
        | Report::Seeking { .. }
        | Report::StandbyLeft { .. }
        | Report::HeardElsewhere { .. }
        | Report::SecondLink { up: false, .. }
        | Report::SwitchoverFailed { .. }
        | Report::DetachFailed { .. } => Level::WARN,
        Report::RoundStarted { .. } | Report::DiskSync { .. } => Level::DEBUG,
        Report::RoundProgress { .. } | Report::Committed { .. } => Level::TRACE,
        _ => Level::INFO,
    }
}

/// What people want to know of a report; `None` for what comes many times a second.
pub fn words(report: &Report) -> Option<String> {
    Some(match report {
        Report::Listening { address } => format!("listening on {address}"),
        Report::Joined { guid, term, pages } => format!("mirroring guest {guid}, {pages} pages, term {term}"),
        Report::RoundStarted { .. } | Report::RoundProgress { .. } | Report::Committed { .. } => return None,
        Report::RoundDone { round, pages, bytes, micros, dirtied } => format!(
            "seeding round {round}: {pages} pages, {:.1} MiB in {:.3} s; {dirtied} dirtied meanwhile",
            *bytes as f64 / 1_048_576.0,
            *micros as f64 / 1e6
        ),
        Report::DiskSync { bytes, left } => {
            let mib = |bytes: &u64| *bytes as f64 / 1_048_576.0;
            format!("{:.1} of {:.1} MiB of the disks are still to be sent", mib(left), mib(bytes))
        }
        Report::HandedOver { term, pause_us } => format!(
            "the standby runs the guest in term {term}; it stood still for {:.1} ms",
            *pause_us as f64 / 1000.0
        ),
        Report::SwitchoverFailed { reason } => format!("the standby does not take the guest over: {reason}"),
        Report::Detached { term } => {
            format!("the guest goes on WITHOUT PROTECTION, as was wished; term {term}")
        }
        Report::DetachFailed { reason } => format!("the standby is not detached: {reason}"),
        Report::Protected { epoch } => format!("the guest is protected from epoch {epoch} on"),
        Report::StandbyGained { epoch, standbys } => {
            format!("one more standby holds the guest, from epoch {epoch} on; now {standbys}")
        }
        Report::StandbyLeft { reason, standbys, .. } => {
            format!("a standby is lost, {standbys} are left: {reason}")
        }
        Report::Renewed { term, standbys } => {
            format!("the guest goes on in term {term} with {standbys} standbys")
        }
        Report::Unprotected { reason } => format!("the guest goes on WITHOUT PROTECTION: {reason}"),
        Report::StandbyLost { reason, .. } => format!("the standby is lost: {reason}"),
        Report::PrimaryLost { reason, epoch, .. } => {
            format!("the primary is lost: {reason}; the last complete epoch is {epoch}")
        }
        Report::HeardElsewhere { reason } => {
            format!("the primary lives, by the second link, and is given time to go on: {reason}")
        }
        Report::SecondLink { address, up: true } => format!("the second link, to {address}, is there"),
        Report::SecondLink { address, up: false } => format!("the second link, to {address}, is lost"),
        Report::Refused { reason } => format!("the guest is not run here: {reason}"),
        Report::AwaitingPromotion { reason } => format!("waiting to be promoted: {reason}"),
        Report::Fencing { reason } => format!("fencing the old primary out: {reason}"),
        Report::Won { term } => format!("the witness made this side the live one, term {term}"),
        Report::WitnessSilent { reason } => format!("the witness does not answer, asking again: {reason}"),
        Report::Suspended { reason } => format!("the guest STANDS STILL, and what it says is held: {reason}"),
        Report::Thawed { term } => format!("the guest goes on, term {term}"),
        Report::Seeking { reason } => format!("no standby yet, asking on: {reason}"),
        Report::Solo { term } => format!("the guest goes on alone, WITHOUT PROTECTION, term {term}"),
        Report::Frozen { reason } => format!("frozen: {reason}"),
        Report::Active { epoch, term, .. } => {
            format!("the guest runs here from epoch {epoch} on, term {term}")
        }
        Report::MemoryArriving { there, pages } => {
            format!("{there} of {pages} pages of memory have come from the snapshot")
        }
        Report::MemoryComplete { pages, micros } => {
            format!(
                "all {pages} pages of memory have come from the snapshot, in {:.3} s",
                *micros as f64 / 1e6
            )
        }
        Report::Ended { reason } => format!("the guest has ended: {reason}"),
        Report::Failed { reason } => format!("failed: {reason}"),
    })
}

#[cfg(test)]
mod tests {
    use mirror::ids::Epoch;

    use super::*;

    #[test]
    fn every_report_is_one_json_line_in_the_order_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        let log = EventLog::open(Some(&path), "test").unwrap();
        let reports = [Report::Protected { epoch: Epoch(1) }, Report::Frozen { reason: "a\nb".into() }];
        for report in reports.clone() {
            log.tell(report);
        }
        log.close();

        let text = std::fs::read_to_string(&path).unwrap();
        let told: Vec<Report> =
            text.lines().map(|line| serde_json::from_str::<Stamped>(line).unwrap().report).collect();
        assert_eq!(told, reports);
    }

    #[test]
    fn file_that_cannot_be_opened_is_named() {
        let error = EventLog::open(Some(Path::new("/nonexistent/e")), "test").err().unwrap().to_string();
        assert!(error.contains("/nonexistent/e"), "{error}");
    }
}
