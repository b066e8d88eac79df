//! One run: start both sides, kill the primary, watch the standby, judge.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use mirror::link::Address;
use mirror::report::monotonic_us;
use mirror::witness::WitnessAddress;

use crate::sides::console::{Consoles, Findings, check};
use crate::sides::process::{Observation, Process, Side};
use crate::sides::tally::Tally;

use super::DemoError;
use super::display::Display;
use super::options::{KillMoment, Plan};
use super::report::{Outcome, Pauses, RunReport};

/// How often the clock and the interrupt flag are looked at while nothing is observed.
const GLANCE: Duration = Duration::from_millis(50);

/// How long a standby may take to decide, beyond the time of silence after which it counts the primary as lost.
const DECISION: Duration = Duration::from_secs(3);

/// Bytes of a console that are shown when something is wrong.
const CONSOLE_TAIL: usize = 1000;

/// How often the consoles are judged while the guest is checking its memory.
const JUDGEMENT: Duration = Duration::from_millis(200);

/// Everything observed of a side.
#[derive(Default)]
struct Observed {
    tally: Tally,
    console: Vec<u8>,
    first_output_us: Option<u64>,
    closed: bool,
}

/// A run under way.
struct Trial<'a> {
    plan: &'a Plan,
    display: &'a mut Display,
    interrupted: &'a AtomicBool,
    observations: Receiver<Observation>,
    primary: Observed,
    standby: Observed,
    deadline: Instant,
}

/// Carries out `plan`.
///
/// # Errors
/// The run could not be made: a process did not start or ended before it was to, or nothing was mirrored.
pub(super) fn carry_out(
    plan: &Plan,
    tcp: bool,
    display: &mut Display,
    interrupted: &AtomicBool,
) -> Result<RunReport, DemoError> {
    let folder = tempfile::Builder::new().prefix("understudy-").tempdir().map_err(DemoError::System)?;
    let (seen, observations) = channel();
    let deadline = Instant::now() + plan.timeout;
    let (primary, standby) = (Observed::default(), Observed::default());
    let mut trial = Trial { plan, display, interrupted, observations, primary, standby, deadline };
    trial.display.start(monotonic_us());
    let mut standby = start_standby(folder.path(), tcp, &seen)?;
    let listens = |trial: &Trial| trial.standby.tally.listening.is_some();
    if let Err(error) = trial.until("the standby listens", listens) {
        return Err(explain(error, Side::STANDBY, standby));
    }
    let address = trial.standby.tally.listening.clone().unwrap_or_default();
    let started_us = monotonic_us();
    trial.display.start(started_us);
    let mut primary = start_primary(folder.path(), plan, &address, &seen)?;
    if let Err(error) = trial.until_moment(started_us) {
        let side = if trial.primary.closed { Side::PRIMARY } else { Side::STANDBY };
        return Err(explain(error, side, if side == Side::PRIMARY { primary } else { standby }));
    }

    let phase_at_kill = trial.primary.tally.phase();
    let promised = trial.primary.tally.protected_us.is_some();
    let killed_us = primary.kill().map_err(DemoError::System)?;
    trial.display.line(killed_us, &format!("KILLED the primary (SIGKILL), in {phase_at_kill}"));
    let decided = trial.after_the_kill(promised)?;
    // What it still has to say is of no interest: it has ended, or is to end now.
    let _ = standby.kill();
    let _ = trial.until("the standby's output ends", |trial| trial.standby.closed);
    let (_, last_words) = standby.wait().map_err(DemoError::System)?;
    trial.display.finish();
    let mut findings = trial.judge();
    findings.problems.extend(decided);
    let report = trial.report(started_us, killed_us, phase_at_kill, findings);
    if report.outcome == Outcome::Lost {
        let console = &trial.standby.console;
        let tail = String::from_utf8_lossy(&console[console.len().saturating_sub(CONSOLE_TAIL)..]);
        eprintln!("the end of the standby's console:\n{tail}\nthe standby's last words:\n{last_words}");
    }
    Ok(report)
}

fn start_standby(folder: &Path, tcp: bool, seen: &Sender<Observation>) -> Result<Process, DemoError> {
    let listen =
        if tcp { Address::Tcp("127.0.0.1:0".into()) } else { Address::Unix(folder.join("standby.sock")) };
    let arguments: [OsString; 6] = [
        "standby".into(),
        "--once".into(),
        "--listen".into(),
        listen.to_string().into(),
        "--witness".into(),
        folder.join("witness").into(),
    ];
    Process::start(Side::STANDBY, &arguments, seen).map_err(DemoError::System)
}

fn start_primary(
    folder: &Path,
    plan: &Plan,
    standby: &str,
    seen: &Sender<Observation>,
) -> Result<Process, DemoError> {
    let mut config = plan.config.clone();
    if let Some(mirror) = &mut config.mirror {
        let address: Address =
            standby.parse().map_err(|reason: String| DemoError::System(io::Error::other(reason)))?;
        mirror.standby = address.into();
        mirror.witness = Some(WitnessAddress::File(folder.join("witness")));
    }
    let file = folder.join("vm.json");
    let text = serde_json::to_string_pretty(&config).map_err(|error| DemoError::System(error.into()))?;
    std::fs::write(&file, text).map_err(DemoError::System)?;
    let arguments: [OsString; 3] = ["run".into(), "--config-file".into(), file.into()];
    Process::start(Side::PRIMARY, &arguments, seen).map_err(DemoError::System)
}

/// Puts what the process said last into the error of its early end.
fn explain(error: DemoError, side: Side, process: Process) -> DemoError {
    if !matches!(error, DemoError::Ended { .. }) {
        return error;
    }
    match process.wait() {
        Ok((status, stderr)) => {
            DemoError::Ended { side, code: status.code(), how: status.to_string(), stderr }
        }
        Err(error) => DemoError::System(error),
    }
}

impl Trial<'_> {
    /// Takes in what is observed until `wait` is over or something was observed.
    fn observe(&mut self, wait: Duration) -> Result<(), DemoError> {
        if self.interrupted.load(Ordering::Relaxed) {
            return Err(DemoError::Interrupted);
        }
        let first = match self.observations.recv_timeout(wait.min(GLANCE)) {
            Ok(observation) => observation,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return Ok(()),
        };
        self.take(first);
        while let Ok(observation) = self.observations.try_recv() {
            self.take(observation);
        }
        Ok(())
    }

    fn take(&mut self, observation: Observation) {
        match observation {
            Observation::Told(side, stamped) => {
                self.of(side).tally.note(&stamped);
                let observed = if side == Side::PRIMARY { &self.primary } else { &self.standby };
                self.display.told(side, stamped.at_us, &stamped.report, &observed.tally);
            }
            Observation::Wrote { side, at_us, bytes } => {
                let observed = self.of(side);
                observed.first_output_us.get_or_insert(at_us);
                observed.console.extend(bytes);
            }
            Observation::Closed(side) => self.of(side).closed = true,
        }
    }

    fn of(&mut self, side: Side) -> &mut Observed {
        match side {
            Side::PRIMARY => &mut self.primary,
            _ => &mut self.standby,
        }
    }

    /// Waits until `reached`; `what` is for the error of a timeout.
    fn until(&mut self, what: &'static str, reached: impl Fn(&Self) -> bool) -> Result<(), DemoError> {
        while !reached(self) {
            if self.standby.closed {
                return Err(DemoError::ended(Side::STANDBY));
            }
            if self.deadline <= Instant::now() {
                return Err(DemoError::TimedOut { what, seconds: self.plan.timeout.as_secs_f64() });
            }
            self.observe(GLANCE)?;
        }
        Ok(())
    }

    /// Waits until the primary is to be killed.
    fn until_moment(&mut self, started_us: u64) -> Result<(), DemoError> {
        loop {
            if self.primary.closed {
                return Err(DemoError::ended(Side::PRIMARY));
            }
            if self.standby.closed {
                return Err(DemoError::ended(Side::STANDBY));
            }
            if let Some(reason) = &self.primary.tally.unprotected {
                return Err(DemoError::NotMirrored(reason.clone()));
            }
            if self.deadline <= Instant::now() {
                let what = "the primary can be killed";
                return Err(DemoError::TimedOut { what, seconds: self.plan.timeout.as_secs_f64() });
            }
            let (from_us, delay) = match self.plan.kill {
                KillMoment::AfterStart(delay) => (Some(started_us), delay),
                KillMoment::AfterJoin(delay) => (self.primary.tally.joined_us, delay),
                KillMoment::AfterProtection(delay) => (self.primary.tally.protected_us, delay),
            };
            let left = from_us.map(|from_us| {
                Duration::from_micros((from_us + delay.as_micros() as u64).saturating_sub(monotonic_us()))
            });
            if left == Some(Duration::ZERO) {
                return Ok(());
            }
            self.observe(left.unwrap_or(GLANCE))?;
        }
    }

    /// Watches what the standby makes of it; returns what it did not do although it should.
    fn after_the_kill(&mut self, promised: bool) -> Result<Option<String>, DemoError> {
        let decide_until = Instant::now() + self.plan.detection + DECISION;
        let mut judge_at = Instant::now();
        let mut complete = false;
        loop {
            let tally = &self.standby.tally;
            if complete && self.primary.closed {
                return Ok(None);
            }
            if self.standby.closed {
                let refused = tally.refused.is_some() && !promised;
                let why = tally.refused.clone().or_else(|| tally.failed.clone()).unwrap_or_default();
                return Ok((!refused).then(|| format!("the standby ended: {why}")));
            }
            let undecided = tally.active.is_none() && tally.refused.is_none();
            if undecided && Instant::now() >= decide_until {
                // A standby that the primary never got to has nothing to decide.
                let never_joined = tally.joined_us.is_none() && !promised;
                return Ok((!never_joined).then(|| "the standby did not decide anything".into()));
            }
            if Instant::now() >= self.deadline {
                let seconds = self.plan.timeout.as_secs_f64();
                return Ok(Some(format!("the guest did not finish its checks within {seconds} s")));
            }
            if tally.active.is_some() && Instant::now() >= judge_at {
                let findings = self.judge();
                judge_at = Instant::now() + JUDGEMENT;
                let (vcpus, outputs) = (self.plan.params.cpus, findings.outputs_after);
                self.display.checking(monotonic_us(), outputs, findings.vcpus_verified, vcpus);
                complete = findings.complete || !findings.is_clean();
            }
            self.observe(GLANCE)?;
        }
    }

    fn judge(&self) -> Findings {
        let consoles = Consoles {
            primary: &self.primary.console,
            standby: &self.standby.console,
            output_start: self.standby.tally.active.map(|(_, _, _, output_start)| output_start),
        };
        check(&self.plan.params, self.plan.only_workload, &consoles)
    }

    fn report(
        &self,
        started_us: u64,
        killed_us: u64,
        phase_at_kill: &'static str,
        findings: Findings,
    ) -> RunReport {
        let (primary, standby) = (&self.primary.tally, &self.standby.tally);
        let outcome = match standby.active {
            _ if !findings.is_clean() => Outcome::Lost,
            Some(_) => Outcome::Survived,
            None => Outcome::NotProtected,
        };
        let ms = |from_us: u64, to_us: u64| to_us.saturating_sub(from_us) as f64 / 1000.0;
        let lost_us = standby.lost.as_ref().map(|(at_us, _)| *at_us);
        let times = primary.times.summary().pause_us;
        let machine = &self.plan.config.machine;
        RunReport {
            outcome,
            run: self.plan.run,
            vcpus: machine.vcpu_count,
            mem_mib: machine.mem_size_mib,
            dirty_rate: if self.plan.params.dirty { self.plan.params.dirty_rate } else { 0 },
            kill_after_s: ms(started_us, killed_us) / 1000.0,
            phase_at_kill,
            term: standby.active.map(|(_, _, term, _)| term.0),
            epoch: standby.active.map(|(_, epoch, ..)| epoch.0),
            seed_rounds: primary.rounds,
            seed_pages: primary.seed_pages,
            seed_bytes: primary.seed_bytes,
            seed_s: primary.seed_us as f64 / 1e6,
            epochs_committed: primary.epochs,
            epoch_pages: primary.epoch_pages,
            epoch_bytes: primary.epoch_bytes,
            pause_us: Pauses { p50: times.p50, p99: times.p99, max: times.max },
            detect_ms: lost_us.map(|at_us| ms(killed_us, at_us)),
            resume_ms: lost_us.zip(standby.active).map(|(from_us, (at_us, ..))| ms(from_us, at_us)),
            failover_ms: standby.active.and(self.standby.first_output_us).map(|at_us| ms(killed_us, at_us)),
            noticed_by: standby.lost.as_ref().map(|(_, how)| how.clone()),
            refused: standby.refused.clone(),
            findings,
        }
    }
}
