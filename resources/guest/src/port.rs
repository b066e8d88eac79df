//! Port I/O. Every access is an exit to the VMM: 40 µs from ring 3 on the machine's own KVM.

use core::arch::asm;

/// Reads one byte from `port`.
pub fn read(port: u16) -> u8 {
    let value;
    // SAFETY: reading the ports this guest knows (serial) changes no memory.
    unsafe { asm!("in al, dx", out("al") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
    value
}

/// Writes one byte to `port`.
pub fn write(port: u16, value: u8) {
    // SAFETY: the ports this guest knows (serial, exit) change no memory.
    unsafe { asm!("out dx, al", in("al") value, in("dx") port, options(nomem, nostack, preserves_flags)) };
}

/// Writes all `bytes` to `port`, in one exit.
pub fn write_all(port: u16, bytes: &[u8]) {
    // SAFETY: reads exactly `bytes`, and writes no memory.
    unsafe {
        asm!("rep outsb", inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _, in("dx") port,
            options(readonly, nostack, preserves_flags));
    };
}
