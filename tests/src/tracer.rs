//! Stops a process at the worst moment: right before one of its threads makes a certain system call (ptrace(2)).

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::pair::PATIENCE;

/// Time between two looks at the threads.
const GLANCE: Duration = Duration::from_micros(100);
/// A stop at the beginning or end of a system call, as it is asked to look like.
const AT_SYSCALL: i32 = libc::SIGTRAP | 0x80;

/// A stopped process, one thread of which is about to make a system call.
pub struct Caught(Watched);

/// Threads that are being watched. All of it is one thread's business.
pub struct Watched {
    process: Pid,
    threads: Vec<i32>,
}

impl Watched {
    /// Watches the threads of `process` that are called `name`.
    ///
    /// # Panics
    /// If there are none, or they cannot be watched.
    pub fn new(process: Pid, name: &str) -> Self {
        let folder = format!("/proc/{}/task", process.as_raw_nonzero());
        let threads: Vec<i32> = fs::read_dir(folder)
            .expect("a process")
            .map(|entry| entry.expect("a thread"))
            .filter(|entry| {
                fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
            })
            .map(|entry| entry.file_name().to_str().and_then(|id| id.parse().ok()).expect("a number"))
            .collect();
        assert!(!threads.is_empty(), "no thread is called {name}");
        for &thread in &threads {
            ptrace(libc::PTRACE_SEIZE, thread, libc::PTRACE_O_TRACESYSGOOD as usize)
                .expect("a thread to watch");
            ptrace(libc::PTRACE_INTERRUPT, thread, 0).expect("a thread to stop");
        }
        Self { process, threads }
    }

    /// Stops the process when one of the threads is about to make a system call for which `wanted` holds, of its number and
    /// its second argument.
    ///
    /// # Panics
    /// If that does not happen within [`PATIENCE`].
    pub fn stop_before(self, wanted: impl Fn(libc::c_long, u64) -> bool) -> Caught {
        let until = Instant::now() + PATIENCE;
        loop {
            for &thread in &self.threads {
                let Some(signal) = stopped_by(thread) else { continue };
                if signal == AT_SYSCALL {
                    let registers = registers(thread).expect("its registers");
                    let begins = registers.rax as i64 == -i64::from(libc::ENOSYS);
                    if begins && wanted(registers.orig_rax as libc::c_long, registers.rsi) {
                        stop(self.process).expect("the process is there");
                        return Caught(self);
                    }
                }
                ptrace(libc::PTRACE_SYSCALL, thread, 0).expect("it goes on");
            }
            assert!(Instant::now() < until, "the system call is not made");
            thread::sleep(GLANCE);
        }
    }
}

impl Caught {
    /// Lets the process go on, if it is still there.
    pub fn let_go(self) {
        let process = self.0.process;
        drop(self);
        let _ = kill_process(process, Signal::CONT);
    }
}

impl Drop for Watched {
    /// A thread that was killed is not gone before whoever watches it has taken note of that.
    fn drop(&mut self) {
        for &thread in &self.threads {
            let _ = ptrace(libc::PTRACE_INTERRUPT, thread, 0);
            let until = Instant::now() + PATIENCE;
            while is_watched(thread) && ptrace(libc::PTRACE_DETACH, thread, 0).is_err() {
                if Instant::now() > until {
                    break;
                }
                thread::sleep(GLANCE);
            }
        }
    }
}

/// Stops all of `process`, by its main thread: one that is watched would only tell its watcher of the signal.
fn stop(process: Pid) -> io::Result<()> {
    let id = process.as_raw_nonzero().get();
    // SAFETY: reads and writes no memory.
    let outcome = unsafe { libc::syscall(libc::SYS_tgkill, id, id, libc::SIGSTOP) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes note of what has become of `thread`; false if it has ended.
fn is_watched(thread: i32) -> bool {
    let mut status = 0;
    // SAFETY: writes to one int, which is there.
    let found = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
    found == 0 || (found == thread && libc::WIFSTOPPED(status))
}

/// By what `thread` has been stopped since the last look, if it has.
fn stopped_by(thread: i32) -> Option<i32> {
    let mut status = 0;
    // SAFETY: writes to one int, which is there.
    let found = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL | libc::WNOHANG) };
    (found == thread && libc::WIFSTOPPED(status)).then(|| libc::WSTOPSIG(status))
}

fn ptrace(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: these requests neither read nor write memory of this process.
    let outcome = unsafe { libc::ptrace(request, thread, 0_usize, data) };
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn registers(thread: i32) -> io::Result<libc::user_regs_struct> {
    let mut registers = std::mem::MaybeUninit::<libc::user_regs_struct>::zeroed();
    // SAFETY: writes to the registers, which are there and large enough.
    let outcome = unsafe { libc::ptrace(libc::PTRACE_GETREGS, thread, 0_usize, registers.as_mut_ptr()) };
    // SAFETY: zeroed, and plain integers.
    if outcome < 0 { Err(io::Error::last_os_error()) } else { Ok(unsafe { registers.assume_init() }) }
}
