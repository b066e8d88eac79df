//! The guest workload as a Linux program: what the bare-metal guest does on its vCPUs, done by pinned threads.
//!
//! Parameters are words like those of the bare-metal guest's command line (`workload=count,dirty,verify dirty.rate=200`),
//! given as arguments or, without arguments, on the kernel command line. Lines go to stdout, each by one write(2).

use std::io::Write as _;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use resources::protocol::{
    BadParameter, Counter, EXIT_BAD_PARAMETER, Key, Line, PAGE_WORDS, Page, Params, Platform, Worker,
};
use rustix::thread::{CpuSet, sched_setaffinity};
use zerocopy::{FromBytes as _, IntoBytes as _};

/// 4 KiB pages in a MiB.
const PAGES_PER_MIB: u64 = 256;

/// A Linux process as the workload's machine.
struct Process {
    started: Instant,
}

impl Platform for Process {
    fn now_ns(&mut self) -> u64 {
        self.started.elapsed().as_nanos() as u64
    }

    fn print(&mut self, line: &[u8]) {
        print_line(line);
    }

    fn idle_for(&mut self, ns: u64) {
        thread::sleep(Duration::from_nanos(ns));
    }

    fn exit(&mut self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}

/// Stdout's lock keeps the lines of threads apart, and its buffer passes on a whole line at once.
fn print_line(line: &[u8]) {
    if let Err(error) = std::io::stdout().lock().write_all(line) {
        eprintln!("linux-workload: cannot write to stdout: {error}");
        std::process::exit(1);
    }
}

/// Arguments if there are any, else the kernel command line.
fn command_line() -> std::io::Result<String> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.is_empty() { std::fs::read_to_string("/proc/cmdline") } else { Ok(arguments.join(" ")) }
}

/// The parameters, if this machine has the processors for them.
fn parameters(command_line: &str) -> Result<Params, BadParameter> {
    let params = Params::parse(command_line)?;
    let processors = thread::available_parallelism().map_or(1, usize::from);
    if params.cpus as usize > processors {
        return Err(BadParameter(Key::Cpus));
    }
    Ok(params)
}

/// Pages of the working set for each thread. Without `dirty.set=` it is half of what Linux still has to give.
fn pages_per_cpu(params: &Params) -> std::io::Result<usize> {
    if !params.has_working_set() {
        return Ok(0);
    }
    let set_mib = match params.dirty_set_mib {
        Some(mib) => mib,
        None => available_mib(&std::fs::read_to_string("/proc/meminfo")?).div_ceil(2),
    };
    Ok((set_mib * PAGES_PER_MIB / u64::from(params.cpus)) as usize)
}

/// `MemAvailable` of /proc/meminfo in MiB, 0 if it is not there.
fn available_mib(meminfo: &str) -> u64 {
    let field = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = field.and_then(|rest| rest.split_ascii_whitespace().next()).and_then(|kib| kib.parse().ok());
    kib.unwrap_or(0_u64) / 1024
}

/// Memory for `count` pages, kept for good, and aligned so that a page of the workload is a page of the machine.
fn working_set(count: usize) -> &'static mut [Page] {
    let words = vec![0_u64; (count + 1) * PAGE_WORDS].leak();
    let start = words.as_ptr().align_offset(size_of::<Page>());
    let words = &mut words[start..][..count * PAGE_WORDS];
    <[Page]>::mut_from_bytes(words.as_mut_bytes()).expect("a whole number of pages, aligned")
}

/// Runs the work of one vCPU on the processor of that number.
fn work(cpu: u32, params: Params, pages: usize) -> ! {
    let mut processor = CpuSet::new();
    processor.set(cpu as usize);
    if let Err(error) = sched_setaffinity(None, &processor) {
        eprintln!("linux-workload: cannot run on processor {cpu}: {error}");
        std::process::exit(1);
    }
    let counter = Box::leak(Box::new(Counter::blank()));
    let generations = vec![0_u32; pages].leak();
    let process = Process { started: Instant::now() };
    Worker::new(process, params, cpu, counter, working_set(pages), generations).run()
}

fn main() -> ExitCode {
    let command_line = match command_line() {
        Ok(line) => line,
        Err(error) => {
            eprintln!("linux-workload: cannot read /proc/cmdline: {error}; give the parameters as arguments");
            return ExitCode::FAILURE;
        }
    };
    let params = match parameters(&command_line) {
        Ok(params) => params,
        Err(BadParameter(key)) => {
            print_line(Line::Error { key }.encode().as_bytes());
            return ExitCode::from(EXIT_BAD_PARAMETER);
        }
    };
    let pages = match pages_per_cpu(&params) {
        Ok(pages) => pages,
        Err(error) => {
            eprintln!("linux-workload: cannot read /proc/meminfo: {error}; say dirty.set=MIB");
            return ExitCode::FAILURE;
        }
    };
    for cpu in 1..params.cpus {
        thread::spawn(move || work(cpu, params, pages));
    }
    work(0, params, pages)
}

#[cfg(test)]
mod tests {
    use super::{Key, Page, available_mib, parameters, working_set};

    #[test]
    fn every_page_of_the_working_set_is_one_page_of_the_machine() {
        let pages = working_set(3);

        assert_eq!(pages.len(), 3);
        assert!(pages.iter().all(|page| page.as_ptr().align_offset(size_of::<Page>()) == 0));
    }

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let meminfo =
            "MemTotal:         247112 kB\nMemFree:          200000 kB\nMemAvailable:     204800 kB\n";

        assert_eq!(available_mib(meminfo), 200);
        assert_eq!(available_mib("MemTotal: 1 kB\n"), 0);
    }

    #[test]
    fn more_vcpus_than_the_machine_has_are_refused() {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);

        assert_eq!(parameters("cpus=1").map(|params| params.cpus), Ok(1));
        if processors < 32 {
            let refused = parameters(&format!("cpus={}", processors + 1)).map_err(|bad| bad.0);
            assert_eq!(refused, Err(Key::Cpus));
        }
    }
}
