//! A side as a child process, and everything that can be observed of it from outside.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use mirror::report::{Stamped, monotonic_us};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};

/// Lines of a child's stderr that are kept.
const STDERR_LINES: usize = 20;

/// Which process of a run, counted in the order in which they were started but for the first two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Side(pub u8);

impl Side {
    /// The one that runs the guest at first.
    pub const PRIMARY: Self = Self(0);
    /// The one that holds its mirror at first.
    pub const STANDBY: Self = Self(1);

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::PRIMARY => "primary",
            Self::STANDBY => "standby",
            Self(2) => "second standby",
            Self(_) => "further standby",
        }
    }
}

/// Something seen of a process.
#[derive(Debug)]
pub(crate) enum Observation {
    /// It reported something.
    Told(Side, Stamped),
    /// Its console wrote something.
    Wrote {
        /// Which process.
        side: Side,
        /// When it arrived here, in microseconds of the monotonic clock.
        at_us: u64,
        /// What.
        bytes: Vec<u8>,
    },
    /// Its console is closed and everything it wrote has been observed: the process has ended.
    Closed(Side),
}

/// A child process. It is killed when this is dropped.
pub(crate) struct Process {
    child: Child,
    stderr: Arc<Mutex<VecDeque<String>>>,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts this program anew with `arguments`; what is seen of it goes to `seen`.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start(side: Side, arguments: &[OsString], seen: &Sender<Observation>) -> io::Result<Self> {
        let (events, events_in) = io::pipe()?;
        // The child is to inherit this end, and opens it by its number.
        fcntl_setfd(events_in.as_fd(), FdFlags::empty())?;
        let mut child = Command::new(program()?)
            .args(arguments)
            .arg("--events")
            .arg(format!("/proc/self/fd/{}", events_in.as_raw_fd()))
            .arg("--end-with-parent")
            .arg(std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for the parent, which then ends its children.
            .process_group(0)
            .spawn()?;
        drop(events_in);
        let (console, messages) = (child.stdout.take(), child.stderr.take());
        let mut process = Self { child, stderr: Arc::default(), readers: Vec::new() };
        let events_seen = seen.clone();
        process.read("events", move || read_events(side, events, &events_seen))?;
        if let Some(messages) = messages {
            let kept = Arc::clone(&process.stderr);
            process.read("stderr", move || keep_tail(messages, &kept))?;
        }
        if let Some(console) = console {
            let seen = seen.clone();
            process.read("console", move || read_console(side, console, &seen))?;
        }
        Ok(process)
    }

    fn read(&mut self, name: &str, reader: impl FnOnce() + Send + 'static) -> io::Result<()> {
        self.readers.push(thread::Builder::new().name(name.into()).spawn(reader)?);
        Ok(())
    }

    /// Ends it as a power failure would: SIGKILL. Returns just before, in microseconds of the monotonic clock.
    ///
    /// # Errors
    /// It has ended already.
    pub(crate) fn kill(&mut self) -> io::Result<u64> {
        let at_us = monotonic_us();
        self.child.kill()?;
        Ok(at_us)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended already.
    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        Ok(kill_process(Pid::from_child(&self.child), signal)?)
    }

    /// The last lines that it wrote to stderr so far.
    pub(crate) fn last_words(&self) -> String {
        let lines = self.stderr.lock().unwrap_or_else(PoisonError::into_inner);
        lines.iter().map(String::as_str).collect::<Vec<_>>().join("\n")
    }

    /// Waits until it has ended and says how, with the last lines that it wrote to stderr.
    ///
    /// # Errors
    /// The system cannot say.
    pub(crate) fn wait(mut self) -> io::Result<(ExitStatus, String)> {
        let status = self.child.wait()?;
        for reader in self.readers.drain(..) {
            // A reader that panicked has said so.
            let _ = reader.join();
        }
        Ok((status, self.last_words()))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// This program, also after its file has been replaced.
fn program() -> io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    Ok(if path.exists() { path } else { "/proc/self/exe".into() })
}

fn read_events(side: Side, events: impl Read, seen: &Sender<Observation>) {
    for line in BufReader::new(events).lines().map_while(Result::ok) {
        // The last line of a process that is killed may be torn.
        if let Ok(stamped) = serde_json::from_str(&line)
            && seen.send(Observation::Told(side, stamped)).is_err()
        {
            return;
        }
    }
}

fn read_console(side: Side, mut console: impl Read, seen: &Sender<Observation>) {
    let mut chunk = vec![0; 64 << 10];
    while let Ok(count @ 1..) = console.read(&mut chunk) {
        let wrote = Observation::Wrote { side, at_us: monotonic_us(), bytes: chunk[..count].to_vec() };
        if seen.send(wrote).is_err() {
            return;
        }
    }
    // A run that is over observes nothing more.
    let _ = seen.send(Observation::Closed(side));
}

fn keep_tail(messages: impl Read, kept: &Mutex<VecDeque<String>>) {
    for line in BufReader::new(messages).split(b'\n').map_while(Result::ok) {
        let mut lines = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == STDERR_LINES {
            lines.pop_front();
        }
        lines.push_back(String::from_utf8_lossy(&line).into_owned());
    }
}
