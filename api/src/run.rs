//! `understudy run`: a guest and, if the configuration says so, its mirror.

use std::io;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use mirror::console::Console;
use mirror::report::Report;
use mirror::shell::primary::{self, AttachError, AttachFailure, Notifier, Outcome, StatusHandle};
use mirror::witness::{FileWitness, Record, Witness};
use thiserror::Error;
use uuid::Uuid;
use vmm::snapshot::{MemoryFill, RestoreError};
use vmm::{CreateError, DeviceLimits, Exit, ExitHandle, Machine, MachineError};

use crate::cli::{InstanceOptions, RunOptions};
use crate::config::{Config, ConfigError, MirrorSection};
use crate::events::{EventLog, EventsError};
use crate::exit::ExitStatus;
use crate::guest::{StartsMirrored, boot, exit_status, machine_config};
use crate::load;
use crate::process::{self, Keyboard};
use crate::server::{DriveChange, Order, ServerError};
use crate::stage::{Happening, RunningGuest, Stage, TOO_LATE};

/// Why a guest is not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The events.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// The machine.
    #[error("cannot create the machine: {0}")]
    Create(#[from] CreateError),
    /// Its kernel.
    #[error("cannot load the kernel: {0}")]
    Load(#[from] MachineError),
    /// Its snapshot.
    #[error("cannot go on from the snapshot: {0}")]
    Restore(#[from] RestoreError),
    /// The mirror.
    #[error("the guest was not started, because it cannot be mirrored: {0}")]
    Attach(#[from] AttachError),
    /// The API.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The process.
    #[error("cannot set up the process: {0}")]
    Process(#[from] io::Error),
}

impl RunError {
    /// The exit status that tells of it.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Config(_) | Self::Create(CreateError::Config(_) | CreateError::Template(_)) => {
                ExitStatus::Config
            }
            Self::Create(CreateError::Host(_))
            | Self::Restore(RestoreError::Create(CreateError::Host(_))) => ExitStatus::Unavailable,
            Self::Load(MachineError::Boot(_)) => ExitStatus::NoKernel,
            Self::Attach(_) => ExitStatus::Unreachable,
            _ => ExitStatus::Failure,
        }
    }
}

/// How long a paused guest's output may take to leave.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// How often it is told how much memory has come from a snapshot.
const FILL_REPORTS: Duration = Duration::from_millis(500);

/// How long the process of a guest whose memory is lost may take to end in order.
const ENDING_PATIENCE: Duration = Duration::from_secs(5);

/// Runs the guest until it ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn run(options: &RunOptions) -> Result<ExitStatus, RunError> {
    let Some(config_file) = &options.config_file else { return load::wait_and_run(&options.instance) };
    let config = Config::load(config_file)?;
    let console = Console::new(io::stdout())?;
    let mut machine = Machine::create(&machine_config(&config), Arc::clone(&console))?;
    machine.load(&boot(&config))?;
    let beginning = config.mirror.map_or(Beginning::Running, Beginning::Mirrored);
    run_machine(machine, console, &options.instance, &beginning)
}

/// How a machine begins.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "there is one")]
pub enum Beginning {
    /// Its guest runs.
    Running,
    /// Its guest stands still until it is told to go on.
    Paused,
    /// It is mirrored, as the section says.
    Mirrored(MirrorSection),
}

/// Runs `machine` until its guest ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn run_machine(
    machine: Machine,
    console: Arc<Console>,
    options: &InstanceOptions,
    beginning: &Beginning,
) -> Result<ExitStatus, RunError> {
    let Some(stage) = Stage::open(options)? else { return Ok(ExitStatus::Interrupted) };
    run_on(stage, machine, console, options, beginning)
}

/// As [`run_machine`], on a stage that is there.
pub(crate) fn run_on(
    mut stage: Stage,
    machine: Machine,
    console: Arc<Console>,
    options: &InstanceOptions,
    beginning: &Beginning,
) -> Result<ExitStatus, RunError> {
    let _keyboard = connect_keyboard(&machine, options.serial_in)?;
    let exit = machine.exit_handle();
    let (ended, ends) = (exit.clone(), stage.happen.clone());
    thread::Builder::new()
        .name("guest-exit".into())
        .spawn(move || drop(ends.send(Happening::GuestEnded(ended.wait()))))?;
    if let Some(fill) = machine.memory_fill() {
        watch_fill(fill, exit.clone(), Arc::clone(&stage.events))?;
    }
    let mirror = Arc::new(OnceLock::new());
    let paused = Arc::new(AtomicBool::new(false));
    stage.seat(RunningGuest { exit, mirror: Arc::clone(&mirror), paused: Arc::clone(&paused) });
    stage.serve(options.api_sock.as_deref())?;
    let mut run = Run {
        console,
        events: stage.events,
        happen: stage.happen,
        limits: machine.device_limits(),
        mirror,
        paused,
        ending: stage.ending,
        running: None,
        notifier: None,
        ended: None,
    };
    let status = run.carry_out(machine, beginning, &options.id, &stage.happenings)?;
    run.events.close();
    Ok(status)
}

/// Tells how memory comes, and sees to it that the process ends if it does not.
fn watch_fill(fill: MemoryFill, exit: ExitHandle, events: Arc<EventLog>) -> io::Result<()> {
    let began = Instant::now();
    let watch = move || loop {
        let outcome = fill.wait(FILL_REPORTS);
        let (there, pages) = fill.pages();
        match outcome {
            Ok(false) => events.tell(Report::MemoryArriving { there, pages }),
            Ok(true) => {
                let micros = began.elapsed().as_micros() as u64;
                return events.tell(Report::MemoryComplete { pages, micros });
            }
            Err(_) if matches!(exit.get(), Some(Exit::Error(_))) => {
                // The main thread may itself wait for a page that never comes.
                thread::sleep(ENDING_PATIENCE);
                eprintln!("error: the process waits for memory that cannot be had; it is ended");
                std::process::exit((ExitStatus::GuestCrashed as u8).into());
            }
            Err(_) => return,
        }
    };
    thread::Builder::new().name("memory-fill".into()).spawn(watch)?;
    Ok(())
}

fn connect_keyboard(machine: &Machine, even_if_no_terminal: bool) -> io::Result<Option<Keyboard>> {
    use std::io::IsTerminal;
    if !even_if_no_terminal && !io::stdin().is_terminal() {
        return Ok(None);
    }
    let keyboard = Keyboard::take();
    let serial = machine.serial();
    // An interrupt that cannot be raised loses the key: the next one raises it again.
    process::forward_stdin(move |bytes| serial.send(bytes).unwrap_or(bytes.len()))?;
    Ok(Some(keyboard))
}

/// A guest's run, from its first instruction to its end.
struct Run {
    console: Arc<Console>,
    events: Arc<EventLog>,
    happen: Sender<Happening>,
    /// Of the guest's devices, whoever has it.
    limits: DeviceLimits,
    /// For the API.
    mirror: Arc<OnceLock<(StatusHandle, Notifier)>>,
    /// The guest was told to stand still.
    paused: Arc<AtomicBool>,
    /// The process was asked to end.
    ending: Arc<AtomicBool>,
    /// The guest, unless the mirror has it.
    running: Option<Machine>,
    /// The mirror, while it has the guest.
    notifier: Option<Notifier>,
    ended: Option<Exit>,
}

impl Run {
    fn carry_out(
        &mut self,
        mut machine: Machine,
        beginning: &Beginning,
        id: &str,
        happenings: &Receiver<Happening>,
    ) -> Result<ExitStatus, RunError> {
        let section = match beginning {
            Beginning::Mirrored(section) => Some(section),
            Beginning::Running | Beginning::Paused => None,
        };
        match section {
            None if matches!(beginning, Beginning::Paused) => {
                self.paused.store(true, Ordering::Release);
                self.running = Some(machine);
            }
            // Not admitted, it does not run.
            Some(section) if section.delay_ms == 0 => {
                self.mirror(machine, section, id).map_err(|failure| failure.error)?;
            }
            _ => {
                section.map_or(Ok(()), refuse_if_live_elsewhere)?;
                machine.start();
                self.running = Some(machine);
            }
        }
        let mut attach_at = section
            .filter(|section| section.delay_ms > 0)
            .map(|section| (section, Instant::now() + Duration::from_millis(section.delay_ms.into())));
        loop {
            let happening = match attach_at {
                None => happenings.recv().ok(),
                Some((section, at)) => {
                    let wait = at.saturating_duration_since(Instant::now());
                    if let Ok(happening) = happenings.recv_timeout(wait) {
                        Some(happening)
                    } else {
                        attach_at = None;
                        if let Some(status) = self.attach_running(section, id) {
                            return Ok(status);
                        }
                        continue;
                    }
                }
            };
            if let Some(status) =
                happening.map_or(Some(ExitStatus::Failure), |happening| self.take(happening))
            {
                return Ok(status);
            }
        }
    }

    /// A running guest goes on if it cannot be mirrored, unless it is live elsewhere: then this side ends.
    fn attach_running(&mut self, section: &MirrorSection, id: &str) -> Option<ExitStatus> {
        let machine = self.running.take()?;
        let failure = self.mirror(machine, section, id).err()?;
        let reason = failure.error.to_string();
        if matches!(failure.error, AttachError::NotOwner { .. }) {
            self.console.freeze();
            self.events.tell(Report::Frozen { reason });
            return Some(ExitStatus::Frozen);
        }
        self.events.tell(Report::Unprotected { reason });
        self.running = Some(failure.guest.0);
        None
    }

    fn mirror(
        &mut self,
        machine: Machine,
        section: &MirrorSection,
        id: &str,
    ) -> Result<(), Box<AttachFailure<StartsMirrored>>> {
        let options = primary::Options {
            settings: section.settings(),
            guid: section.guid.unwrap_or_else(Uuid::new_v4),
            name: format!("primary {id} {}", Uuid::new_v4().as_fields().0),
            term: None,
            witness: section.witness.as_ref().map(FileWitness::new),
            standby: section.standby.clone(),
            staging_pages: section.staging_pages(),
        };
        let log = Arc::clone(&self.events);
        let watcher = Arc::new(move |report| log.tell(report));
        let handle = primary::attach(StartsMirrored(machine), Arc::clone(&self.console), options, watcher)
            .map_err(Box::new)?;
        self.notifier = Some(handle.notifier());
        // It is attached once.
        let _ = self.mirror.set((handle.status_handle(), handle.notifier()));
        let happen = self.happen.clone();
        let waiting = thread::Builder::new().name("mirror-end".into()).spawn(move || {
            let (outcome, guest) = handle.wait();
            let _ = happen.send(Happening::MirrorEnded(outcome, Box::new(guest)));
        });
        if let Err(error) = waiting {
            // The mirror goes on; only its end will not be noticed here.
            self.events.tell(Report::Failed { reason: format!("cannot start a thread: {error}") });
        }
        Ok(())
    }

    fn obey(&mut self, order: &Order) -> Result<(), String> {
        match order {
            Order::Pause => {
                self.own_machine()?.stand_still().map_err(|error| error.to_string())?;
                // What it has printed is out before anybody counts on its standing still.
                self.console.flush_within(CONSOLE_PATIENCE);
                self.paused.store(true, Ordering::Release);
                Ok(())
            }
            Order::Resume => {
                self.own_machine()?.start();
                self.paused.store(false, Ordering::Release);
                Ok(())
            }
            Order::Snapshot(request) => {
                let ending = Arc::clone(&self.ending);
                let mut progress = |_, _| {
                    if ending.load(Ordering::Acquire) {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                };
                let taken = self.own_machine()?.snapshot(request, &mut progress);
                taken.map(drop).map_err(|error| error.to_string())
            }
            Order::Drive(change) => self.change_drive(change).map_err(|reason| {
                format!("Unable to patch the block device: {reason}. Please verify the request arguments")
            }),
            Order::Net { id, receive, send } => {
                self.limits.update_net(id, receive, send).map_err(|error| error.to_string())
            }
        }
    }

    fn change_drive(&mut self, DriveChange { id, image, limits }: &DriveChange) -> Result<(), String> {
        if let Some(image) = image {
            let mirrored = "the guest is mirrored, and its standby would go on with the old image; leave path_on_host out";
            let machine = self.running.as_mut().ok_or(mirrored)?;
            machine.change_image(id, image).map_err(|error| error.to_string())?;
        }
        self.limits.update_drive(id, limits).map_err(|error| error.to_string())
    }

    /// The machine, unless the mirror has it.
    fn own_machine(&mut self) -> Result<&mut Machine, String> {
        let mirrored = "the guest is mirrored, and the mirror has its pages; that is not possible yet";
        self.running.as_mut().ok_or_else(|| mirrored.into())
    }

    /// Takes notice of what happened; says how the process ends, if it does.
    fn take(&mut self, happening: Happening) -> Option<ExitStatus> {
        match happening {
            Happening::GuestEnded(exit) => {
                if let Some(notifier) = &self.notifier {
                    notifier.guest_ended(exit.to_string());
                }
                self.ended = Some(exit);
            }
            Happening::MirrorEnded(Outcome::Frozen, _) => return Some(ExitStatus::Frozen),
            Happening::MirrorEnded(Outcome::HandedOver, _) => return Some(ExitStatus::Success),
            Happening::MirrorEnded(_, guest) => {
                let mut machine = guest.0;
                // It has not run yet if the standby turned it down.
                machine.start();
                self.notifier = None;
                self.running = Some(machine);
            }
            Happening::EndRequested => return Some(ExitStatus::Interrupted),
            Happening::Ordered(order, answer) => {
                // Whoever asked may have gone.
                let _ = answer.send(self.obey(&order));
            }
            Happening::Load(_, answer) => {
                let _ = answer.send(Err(TOO_LATE.into()));
            }
        }
        // An end that is not committed yet is the mirror's to finish.
        let (Some(exit), Some(_)) = (&self.ended, &self.running) else { return None };
        self.console.flush();
        self.events.tell(Report::Ended { reason: exit.to_string() });
        Some(exit_status(exit))
    }
}

/// A guest that runs before it is mirrored owns no term yet: it must not run at all if somebody else does.
fn refuse_if_live_elsewhere(section: &MirrorSection) -> Result<(), AttachError> {
    let (Some(path), Some(guid)) = (&section.witness, section.guid) else { return Ok(()) };
    match FileWitness::new(path).read()? {
        Some(Record { guid: theirs, term, owner }) if theirs == guid => {
            Err(AttachError::NotOwner { guid, term, owner })
        }
        _ => Ok(()),
    }
}
