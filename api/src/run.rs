//! `understudy run`: a guest and, if the configuration says so, its mirror.

use std::fs::OpenOptions;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mirror::console::Console;
use mirror::shell::primary::AttachError;
use thiserror::Error;
use vmm::snapshot::RestoreError;
use vmm::{CreateError, Machine, MachineError};

use crate::cli::{InstanceOptions, RunOptions};
use crate::config::{Config, ConfigError, Draft, MirrorSection};
use crate::events::EventsError;
use crate::exit::ExitStatus;
use crate::guest::{boot, machine_config};
use crate::guest_run::run_on;
use crate::server::ServerError;
use crate::stage::Stage;
use crate::waiting;

/// Why a guest is not run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The events.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// Messages or metrics cannot go where they are to go.
    #[error("{0}")]
    Operator(String),
    /// What the guest is to read from its metadata service.
    #[error("--metadata: cannot take {path}: {reason}; name a file with a JSON object")]
    Metadata {
        /// Where it is.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The API has not been told enough.
    #[error("{0}")]
    Unfinished(String),
    /// The serial port's output has nowhere to go.
    #[error(
        "cannot write the serial port's output to {path}: {source}; name a file that can be made, or a FIFO"
    )]
    Serial {
        /// Where it was to go.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
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
    /// A flag of Firecracker's that means something that is not to be had.
    #[error("--{flag} is not supported: {reason}")]
    Flag {
        /// Which.
        flag: &'static str,
        /// Why, and what to do instead.
        reason: String,
    },
}

impl RunError {
    /// The exit status that tells of it.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Config(_)
            | Self::Operator(_)
            | Self::Metadata { .. }
            | Self::Create(CreateError::Config(_) | CreateError::Template(_)) => ExitStatus::Config,
            Self::Create(CreateError::Host(_))
            | Self::Restore(RestoreError::Create(CreateError::Host(_))) => ExitStatus::Unavailable,
            Self::Load(MachineError::Boot(_)) => ExitStatus::NoKernel,
            Self::Attach(_) => ExitStatus::Unreachable,
            Self::Flag { .. } => ExitStatus::Usage,
            _ => ExitStatus::Failure,
        }
    }
}

/// Runs the guest until it ends, and says how it ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn run(options: &RunOptions) -> Result<ExitStatus, RunError> {
    match &options.config_file {
        None => waiting::wait_and_run(Draft::default(), &options.instance),
        Some(path) => {
            let mut draft = Draft::load(path)?;
            let (listen, second) = (options.listen.clone(), options.second_listen.clone());
            match &mut draft.mirror {
                Some(mirror) => {
                    mirror.listen = listen.or(mirror.listen.take());
                    mirror.second_listen = second.or(mirror.second_listen.take());
                }
                None if listen.is_some() || second.is_some() => {
                    let flag = if listen.is_some() { "listen" } else { "second-listen" };
                    let reason = "the guest is not mirrored, so no other side takes it; give the configuration a \"mirror\" section, or leave this out";
                    return Err(RunError::Flag { flag, reason: reason.into() });
                }
                None => {}
            }
            run_draft(path, draft, &options.instance)
        }
    }
}

/// Runs what `draft` asks for until it ends; errors name `path` as the place it is from.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub(crate) fn run_draft(
    path: &Path,
    draft: Draft,
    instance: &InstanceOptions,
) -> Result<ExitStatus, RunError> {
    let config = Config::finish(path, draft.clone())?;
    let ready = Ready::new(config)?;
    let Some(mut stage) = Stage::open(instance, "primary")? else { return Ok(ExitStatus::Interrupted) };
    stage.configure(draft)?;
    run_on(&mut stage, ready, instance, None)
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

/// A machine that is ready to run.
pub struct Ready {
    pub(crate) machine: Machine,
    pub(crate) console: Arc<Console>,
    pub(crate) beginning: Beginning,
}

impl Ready {
    /// The machine that `config` asks for, with its kernel loaded.
    ///
    /// # Errors
    /// [`RunError`]
    pub(crate) fn new(config: Config) -> Result<Self, RunError> {
        let console = console(&config)?;
        let mut machine = Machine::create(&machine_config(&config), Arc::clone(&console))?;
        machine.load(&boot(&config))?;
        let beginning = config.mirror.map_or(Beginning::Running, Beginning::Mirrored);
        Ok(Self { machine, console, beginning })
    }
}

/// Where the serial port's output goes.
fn console(config: &Config) -> Result<Arc<Console>, RunError> {
    let Some(path) = config.serial.as_ref().and_then(|serial| serial.serial_out_path.as_ref()) else {
        return Ok(Console::new(io::stdout())?);
    };
    let file = OpenOptions::new().append(true).create(true).open(path);
    let file = file.map_err(|source| RunError::Serial { path: path.clone(), source })?;
    Ok(Console::new(file)?)
}
