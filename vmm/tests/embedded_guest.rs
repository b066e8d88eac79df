//! The embedded guest, which checks its own memory, on several vCPUs with timers and interrupts; and its twin.

mod common;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::pool::Pool;
use common::watch::Watch;
use common::{Output, PATIENCE, console};
use mirror::console::Console;
use mirror::dirty::DirtySet;
use mirror::guest::{Guest, StandbyMachine};
use mirror::ids::Guid;
use mirror::memory::{PAGE_SIZE, PageMemory};
use resources::GUEST_ELF;
use vmm::config::MAX_VCPUS;
use vmm::{Boot, Exit, KernelImage, Machine, MachineConfig, MachineState, StandbyHost};

/// The guest's name.
const GUEST: Guid = Guid::from_u128(1);

fn config(vcpu_count: u8) -> MachineConfig {
    MachineConfig::new(vcpu_count, 64)
}

fn embedded(vcpu_count: u8, parameters: &str) -> (Machine, Output) {
    let (machine, output, _) = embedded_with_console(&config(vcpu_count), parameters);
    (machine, output)
}

fn embedded_with_console(config: &MachineConfig, parameters: &str) -> (Machine, Output, Arc<Console>) {
    let (console, output) = console();
    let mut machine = Machine::create(config, Arc::clone(&console)).unwrap();
    let kernel = KernelImage::Bytes(Cow::Borrowed(GUEST_ELF));
    let cmdline = format!("cpus={} {parameters}", config.vcpu_count);
    machine.load(&Boot { kernel, initrd: None, cmdline }).unwrap();
    machine.start();
    (machine, output, console)
}

/// Keeps the memory of a twin up to date with that of a machine.
struct Copier {
    from: PageMemory,
    to: PageMemory,
    dirty: DirtySet,
    page: Vec<u8>,
}

impl Copier {
    fn copy(&mut self) -> u64 {
        for page in self.dirty.iter() {
            self.from.read(page, &mut self.page).unwrap();
            self.to.write(page, &self.page).unwrap();
        }
        let count = self.dirty.count();
        self.dirty.clear();
        count
    }
}

/// A twin of the running `machine`, and what copies its memory there.
fn attach(machine: &mut Machine) -> (StandbyHost, Copier, Output) {
    let (console, output) = console();
    let mut twin = StandbyHost::new(console);
    let ram = twin.allocate(GUEST, &machine.describe(), machine.layout()).unwrap();
    let from = PageMemory::new(Arc::clone(machine.ram())).unwrap();
    let to = PageMemory::new(ram).unwrap();
    let dirty = DirtySet::new(from.layout().pages());
    (twin, Copier { from, to, dirty, page: vec![0; PAGE_SIZE] }, output)
}

#[test]
fn all_vcpus_work_and_find_their_memory_intact() {
    for cpus in [1, 2, 4] {
        let (_machine, output) = embedded(cpus, "workload=count,dirty,verify dirty.rate=5000 dirty.set=16");
        Watch::new(output, cpus).more(5, 2);
    }
}

#[test]
fn guest_ends_with_its_code_after_so_many_lines() {
    let (machine, _output) = embedded(1, "count.rate=1000 count.limit=20");
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Code(0)));
}

#[test]
fn twin_goes_on_without_gap_and_finds_every_page_intact() {
    let parameters = "workload=count,dirty,verify dirty.rate=20000 dirty.set=16 dirty.pattern=hotcold";
    for (cpus, tracking_rounds) in [(1, 6), (2, 6), (4, 3)] {
        fail_over(&config(cpus), parameters, tracking_rounds);
    }
}

#[test]
fn guest_of_32_vcpus_boots_on_all_of_them_and_goes_on_in_its_twin() {
    // More than any test machine has processors for: so a little work for each.
    fail_over(&config(MAX_VCPUS), "workload=count,dirty,verify dirty.rate=200 dirty.set=4 count.rate=5", 3);
}

mod huge {
    use super::*;

    #[test]
    fn twin_of_huge_pages_goes_on_without_gap_and_finds_every_page_intact() {
        let _pool = Pool::of(64);
        let config = MachineConfig { huge_pages: true, ..config(2) };
        fail_over(&config, "workload=count,dirty,verify dirty.rate=20000 dirty.set=16", 3);
    }
}

/// Lets a guest go on in a twin, with epochs before, and checks all that it says.
fn fail_over(config: &MachineConfig, parameters: &str, tracking_rounds: usize) {
    let (mut machine, output, console) = embedded_with_console(config, parameters);
    let mut watch = Watch::new(output, config.vcpu_count);
    watch.more(2, 1);

    let (mut twin, mut copier, twin_output) = attach(&mut machine);
    machine.start_tracking().unwrap();
    machine.populated(&mut copier.dirty).unwrap();
    for _ in 0..tracking_rounds {
        machine.harvest(&mut copier.dirty).unwrap();
        copier.copy();
        watch.more(2, 0);
    }
    // Epochs: what is dirty in a pause is copied in it.
    for _ in 0..20 {
        machine.pause().unwrap();
        machine.harvest(&mut copier.dirty).unwrap();
        copier.copy();
        machine.capture().unwrap();
        machine.resume().unwrap();
    }
    watch.more(2, 0);
    machine.pause().unwrap();
    machine.harvest(&mut copier.dirty).unwrap();
    copier.copy();
    machine.capture().unwrap();
    let mut state = Vec::new();
    machine.encode_captured(&mut state).unwrap();

    let mut page = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
    for number in 0..copier.from.layout().pages() {
        copier.from.read(number, &mut page.0).unwrap();
        copier.to.read(number, &mut page.1).unwrap();
        assert!(page.0 == page.1, "page {number} differs");
    }
    twin.restore(&state).unwrap();
    let restored = twin.machine().unwrap().save().unwrap();
    let original = MachineState::decode(&state).unwrap();
    assert_eq!(original.differences(&restored), Vec::<String>::new());

    // The console writes from a thread of its own: everything that was produced must be out.
    console.flush();
    watch.go_on(twin_output);
    twin.machine().unwrap().start();
    watch.more(3, 1);
}

#[test]
fn hammered_guest_loses_neither_interrupts_nor_pages() {
    let (mut machine, output) = embedded(3, "workload=count,dirty,verify dirty.rate=20000 dirty.set=16");
    let mut watch = Watch::new(output, 3);
    watch.more(1, 0);
    machine.start_tracking().unwrap();
    let mut dirty = DirtySet::new(machine.layout().pages());
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        machine.pause().unwrap();
        machine.harvest(&mut dirty).unwrap();
        machine.capture().unwrap();
        machine.resume().unwrap();
        watch.look();
    }
    watch.more(3, 1);
}
