//! Keys that are pressed reach the guest, wherever it runs.

mod common;

use common::{Code, SMALL, console, machine};
use mirror::guest::{Guest, StandbyMachine};
use mirror::ids::Guid;
use vmm::{Machine, StandbyHost};

/// The guest's name.
const GUEST: Guid = Guid::from_u128(1);

/// Ctrl, Alt and Del, down and up, in scancode set 1.
const CTRL_ALT_DEL: [u8; 8] = [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];

/// Enables keyboard and interrupt, says so by a `k`, and prints what the keyboard sends.
fn typist() -> Code {
    let code = Code::new().out(0x64, 0x60).out(0x60, 0b0100_0101).print("k");
    let start = code.0.len();
    // wait: in al, 0x64; test al, 1; jz wait; in al, 0x60; mov bl, al; print
    code.bytes(&[0xe4, 0x64, 0xa8, 1, 0x74, 0xfa, 0xe4, 0x60, 0x88, 0xc3]).print_bl().jump(start)
}

/// Whether interrupt 1 waits in the first PIC: bit 1 of its request register, the second of KVM's kvm_pic_state.
fn interrupt_waits(machine: &mut Machine) -> bool {
    machine.save().unwrap().vm.irqchips[0][1] & 1 << 1 != 0
}

#[test]
fn ctrl_alt_del_reaches_a_guest_that_listens() {
    let (mut machine, mut output) = machine(&SMALL, &typist());
    machine.start();
    output.wait_for(1);
    for round in 1..=3 {
        machine.device_limits().press_ctrl_alt_del().unwrap();
        let read = output.wait_for(1 + round * CTRL_ALT_DEL.len());
        assert_eq!(read[read.len() - CTRL_ALT_DEL.len()..], CTRL_ALT_DEL);
    }
}

#[test]
fn guest_that_has_no_driver_for_its_keyboard_is_not_said_to_have_heard() {
    let (mut machine, _output) = machine(&SMALL, &Code::new().spin());
    machine.start();
    let error = machine.device_limits().press_ctrl_alt_del().unwrap_err();
    assert!(error.to_string().contains("does not listen to its keyboard"), "{error}");
}

#[test]
fn keys_that_the_guest_has_not_read_go_with_it_and_interrupt_it_there() {
    let (mut machine, mut output) = machine(&SMALL, &typist());
    machine.start();
    output.wait_for(1);
    machine.pause().unwrap();
    assert!(!interrupt_waits(&mut machine));
    machine.device_limits().press_ctrl_alt_del().unwrap();
    assert!(interrupt_waits(&mut machine));
    // As if it had come too late for the state of the interrupt controllers.
    let mut state = machine.save().unwrap();
    state.vm.irqchips[0][1] = 0;
    let mut bytes = Vec::new();
    state.encode(&mut bytes).unwrap();

    let (console, _silent) = console();
    let mut standby = StandbyHost::new(console);
    standby.allocate(GUEST, &machine.describe(), machine.layout()).unwrap();
    standby.restore(&bytes).unwrap();
    let twin = standby.machine().unwrap();

    assert_eq!(twin.save().unwrap().keyboard, state.keyboard);
    assert!(interrupt_waits(twin));
    machine.resume().unwrap();
    assert_eq!(output.wait_for(9)[1..], CTRL_ALT_DEL);
}
