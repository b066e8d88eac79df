//! The I/O APIC, used from ring 3 through a page that ring 0 mapped for it (82093AA datasheet, 3.2).

use core::ptr;

/// Where `ring0.s` maps the registers.
const SELECT: usize = 0xfec0_0000;
const WINDOW: usize = 0xfec0_0010;
const REDIRECTIONS: u32 = 0x10;
/// Lines that it has.
const LINES: u32 = 24;

/// The vector of all devices.
pub const DEVICE_VECTOR: u8 = 0x30;

/// Lets `line` interrupt vCPU 0, by edge, at [`DEVICE_VECTOR`]. What is no line is left alone.
pub fn route(line: u32) {
    if line < LINES {
        // Destination 0; fixed, physical, edge, active high, not masked.
        write(REDIRECTIONS + 2 * line + 1, 0);
        write(REDIRECTIONS + 2 * line, u32::from(DEVICE_VECTOR));
    }
}

fn write(register: u32, value: u32) {
    // SAFETY: the page is mapped and holds no memory of ours; only vCPU 0 comes here.
    unsafe { ptr::write_volatile(SELECT as *mut u32, register) };
    // SAFETY: as above.
    unsafe { ptr::write_volatile(WINDOW as *mut u32, value) };
}
