//! The embedded guest: bare metal, booted by PVH, its workload in ring 3 on every vCPU.
//!
//! Ring 0 is `ring0.s` and nothing else: start-up and handlers, in assembly. It enters [`guest_main`] on each vCPU in
//! ring 3, with all memory, the serial port and the local APIC mapped or opened to it. There is no heap, and no code
//! that can unwind. What it prints and how it is told what to do is in [`protocol`].

#![no_std]
#![no_main]

mod boot_info;
mod exceptions;
mod io_apic;
mod lapic;
mod memory;
mod memory_functions;
mod per_cpu;
mod platform;
mod port;
// Parts of it are for the host.
#[allow(dead_code, unused_imports)]
mod protocol;
mod serial;
mod service;
mod smp;
mod time;
mod virtio;

use boot_info::BootInfo;
use memory::Pool;
use per_cpu::{PerCpu, Published};
use platform::GuestPlatform;
use protocol::{BadParameter, Counter, EXIT_BAD_PARAMETER, Key, Line, MAX_CPUS, Params, Worker};
use service::Service;
use time::Scale;
use virtio::Window;

core::arch::global_asm!(include_str!("ring0.s"), options(att_syntax));

/// What vCPU 0 found out and decided, for all.
struct Plan {
    params: Params,
    pool: Pool,
    pages_per_cpu: usize,
    scale: Scale,
}

static PLAN: Published<Plan> = Published::new();
static COUNTERS: PerCpu<Counter, { MAX_CPUS as usize }> =
    PerCpu::new([const { Counter::blank() }; MAX_CPUS as usize]);

/// Where `ring0.s` leaves each vCPU. `start_info` is the physical address of the hvm_start_info on vCPU 0.
#[unsafe(no_mangle)]
extern "C" fn guest_main(cpu: u32, start_info: u32) -> ! {
    let mut service = None;
    if cpu == 0 {
        exceptions::fill_interrupt_table();
        serial::set_up();
        lapic::set_up();
        match plan(start_info, &mut service) {
            // SAFETY: the other vCPUs have not been started, and this is done once.
            Ok(plan) => unsafe { PLAN.publish(plan) },
            Err(BadParameter(key)) => refuse(key),
        }
    } else {
        lapic::set_up();
        smp::report_online(cpu);
    }
    let Some(plan) = PLAN.get() else { refuse(Key::Cpus) };
    if cpu == 0 && !smp::start_others(plan.params.cpus, plan.scale) {
        refuse(Key::Cpus);
    }
    // SAFETY: each vCPU comes here once, with its own number.
    let counter = unsafe { COUNTERS.take(cpu) };
    // SAFETY: as above; the plan was made so that the shares fit.
    let (pages, generations) = unsafe { plan.pool.share(cpu, plan.pages_per_cpu) };
    let platform = GuestPlatform::new(plan.scale).with(service);
    Worker::new(platform, plan.params, cpu, counter, pages, generations).run()
}

fn plan(start_info: u32, service: &mut Option<&'static mut Service>) -> Result<Plan, BadParameter> {
    let boot_info = BootInfo::read(start_info);
    let params = Params::parse(boot_info.command_line())?;
    let mut pool = Pool::map(&boot_info);
    if let Some(address) = params.net_ip {
        let windows = Window::all(boot_info.command_line());
        let frame = pool.take_frame().ok_or(BadParameter(Key::NetIp))?;
        *service = Some(Service::new(&params, address, windows, frame, time::ticks())?);
    }
    let cpus = params.cpus as usize;
    let pages_per_cpu = if params.has_working_set() {
        let wanted = params.dirty_set_mib.map(|mib| mib as usize * 256);
        pool.pages_for(wanted).ok_or(BadParameter(Key::DirtySet))? / cpus
    } else {
        0
    };
    if params.has_working_set() && pages_per_cpu == 0 {
        return Err(BadParameter(Key::DirtySet));
    }
    Ok(Plan { params, pool, pages_per_cpu, scale: Scale::find() })
}

/// Says which parameter cannot be honoured, and ends.
fn refuse(key: Key) -> ! {
    serial::print(Line::Error { key }.encode().as_bytes());
    platform::exit(EXIT_BAD_PARAMETER)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    // No code here is meant to panic; what does is told apart from exceptions by this vector.
    exceptions::report(0xff, 0, 0, 0)
}
