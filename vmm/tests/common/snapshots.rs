//! Machines that are snapshotted and restored.

use std::borrow::Cow;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use mirror::memory::PAGE_SIZE;
use resources::GUEST_ELF;
use vmm::snapshot::pages::PageReader;
use vmm::snapshot::state_file::StateFile;
use vmm::snapshot::{
    Kind, RestoreError, RestoreMode, RestoreSource, Snapshot, SnapshotError, SnapshotReport, SnapshotRequest,
};
use vmm::{Boot, Host, HostResources, KernelImage, Machine, MachineConfig, MachineState};

use super::watch::Watch;
use super::{Output, console};

pub const CPUS: u8 = 2;

/// A guest that counts, writes and checks its memory.
pub fn working() -> (Machine, Watch) {
    working_in(&MachineConfig::new(CPUS, 64).tracked())
}

/// The same in a machine of `config`.
pub fn working_in(config: &MachineConfig) -> (Machine, Watch) {
    let (console, output) = console();
    let mut machine = Machine::create(config, console).unwrap();
    let kernel = KernelImage::Bytes(Cow::Borrowed(GUEST_ELF));
    let cmdline = format!("cpus={CPUS} workload=count,dirty,verify dirty.rate=5000");
    machine.load(&Boot { kernel, initrd: None, cmdline }).unwrap();
    machine.start();
    let mut watch = Watch::new(output, CPUS);
    watch.more(20, 1);
    (machine, watch)
}

/// The files of a snapshot.
pub struct Files {
    pub state: PathBuf,
    pub memory: PathBuf,
}

impl Files {
    pub fn new(folder: &Path, name: &str) -> Self {
        Self { state: folder.join(format!("{name}.state")), memory: folder.join(format!("{name}.memory")) }
    }

    pub fn open(&self) -> Result<Snapshot, RestoreError> {
        Snapshot::open(&self.state, &self.memory)
    }

    pub fn are_there(&self) -> bool {
        self.state.exists() || self.memory.exists()
    }
}

pub fn take(machine: &mut Machine, kind: Kind, files: &Files) -> Result<SnapshotReport, SnapshotError> {
    let request = SnapshotRequest { kind, state: files.state.clone(), memory: files.memory.clone() };
    machine.snapshot(&request, &mut |_, _| ControlFlow::Continue(()))
}

pub fn restored(chain: Vec<Snapshot>, mode: RestoreMode) -> (Machine, Output) {
    let (console, output) = console();
    let source = RestoreSource { chain, mode, resources: HostResources::default(), track_dirty_pages: true };
    let machine = Machine::from_snapshot(&Host::open().unwrap(), &source, console).unwrap();
    (machine, output)
}

/// Page `page` as `pages` has it.
pub fn page(pages: &PageReader, page: u64) -> Vec<u8> {
    let mut body = vec![0; PAGE_SIZE];
    if pages.present().contains(page) {
        pages.read(page, &mut body).unwrap();
    }
    body
}

/// Whether two full snapshots are of the same moment, byte for byte.
pub fn assert_same(a: &Files, b: &Files) {
    let (a_pages, b_pages) = (PageReader::open(&a.memory).unwrap(), PageReader::open(&b.memory).unwrap());
    for number in 0..a_pages.header().layout.pages() {
        assert!(page(&a_pages, number) == page(&b_pages, number), "page {number} differs");
    }
    let state = |files: &Files| MachineState::decode(&StateFile::read(&files.state).unwrap().state).unwrap();
    assert_eq!(state(a).differences(&state(b)), Vec::<String>::new());
}
