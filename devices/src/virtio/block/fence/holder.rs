//! Processes of this host that hold an image's lock. A description's lock does not say whose it is, so the kernel is asked what
//! each process has open.

use std::fmt;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::lock::PLACE;

/// A process that can write to an image.
pub(super) struct Holder {
    pid: i32,
    name: String,
    /// The process itself: its number may become another's.
    process: OwnedFd,
    killed: bool,
}

impl Holder {
    /// All others than this process that hold the lock on `image`, as far as they can be seen.
    pub(super) fn find(image: &File) -> Vec<Self> {
        let Ok(image) = image.metadata() else { return Vec::new() };
        let own = std::process::id() as i32;
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid| *pid != own)
            .filter_map(|pid| Self::open(pid, &image))
            .collect()
    }

    fn open(pid: i32, image: &Metadata) -> Option<Self> {
        if !holds(pid, image) {
            return None;
        }
        let process = pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()?;
        // The number may have become another's meanwhile, or mean another in this process's namespace than in /proc.
        let told = fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd())).ok()?;
        let same = told.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok()) == Some(pid);
        if !same || !holds(pid, image) {
            return None;
        }
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned();
        Some(Self { pid, name, process, killed: false })
    }

    /// Whether it was stopped (SIGSTOP, a debugger): it will not let go by itself.
    pub(super) fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        // Behind the name, which may contain anything.
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        matches!(state, Some('T' | 't'))
    }

    /// Kills it. Its death may take as long as what it does in the kernel.
    pub(super) fn kill(&mut self) -> io::Result<()> {
        self.killed = true;
        match pidfd_send_signal(&self.process, Signal::KILL) {
            // It has ended.
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn is_killed(&self) -> bool {
        self.killed
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.name)
    }
}

/// Whether process `pid` has a description of `image` open that holds the lock.
fn holds(pid: i32, image: &Metadata) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| {
        let locked = fs::read_to_string(entry.path()).is_ok_and(|info| info.lines().any(is_ours));
        let file = || fs::metadata(format!("/proc/{pid}/fd/{}", entry.file_name().display()));
        locked && file().is_ok_and(|file| (file.dev(), file.ino()) == (image.dev(), image.ino()))
    })
}

/// Whether a line of fdinfo tells of a description's lock at [`PLACE`] (proc_pid_fdinfo(5), proc_locks(5)).
fn is_ours(line: &str) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let mut words = lock.split_whitespace();
    let of_description = words.any(|word| word == "OFDLCK");
    of_description && words.any(|word| word.parse() == Ok(PLACE))
}
