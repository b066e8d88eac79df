//! A machine from a snapshot.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use mirror::console::Console;
use mirror::dirty::DirtySet;
use mirror::memory::{PAGE_SIZE, PageMemory};
use thiserror::Error;

use super::pager::{Pager, PagerError};
use super::pages::{PageReader, PageWriter};
use super::publish::Unpublished;
use super::state_file::StateFile;
use super::take::{Progress, SnapshotError, SnapshotTracking};
use super::{FileError, Identity};
use crate::config::{HostResources, MachineConfig, UnknownDevice};
use crate::dirty;
use crate::host::Host;
use crate::machine::{CreateError, Machine, MachineError};
use crate::memory::{self, Memory};
use crate::processor::Processor;
use crate::state::{self, MachineState, StateError};

/// Pages that are read and written in one call, at most.
const COPIED_TOGETHER: usize = 64;

/// Pages after which it is told how far copying is.
const TOLD_EVERY: u64 = 4096;

/// A snapshot's two files, opened and verified but for the pages themselves.
#[derive(Debug)]
pub struct Snapshot {
    identity: Identity,
    config: MachineConfig,
    processor: Processor,
    state: MachineState,
    encoded: StateFile,
    pages: Arc<PageReader>,
}

/// Why a snapshot cannot be used.
#[derive(Debug, Error)]
pub enum RestoreError {
    /// A file.
    #[error(transparent)]
    File(#[from] FileError),
    /// What is in the state file.
    #[error("the snapshot's state: {0}")]
    State(#[from] StateError),
    /// The two files are of two snapshots.
    #[error("{state} and {memory} are files of two different snapshots")]
    Pair {
        /// The state file.
        state: String,
        /// The memory file.
        memory: String,
    },
    /// A snapshot that is not full was given as the first.
    #[error("the first snapshot must be a full one; this is differential")]
    NotFull,
    /// A differential snapshot of another one.
    #[error(
        "differential snapshot number {0} is not of the snapshot before it: give all of them, in the order in which they were taken"
    )]
    Chain(usize),
    /// What cannot be mapped.
    #[error(
        "memory can only be mapped from one full snapshot of ordinary pages; merge the snapshots first, or copy"
    )]
    CannotMap,
    /// Memory cannot come on demand.
    #[error(transparent)]
    OnDemand(#[from] PagerError),
    /// Nor can huge pages.
    #[error("memory of huge pages cannot be provided on demand: copy it")]
    HugeOnDemand,
    /// A device is elsewhere than the machine knows.
    #[error(transparent)]
    Unknown(#[from] UnknownDevice),
    /// The guest has seen features that this host has not.
    #[error("this host cannot run the guest: its processor or KVM lacks {}", .0.join(", "))]
    Processor(Vec<String>),
    /// The machine cannot be created.
    #[error("creating the machine: {0}")]
    Create(#[from] CreateError),
    /// The machine does not take the state.
    #[error("restoring the machine: {0}")]
    Machine(#[from] MachineError),
    /// Whoever was told how far it is did not want it any more.
    #[error("the restore was broken off")]
    Cancelled,
    /// The merged snapshot cannot be written.
    #[error(transparent)]
    Write(#[from] SnapshotError),
}

impl Snapshot {
    /// Opens the files of a snapshot.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn open(state: &Path, memory: &Path) -> Result<Self, RestoreError> {
        let encoded = StateFile::read(state)?;
        let pages = PageReader::open(memory)?;
        if pages.header().identity != encoded.identity {
            let (state, memory) = (state.display().to_string(), memory.display().to_string());
            return Err(RestoreError::Pair { state, memory });
        }
        let (config, processor) = state::read_description(&encoded.description)?;
        let machine = MachineState::decode(&encoded.state)?;
        let layout = memory::layout(config.mem_size_mib).map_err(CreateError::Layout)?;
        if layout != pages.header().layout {
            let reason = format!("its layout is not that of a machine with {} MiB", config.mem_size_mib);
            return Err(FileError::Content { path: memory.into(), reason }.into());
        }
        Ok(Self {
            identity: encoded.identity.clone(),
            config,
            processor,
            state: machine,
            encoded,
            pages: Arc::new(pages),
        })
    }

    /// What the machine is made of.
    pub fn config(&self) -> &MachineConfig {
        &self.config
    }

    /// Whether it has all of memory.
    pub fn is_full(&self) -> bool {
        self.identity.base.is_none()
    }

    /// Its pages.
    pub fn pages(&self) -> &PageReader {
        &self.pages
    }

    /// Reads and verifies every page.
    ///
    /// # Errors
    /// The first that is damaged.
    pub fn verify(&self) -> Result<(), FileError> {
        self.pages.verify()
    }
}

/// How memory comes from the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestoreMode {
    /// The file is mapped: pages are read when they are touched, unverified, and what the guest writes stays out of it.
    /// The file must not change as long as the guest runs.
    Map,
    /// Every page is read and verified before the guest runs.
    Copy,
    /// Every page is read and verified when it is touched first. The files must not change until all are read.
    OnDemand {
        /// Pages that nobody touches are read, too, as soon as can be. Without, they are when all are needed: for a
        /// snapshot or a mirror.
        eager: bool,
    },
}

/// What to restore, and how.
#[derive(Debug)]
pub struct RestoreSource {
    /// A full snapshot, and the differential ones to be laid over it, in the order in which they were taken.
    pub chain: Vec<Snapshot>,
    /// How memory comes from them.
    pub mode: RestoreMode,
    /// What of the devices is elsewhere on this host.
    pub resources: HostResources,
    /// Whether pages written are logged from the start, so that the next snapshot may be differential.
    pub track_dirty_pages: bool,
}

impl Machine {
    /// A machine as it was when the last snapshot of `source` was taken. It stands still; its serial output goes to
    /// `console`.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn from_snapshot(
        host: &Host,
        source: &RestoreSource,
        console: Arc<Console>,
    ) -> Result<Self, RestoreError> {
        Self::from_snapshot_telling(host, source, console, &mut |_, _| ControlFlow::Continue(()))
    }

    /// As [`Self::from_snapshot`]; `progress` is told how many pages of memory have been looked at, of how many, while
    /// they are copied, and may break it off.
    ///
    /// # Errors
    /// [`RestoreError`]
    pub fn from_snapshot_telling(
        host: &Host,
        source: &RestoreSource,
        console: Arc<Console>,
        progress: Progress<'_>,
    ) -> Result<Self, RestoreError> {
        let (base, last) = check(&source.chain)?;
        let mut config = last.config.clone();
        config.devices.relocate(&source.resources)?;
        config.track_dirty_pages = source.track_dirty_pages;
        let layout = memory::layout(config.mem_size_mib).map_err(CreateError::Layout)?;
        let memory = match source.mode {
            RestoreMode::Map if source.chain.len() > 1 || config.huge_pages => {
                return Err(RestoreError::CannotMap);
            }
            RestoreMode::Map => Memory::map_private(layout, base.pages.file(), super::pages::DATA),
            RestoreMode::OnDemand { .. } if config.huge_pages => return Err(RestoreError::HugeOnDemand),
            RestoreMode::Copy | RestoreMode::OnDemand { .. } => Memory::new(layout, config.huge_pages),
        };
        let mut memory = memory.map_err(CreateError::Memory)?;
        match source.mode {
            RestoreMode::Map => {}
            RestoreMode::Copy => copy(&source.chain, &memory, config.huge_pages, progress)?,
            RestoreMode::OnDemand { eager } => {
                let chain = source.chain.iter().map(|snapshot| Arc::clone(&snapshot.pages)).collect();
                let pager = Pager::start(memory.ram(), chain, eager)?;
                memory = memory.provided_by(pager);
            }
        }
        let mut machine = Self::create_in(host, &config, console, memory)?;
        let missing = last.processor.missing_in(&machine.processor());
        if !missing.is_empty() {
            return Err(RestoreError::Processor(missing));
        }
        machine.check_disks()?;
        machine.restore(&last.state)?;
        machine.rely_on_pager().map_err(MachineError::from)?;
        if config.track_dirty_pages {
            let pages = DirtySet::new(machine.layout().pages());
            machine.snapshots = SnapshotTracking { since: Some((last.identity.id, pages)) };
        }
        Ok(machine)
    }
}

/// The first and the last of `chain`, each a snapshot of the one before.
fn check(chain: &[Snapshot]) -> Result<(&Snapshot, &Snapshot), RestoreError> {
    let (Some(base), Some(last)) = (chain.first(), chain.last()) else { return Err(RestoreError::NotFull) };
    if !base.is_full() {
        return Err(RestoreError::NotFull);
    }
    for (index, pair) in chain.windows(2).enumerate() {
        if pair[1].identity.base != Some(pair[0].identity.id)
            || pair[1].pages.header().layout != base.pages.header().layout
        {
            return Err(RestoreError::Chain(index + 1));
        }
    }
    Ok((base, last))
}

/// The newest snapshot of `chain` that has page `page`.
fn newest(chain: &[Snapshot], page: u64) -> Option<&Snapshot> {
    chain.iter().rev().find(|snapshot| snapshot.pages.present().contains(page))
}

fn each_page(
    chain: &[Snapshot],
    mut with: impl FnMut(u64, &[u8]) -> Result<(), RestoreError>,
) -> Result<(), RestoreError> {
    let mut body = vec![0; PAGE_SIZE];
    let pages = chain.first().map_or(0, |base| base.pages.header().layout.pages());
    for page in 0..pages {
        if let Some(snapshot) = newest(chain, page) {
            snapshot.pages.read(page, &mut body)?;
            with(page, &body)?;
        }
    }
    Ok(())
}

/// Fills `memory`, which is all zeros, with the pages of `chain`: they do not count as written.
fn copy(chain: &[Snapshot], memory: &Memory, huge: bool, progress: Progress<'_>) -> Result<(), RestoreError> {
    let pages = PageMemory::new(Arc::clone(memory.ram())).map_err(CreateError::Layout)?;
    let mut put = |first: u64, bodies: &[u8]| {
        if !huge {
            return memory.fill(first, bodies);
        }
        for (page, body) in (first..).zip(bodies.chunks(PAGE_SIZE)) {
            // The layouts are the same: the page is there.
            let _ = pages.write(page, body);
        }
        Ok(())
    };
    let mut bodies = vec![0; COPIED_TOGETHER * PAGE_SIZE];
    let end = memory.layout().pages();
    let (mut page, mut told) = (0, 0);
    while page < end {
        let Some(snapshot) = newest(chain, page) else {
            page += 1;
            continue;
        };
        let same = |&page: &u64| newest(chain, page).is_some_and(|newest| std::ptr::eq(newest, snapshot));
        let count = (page..end).take(COPIED_TOGETHER).take_while(same).count();
        let run = &mut bodies[..count * PAGE_SIZE];
        snapshot.pages.read_run(page, run)?;
        each_filled_run(page, run, &mut put).map_err(CreateError::Memory)?;
        page += count as u64;
        if page - told >= TOLD_EVERY || page == end {
            told = page;
            if progress(page, end).is_break() {
                return Err(RestoreError::Cancelled);
            }
        }
    }
    // Those of huge pages were written as devices write.
    dirty::harvest_own_writes(memory.ram(), &mut DirtySet::new(end));
    Ok(())
}

/// Calls `with` for each run of pages that are not all zeros: such a page need not be touched.
fn each_filled_run<E>(
    first: u64,
    bodies: &[u8],
    mut with: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let filled = |body: &[u8]| body.iter().any(|&byte| byte != 0);
    let mut at = 0;
    while at < bodies.len() {
        let run = bodies[at..].chunks(PAGE_SIZE).take_while(|body| filled(body)).count() * PAGE_SIZE;
        if run > 0 {
            with(first + (at / PAGE_SIZE) as u64, &bodies[at..at + run])?;
        }
        at += run.max(PAGE_SIZE);
    }
    Ok(())
}

/// Writes one full snapshot that is the same as `chain`: the full one with the differential ones laid over it.
///
/// # Errors
/// [`RestoreError`]; nothing appears under the names then.
pub fn merge(chain: &[Snapshot], state: &Path, memory: &Path) -> Result<(), RestoreError> {
    let (base, last) = check(chain)?;
    let failed = |path: &Path| {
        let path = path.to_path_buf();
        move |cause| SnapshotError::Write { path, cause }
    };
    let (memory_place, file) = Unpublished::create(memory).map_err(failed(memory))?;
    let (state_place, mut state_file) = Unpublished::create(state).map_err(failed(state))?;
    let mut pages = PageWriter::new(file, &base.pages.header().layout).map_err(failed(memory))?;
    each_page(chain, |page, body| Ok(pages.write(page, body).map_err(failed(memory))?))?;
    let identity = Identity { id: last.identity.id, base: None };
    pages.finish(identity.clone()).map_err(failed(memory))?;
    let whole = StateFile { identity, ..last.encoded.clone() };
    let write = |file: &mut std::fs::File| -> std::io::Result<()> {
        std::io::Write::write_all(file, &whole.encode()?)?;
        file.sync_all()
    };
    write(&mut state_file).map_err(failed(state))?;
    memory_place.publish().map_err(failed(memory))?;
    state_place.publish().map_err(failed(state))?;
    Ok(())
}
