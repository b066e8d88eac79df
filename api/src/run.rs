//! `understudy run`: a guest and, if the configuration says so, its mirror.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use mirror::console::Console;
use mirror::report::Report;
use mirror::shell::primary::{self, AttachError, Handle, Outcome, StatusHandle};
use mirror::witness::FileWitness;
use thiserror::Error;
use uuid::Uuid;
use vmm::{CreateError, Exit, ExitHandle, Machine, MachineError};

use crate::cli::RunOptions;
use crate::config::{Config, ConfigError, MirrorSection};
use crate::events::{EventLog, EventsError};
use crate::exit::ExitStatus;
use crate::guest::{StartsMirrored, boot, exit_status, machine_config};
use crate::process::{self, Keyboard};
use crate::server::{Instance, InstanceInfo, InstanceState, MirrorStatus, Server, ServerError};

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
            Self::Config(_) | Self::Create(CreateError::Config(_)) => ExitStatus::Config,
            Self::Create(CreateError::Host(_)) => ExitStatus::Unavailable,
            Self::Load(MachineError::Boot(_)) => ExitStatus::NoKernel,
            Self::Attach(_) => ExitStatus::Unreachable,
            _ => ExitStatus::Failure,
        }
    }
}

/// What the main thread waits for.
enum Happening {
    GuestEnded(Exit),
    MirrorEnded(Outcome, Box<StartsMirrored>),
    EndRequested,
}

/// What the API tells about.
struct RunningGuest {
    id: String,
    exit: ExitHandle,
    mirror: Option<StatusHandle>,
}

impl Instance for RunningGuest {
    fn info(&self) -> InstanceInfo {
        let frozen = self.mirror().is_some_and(
            |status| matches!(status, MirrorStatus::Primary(primary) if primary.phase == "frozen"),
        );
        let state = match self.exit.get() {
            Some(_) => InstanceState::NotStarted,
            None if frozen => InstanceState::Paused,
            None => InstanceState::Running,
        };
        InstanceInfo::new(&self.id, state)
    }

    fn mirror(&self) -> Option<MirrorStatus> {
        self.mirror.as_ref()?.status().map(|status| MirrorStatus::Primary(Box::new(status)))
    }
}

/// Runs the guest until it ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn run(options: &RunOptions) -> Result<ExitStatus, RunError> {
    if options.end_with_parent.map_or(Ok(true), process::end_with_parent).is_ok_and(|alive| !alive) {
        return Ok(ExitStatus::Interrupted);
    }
    let config = Config::load(&options.config_file)?;
    let events = EventLog::open(options.events.as_deref(), "primary")?;
    let console = Console::new(io::stdout())?;
    let mut machine = Machine::create(&machine_config(&config), Arc::clone(&console))?;
    machine.load(&boot(&config.boot))?;

    let (happen, happenings) = channel();
    let end = happen.clone();
    // At the end nobody waits for it any more; so with all that happens.
    process::on_end_request(move || drop(end.send(Happening::EndRequested)))?;
    let keyboard = connect_keyboard(&machine, options.serial_in)?;
    let exit = machine.exit_handle();
    let mut running = None;
    let (mut notifier, mut mirror) = (None, None);
    if let Some(section) = &config.mirror {
        let handle = attach(machine, &console, section, &options.id, &events)?;
        (notifier, mirror) = (Some(handle.notifier()), Some(handle.status_handle()));
        wait_for_mirror(handle, happen.clone())?;
    } else {
        machine.start();
        running = Some(machine);
    }
    let ended = exit.clone();
    thread::Builder::new().name("guest-exit".into()).spawn(move || {
        let exit = ended.wait();
        if let Some(notifier) = notifier {
            notifier.guest_ended(exit.to_string());
        }
        let _ = happen.send(Happening::GuestEnded(exit));
    })?;
    let instance = RunningGuest { id: options.id.clone(), exit, mirror };
    let server =
        options.api_sock.as_deref().map(|path| Server::start(path, Arc::new(instance))).transpose()?;

    let status = watch(&happenings, running, &console, &events);
    events.close();
    drop((server, keyboard));
    Ok(status)
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

fn attach(
    machine: Machine,
    console: &Arc<Console>,
    section: &MirrorSection,
    id: &str,
    events: &Arc<EventLog>,
) -> Result<Handle<StartsMirrored>, AttachError> {
    let options = primary::Options {
        settings: section.settings(),
        guid: section.guid.unwrap_or_else(Uuid::new_v4),
        name: format!("primary {id} {}", Uuid::new_v4().as_fields().0),
        witness: section.witness.as_ref().map(FileWitness::new),
        standby: section.standby.clone(),
        staging_pages: section.staging_pages(),
    };
    let log = Arc::clone(events);
    let watcher = Arc::new(move |report| log.tell(report));
    primary::attach(StartsMirrored(machine), Arc::clone(console), options, watcher)
        .map_err(|failure| failure.error)
}

fn wait_for_mirror(handle: Handle<StartsMirrored>, happen: Sender<Happening>) -> io::Result<()> {
    thread::Builder::new().name("mirror-end".into()).spawn(move || {
        let (outcome, guest) = handle.wait();
        let _ = happen.send(Happening::MirrorEnded(outcome, Box::new(guest)));
    })?;
    Ok(())
}

/// Waits until there is nothing more to run. `running` is the guest, unless the mirror has it.
fn watch(
    happenings: &Receiver<Happening>,
    mut running: Option<Machine>,
    console: &Console,
    events: &EventLog,
) -> ExitStatus {
    let mut ended = None;
    while let Ok(happening) = happenings.recv() {
        match happening {
            Happening::GuestEnded(exit) => ended = Some(exit),
            Happening::MirrorEnded(Outcome::Frozen, _) => return ExitStatus::Frozen,
            Happening::MirrorEnded(_, guest) => {
                let mut machine = guest.0;
                // It has not run yet if the standby turned it down.
                machine.start();
                running = Some(machine);
            }
            Happening::EndRequested => return ExitStatus::Interrupted,
        }
        // An end that is not committed yet is the mirror's to finish.
        if let (Some(exit), Some(_)) = (&ended, &running) {
            console.flush();
            events.tell(Report::Ended { reason: exit.to_string() });
            return exit_status(exit);
        }
    }
    ExitStatus::Failure
}
