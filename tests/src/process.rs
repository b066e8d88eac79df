//! The real command as child processes, watched from outside.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use mirror::report::{Report, Stamped};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, Signal, kill_process};

use understudy::drill::relay::Relay;

use crate::pair::{PATIENCE, Screen, await_report};

/// How often it is looked at whether a process has ended.
const GLANCE: Duration = Duration::from_millis(5);

/// The `understudy` command, built in the profile and target folder of the running program.
///
/// # Panics
/// If it cannot be built.
pub fn understudy() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = profile_folder();
        let release: &[&str] = if cfg!(debug_assertions) { &[] } else { &["--release"] };
        build(&folder, &[&["build"], release].concat());
        folder.join("understudy")
    })
}

/// The `understudy` command as it is shipped.
///
/// # Panics
/// If it cannot be built.
pub fn understudy_as_shipped() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = profile_folder();
        build(&folder, &["build-dist"]);
        folder.with_file_name("x86_64-unknown-linux-gnu").join("dist/understudy")
    })
}

/// Where the running program was built.
fn profile_folder() -> PathBuf {
    let this = std::env::current_exe().expect("a path of its own");
    let mut folder = this.parent().expect("a folder").to_path_buf();
    if folder.ends_with("deps") {
        folder.pop();
    }
    folder
}

fn build(folder: &Path, how: &[&str]) {
    let built = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(how)
        .args(["--quiet", "--package", "understudy", "--target-dir"])
        .arg(folder.parent().expect("a target folder"))
        // Where cargo finds what `build-dist` means.
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .status()
        .expect("cargo starts");
    assert!(built.success(), "the command under test cannot be built");
}

/// A child process; killed when it is dropped.
pub struct Process {
    child: Child,
    /// What it has written to stdout: the guest's console.
    pub console: Screen,
    /// What it has written to stderr.
    pub errors: Screen,
    /// What it reports.
    pub reports: Receiver<Report>,
}

impl Process {
    /// Starts `understudy` with `arguments` and with its events connected.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(arguments: &[&str]) -> Self {
        let (events, events_in) = std::io::pipe().expect("a pipe");
        // The child is to inherit this end, and opens it by its number.
        fcntl_setfd(events_in.as_fd(), FdFlags::empty()).expect("a flag");
        let mut child = Command::new(understudy())
            .args(arguments)
            .args(["--events", &format!("/proc/self/fd/{}", events_in.as_raw_fd())])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("understudy starts");
        drop(events_in);
        let (sender, reports) = channel();
        thread::spawn(move || {
            for line in BufReader::new(events).lines().map_while(Result::ok) {
                let stamped: Stamped = serde_json::from_str(&line).expect("an event in JSON");
                if sender.send(stamped.report).is_err() {
                    return;
                }
            }
        });
        let console = collect(child.stdout.take().expect("a console"));
        let errors = collect(child.stderr.take().expect("stderr"));
        Self { child, console, errors, reports }
    }

    /// Starts a standby that listens on `listen`, with `witness`.
    pub fn standby(listen: &str, witness: &Path) -> Self {
        Self::standby_with(listen, &["--witness", &witness.display().to_string()])
    }

    /// Starts a standby that listens on `listen`, with `more` arguments.
    pub fn standby_with(listen: &str, more: &[&str]) -> Self {
        let standby = Self::start(&[&["standby", "--listen", listen], more].concat());
        standby.errors.await_text(|text| text.contains("listening on"));
        standby
    }

    /// A way to where it listens, by TCP, that can be slowed and cut.
    ///
    /// # Panics
    /// If it does not listen within [`PATIENCE`].
    pub fn relay(&self) -> Relay {
        let listening = await_report(&self.reports, |report| matches!(report, Report::Listening { .. }));
        let Report::Listening { address } = listening else { unreachable!("it was waited for") };
        Relay::start(address.trim_start_matches("tcp:")).expect("a relay")
    }

    /// Waits until the process serves its API on `socket`.
    ///
    /// # Panics
    /// If it does not within [`PATIENCE`].
    pub fn await_api(&self, socket: &Path) {
        let until = Instant::now() + PATIENCE;
        while UnixStream::connect(socket).is_err() {
            assert!(Instant::now() < until, "it serves no API; it said:\n{}", self.errors.text());
            thread::sleep(GLANCE);
        }
    }

    /// Its number.
    pub fn id(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// Sends `signal`.
    ///
    /// # Panics
    /// If the process is gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process is there");
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If it does not come within [`PATIENCE`].
    pub fn wait(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("a child of ours") {
                return status;
            }
            assert!(Instant::now() < until, "it does not end; it said:\n{}", self.errors.text());
            thread::sleep(GLANCE);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn collect(mut from: impl Read + Send + 'static) -> Screen {
    let screen = Screen::default();
    let mut into = screen.clone();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            let _ = into.write_all(&bytes[..count]);
        }
    });
    screen
}

/// Writes a configuration of the embedded guest to `folder`: 64 MiB, with `mirror` as the fields of its mirror section.
///
/// # Panics
/// If it cannot be written.
pub fn configuration(folder: &Path, kernel: &str, mirror: Option<&str>) -> String {
    let path = folder.join("vm.json");
    let mirror = mirror.map(|fields| format!(r#", "mirror": {{{fields}}}"#)).unwrap_or_default();
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{kernel}", "boot_args": "workload=count,dirty,verify dirty.rate=5000"}},
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}}{mirror}}}"#
    );
    std::fs::write(&path, text).expect("a configuration file");
    path.display().to_string()
}
