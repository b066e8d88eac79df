//! `understudy standby`: waits for a primary, holds its guest's mirror, and takes over when it dies.

use std::io;
use std::sync::Arc;

use mirror::console::Console;
use mirror::link::LinkError;
use mirror::shell::primary::AttachError;
use mirror::shell::standby::ServeError;
use mirror::witness::WitnessError;
use thiserror::Error;
use uuid::Uuid;
use vmm::{Host, HostError, HostResources};

use crate::cli::{InstanceOptions, StandbyOptions};
use crate::config::Draft;
use crate::exit::ExitStatus;
use crate::guest_run::stand_by;
use crate::run::RunError;
use crate::server::{MAX_BODY, ServerError};
use crate::stage::Stage;

mod node;

pub(crate) use node::{Node, Setup, StandingBy, TakenOver};

/// Why a standby does not stand by.
#[derive(Debug, Error)]
pub enum StandbyError {
    /// The process.
    #[error(transparent)]
    Process(#[from] RunError),
    /// The host.
    #[error("this host cannot run guests: {0}")]
    Host(#[from] HostError),
    /// The witness: what it takes to reach it.
    #[error(transparent)]
    Witness(#[from] WitnessError),
    /// The address.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The API.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The guest's console.
    #[error("cannot write the guest's console to stdout: {0}")]
    Console(#[from] io::Error),
    /// Whom the guest is to be mirrored to.
    #[error("--{flag}: {reason}")]
    Mirror {
        /// Which flag.
        flag: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// Why this side cannot wait for a guest.
#[derive(Debug, Error)]
pub enum NodeError {
    /// The address.
    #[error(transparent)]
    Listen(#[from] LinkError),
    /// The threads.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

impl From<NodeError> for AttachError {
    fn from(error: NodeError) -> Self {
        match error {
            NodeError::Listen(error) | NodeError::Serve(ServeError::Listen(error)) => Self::Link(error),
            NodeError::Serve(ServeError::Thread(error)) => Self::Thread(error),
        }
    }
}

impl StandbyError {
    /// The exit status that tells of it.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Process(error) => error.status(),
            Self::Host(_) => ExitStatus::Unavailable,
            Self::Witness(_) => ExitStatus::Config,
            Self::Mirror { .. } => ExitStatus::Usage,
            _ => ExitStatus::Failure,
        }
    }
}

/// Stands by until the guest that it took over has ended, or, with `--once`, until its first guest is gone.
///
/// # Errors
/// [`StandbyError`]: it has then not begun to listen.
pub fn standby(options: &StandbyOptions) -> Result<ExitStatus, StandbyError> {
    let name = options.name.clone().unwrap_or_else(|| format!("standby {}", Uuid::new_v4().as_fields().0));
    let instance = InstanceOptions {
        api_sock: options.api_sock.clone(),
        events: options.events.clone(),
        id: name.clone(),
        http_api_max_payload_size: MAX_BODY,
        metadata: None,
        mmds_size_limit: None,
        serial_in: false,
        end_with_parent: options.end_with_parent,
    };
    // Before it is waited for: a guest that cannot run here is none.
    Host::open()?;
    let access = options.witness.access();
    let witness = options.witness.witness.as_ref().map(|address| address.open(&access)).transpose()?;
    let mirror = options.mirror_section().map_err(|(flag, reason)| {
        let flag = flag.trim_start_matches("mirror.").replace('_', "-");
        StandbyError::Mirror { flag, reason }
    })?;
    let Some(mut stage) = Stage::open(&instance, "standby")? else { return Ok(ExitStatus::Interrupted) };
    let mut draft = Draft::default();
    draft.mirror = mirror;
    stage.configure(draft)?;
    let setup = Setup {
        listen: options.listen.clone(),
        second_listen: options.second_listen.clone(),
        name,
        witness,
        console: Console::new(io::stdout())?,
        resources: resources(options),
        occupied: false,
    };
    let node = Node::open(setup, Arc::clone(&stage.events), stage.happen.clone())?;
    stage.stand_by(node.standing_by());
    stage.serve(options.api_sock.as_deref(), MAX_BODY)?;
    Ok(stand_by(&mut stage, node, options.once))
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
