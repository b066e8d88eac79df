//! Guests boot, speak, and end.

mod common;

use common::{CODE, Code, PATIENCE, SMALL, boot, console, elf, machine};
use vmm::{Exit, Machine};

#[test]
fn pvh_elf_prints_and_ends_with_its_code() {
    let (mut machine, mut output) = machine(&SMALL, &Code::new().print("hello").exit(7).spin());
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Code(7)));
    assert_eq!(output.wait_for(5), b"hello");
}

#[test]
fn elf_without_note_is_entered_in_long_mode() {
    // mov rax, 1 << 32; shr rax, 32; al is 1 only in 64-bit mode; add al, '0'
    let code = Code::new()
        .bytes(&[0x48, 0xb8, 0, 0, 0, 0, 1, 0, 0, 0, 0x48, 0xc1, 0xe8, 0x20, 0x04, b'0'])
        .bytes(&[0x88, 0xc3])
        .print_bl()
        .exit(0)
        .spin();
    let (console, mut output) = console();
    let mut machine = Machine::create(&SMALL, console).unwrap();
    machine.load(&boot(elf(&code.0, false))).unwrap();
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Code(0)));
    assert_eq!(output.wait_for(1), b"1");
    let _ = CODE;
}

#[test]
fn reset_through_the_keyboard_controller_ends_the_run() {
    let (mut machine, _output) = machine(&SMALL, &Code::new().out(0x64, 0xfe).spin());
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Reset));
}

#[test]
fn string_output_reaches_the_port_byte_by_byte() {
    // mov esi, text; mov ecx, 5; mov dx, 0x3f8; rep outsb
    let text = CODE + 0x80;
    let mut code = Code::new()
        .bytes(&[0xbe])
        .bytes(&(text as u32).to_le_bytes())
        .bytes(&[0xb9, 5, 0, 0, 0, 0x66, 0xba, 0xf8, 0x03, 0xfc, 0xf3, 0x6e])
        .exit(0)
        .spin();
    code.0.resize(0x80, 0);
    let (mut machine, mut output) = machine(&SMALL, &code.bytes(b"words"));
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Code(0)));
    assert_eq!(output.wait_for(5), b"words");
}

#[test]
fn unknown_ports_and_addresses_read_as_ones() {
    // mov dx, 0x999; in al, dx; mov bl, al; print; mov edi, 0xd0000000; mov bl, [edi]; print
    let code = Code::new()
        .bytes(&[0x66, 0xba, 0x99, 0x09, 0xec, 0x88, 0xc3])
        .print_bl()
        .bytes(&[0xbf, 0, 0, 0, 0xd0, 0x8a, 0x1f])
        .print_bl()
        .exit(0)
        .spin();
    let (mut machine, mut output) = machine(&SMALL, &code);
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(PATIENCE), Some(Exit::Code(0)));
    assert_eq!(output.wait_for(2), [0xff, 0xff]);
}

#[test]
fn triple_fault_is_told_as_a_shutdown() {
    // lidt of a zero limit, then int 0x40: no handler, no double fault handler.
    let code = Code::new().bytes(&[0x0f, 0x01, 0x1d]).bytes(&(CODE as u32 + 0x80).to_le_bytes());
    let mut code = code.bytes(&[0x0f, 0x0b]).spin();
    code.0.resize(0x90, 0);
    let (mut machine, _output) = machine(&SMALL, &code);
    machine.start();
    let exit = machine.exit_handle().wait_timeout(PATIENCE).unwrap();
    assert_eq!(exit, Exit::Shutdown);
    assert!(exit.to_string().contains("triple fault"));
}

#[test]
fn code_outside_of_memory_ends_with_a_message_that_tells_where() {
    // jmp to the hole below 4 GiB: nothing is there to be executed.
    let code = Code::new().bytes(&[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0]);
    let (mut machine, _output) = machine(&SMALL, &code);
    machine.start();
    match machine.exit_handle().wait_timeout(PATIENCE).unwrap() {
        Exit::Error(why) => assert!(why.contains("0xd0000000"), "{why}"),
        // A processor fetches ones there, which is an invalid instruction without a handler.
        Exit::Shutdown => {}
        other => panic!("{other}"),
    }
}

#[test]
fn instruction_that_cannot_be_emulated_is_told_with_its_bytes_and_place() {
    // clac: KVM's emulator does not know it. Hardware runs it (or has no such instruction, which is a triple fault).
    let (mut machine, _output) =
        machine(&SMALL, &Code::new().bytes(&[0x90, 0x0f, 0x01, 0xca]).exit(3).spin());
    machine.start();
    match machine.exit_handle().wait_timeout(PATIENCE).unwrap() {
        Exit::Error(why) => {
            assert!(why.contains("0f 01 ca"), "{why}");
            assert!(why.contains(&format!("rip {:#x}", CODE + 1)), "{why}");
        }
        Exit::Code(3) | Exit::Shutdown => {
            eprintln!(
                "SKIPPED: this host's processor runs ring-0 code itself and does not need KVM to emulate it"
            );
        }
        other => panic!("{other}"),
    }
}

#[test]
fn input_reaches_the_guest_and_is_echoed() {
    // wait: mov dx, 0x3fd; in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx; out dx, al; jmp wait
    let code = Code::new().bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xf7]);
    let code = code.bytes(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee]).jump(0);
    let (mut machine, mut output) = machine(&SMALL, &code);
    machine.start();
    let input: Vec<u8> = (0..200).collect();
    assert_eq!(machine.serial_input(&input).unwrap(), input.len());
    assert_eq!(output.wait_for(input.len()), input);
}

#[test]
fn guest_that_fills_the_held_console_waits_and_can_be_paused() {
    // A guest in ring 0 is slow here, so most of what is held is not its own.
    let (console, mut output) = console();
    console.hold();
    console.push(&vec![b'.'; mirror::console::HOLD_LIMIT as usize - 10]);
    let mut machine = Machine::create(&SMALL, console.clone()).unwrap();
    machine.load(&boot(elf(&Code::counter().0, true))).unwrap();
    machine.start();
    while console.has_room() {
        std::thread::yield_now();
    }
    mirror::guest::Guest::pause(&mut machine).unwrap();
    let produced = console.produced();
    assert!(produced <= mirror::console::HOLD_LIMIT + 1, "{produced}");
    mirror::guest::Guest::resume(&mut machine).unwrap();
    console.pass();
    let bytes = output.wait_for(mirror::console::HOLD_LIMIT as usize + 300);
    let start = mirror::console::HOLD_LIMIT as usize - 10;
    assert!(bytes[start..].iter().enumerate().all(|(index, byte)| *byte == index as u8));
}
