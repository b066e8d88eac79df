//! A run under way: its processes, its clients, and all that was observed so far.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use mirror::ids::Term;
use mirror::link::Address;
use mirror::report::{Report, Stamped, monotonic_us};
use mirror::witness::{FileWitness, Witness, WitnessAddress};
use rustix::process::Signal;

use super::DrillError;
use super::load::Load;
use super::network::{self, SERVICE};
use super::options::{Name, Random};
use super::plan::{DRIVE, Plan};
use super::record::Mark;
use super::relay::Relay;
use crate::config::MirrorSection;
use crate::sides::Side;
use crate::sides::process::{Observation, Process};
use crate::sides::tally::Tally;

/// How often the clock and the interrupt flag are looked at while nothing is observed.
const GLANCE: Duration = Duration::from_millis(20);

/// How long a side may take for anything.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Answers that the clients must get before the fault, so that it hits a service at work.
const WARM: u64 = 40;

/// Everything observed of a side.
#[derive(Default)]
pub(super) struct Observed {
    pub(super) tally: Tally,
    pub(super) console: Vec<u8>,
    pub(super) told: Vec<Stamped>,
    pub(super) closed: bool,
    pub(super) ended_us: Option<u64>,
}

impl Observed {
    /// When it first told something like this after `from_us`.
    pub(super) fn when(&self, from_us: u64, wanted: impl Fn(&Report) -> bool) -> Option<u64> {
        self.told
            .iter()
            .find(|stamped| stamped.at_us >= from_us && wanted(&stamped.report))
            .map(|stamped| stamped.at_us)
    }
}

/// Why a run cannot go on.
#[derive(Debug)]
pub(super) enum Failure {
    /// There is no run.
    Error(DrillError),
    /// The guest is lost: what did not happen although it must.
    Lost(String),
    /// The fault hit a guest that was not protected just then, for which nothing is promised.
    Unprotected,
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Error(DrillError::System(error))
    }
}

/// A run under way.
pub(super) struct Scene<'a> {
    pub(super) plan: &'a Plan,
    pub(super) random: Random,
    pub(super) folder: tempfile::TempDir,
    interrupted: &'a AtomicBool,
    seen: Sender<Observation>,
    observations: Receiver<Observation>,
    processes: BTreeMap<Side, Process>,
    /// Where each side has its image of the disk.
    images: BTreeMap<Side, PathBuf>,
    /// Who runs the guest, as far as the drill has seen.
    pub(super) live: Side,
    /// Who holds its mirror.
    pub(super) partner: Option<Side>,
    /// When the old primary came back, beyond what the drill is about.
    pub(super) returned_us: Option<u64>,
    /// Whether the images of both were compared in the end, and were the same.
    pub(super) images_equal: bool,
    pub(super) observed: BTreeMap<Side, Observed>,
    pub(super) started_us: u64,
    deadline: Instant,
    pub(super) marks: Vec<Mark>,
    pub(super) fault_us: Option<u64>,
    pub(super) how: String,
    pub(super) violations: Vec<String>,
    pub(super) load: Option<Load>,
    pub(super) relay: Option<Relay>,
}

impl<'a> Scene<'a> {
    /// Before anything is there.
    pub(super) fn new(plan: &'a Plan, interrupted: &'a AtomicBool) -> io::Result<Self> {
        let (seen, observations) = channel();
        let folder = tempfile::Builder::new().prefix("understudy-drill-").tempdir()?;
        fs::create_dir(folder.path().join("witness"))?;
        Ok(Self {
            plan,
            random: plan.random.clone(),
            folder,
            interrupted,
            seen,
            observations,
            processes: BTreeMap::new(),
            images: BTreeMap::new(),
            live: Side::PRIMARY,
            partner: Some(Side::STANDBY),
            returned_us: None,
            images_equal: false,
            observed: BTreeMap::new(),
            started_us: monotonic_us(),
            deadline: Instant::now() + plan.timeout,
            marks: Vec::new(),
            fault_us: None,
            how: String::new(),
            violations: Vec::new(),
            load: None,
            relay: None,
        })
    }

    /// Starts both sides and the clients, and returns when the guest is protected and serves.
    pub(super) fn begin(&mut self) -> Result<(), Failure> {
        let early = |failure| match failure {
            Failure::Lost(what) => Failure::Error(DrillError::NotBegun(what)),
            error => error,
        };
        let mut listen = self.start_standby(Side::STANDBY).map_err(early)?;
        if matches!(self.plan.drill, Name::Cut | Name::Slow) {
            let relay = Relay::start(listen.trim_start_matches("tcp:"))?;
            listen = format!("tcp:{}", relay.address());
            self.relay = Some(relay);
        }
        self.start_primary(&listen)?;
        self.await_report(Side::PRIMARY, "the guest is protected", |report| {
            matches!(report, Report::Protected { .. })
        })
        .map_err(|failure| early(self.with_last_words(failure)))?;
        self.mark("protected");
        if self.plan.served {
            self.load = Some(Load::start(SERVICE, self.plan.blocks)?);
            self.until("the service answers", PATIENCE, |scene| scene.answered() >= WARM).map_err(early)?;
        }
        Ok(())
    }

    /// Adds what the processes said last to the words of a failure.
    pub(super) fn with_last_words(&self, failure: Failure) -> Failure {
        let Failure::Lost(text) = failure else { return failure };
        let words = self
            .processes
            .iter()
            .map(|(side, process)| format!("{} said last:\n{}", side.name(), process.last_words()));
        Failure::Lost(std::iter::once(text).chain(words).collect::<Vec<_>>().join("\n"))
    }

    /// Starts a standby, with a disk of its own on which there is nothing, and returns where it listens.
    pub(super) fn start_standby(&mut self, side: Side) -> Result<String, Failure> {
        let image = self.image_folder().join(format!("disk-{}", side.0));
        if self.plan.is_replicated() {
            self.create_image(&image)?;
        }
        self.start_standby_with(side, image)
    }

    fn create_image(&self, image: &Path) -> io::Result<()> {
        fs::create_dir_all(self.image_folder())?;
        fs::File::create(image)?.set_len(self.plan.image_bytes())
    }

    /// Starts a standby with the image that `before` had, which has ended, and returns where it listens.
    pub(super) fn start_returning(&mut self, side: Side, before: Side) -> Result<String, Failure> {
        let image = self.image(before);
        self.start_standby_with(side, image)
    }

    fn start_standby_with(&mut self, side: Side, image: PathBuf) -> Result<String, Failure> {
        let mut arguments: Vec<OsString> = [
            "standby",
            "--listen",
            "tcp:127.0.0.1:0",
            "--net",
            &format!("{}={}", self.plan.card, network::tap(side)),
            "--name",
            side.name(),
        ]
        .map(OsString::from)
        .into();
        arguments.extend(["--witness".into(), self.witness().into_os_string()]);
        arguments.extend(["--api-sock".into(), self.api(side).into_os_string()]);
        if self.plan.is_replicated() {
            arguments.extend(["--drive".into(), format!("{DRIVE}={}", image.display()).into()]);
            self.images.insert(side, image);
        }
        self.start(side, &arguments)?;
        self.until("a standby listens", PATIENCE, |scene| scene.of(side).tally.listening.is_some())?;
        Ok(self.of(side).tally.listening.clone().unwrap_or_default())
    }

    fn start_primary(&mut self, standby: &str) -> Result<(), Failure> {
        let mut config = self.plan.config.clone();
        config.mirror = Some(self.mirror_to(standby)?);
        for drive in &mut config.drives {
            if drive.path_on_host.as_os_str().is_empty() {
                drive.path_on_host = self.image_folder().join("disk-0");
                self.create_image(&drive.path_on_host)?;
                self.images.insert(Side::PRIMARY, drive.path_on_host.clone());
            }
        }
        let file = self.folder.path().join("vm.json");
        fs::write(&file, serde_json::to_vec_pretty(&config).map_err(io::Error::from)?)?;
        let arguments: [OsString; 5] = [
            "run".into(),
            "--config-file".into(),
            file.into(),
            "--api-sock".into(),
            self.api(Side::PRIMARY).into(),
        ];
        self.start(Side::PRIMARY, &arguments)
    }

    /// The mirror of this run's guest, to `standby`.
    pub(super) fn mirror_to(&self, standby: &str) -> Result<MirrorSection, Failure> {
        let address: Address = standby.parse().map_err(|reason: String| io::Error::other(reason))?;
        let mut mirror = MirrorSection::to(address);
        mirror.witness = Some(WitnessAddress::File(self.witness()));
        mirror.guid = Some(self.plan.guid);
        Ok(mirror)
    }

    fn start(&mut self, side: Side, arguments: &[OsString]) -> Result<(), Failure> {
        self.observed.insert(side, Observed::default());
        let process = Process::start(side, arguments, &self.seen)?;
        self.processes.insert(side, process);
        Ok(())
    }

    /// The file of the witness.
    fn witness(&self) -> PathBuf {
        self.folder.path().join("witness").join("record")
    }

    /// The newest term that the witness has granted.
    pub(super) fn newest_term(&self) -> Result<Option<Term>, Failure> {
        let record = FileWitness::new(self.witness()).read(self.plan.guid).map_err(io::Error::other)?;
        Ok(record.map(|record| record.term))
    }

    /// The API socket of a side.
    pub(super) fn api(&self, side: Side) -> PathBuf {
        self.folder.path().join(format!("side-{}.sock", side.0))
    }

    /// Where the image of a side is: of all sides, if there is only one.
    pub(super) fn image(&self, side: Side) -> PathBuf {
        self.images.get(&side).or(self.images.get(&Side::PRIMARY)).cloned().unwrap_or_default()
    }

    /// The folder that has the images alone.
    pub(super) fn image_folder(&self) -> PathBuf {
        self.folder.path().join("image")
    }

    /// What was observed of a side that was started.
    pub(super) fn of(&self, side: Side) -> &Observed {
        &self.observed[&side]
    }

    /// The mirror's link.
    pub(super) fn link(&self) -> Result<&Relay, Failure> {
        self.relay.as_ref().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound).into())
    }

    /// Answers that clients got.
    pub(super) fn answered(&self) -> u64 {
        self.load.as_ref().map_or(0, Load::answered)
    }

    /// Takes in what is observed for at most `wait`.
    fn observe(&mut self, wait: Duration) -> Result<(), Failure> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(Failure::Error(DrillError::Interrupted));
        }
        match self.observations.recv_timeout(wait.min(GLANCE)) {
            Ok(first) => self.take(first),
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
        }
        while let Ok(observation) = self.observations.try_recv() {
            self.take(observation);
        }
        Ok(())
    }

    fn take(&mut self, observation: Observation) {
        match observation {
            Observation::Told(side, stamped) => {
                let observed = self.observed.entry(side).or_default();
                observed.tally.note(&stamped);
                observed.told.push(stamped);
            }
            Observation::Wrote { side, bytes, .. } => {
                self.observed.entry(side).or_default().console.extend(bytes);
            }
            Observation::Closed(side) => {
                let observed = self.observed.entry(side).or_default();
                observed.closed = true;
                observed.ended_us.get_or_insert(monotonic_us());
            }
        }
    }

    /// Waits until `reached`; if that is not so within `patience`, the guest is lost.
    pub(super) fn until(
        &mut self,
        what: &str,
        patience: Duration,
        mut reached: impl FnMut(&Self) -> bool,
    ) -> Result<(), Failure> {
        let until = (Instant::now() + patience).min(self.deadline);
        while !reached(self) {
            if Instant::now() >= until {
                return Err(Failure::Lost(format!("not in time: {what}")));
            }
            self.observe(GLANCE)?;
        }
        Ok(())
    }

    /// Waits until a side tells something; its end is a loss, too.
    pub(super) fn await_report(
        &mut self,
        side: Side,
        what: &str,
        wanted: impl Fn(&Report) -> bool,
    ) -> Result<u64, Failure> {
        let mut at_us = None;
        let mut ended = false;
        self.until(what, PATIENCE, |scene| {
            at_us = scene.of(side).when(0, &wanted);
            ended = scene.of(side).closed;
            at_us.is_some() || ended
        })?;
        at_us.ok_or_else(|| Failure::Lost(format!("the {} ended before {what}", side.name())))
    }

    /// Lets time pass.
    pub(super) fn pass(&mut self, time: Duration) -> Result<(), Failure> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            self.observe(left)?;
        }
    }

    /// Lets a random part of the time pass in which the fault may come.
    pub(super) fn pass_to_the_fault(&mut self) -> Result<(), Failure> {
        let wait = self.random.time(0, 1000);
        self.pass(wait)
    }

    /// Notes what the drill does now.
    pub(super) fn mark(&mut self, text: impl Into<String>) -> u64 {
        let at_us = monotonic_us();
        self.marks.push(Mark { at_us, text: text.into() });
        at_us
    }

    /// Notes that this is the fault.
    pub(super) fn fault(&mut self, text: impl Into<String>) -> u64 {
        let at_us = self.mark(text);
        self.fault_us.get_or_insert(at_us);
        at_us
    }

    /// Kills a side by SIGKILL.
    pub(super) fn kill(&mut self, side: Side) -> Result<(), Failure> {
        let killed_us = self.fault(format!("SIGKILL to the {}", side.name()));
        self.processes.get_mut(&side).map_or(Err(io::ErrorKind::NotFound.into()), Process::kill)?;
        // All that it wrote is to be seen.
        self.until("the output of a killed process ends", PATIENCE, |scene| scene.of(side).closed)?;
        self.observed.entry(side).or_default().ended_us = Some(killed_us);
        self.must_be_protected(killed_us)
    }

    /// Whether the last that the live side told before `at_us` was not that it goes on alone.
    ///
    /// # Errors
    /// [`Failure::Unprotected`]
    pub(super) fn must_be_protected(&mut self, at_us: u64) -> Result<(), Failure> {
        // What it told just before may still be on its way.
        self.pass(GLANCE)?;
        let lost_before = |side: Side, lost: fn(&Report) -> bool| {
            let before = self.of(side).told.iter().rev().filter(|stamped| stamped.at_us <= at_us);
            let last = before
                .map(|stamped| &stamped.report)
                .find(|report| matches!(report, Report::Protected { .. }) || lost(report));
            last.is_some_and(lost)
        };
        let standby_lost = |report: &Report| {
            matches!(report, Report::StandbyLost { .. } | Report::Solo { .. } | Report::Unprotected { .. })
        };
        // A side that is kept waiting may take the other for dead.
        let primary_lost = |report: &Report| matches!(report, Report::PrimaryLost { .. });
        if lost_before(self.live, standby_lost)
            || self.partner.is_some_and(|side| lost_before(side, primary_lost))
        {
            return Err(Failure::Unprotected);
        }
        Ok(())
    }

    /// The side that ran the guest last until `at_us`.
    pub(super) fn live_at(&self, at_us: u64) -> Side {
        let told = self
            .observed
            .iter()
            .flat_map(|(side, observed)| observed.told.iter().map(move |told| (side, told)));
        let live = told.filter(|(_, told)| {
            told.at_us <= at_us && matches!(told.report, Report::Active { .. } | Report::Solo { .. })
        });
        live.max_by_key(|(_, told)| told.at_us).map_or(Side::PRIMARY, |(side, _)| *side)
    }

    /// Ends a side that has lost the guest, if it has not ended by itself: another is to have its image.
    pub(super) fn dismiss(&mut self, side: Side) -> Result<(), Failure> {
        if let Some(process) = self.processes.get_mut(&side) {
            // It may have ended.
            let _ = process.kill();
        }
        self.until("the output of a process that was ended ends", PATIENCE, |scene| scene.of(side).closed)
    }

    /// Sends a signal to a side.
    pub(super) fn signal(&mut self, side: Side, signal: Signal) -> Result<(), Failure> {
        let process = self.processes.get(&side);
        Ok(process.map_or(Err(io::ErrorKind::NotFound.into()), |process| process.signal(signal))?)
    }

    /// Ends all processes and takes in all that they had to say.
    pub(super) fn end(&mut self) -> Result<(), Failure> {
        let sides: Vec<Side> = self.processes.keys().copied().collect();
        for side in &sides {
            if let Some(process) = self.processes.get_mut(side) {
                // It may have ended.
                let _ = process.kill();
            }
        }
        let all_closed = |scene: &Self| sides.iter().all(|side| scene.of(*side).closed);
        self.until("the output of all processes ends", PATIENCE, all_closed)?;
        // Events end with the process, too, but by a thread of their own.
        let seen = self.seen.clone();
        for process in std::mem::take(&mut self.processes).into_values() {
            process.wait()?;
        }
        drop(seen);
        while let Ok(observation) = self.observations.try_recv() {
            self.take(observation);
        }
        Ok(())
    }
}
