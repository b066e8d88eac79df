//! Taking a snapshot of a machine, while its guest runs.

use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mirror::dirty::DirtySet;
use mirror::guest::{Guest, GuestError};
use mirror::memory::{PAGE_SIZE, PageMemory};
use mirror::primary::convergence::{Round, judge};
use thiserror::Error;

use super::pager::NotWhole;
use super::pages::PageWriter;
use super::publish::Unpublished;
use super::state_file::StateFile;
use super::{Identity, SnapshotId};
use crate::machine::{Machine, MachineError};

/// What the pause at the end may cost in copying pages aside.
const PAUSE_BUDGET: Duration = Duration::from_millis(10);
/// Pages between two reports of progress.
const PROGRESS: u64 = 1024;
/// Most pages that are copied aside in the pause; more are written while the guest stands still.
const STAGED_PAGES: u64 = 32 << 10;

/// What of memory a snapshot has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All of it.
    Full,
    /// What was written since the snapshot before.
    Diff,
}

/// What to take.
#[derive(Clone, Debug)]
pub struct SnapshotRequest {
    /// Full or differential.
    pub kind: Kind,
    /// Where the state goes.
    pub state: PathBuf,
    /// Where memory goes.
    pub memory: PathBuf,
}

/// What a snapshot came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct SnapshotReport {
    /// Pages in it.
    pub pages: u64,
    /// Rounds before the pause.
    pub rounds: u32,
    /// Pages that were copied aside in the pause.
    pub staged: u64,
    /// How long the guest stood still.
    pub pause: Duration,
    /// What of the pause it took to stop vCPUs and devices.
    pub stop: Duration,
    /// What of it went into the harvest of the dirty pages.
    pub harvest: Duration,
    /// What of it went into copying pages aside.
    pub copy: Duration,
    /// What of it went into capturing the state.
    pub capture: Duration,
    /// What of it went into letting them go on.
    pub resume: Duration,
    /// How long all of it took.
    pub took: Duration,
}

/// Why there is no snapshot. The guest goes on as it did, and the next differential snapshot has everything that this one
/// would have had.
#[derive(Debug, Error)]
pub enum SnapshotError {
    /// There is nothing to lay it over.
    #[error(
        "there is no snapshot before that a differential one could be laid over: take a full one first, of a machine with track_dirty_pages"
    )]
    NoBase,
    /// Somebody else has the machine's dirty pages.
    #[error("the guest is mirrored: detach the mirror before taking a snapshot")]
    Mirrored,
    /// Whoever watches has broken it off.
    #[error("the snapshot was broken off")]
    Cancelled,
    /// Both files under one name.
    #[error("the state and the memory of a snapshot are two files, and {0} is named for both: name two")]
    OneFile(PathBuf),
    /// A file cannot be written.
    #[error("cannot write the snapshot to {path}: {cause}")]
    Write {
        /// Which file.
        path: PathBuf,
        /// What the system answered.
        cause: io::Error,
    },
    /// The machine.
    #[error("the machine cannot be captured: {0}")]
    Machine(#[from] MachineError),
    /// Its state.
    #[error("the machine cannot be captured: {0}")]
    Capture(GuestError),
}

/// Told how far a snapshot is: pages written and pages to write, in the current round; before that, of memory that comes
/// on demand, pages that are there and pages that there are. Breaks it off by its answer.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// What a machine knows of its snapshots.
#[derive(Debug, Default)]
pub(crate) struct SnapshotTracking {
    /// The last one, and the pages written since, as far as they were harvested.
    pub(crate) since: Option<(SnapshotId, DirtySet)>,
}

impl Machine {
    /// Takes a snapshot. A guest that runs goes on running, but for one short pause; one that stands still stays so.
    ///
    /// # Errors
    /// [`SnapshotError`]
    pub fn snapshot(
        &mut self,
        request: &SnapshotRequest,
        progress: Progress<'_>,
    ) -> Result<SnapshotReport, SnapshotError> {
        if self.is_mirrored() {
            return Err(SnapshotError::Mirrored);
        }
        if same_place(&request.state, &request.memory) {
            return Err(SnapshotError::OneFile(request.state.clone()));
        }
        let since = match (&self.snapshots.since, request.kind) {
            (None, Kind::Diff) => return Err(SnapshotError::NoBase),
            (since, _) => since.clone(),
        };
        match self.complete_memory(progress) {
            Ok(()) => {}
            Err(NotWhole::Lost(lost)) => return Err(MachineError::from(lost).into()),
            Err(NotWhole::Cancelled) => return Err(SnapshotError::Cancelled),
        }
        let runs = self.runs();
        let logged = self.logs();
        let mut attempt = Attempt {
            all: DirtySet::new(self.layout().pages()),
            found: DirtySet::new(self.layout().pages()),
            report: SnapshotReport::default(),
            began: Instant::now(),
        };
        let outcome = attempt.take(self, request, since.as_ref(), progress);
        if runs {
            self.start();
        }
        let outcome = outcome.and_then(|id| self.note(id, logged).map_err(SnapshotError::from));
        match outcome {
            Ok(()) => {
                attempt.report.took = attempt.began.elapsed();
                Ok(attempt.report)
            }
            Err(error) => {
                // Everything that was harvested for this one is for the next.
                if let Some((_, dirty)) = &mut self.snapshots.since {
                    dirty.union(&attempt.all);
                } else if !logged {
                    let _ = self.log(false);
                }
                Err(error)
            }
        }
    }

    /// The snapshot `id` is taken: pages written from now on are the next one's.
    fn note(&mut self, id: SnapshotId, logged: bool) -> Result<(), MachineError> {
        if self.config().track_dirty_pages {
            // What was harvested since the pause began is in KVM's log still: only the pause harvests last.
            let pages = self.layout().pages();
            self.snapshots.since = Some((id, DirtySet::new(pages)));
        } else if !logged {
            self.log(false)?;
        }
        Ok(())
    }
}

struct Attempt {
    /// Every page that was harvested.
    all: DirtySet,
    /// What the last harvest found.
    found: DirtySet,
    report: SnapshotReport,
    began: Instant,
}

impl Attempt {
    fn take(
        &mut self,
        machine: &mut Machine,
        request: &SnapshotRequest,
        since: Option<&(SnapshotId, DirtySet)>,
        progress: Progress<'_>,
    ) -> Result<SnapshotId, SnapshotError> {
        let write = |path: &Path| {
            let path = path.to_path_buf();
            move |cause| SnapshotError::Write { path, cause }
        };
        let (memory_place, file) = Unpublished::create(&request.memory).map_err(write(&request.memory))?;
        let (state_place, state_file) = Unpublished::create(&request.state).map_err(write(&request.state))?;
        let id = SnapshotId::new().map_err(write(&request.state))?;
        let base = match (request.kind, since) {
            (Kind::Diff, Some((base, _))) => Some(*base),
            _ => None,
        };
        let layout = machine.layout().clone();
        let mut pages = PageWriter::new(file, &layout).map_err(write(&request.memory))?;
        let memory = PageMemory::new(std::sync::Arc::clone(machine.guest_ram())).map_err(|cause| {
            SnapshotError::Write { path: request.memory.clone(), cause: io::Error::other(cause) }
        })?;

        let mut set = self.first_set(machine, request.kind, since)?;
        let mut before = set.count();
        let mut body = vec![0; PAGE_SIZE];
        let mut rest = DirtySet::new(layout.pages());
        while machine.runs() {
            self.report.rounds += 1;
            let start = Instant::now();
            let count = set.count();
            for (done, page) in set.iter().enumerate() {
                if (done as u64).is_multiple_of(PROGRESS) && progress(done as u64, count).is_break() {
                    return Err(SnapshotError::Cancelled);
                }
                read(&memory, page, &mut body);
                pages.write(page, &body).map_err(write(&request.memory))?;
            }
            rest.clear();
            self.harvest(machine, &mut rest)?;
            let remaining = rest.count();
            let round = Round { pages: count, took: start.elapsed(), remaining };
            std::mem::swap(&mut set, &mut rest);
            if remaining <= STAGED_PAGES && judge(self.report.rounds, round, before, PAUSE_BUDGET).is_final()
                || self.report.rounds >= mirror::primary::convergence::MAX_ROUNDS
            {
                break;
            }
            before = remaining;
        }
        // Room for what the guest dirties until it stands still; all of it is touched before the pause.
        let room = (set.count() * 2 + 4096).min(STAGED_PAGES);
        let mut staging = mirror::staging::Staging::new(room as usize);

        let runs = machine.runs();
        let mut clock = PauseClock::start();
        machine.stand_still()?;
        self.report.stop = clock.lap();
        self.harvest(machine, &mut set)?;
        self.report.harvest = clock.lap();
        let count = set.count();
        let mut left = set.iter();
        let mut staged = 0;
        loop {
            staging.fill(&memory, &mut left).map_err(|cause| SnapshotError::Write {
                path: request.memory.clone(),
                cause: io::Error::other(cause),
            })?;
            staged += staging.len() as u64;
            if staged == count {
                break;
            }
            // More than fits is written while the guest stands still: a snapshot is of one moment.
            put(&mut pages, &staging).map_err(write(&request.memory))?;
            if progress(staged, count).is_break() {
                return Err(SnapshotError::Cancelled);
            }
        }
        self.report.copy = clock.lap();
        Guest::capture(machine).map_err(SnapshotError::Capture)?;
        self.report.capture = clock.lap();
        if runs {
            machine.start();
            self.report.resume = clock.lap();
            self.report.pause = clock.total();
        }
        self.report.staged = staged;

        let mut state = Vec::new();
        Guest::encode_captured(machine, &mut state).map_err(SnapshotError::Capture)?;
        put(&mut pages, &staging).map_err(write(&request.memory))?;
        if progress(count, count).is_break() {
            return Err(SnapshotError::Cancelled);
        }
        self.report.pages = pages.count();
        let identity = Identity { id, base };
        pages.finish(identity.clone()).map_err(write(&request.memory))?;
        let description = machine.description();
        write_state(state_file, &StateFile { identity, description, state })
            .map_err(write(&request.state))?;
        // Memory first: a state file that is there has its memory.
        memory_place.publish().map_err(write(&request.memory))?;
        state_place.publish().map_err(write(&request.state))?;
        Ok(id)
    }

    fn first_set(
        &mut self,
        machine: &mut Machine,
        kind: Kind,
        since: Option<&(SnapshotId, DirtySet)>,
    ) -> Result<DirtySet, SnapshotError> {
        let mut set = DirtySet::new(machine.layout().pages());
        // What was written before is in the set by another way, or in the log that is read here.
        machine.log(true)?;
        self.harvest(machine, &mut set)?;
        match (kind, since) {
            (Kind::Diff, Some((_, dirty))) => set.union(dirty),
            _ => machine.populated_pages(&mut set)?,
        }
        Ok(set)
    }

    fn harvest(&mut self, machine: &mut Machine, into: &mut DirtySet) -> Result<(), SnapshotError> {
        self.found.clear();
        let outcome = machine.harvest_pages(&mut self.found);
        self.all.union(&self.found);
        into.union(&self.found);
        Ok(outcome?)
    }
}

/// Measures the phases of the pause.
struct PauseClock {
    began: Instant,
    lap: Instant,
}

impl PauseClock {
    fn start() -> Self {
        let began = Instant::now();
        Self { began, lap: began }
    }

    /// Since the last lap.
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.lap, now)
    }

    fn total(&self) -> Duration {
        self.began.elapsed()
    }
}

/// Whether two names are of one file that is yet to be written.
fn same_place(a: &Path, b: &Path) -> bool {
    let place = |path: &Path| {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        (folder.canonicalize().ok(), path.file_name().map(ToOwned::to_owned))
    };
    a == b || place(a) == place(b)
}

fn read(memory: &PageMemory, page: u64, body: &mut [u8]) {
    // The set ranges over this memory's pages.
    let _ = memory.read(page, body);
}

fn put(pages: &mut PageWriter, staging: &mirror::staging::Staging) -> io::Result<()> {
    for (numbers, bodies) in staging.batches(256) {
        for (&page, body) in numbers.iter().zip(bodies.chunks(PAGE_SIZE)) {
            pages.write(page.into(), body)?;
        }
    }
    Ok(())
}

fn write_state(mut file: File, state: &StateFile) -> io::Result<()> {
    file.write_all(&state.encode()?)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    mod kvm {
        use std::ops::ControlFlow;

        use devices::virtio::balloon::Discard;
        use mirror::console::Console;
        use vm_memory::{Bytes, GuestAddress};

        use super::super::*;
        use crate::config::MachineConfig;
        use crate::snapshot::pages::PageReader;

        #[test]
        fn page_that_the_guest_has_given_back_is_zeros_in_the_next_difference() {
            let folder = tempfile::tempdir().unwrap();
            let config = MachineConfig::new(1, 16).tracked();
            let mut machine = Machine::create(&config, Console::new(std::io::sink()).unwrap()).unwrap();
            machine.guest_ram().write_obj(7_u8, GuestAddress(5 * PAGE_SIZE as u64)).unwrap();
            let mut take = |kind, name| {
                let (state, memory) = (folder.path().join("state"), folder.path().join(name));
                let request = SnapshotRequest { kind, state, memory: memory.clone() };
                machine.snapshot(&request, &mut |_, _| ControlFlow::Continue(())).unwrap();
                machine.memory().returned().clone().discard(5 * PAGE_SIZE as u64, PAGE_SIZE as u64);
                PageReader::open(&memory).unwrap()
            };
            let (base, diff) = (take(Kind::Full, "base"), take(Kind::Diff, "diff"));
            let mut body = vec![0; PAGE_SIZE];
            base.read(5, &mut body).unwrap();
            assert_eq!(body[0], 7);
            assert!(diff.present().iter().eq([5]));
            diff.read(5, &mut body).unwrap();
            assert_eq!(body[0], 0);
        }
    }
}
