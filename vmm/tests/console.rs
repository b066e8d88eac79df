//! A guest's virtio console, from the guest's registers to a program on its socket, and over there after a failover.

mod common;

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use common::{Code, PATIENCE, SMALL};
use devices::virtio::console::{COLUMNS, ConsoleConfig, ConsolePlace, ROWS};
use mirror::guest::{Guest, StandbyMachine};
use mirror::ids::Guid;
use mirror::memory::PageMemory;
use vm_memory::{Bytes, GuestAddress};
use vmm::{DevicesConfig, HostResources, Machine, MachineConfig, StandbyHost};

/// The guest's name.
const GUEST: Guid = Guid::from_u128(1);

/// Registers of the transport (virtio 1.2, 4.2.2).
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SELECT: u64 = 0x24;
const QUEUE_SELECT: u64 = 0x30;
const QUEUE_SIZE: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const QUEUE_NOTIFY: u64 = 0x50;
const STATUS: u64 = 0x70;
const QUEUE_TABLE: u64 = 0x80;
const QUEUE_AVAILABLE: u64 = 0x90;
const QUEUE_USED: u64 = 0xa0;

/// Where the guest has its queue for output, a request's bytes, and what the test lets it go on with.
const TABLE: u64 = 0x30_0000;
const AVAILABLE: u64 = 0x30_1000;
const USED: u64 = 0x30_2000;
const TEXT: u64 = 0x30_3000;
const GATE: u64 = 0x30_4000;

const FIRST: &[u8] = b"before the failover\n";
const SECOND: &[u8] = b"after it\n";

fn config(place: ConsolePlace) -> MachineConfig {
    let console = ConsoleConfig { place, columns: COLUMNS, rows: ROWS };
    MachineConfig { devices: DevicesConfig { console: Some(console), ..DevicesConfig::NONE }, ..SMALL }
}

/// mov edi, address; mov dword [edi], value
fn store(code: Code, address: u64, value: u32) -> Code {
    let code = code.bytes(&[0xbf]).bytes(&(address as u32).to_le_bytes());
    code.bytes(&[0xc7, 0x07]).bytes(&value.to_le_bytes())
}

/// Sets the console's queue for output up, and writes the first text; the second when the gate is open.
fn driver(window: u64) -> Code {
    let registers = [
        (STATUS, 3),
        (DRIVER_FEATURES_SELECT, 1),
        (DRIVER_FEATURES, 1),
        (STATUS, 0xb),
        (QUEUE_SELECT, 1),
        (QUEUE_SIZE, 4),
        (QUEUE_TABLE, TABLE as u32),
        (QUEUE_AVAILABLE, AVAILABLE as u32),
        (QUEUE_USED, USED as u32),
        (QUEUE_READY, 1),
        (STATUS, 0xf),
    ];
    let code = registers
        .into_iter()
        .fold(Code::new(), |code, (register, value)| store(code, window + register, value));
    let write = |code, count: u32| {
        let code = store(code, AVAILABLE, count << 16);
        store(code, window + QUEUE_NOTIFY, 1)
    };
    let code = write(code, 1).print("1").wait_for_byte(GATE);
    write(code, 2).print("2").halt()
}

/// Lays both texts out as requests that the guest makes available one by one.
fn lay_out(machine: &Machine) {
    let mut at = TEXT;
    for (index, text) in [FIRST, SECOND].into_iter().enumerate() {
        machine.ram().write_slice(text, GuestAddress(at)).unwrap();
        let entry = TABLE + 16 * index as u64;
        machine.ram().write_obj(at, GuestAddress(entry)).unwrap();
        machine.ram().write_obj(text.len() as u64, GuestAddress(entry + 8)).unwrap();
        machine.ram().write_obj(index as u16, GuestAddress(AVAILABLE + 4 + 2 * index as u64)).unwrap();
        at += text.len() as u64;
    }
}

fn connect(path: &Path) -> UnixStream {
    let end = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE)).unwrap();
                return stream;
            }
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        thread::yield_now();
    }
}

fn heard(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

/// A machine that is about to run the driver, and where its console is.
fn machine(folder: &Path) -> (Machine, common::Output, PathBuf) {
    let path = folder.join("console");
    let (console, output) = common::console();
    let mut machine = Machine::create(&config(ConsolePlace::Socket(path.clone())), console).unwrap();
    let window = machine.virtio_windows()[0].base;
    machine.load(&common::boot(common::elf(&driver(window).0, true))).unwrap();
    lay_out(&machine);
    (machine, output, path)
}

#[test]
fn program_hears_the_guest() {
    let folder = tempfile::tempdir().unwrap();
    let (mut machine, _output, path) = machine(folder.path());
    machine.start();
    assert_eq!(heard(&mut connect(&path), FIRST.len()), FIRST);
    machine.ram().write_obj(1_u8, GuestAddress(GATE)).unwrap();
    assert_eq!(heard(&mut connect(&path), SECOND.len()), SECOND);
}

#[test]
fn what_was_held_comes_out_at_the_standby_and_the_guest_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (mut machine, mut output, path) = machine(folder.path());
    machine.hold_output();
    machine.start_tracking().unwrap();
    machine.start();
    output.wait_for(1);
    // The device loop takes the request in its own time; the guest could see it in the used ring.
    let end = Instant::now() + PATIENCE;
    while machine.ram().read_obj::<u16>(GuestAddress(USED + 2)).unwrap() == 0 {
        assert!(Instant::now() < end, "the request was not taken");
        thread::yield_now();
    }
    let mut program = connect(&path);
    machine.pause().unwrap();
    machine.capture().unwrap();
    let mut state = Vec::new();
    machine.encode_captured(&mut state).unwrap();
    let from = PageMemory::new(machine.ram().clone()).unwrap();

    let there = folder.path().join("there");
    let resources = HostResources { console: Some(there.clone()), ..HostResources::default() };
    let mut standby = StandbyHost::new(common::console().0).with_resources(resources);
    let to =
        PageMemory::new(standby.allocate(GUEST, &machine.describe(), machine.layout()).unwrap()).unwrap();
    let mut page = vec![0; 4096];
    for number in 0..from.layout().pages() {
        from.read(number, &mut page).unwrap();
        to.write(number, &page).unwrap();
    }
    drop(machine);
    let mut nothing = Vec::new();
    program.read_to_end(&mut nothing).unwrap();
    assert_eq!(nothing, b"", "its epoch was never committed");

    standby.activate(&state).unwrap();
    let mut program = connect(&there);
    assert_eq!(heard(&mut program, FIRST.len()), FIRST);
    standby.machine().unwrap().ram().write_obj(1_u8, GuestAddress(GATE)).unwrap();
    assert_eq!(heard(&mut program, SECOND.len()), SECOND);
}
