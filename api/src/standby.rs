//! `understudy standby`: holds the mirror of a guest and takes over when its primary dies.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use mirror::console::Console;
use mirror::link::{LinkError, Listener};
use mirror::report::Report;
use mirror::shell::standby::{self, Handle, Options, ServeError};
use mirror::witness::FileWitness;
use thiserror::Error;
use uuid::Uuid;
use vmm::{DeviceLimits, Exit, Host, HostError, HostResources, StandbyHost};

use crate::cli::StandbyOptions;
use crate::config::operator::Logger;
use crate::config::{Draft, Section};
use crate::events::{EventLog, EventsError};
use crate::exit::ExitStatus;
use crate::guest::exit_status;
use crate::log;
use crate::metrics::{self, Meters};
use crate::process;
use crate::server::types::BalloonStats;
use crate::server::{
    Instance, InstanceInfo, InstanceState, MAX_BODY, MirrorStatus, Request, Server, ServerError,
};

/// Why a standby does not stand by.
#[derive(Debug, Error)]
pub enum StandbyError {
    /// The events.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// The host.
    #[error("this host cannot run guests: {0}")]
    Host(#[from] HostError),
    /// The address.
    #[error(transparent)]
    Listen(#[from] LinkError),
    /// The threads.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// The API.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The process.
    #[error("cannot set up the process: {0}")]
    Process(#[from] io::Error),
}

impl StandbyError {
    /// The exit status that tells of it.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Host(_) => ExitStatus::Unavailable,
            _ => ExitStatus::Failure,
        }
    }
}

/// What the main thread waits for.
enum Happening {
    Told(Report),
    GuestEnded(Exit),
    EndRequested,
}

/// What the API tells about.
struct StandingBy {
    name: String,
    meters: Arc<Meters>,
    logger: Mutex<Logger>,
    handle: Handle<StandbyHost>,
}

impl Instance for StandingBy {
    fn info(&self) -> InstanceInfo {
        let runs = self.handle.status().role == "active";
        InstanceInfo::new(&self.name, if runs { InstanceState::Running } else { InstanceState::NotStarted })
    }

    fn draft(&self) -> Draft {
        // The guest's configuration came with it, and is the primary's to tell.
        Draft::default()
    }

    fn mirror(&self) -> Option<MirrorStatus> {
        Some(MirrorStatus::Standby(Box::new(self.handle.status())))
    }

    fn meters(&self) -> &Meters {
        &self.meters
    }

    fn guest(&self) -> Option<DeviceLimits> {
        self.handle.with_machine(|host| host.machine().map(|machine| machine.device_limits()))
    }

    fn balloon_statistics(&self) -> Result<BalloonStats, String> {
        Err(NOT_HERE.into())
    }

    fn ask(&self, request: Request) -> Result<(), String> {
        match request {
            Request::Failover => self.promote(),
            Request::FlushMetrics => self.meters.flush(self),
            Request::Configure(section) => self.configure(*section),
            Request::CtrlAltDel => self.press_ctrl_alt_del(),
            _ => Err(NOT_HERE.into()),
        }
    }

    fn switchover(&self) -> Result<Duration, String> {
        Err("this side mirrors no guest that it could hand over; ask its primary".into())
    }
}

impl StandingBy {
    /// What is this side's own to configure.
    fn configure(&self, section: Section) -> Result<(), String> {
        match section {
            Section::Logger(logger) => {
                let mut current = self.logger.lock().unwrap_or_else(PoisonError::into_inner);
                let logger = logger.over(Some(current.clone()));
                log::configure(&logger, &self.name).map_err(|error| error.to_string())?;
                *current = logger;
                Ok(())
            }
            Section::Metrics(section) => self.meters.write_to(&section),
            _ => Err(NOT_HERE.into()),
        }
    }

    /// For the guest that has been taken over; one that is held does not run.
    fn press_ctrl_alt_del(&self) -> Result<(), String> {
        let runs = self.handle.status().role == "active";
        let guest = self.guest().filter(|_| runs).ok_or(NOT_HERE)?;
        guest.press_ctrl_alt_del().map_err(|error| error.to_string())
    }

    fn promote(&self) -> Result<(), String> {
        let before = self.handle.status();
        if before.phase != "orphaned" {
            return Err(format!(
                "a standby is promoted when its primary is lost and no witness can decide; this one is {}",
                before.phase
            ));
        }
        self.handle.promote();
        let after = self.handle.status();
        if after.role == "active" {
            return Ok(());
        }
        Err(format!("the guest is not run here: this side is {}; its messages say why", after.phase))
    }
}

/// What a standby is not asked.
const NOT_HERE: &str = "this side waits for the guest of a primary; ask the side that runs the guest";

/// Stands by until the guest that it took over has ended, or, with `--once`, until its first guest is gone.
///
/// # Errors
/// [`StandbyError`]: it has then not begun to listen.
pub fn standby(options: &StandbyOptions) -> Result<ExitStatus, StandbyError> {
    if options.end_with_parent.map_or(Ok(true), process::end_with_parent).is_ok_and(|alive| !alive) {
        return Ok(ExitStatus::Interrupted);
    }
    let events = EventLog::open(options.events.as_deref(), "standby")?;
    let console = Console::new(io::stdout())?;
    let machine = StandbyHost::on(Host::open()?, Arc::clone(&console)).with_resources(resources(options));
    let exit = machine.exit_handle();
    let listener = Listener::bind(&options.listen)?;

    let (happen, happenings) = channel();
    let end = happen.clone();
    // At the end nobody waits for it any more; so with all that happens.
    process::on_end_request(move || drop(end.send(Happening::EndRequested)))?;
    let ended = happen.clone();
    thread::Builder::new()
        .name("guest-exit".into())
        .spawn(move || drop(ended.send(Happening::GuestEnded(exit.wait()))))?;
    let name = options.name.clone().unwrap_or_else(|| format!("standby {}", Uuid::new_v4().as_fields().0));
    let witness = options.witness.as_ref().map(FileWitness::new);
    let log = Arc::clone(&events);
    let watcher = Arc::new(move |report: Report| {
        log.tell(report.clone());
        let _ = happen.send(Happening::Told(report));
    });
    let handle =
        standby::serve(listener, machine, console, Options { name: name.clone(), witness }, watcher)?;
    let meters = Arc::clone(events.meters());
    let instance = Arc::new(StandingBy { name, meters, logger: Mutex::default(), handle: handle.clone() });
    metrics::write_regularly(Arc::downgrade(&instance));
    let server = options
        .api_sock
        .as_deref()
        .map(|path| Server::start(path, Arc::<StandingBy>::clone(&instance), MAX_BODY))
        .transpose()?;

    let status = watch(&happenings, options.once, &handle, &events);
    if let Err(reason) = instance.meters.flush(&*instance) {
        tracing::error!("{reason}");
    }
    handle.stop();
    events.close();
    drop(server);
    Ok(status)
}

/// Where the guest's devices are on this host.
fn resources(options: &StandbyOptions) -> HostResources {
    HostResources {
        drives: options.drives.iter().map(|(id, path)| (id.clone(), path.into())).collect(),
        nets: options.nets.iter().cloned().collect(),
        vsock: options.vsock.clone(),
        console: options.console.clone(),
    }
}

fn watch(
    happenings: &Receiver<Happening>,
    once: bool,
    handle: &Handle<StandbyHost>,
    events: &EventLog,
) -> ExitStatus {
    while let Ok(happening) = happenings.recv() {
        match happening {
            Happening::GuestEnded(exit) => {
                handle.flush_console();
                events.tell(Report::Ended { reason: exit.to_string() });
                return exit_status(&exit);
            }
            Happening::EndRequested => return ExitStatus::Interrupted,
            Happening::Told(Report::Refused { .. }) if once => return ExitStatus::Refused,
            // It has ended at its primary: there is nothing left to take over.
            Happening::Told(Report::Ended { .. }) if once => return ExitStatus::Success,
            Happening::Told(Report::Failed { .. }) if once => return ExitStatus::Failure,
            Happening::Told(_) => {}
        }
    }
    ExitStatus::Failure
}
