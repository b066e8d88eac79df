//! The event loop feeds the guest's serial port.

mod common;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use common::{Code, PATIENCE, SMALL, machine};
use devices::serial::INPUT_LIMIT;
use vmm::event_loop::EventLoop;

/// Echoes what comes in.
fn echo() -> Code {
    // wait: mov dx, 0x3fd; in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx; out dx, al; jmp wait
    let code = Code::new().bytes(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 1, 0x74, 0xf7]);
    code.bytes(&[0x66, 0xba, 0xf8, 0x03, 0xec, 0xee]).jump(0)
}

#[test]
fn what_is_typed_reaches_the_guest_in_order() {
    let (mut machine, mut output) = machine(&SMALL, &echo());
    let (mut keyboard, end) = UnixStream::pair().unwrap();
    let _events = EventLoop::start(OwnedFd::from(end), machine.serial()).unwrap();
    machine.start();
    let text: Vec<u8> = (0..3000_u32).map(|number| (number % 251) as u8).collect();
    keyboard.write_all(&text).unwrap();
    assert_eq!(output.wait_for(text.len()), text);
}

#[test]
fn input_that_a_guest_never_reads_is_not_taken_without_end_and_the_loop_still_stops() {
    let (mut machine, _output) = machine(&SMALL, &Code::new().spin());
    let (mut keyboard, end) = UnixStream::pair().unwrap();
    let events = EventLoop::start(OwnedFd::from(end), machine.serial()).unwrap();
    keyboard.set_nonblocking(true).unwrap();
    let start = Instant::now();
    while machine.save().unwrap().serial.waiting.len() < INPUT_LIMIT {
        let _ = keyboard.write(&[b'x'; 4096]);
        assert!(start.elapsed() < PATIENCE);
    }
    // Until the loop reads no more, and so the socket takes no more.
    let mut taken = 0;
    while let Ok(count) = keyboard.write(&[b'x'; 4096]) {
        taken += count;
        assert!(taken < 64 << 20, "what the guest does not read is piled up");
    }
    drop(events);
}

#[test]
fn end_of_the_input_is_not_the_end_of_the_guest() {
    let (mut machine, mut output) = machine(&SMALL, &echo());
    let (keyboard, end) = UnixStream::pair().unwrap();
    let events = EventLoop::start(OwnedFd::from(end), machine.serial()).unwrap();
    drop(keyboard);
    machine.start();
    machine.serial_input(b"still here").unwrap();
    assert_eq!(output.wait_for(10), b"still here");
    drop(events);
}

#[test]
fn source_that_cannot_be_waited_for_is_an_error() {
    let (machine, _output) = machine(&SMALL, &Code::new().spin());
    let file = tempfile::tempfile().unwrap();
    assert!(EventLoop::start(OwnedFd::from(file), machine.serial()).is_err());
}
