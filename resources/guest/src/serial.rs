//! The first serial port, polled. The line status is asked once per FIFO load, not once per byte: exits are dear.

use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use crate::{lapic, port};

const COM1: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = COM1 + 1;
const FIFO_CONTROL: u16 = COM1 + 2;
const LINE_CONTROL: u16 = COM1 + 3;
const MODEM_CONTROL: u16 = COM1 + 4;
const LINE_STATUS: u16 = COM1 + 5;
const TRANSMITTER_EMPTY: u8 = 0x20;
/// Bytes that a 16550 takes once its transmitter is empty.
const FIFO: usize = 16;
/// Polls before the processor is given away between two of them.
const EAGER_POLLS: u32 = 64;
const POLL_NS: u32 = 1_000_000;
/// Attempts to get the line lock before the processor is given away between two of them: a line takes its holder far
/// longer (0.3 ms and more) than idling costs.
const EAGER_ATTEMPTS: u32 = 100;
const ATTEMPT_NS: u32 = 200_000;
/// Attempts before the last line is printed without the lock: some 50 ms.
const LAST_ATTEMPTS: u32 = 1_000_000;

/// Held while a line is written, so that lines of two vCPUs do not mix.
static LINE: AtomicBool = AtomicBool::new(false);

/// Eight data bits, FIFO on, no interrupts.
pub fn set_up() {
    port::write(INTERRUPT_ENABLE, 0);
    port::write(LINE_CONTROL, 3);
    port::write(FIFO_CONTROL, 1);
    port::write(MODEM_CONTROL, 3);
}

/// Prints a line; waits for other vCPUs to finish theirs.
pub fn print(line: &[u8]) {
    let mut attempts = 0;
    while LINE.swap(true, Ordering::Acquire) {
        attempts += 1;
        if attempts > EAGER_ATTEMPTS {
            lapic::idle_for(ATTEMPT_NS);
        } else {
            spin_loop();
        }
    }
    print_now(line);
    LINE.store(false, Ordering::Release);
}

/// Prints the last line of all: no other vCPU prints after it. If one never finishes its own line, this one begins in
/// the middle of it, on a new line.
pub fn print_last(line: &[u8]) {
    let mut attempts = 0;
    while LINE.swap(true, Ordering::Acquire) {
        attempts += 1;
        if attempts > LAST_ATTEMPTS {
            print_now(b"\n");
            break;
        }
        spin_loop();
    }
    print_now(line);
}

fn print_now(line: &[u8]) {
    for load in line.chunks(FIFO) {
        wait_until_empty();
        port::write_all(COM1, load);
    }
}

fn wait_until_empty() {
    let mut polls = 0;
    while port::read(LINE_STATUS) & TRANSMITTER_EMPTY == 0 {
        polls += 1;
        if polls > EAGER_POLLS {
            lapic::idle_for(POLL_NS);
        }
    }
}
