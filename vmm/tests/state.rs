//! A guest that is captured goes on elsewhere exactly where it stood.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::{env, fs};

use common::{Code, Output, PATIENCE, SMALL, console, machine};
use mirror::console::Console;
use mirror::guest::{Guest, StandbyMachine};
use mirror::ids::Guid;
use mirror::memory::{Layout, PageMemory};
use vmm::{Exit, Machine, MachineConfig, MachineState, StandbyHost};

/// The guest's name.
const GUEST: Guid = Guid::from_u128(1);

/// Tells the child process where its state is.
const CHILD: &str = "UNDERSTUDY_TEST_STATE";

fn contents(memory: &PageMemory) -> Vec<u8> {
    let mut bytes = vec![0; memory.layout().bytes() as usize];
    for (page, into) in bytes.chunks_exact_mut(4096).enumerate() {
        memory.read(page as u64, into).unwrap();
    }
    bytes
}

fn fill(memory: &PageMemory, bytes: &[u8]) {
    for (page, from) in bytes.chunks_exact(4096).enumerate() {
        if from.iter().any(|&byte| byte != 0) {
            memory.write(page as u64, from).unwrap();
        }
    }
}

/// Captures a machine that stands still.
fn capture(machine: &mut Machine) -> Vec<u8> {
    machine.capture().unwrap();
    let mut state = Vec::new();
    machine.encode_captured(&mut state).unwrap();
    state
}

/// A standby that holds the twin of the machine described.
fn standby(description: &[u8], layout: &Layout, memory: &[u8], console: Arc<Console>) -> StandbyHost {
    let mut standby = StandbyHost::new(console);
    let ram = standby.allocate(GUEST, description, layout).unwrap();
    fill(&PageMemory::new(ram).unwrap(), memory);
    standby
}

fn twin(machine: &mut Machine, console: Arc<Console>) -> StandbyHost {
    let memory = contents(&PageMemory::new(Arc::clone(machine.ram())).unwrap());
    standby(&machine.describe(), machine.layout(), &memory, console)
}

/// Checks that `output` goes on counting from `next` on.
fn counts_on(output: &mut Output, next: u64) {
    let bytes = output.wait_for(300);
    let expected: Vec<u8> = (next..next + bytes.len() as u64).map(|count| count as u8).collect();
    assert_eq!(bytes, expected);
}

#[test]
fn restored_guest_counts_on_without_gap_or_repetition() {
    for tracking in [false, true] {
        let (console, mut output) = console();
        let mut machine = Machine::create(&SMALL, Arc::clone(&console)).unwrap();
        machine.load(&common::boot(common::elf(&Code::counter().0, true))).unwrap();
        if tracking {
            machine.start_tracking().unwrap();
        }
        machine.start();
        for round in 1..20 {
            output.wait_for(round * 10);
            machine.pause().unwrap();
            let next = console.produced();
            let state = capture(&mut machine);
            let (twin_console, mut twin_output) = common::console();
            let mut twin = twin(&mut machine, twin_console);
            machine.resume().unwrap();
            twin.activate(&state).unwrap();
            counts_on(&mut twin_output, next);
        }
    }
}

#[test]
fn restored_state_is_equal_field_by_field() {
    for vcpu_count in [1, 2, 5] {
        let config = MachineConfig { vcpu_count, ..SMALL };
        let (mut machine, mut output) = machine(&config, &Code::counter());
        machine.start();
        output.wait_for(20);
        machine.pause().unwrap();
        let state = capture(&mut machine);
        let mut twin = twin(&mut machine, common::console().0);
        twin.restore(&state).unwrap();
        let original = MachineState::decode(&state).unwrap();
        let restored = twin.machine().unwrap().save().unwrap();
        assert_eq!(original.differences(&restored), Vec::<String>::new());
        assert_eq!(original.vcpus.len(), usize::from(vcpu_count));
    }
}

#[test]
fn differences_are_found_in_every_part() {
    let (mut machine, _output) = machine(&SMALL, &Code::counter());
    machine.capture().unwrap();
    let state = machine.save().unwrap();
    let check = |what: &str, change: &dyn Fn(&mut MachineState)| {
        let mut other = state.clone();
        change(&mut other);
        let found = state.differences(&other);
        assert!(found.len() == 1 && found[0].contains(what), "{what}: {found:?}");
    };
    check("regs", &|s| s.vcpus[0].regs.rbx += 1);
    check("sregs", &|s| s.vcpus[0].sregs.cr3 += 1);
    check("xsave", &|s| s.vcpus[0].xsave[40] += 1);
    check("MSR", &|s| s.vcpus[0].msrs[1].data += 1);
    check("lapic", &|s| s.vcpus[0].lapic[0x20] ^= 1);
    check("events", &|s| s.vcpus[0].events.interrupt.nr ^= 1);
    check("IOAPIC", &|s| s.vm.irqchips[2][9] ^= 1);
    check("pit", &|s| s.vm.pit.channels[0].mode ^= 1);
    check("serial", &|s| s.serial.scratch ^= 1);
    check("keyboard", &|s| s.keyboard.command_byte ^= 1);
    check("ended", &|s| s.ended = Some(Exit::Reset));
}

#[test]
fn guest_that_had_ended_has_ended_in_its_twin() {
    let (mut machine, _output) = machine(&SMALL, &Code::new().exit(9).spin());
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Code(9)));
    machine.pause().unwrap();
    let state = capture(&mut machine);
    let mut twin = twin(&mut machine, common::console().0);
    twin.activate(&state).unwrap();
    assert_eq!(twin.machine().unwrap().exit_handle().get(), Some(Exit::Code(9)));
}

#[test]
fn input_that_the_guest_has_not_read_goes_with_it() {
    let spin = Code::new().spin();
    let (mut machine, _output) = machine(&SMALL, &spin);
    machine.serial_input(&[7; 100]).unwrap();
    let state = machine.save().unwrap();
    assert_eq!((state.serial.fifo.len(), state.serial.waiting.len()), (64, 36));
}

#[test]
fn pausing_and_resuming_many_times_loses_nothing() {
    let config = MachineConfig { vcpu_count: 3, ..SMALL };
    let (mut machine, mut output) = machine(&config, &Code::counter());
    machine.start_tracking().unwrap();
    machine.start();
    for round in 0..500 {
        machine.pause().unwrap();
        if round % 3 == 0 {
            machine.pause().unwrap();
            machine.capture().unwrap();
        }
        machine.resume().unwrap();
        if round % 5 == 0 {
            machine.resume().unwrap();
        }
    }
    let bytes = output.wait_for(1000);
    assert!(bytes.iter().enumerate().all(|(index, byte)| *byte == index as u8));
}

#[test]
fn paused_guest_does_not_run() {
    let (mut machine, mut output) = machine(&SMALL, &Code::counter());
    machine.start();
    output.wait_for(10);
    machine.pause().unwrap();
    let before = machine.save().unwrap();
    std::thread::yield_now();
    let after = machine.save().unwrap();
    assert_eq!(before.differences(&after), Vec::<String>::new());
}

#[test]
fn capture_of_a_running_guest_is_refused() {
    let (mut machine, _output) = machine(&SMALL, &Code::counter());
    machine.start();
    assert!(machine.capture().unwrap_err().to_string().contains("paused"));
}

#[test]
fn damaged_states_are_errors_and_never_run() {
    let (mut machine, _output) = machine(&SMALL, &Code::counter());
    let state = capture(&mut machine);
    let mut twin = twin(&mut machine, common::console().0);
    for len in (0..state.len()).step_by(97) {
        assert!(twin.activate(&state[..len]).is_err(), "{len} of {} bytes", state.len());
    }
    let mut newer = state.clone();
    newer[0] = 99;
    assert!(twin.activate(&newer).unwrap_err().to_string().contains("version 99"));
    let mut more = MachineState::decode(&state).unwrap();
    more.vcpus.push(more.vcpus[0].clone());
    let mut bytes = Vec::new();
    more.encode(&mut bytes).unwrap();
    assert!(twin.activate(&bytes).unwrap_err().to_string().contains("2 vCPUs"));
}

#[test]
fn standby_refuses_what_it_cannot_hold() {
    let (machine, _output) = machine(&SMALL, &Code::counter());
    let mut standby = StandbyHost::new(console().0);
    assert!(standby.activate(&[]).is_err(), "nothing was allocated");
    assert!(standby.allocate(GUEST, &[1, 2], machine.layout()).is_err(), "no description");
    let other = vmm::memory::layout(32).unwrap();
    let error = standby.allocate(GUEST, &machine.describe(), &other).unwrap_err();
    assert!(error.to_string().contains("layout"), "{error}");
    standby.allocate(GUEST, &machine.describe(), machine.layout()).unwrap();
    assert!(standby.allocate(GUEST, &machine.describe(), machine.layout()).is_err(), "one machine at a time");
    standby.release();
    standby.allocate(GUEST, &machine.describe(), machine.layout()).unwrap();
    assert!(standby.space() > 0);
}

#[test]
fn guest_goes_on_in_a_fresh_process() {
    let (console, mut output) = console();
    let config = MachineConfig { vcpu_count: 2, ..SMALL };
    let mut machine = Machine::create(&config, Arc::clone(&console)).unwrap();
    machine.load(&common::boot(common::elf(&Code::counter().0, true))).unwrap();
    machine.start();
    output.wait_for(100);
    machine.pause().unwrap();
    let state = capture(&mut machine);
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| fs::write(directory.path().join(name), bytes).unwrap();
    write("state", &state);
    write("memory", &contents(&PageMemory::new(Arc::clone(machine.ram())).unwrap()));
    write("description", &machine.describe());
    write("next", console.produced().to_string().as_bytes());

    let child = Command::new(env::current_exe().unwrap())
        .args(["--ignored", "--exact", "in_the_fresh_process", "--nocapture"])
        .env(CHILD, directory.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(
        child.status.success() && text.contains("1 passed"),
        "{text}\n{}",
        String::from_utf8_lossy(&child.stderr)
    );
}

#[test]
fn standby_refuses_a_guest_that_counts_on_what_its_host_lacks_and_names_it() {
    let (machine, _output) = machine(&SMALL, &Code::new().spin());
    let (config, processor) = vmm::state::read_description(&machine.describe()).unwrap();
    let layout = vmm::memory::layout(config.mem_size_mib).unwrap();
    let allocate = |processor| {
        let mut standby = StandbyHost::new(console().0);
        let description = vmm::state::describe(&config, &processor);
        standby.allocate(GUEST, &description, &layout).map(drop)
    };
    allocate(processor.clone()).expect("the same host has all of it");

    let mut demanding = processor.clone();
    demanding.msrs.push(0xdead);
    demanding.address_bits = 64;
    let error = allocate(demanding).unwrap_err().to_string();
    assert!(error.contains("MSR 0xdead") && error.contains("64 address bits"), "{error}");
    let mut all = processor;
    all.features.fill(u32::MAX);
    let error = allocate(all).unwrap_err().to_string();
    assert!(error.contains("this host cannot run the guest") && error.contains("more"), "{error}");
}

#[test]
#[ignore = "run by guest_goes_on_in_a_fresh_process"]
fn in_the_fresh_process() {
    let directory = env::var_os(CHILD).expect("started by another test");
    let read = |name: &str| fs::read(Path::new(&directory).join(name)).unwrap();
    let (console, mut output) = console();
    let (config, _) = vmm::state::read_description(&read("description")).unwrap();
    let layout = vmm::memory::layout(config.mem_size_mib).unwrap();
    let mut standby = standby(&read("description"), &layout, &read("memory"), console);
    standby.restore(&read("state")).unwrap();
    let original = MachineState::decode(&read("state")).unwrap();
    let restored = standby.machine().unwrap().save().unwrap();
    assert_eq!(original.differences(&restored), Vec::<String>::new());
    assert!(output.now().is_empty());
    standby.machine().unwrap().start();
    let next = String::from_utf8(read("next")).unwrap().parse().unwrap();
    counts_on(&mut output, next);
}
