//! A primary and a standby in this process, with real machines, a real link and a real witness.

use std::io::Write;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, PoisonError};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use mirror::console::Console;
use mirror::guest::Guest;
use mirror::ids::Guid;
use mirror::link::Listener;
use mirror::memory::PageMemory;
use mirror::primary::Settings;
use mirror::report::Report;
use mirror::shell::primary::{Handle, Options, attach};
use mirror::shell::{Watcher, standby};
use mirror::witness::{FileWitness, Witness};
use vmm::{Boot, KernelImage, Machine, MachineConfig, StandbyHost};

/// How long a pair may take for anything.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Collects what a console releases.
#[derive(Clone, Default)]
pub struct Screen(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Screen {
    /// All that has been released.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// Waits until `wanted` holds for what has been released.
    ///
    /// # Panics
    /// If it does not within [`PATIENCE`].
    pub fn await_text(&self, wanted: impl Fn(&str) -> bool) -> String {
        let (bytes, grown) = &*self.0;
        let until = Instant::now() + PATIENCE;
        let mut seen = bytes.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let text = String::from_utf8_lossy(&seen).into_owned();
            if wanted(&text) {
                return text;
            }
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "not seen in time; on the screen:\n{text}");
            seen = grown.wait_timeout(seen, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let (seen, grown) = &*self.0;
        seen.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        grown.notify_all();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The embedded guest, started with `cmdline`, and what it says.
///
/// # Panics
/// If it cannot be started.
pub fn start_guest(config: &MachineConfig, cmdline: &str) -> (Machine, Arc<Console>, Screen) {
    let screen = Screen::default();
    let console = Console::new(screen.clone()).expect("a console");
    let mut machine = Machine::create(config, Arc::clone(&console)).expect("a machine");
    let kernel = KernelImage::Bytes(resources::GUEST_ELF.into());
    machine.load(&Boot { kernel, initrd: None, cmdline: cmdline.into() }).expect("the guest loads");
    machine.start();
    (machine, console, screen)
}

/// A watcher, and what it was told.
pub fn watcher() -> (Watcher, Receiver<Report>) {
    let (sender, receiver): (Sender<Report>, _) = channel();
    // Nobody need listen to the end.
    (Arc::new(move |report| drop(sender.send(report))), receiver)
}

/// Waits for a report.
///
/// # Panics
/// If it does not come within [`PATIENCE`].
pub fn await_report(reports: &Receiver<Report>, wanted: impl Fn(&Report) -> bool) -> Report {
    let mut seen = Vec::new();
    loop {
        match reports.recv_timeout(PATIENCE) {
            Ok(report) if wanted(&report) => return report,
            Ok(report) => seen.push(report),
            Err(error) => panic!("not reported in time ({error}); reported were {seen:#?}"),
        }
    }
}

/// A pair in lockstep.
pub struct Pair {
    /// The primary's mirror.
    pub primary: Handle<Machine>,
    /// The primary's memory.
    pub primary_memory: PageMemory,
    /// What the primary has released.
    pub primary_screen: Screen,
    /// What the primary reports.
    pub primary_reports: Receiver<Report>,
    /// The standby.
    pub standby: standby::Handle<StandbyHost>,
    /// What the standby has released.
    pub standby_screen: Screen,
    /// What the standby reports.
    pub standby_reports: Receiver<Report>,
    /// What the primary reported up to lockstep.
    pub seeding: Vec<Report>,
    /// Where the witness is; removed in the end.
    pub folder: tempfile::TempDir,
}

impl Pair {
    /// Starts the embedded guest and mirrors it to a standby at `listen` (`FOLDER` in it stands for a fresh folder).
    ///
    /// # Panics
    /// If lockstep is not reached.
    pub fn start(config: &MachineConfig, cmdline: &str, listen: &str, settings: Settings) -> Self {
        Self::start_when(config, cmdline, listen, settings, |_| true)
    }

    /// As [`Self::start`], but mirroring begins when `ready` holds for what the guest has printed.
    ///
    /// # Panics
    /// If lockstep is not reached.
    pub fn start_when(
        config: &MachineConfig,
        cmdline: &str,
        listen: &str,
        settings: Settings,
        ready: impl Fn(&str) -> bool,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().to_str().expect("a readable path");
        let witness: Arc<dyn Witness> = Arc::new(FileWitness::new(folder.path().join("witness")));
        let witness = Some(witness);
        let listener = Listener::bind(&listen.replace("FOLDER", path).parse().expect("an address"))
            .expect("a free address");
        let address = listener.address();
        let standby_screen = Screen::default();
        let standby_console = Console::new(standby_screen.clone()).expect("a console");
        let (standby_watcher, standby_reports) = watcher();
        let standby = standby::serve(
            listener,
            StandbyHost::new(Arc::clone(&standby_console)),
            standby_console,
            standby::Options {
                name: "standby".into(),
                witness: witness.clone(),
                occupied: false,
                second_listen: None,
            },
            standby_watcher,
        )
        .expect("a standby");
        let (machine, console, primary_screen) = start_guest(config, cmdline);
        primary_screen.await_text(ready);
        let primary_memory = PageMemory::new(Arc::clone(machine.ram())).expect("whole pages");
        let options = Options {
            settings,
            guid: Guid::new_v4(),
            name: "primary".into(),
            term: None,
            witness,
            standby: address,
            staging_pages: 16_384,
        };
        let (primary_watcher, primary_reports) = watcher();
        let primary = attach(machine, console, options, primary_watcher)
            .unwrap_or_else(|failure| panic!("{}", failure.error));
        let mut seeding = Vec::new();
        while !matches!(seeding.last(), Some(Report::Protected { .. })) {
            seeding.push(await_report(&primary_reports, |_| true));
        }
        Self {
            primary,
            primary_memory,
            primary_screen,
            primary_reports,
            standby,
            standby_screen,
            standby_reports,
            seeding,
            folder,
        }
    }

    /// Stops the guest and both sides.
    pub fn end(self) {
        // Without lockstep there is nothing to stop.
        let _ = self.primary.quiesce();
        self.primary.notifier().guest_ended("the pair is taken down");
        drop(self.primary.wait());
        self.standby.stop();
    }
}
