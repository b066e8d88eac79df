//! The interrupt table, and the report of exceptions that must not happen.

use crate::io_apic::DEVICE_VECTOR;
use crate::lapic::{SPURIOUS, TIMER_VECTOR};
use crate::per_cpu::PerCpu;
use crate::platform;
use crate::protocol::{EXIT_PANIC, Line};
use crate::serial;

const EXCEPTIONS: usize = 32;
/// Size of one of the `exception_stubs`.
const STUB_BYTES: usize = 16;
/// Selector of ring-0 code in the GDT of `ring0.s`.
const CODE64: u64 = 0x10;
/// Present, ring 0, interrupt gate: interrupts stay off in the handler.
const INTERRUPT_GATE: u64 = 0x8e00;

type Gate = [u64; 2];

#[repr(C, align(4096))]
struct Gates([Gate; 256]);

/// Loaded by `ring0.s` on every vCPU.
#[unsafe(no_mangle)]
static interrupt_table: PerCpu<Gates, 1> = PerCpu::new([Gates([[0; 2]; 256])]);

unsafe extern "C" {
    static exception_stubs: u8;
    static timer_interrupt: u8;
    static device_interrupt: u8;
    static spurious_interrupt: u8;
}

/// To be called once, on vCPU 0, before the others are started.
pub fn fill_interrupt_table() {
    // SAFETY: taken here alone, and the processor only reads it.
    let gates = unsafe { &mut interrupt_table.take(0).0 };
    let stubs = (&raw const exception_stubs) as usize;
    for (vector, gate) in gates.iter_mut().take(EXCEPTIONS).enumerate() {
        *gate = gate_to(stubs + vector * STUB_BYTES);
    }
    gates[TIMER_VECTOR as usize] = gate_to((&raw const timer_interrupt) as usize);
    gates[DEVICE_VECTOR as usize] = gate_to((&raw const device_interrupt) as usize);
    gates[SPURIOUS as usize] = gate_to((&raw const spurious_interrupt) as usize);
}

fn gate_to(handler: usize) -> Gate {
    let handler = handler as u64;
    let low = (handler & 0xffff) | CODE64 << 16 | INTERRUPT_GATE << 32 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

/// Where `ring0.s` goes, in ring 3 again, after an exception that it has no handler for.
#[unsafe(no_mangle)]
extern "C" fn report_panic(vector: u64, rip: u64, err: u64, cr2: u64) -> ! {
    report(vector as u8, rip, err, cr2)
}

/// Prints the `panic` line and ends.
pub fn report(vector: u8, rip: u64, err: u64, cr2: u64) -> ! {
    serial::print_last(Line::Panic { vector, rip, err, cr2 }.encode().as_bytes());
    platform::exit(EXIT_PANIC)
}
