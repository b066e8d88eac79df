//! Starting the other vCPUs: INIT and STARTUP through the local APIC, one vCPU after the other.
//!
//! They start in real mode, in a copy of a few instructions below 1 MiB: the ordinary way. It needs no detour on
//! kvm_pvm, whose instruction emulator knows real mode.

use core::hint::spin_loop;
use core::ptr;
use core::sync::atomic::{AtomicU32, Ordering};

use crate::lapic;
use crate::platform::GuestPlatform;
use crate::protocol::Platform;
use crate::time::Scale;

/// Where the copy goes: a page of low memory. What the VMM put there has been read by then.
const TRAMPOLINE_PAGE: u8 = 8;
/// Limit and 32-bit base.
const GDT_POINTER_BYTES: usize = 6;
/// How long a vCPU may take to appear.
const PATIENCE_NS: u64 = 2_000_000_000;
/// STARTUP is sent again after this time: the first may come while INIT is still on its way.
const RETRY_NS: u64 = 20_000_000;

/// The vCPU that is being started, read by `ring0.s`.
#[unsafe(no_mangle)]
static starting_cpu: AtomicU32 = AtomicU32::new(0);
/// The vCPU that came up last.
static ONLINE: AtomicU32 = AtomicU32::new(0);

unsafe extern "C" {
    static ap_trampoline: u8;
    static ap_trampoline_end: u8;
    static gdt_pointer: u8;
}

/// Says, on the vCPU that was started, that it runs.
pub fn report_online(cpu: u32) {
    ONLINE.store(cpu, Ordering::Release);
}

/// Starts vCPUs 1 to `cpus` - 1, whose APIC IDs must be these numbers. False if one does not appear.
pub fn start_others(cpus: u32, scale: Scale) -> bool {
    if cpus > 1 {
        place_trampoline();
    }
    (1..cpus).all(|cpu| start(cpu, scale))
}

fn start(cpu: u32, scale: Scale) -> bool {
    starting_cpu.store(cpu, Ordering::Release);
    lapic::send_init(cpu);
    let mut platform = GuestPlatform::new(scale);
    let begun_ns = platform.now_ns();
    let mut retry_ns = begun_ns;
    loop {
        if ONLINE.load(Ordering::Acquire) == cpu {
            return true;
        }
        let now_ns = platform.now_ns();
        if now_ns - begun_ns > PATIENCE_NS {
            return false;
        }
        if now_ns >= retry_ns {
            lapic::send_startup(cpu, TRAMPOLINE_PAGE);
            retry_ns = now_ns + RETRY_NS;
        }
        spin_loop();
    }
}

fn place_trampoline() {
    let page = (usize::from(TRAMPOLINE_PAGE) << 12) as *mut u8;
    let (code, end) = (&raw const ap_trampoline, &raw const ap_trampoline_end);
    let code_bytes = end as usize - code as usize;
    // SAFETY: the page is low RAM that is mapped and that nothing uses; code and pointer together are far shorter.
    unsafe { ptr::copy_nonoverlapping(code, page, code_bytes) };
    // SAFETY: as above; the symbol in `ring0.s` has ten bytes.
    unsafe {
        ptr::copy_nonoverlapping(&raw const gdt_pointer, page.wrapping_add(code_bytes), GDT_POINTER_BYTES)
    };
}
