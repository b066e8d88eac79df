//! A guest's life by nothing but the command line, with real processes.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;
use tests::pair::PATIENCE;
use tests::process::{Process, configuration, understudy};

/// The exit status of what was ended by a signal.
const INTERRUPTED: i32 = 130;

/// Nothing here depends on how soon a silent side is noticed.
const PATIENT_HEARTBEATS: &[&str] = &["--heartbeat-ms", "200", "--heartbeat-misses", "25"];

/// A folder for sockets and files.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A guest whose API is at `name`, with `mib` MiB of memory that it fills.
    fn run(&self, name: &str, mib: u32) -> Process {
        let config = configuration(self.0.path(), "embedded:guest", None);
        let text = std::fs::read_to_string(&config).unwrap();
        std::fs::write(&config, text.replace(r#""mem_size_mib": 64"#, &format!(r#""mem_size_mib": {mib}"#)))
            .unwrap();
        let guest = Process::start(&["run", "--config-file", &config, "--api-sock", &self.at(name)]);
        guest.console.await_text(|text| text.contains("count cpu=0 n=10 "));
        guest
    }

    /// A standby that listens at `name`, its API at `name`.api.
    fn standby(&self, name: &str, more: &[&str]) -> Process {
        let (listen, api) = (format!("unix:{}", self.at(name)), self.at(&format!("{name}.api")));
        let standby = Process::standby_with(&listen, &[&["--api-sock", api.as_str()], more].concat());
        standby.await_api(Path::new(&api));
        standby
    }

    /// Runs the command on the API at `name` to its end.
    fn command(&self, name: &str, arguments: &[&str]) -> Output {
        let (subcommand, more) = arguments.split_first().unwrap();
        let mut command = Command::new(understudy());
        command.args([subcommand, "--api-sock", &self.at(name)]).args(more).output().unwrap()
    }

    /// Has the guest at `name` mirrored to `standby`. A machine that is busy with other tests is not taken for dead.
    fn attached(&self, name: &str, standby: &str, more: &[&str]) -> String {
        let attach = [&["attach", "--standby", standby], PATIENT_HEARTBEATS, more].concat();
        self.succeeds(name, &attach)
    }

    fn succeeds(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.command(name, arguments);
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{arguments:?}: {out}{error}");
        out.into_owned()
    }

    /// What it says when it turns the request down.
    fn refused(&self, name: &str, arguments: &[&str]) -> String {
        let output = self.command(name, arguments);
        assert_eq!(output.status.code(), Some(75), "{arguments:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }

    fn status(&self, name: &str) -> Value {
        serde_json::from_str(&self.succeeds(name, &["status", "--json"])).unwrap()
    }

    /// Waits until the status's field at `pointer` is `wanted`.
    fn await_status(&self, name: &str, pointer: &str, wanted: &str) {
        let until = Instant::now() + PATIENCE;
        loop {
            let status = self.status(name);
            if status.pointer(pointer).and_then(Value::as_str) == Some(wanted) {
                return;
            }
            assert!(Instant::now() < until, "{pointer} does not come to {wanted}: {status}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Runs the command on the API at `name`, presses Ctrl-C when it first tells how far it is, and waits for its end.
    fn interrupted(&self, name: &str, arguments: &[&str]) -> Option<i32> {
        let (subcommand, more) = arguments.split_first().unwrap();
        let mut command = Command::new(understudy());
        let command = command.args([subcommand, "--api-sock", &self.at(name), "--progress"]).args(more);
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        press_ctrl_c(&mut child);
        child.wait().unwrap().code()
    }
}

/// Presses Ctrl-C when the command first tells how far it is.
fn press_ctrl_c(child: &mut Child) {
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let told = lines.by_ref().map_while(Result::ok).find(|line| line.contains('%'));
    assert!(told.is_some(), "it told nothing of how far it is");
    kill_process(Pid::from_child(child), Signal::INT).unwrap();
    // Nobody is stopped by a pipe that is full.
    thread::spawn(move || lines.map_while(Result::ok).for_each(drop));
}

/// The numbers that the guest has counted, in lines that are whole.
fn counts(text: &str) -> Vec<u64> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let counts = whole.lines().filter_map(|line| line.strip_prefix("count cpu=0 n="));
    counts.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

/// Waits until the guest has counted on, from now.
fn counts_on(guest: &Process) {
    let seen = counts(&guest.console.text()).len();
    guest.console.await_text(|text| counts(text).len() > seen + 10);
}

/// What is printed on both sides is without a gap.
fn assert_contiguous(text: &str) {
    let numbers = counts(text);
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

mod kvm {
    use super::*;

    #[test]
    fn guest_is_paused_snapshotted_protected_switched_over_restored_promoted_and_detached() {
        let place = Place::new();
        let (state, memory, witness) = (place.at("state"), place.at("memory"), place.at("witness"));
        let mut first = place.run("first", 64);
        assert!(place.succeeds("first", &["status"]).contains("running"));

        place.succeeds("first", &["pause"]);
        assert!(place.succeeds("first", &["status"]).contains("paused"));
        place.succeeds("first", &["snapshot", "--state", &state, "--memory", &memory]);
        let at_snapshot = first.console.text();
        place.succeeds("first", &["resume"]);
        counts_on(&first);

        let standby = place.standby("a", &["--witness", &witness]);
        let address = format!("unix:{}", place.at("a"));
        let attached = place.attached("first", &address, &["--witness", &witness]);
        assert!(attached.contains("is protected by unix:"), "{attached}");
        assert_eq!(place.status("first")["mirror"]["phase"], "lockstep");
        assert!(place.refused("first", &["attach", "--standby", &address]).contains("mirrored already"));
        assert!(place.refused("a.api", &["promote"]).contains("shadowing"));

        assert!(place.succeeds("first", &["switchover"]).contains("the standby runs the guest"));
        assert_eq!(first.wait().code(), Some(0), "{}", first.errors.text());
        assert_eq!(place.status("a.api")["mirror"]["role"], "active");
        counts_on(&standby);
        assert_contiguous(&(first.console.text() + &standby.console.text()));
        drop(standby);

        // The same guest again, from where it was snapshotted; no witness can decide this time.
        let restore =
            ["restore", "--state", &state, "--memory", &memory, "--copy", "--api-sock", &place.at("second")];
        let second = Process::start(&restore);
        second.await_api(&place.path("second"));
        counts_on(&second);
        let standby = place.standby("b", &[]);
        let address = format!("unix:{}", place.at("b"));
        place.attached("second", &address, &["--interval-ms", "5"]);
        counts_on(&second);
        second.signal(Signal::KILL);
        place.await_status("b.api", "/mirror/phase", "orphaned");
        place.succeeds("b.api", &["promote"]);
        counts_on(&standby);
        drop((second, standby));

        // And once more: it runs on alone after it was detached.
        let third = Process::start(&[
            "restore",
            "--state",
            &state,
            "--memory",
            &memory,
            "--api-sock",
            &place.at("third"),
        ]);
        third.await_api(&place.path("third"));
        let _standby = place.standby("c", &[]);
        place.attached("third", &format!("unix:{}", place.at("c")), &[]);
        assert!(place.succeeds("third", &["detach"]).contains("WITHOUT PROTECTION"));
        counts_on(&third);
        assert_contiguous(&(at_snapshot + &third.console.text()));
        assert!(place.refused("third", &["detach"]).contains("not mirrored"));
        place.await_status("c.api", "/mirror/phase", "waiting");
    }

    #[test]
    fn ctrl_c_breaks_seeding_off_and_the_guest_runs_on() {
        let place = Place::new();
        let guest = place.run("api", 768);
        let _standby = place.standby("standby", &[]);
        let address = format!("unix:{}", place.at("standby"));
        let attach = [&["attach", "--standby", &address], PATIENT_HEARTBEATS].concat();
        assert_eq!(place.interrupted("api", &attach), Some(INTERRUPTED));
        counts_on(&guest);
        assert_contiguous(&guest.console.text());
        assert_ne!(place.status("api")["mirror"]["phase"], "lockstep");
        // Nothing of it is in the way of the next.
        place.attached("api", &address, &[]);
    }

    #[test]
    fn ctrl_c_breaks_a_snapshot_off_and_a_restore_and_leaves_nothing_behind() {
        let place = Place::new();
        let guest = place.run("api", 768);
        std::fs::create_dir(place.path("files")).unwrap();
        let (state, memory) = (place.at("files/state"), place.at("files/memory"));
        let snapshot = ["snapshot", "--state", &state, "--memory", &memory];
        assert_eq!(place.interrupted("api", &snapshot), Some(INTERRUPTED));
        assert_eq!(std::fs::read_dir(place.path("files")).unwrap().count(), 0);
        counts_on(&guest);
        assert_contiguous(&guest.console.text());

        place.succeeds("api", &snapshot);
        drop(guest);
        let restore = ["restore", "--state", &state, "--memory", &memory, "--copy"];
        assert_eq!(place.interrupted("again", &restore), Some(INTERRUPTED));
        assert!(!place.path("again").exists());
    }

    #[test]
    fn live_view_ends_with_its_terminal() {
        let place = Place::new();
        let _guest = place.run("api", 64);
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let path = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let terminal = || File::options().read(true).write(true).open(&path).unwrap();
        tcsetwinsize(terminal(), Winsize { ws_row: 24, ws_col: 80, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
        let mut view = Command::new(understudy())
            .args(["top", "--api-sock", &place.at("api")])
            .stdin(terminal())
            .stdout(terminal())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();

        let mut master = File::from(master);
        let mut shown = Vec::new();
        while !String::from_utf8_lossy(&shown).contains("mirrored.") {
            let mut piece = [0; 4096];
            let read = master.read(&mut piece).unwrap();
            shown.extend_from_slice(&piece[..read]);
        }
        drop(master);

        let until = Instant::now() + PATIENCE;
        while view.try_wait().unwrap().is_none() {
            assert!(Instant::now() < until, "the view goes on without a terminal");
            thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn without_a_subcommand_it_runs_as_firecracker_does() {
        let place = Place::new();
        let config = configuration(place.0.path(), "embedded:guest", None);
        let start = |arguments: &[&str]| {
            let mut command = Command::new(understudy());
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
        };
        let socket = place.at("api");
        let mut guest =
            start(&["--id", "fc-1", "--api-sock", &socket, "--config-file", &config, "--level", "Info"]);
        let until = Instant::now() + PATIENCE;
        while !place.command("api", &["status"]).status.success() {
            assert!(Instant::now() < until, "it serves no API");
            thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(place.status("api")["instance"]["id"], "fc-1");
        let (state, memory) = (place.at("state"), place.at("memory"));
        place.succeeds("api", &["snapshot", "--state", &state, "--memory", &memory]);
        kill_process(Pid::from_child(&guest), Signal::TERM).unwrap();
        assert_eq!(guest.wait().unwrap().code(), Some(INTERRUPTED));
        assert!(!place.path("api").exists());

        let says = |arguments: &[&str]| {
            let output = Command::new(understudy()).args(arguments).output().unwrap();
            assert!(output.status.success(), "{arguments:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(says(&["--describe-snapshot", &state]), says(&["--snapshot-version"]));
        let wrong = Command::new(understudy()).args(["--describe-snapshot", &memory]).output().unwrap();
        assert_eq!(wrong.status.code(), Some(2));
    }
}

#[test]
fn live_view_without_a_terminal_says_what_to_use_instead() {
    let place = Place::new();
    assert!(place.refused("nobody", &["top"]).contains("status --watch"));
    assert!(place.refused("nobody", &["metrics"]).contains("nobody serves"));
}
