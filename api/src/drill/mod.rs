//! `understudy drill`: does harm to pairs of its own, and proves from outside that nothing was lost and nothing twice.
//!
//! A run (`plan`) is a `scene` of processes and clients (`load`) on a `network` of its own, in which a fault
//! happens (`faults`). What clients saw is a history that [`crate::history`] judges; `judge` looks at everything else.

use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use resources::protocol::BadParameter;
use thiserror::Error;
use uuid::Uuid;

use crate::config::ConfigError;
use crate::exit::ExitStatus;
use crate::history::{self, HistoryError, image};
use crate::process;
use network::NetworkError;
use options::{CheckOptions, DrillCommand, Name, Running};
use plan::Plan;
use record::Run;
use run::{Tried, run};

mod chart;
mod client;
mod faults;
mod judge;
mod load;
mod network;
pub mod options;
mod page;
mod plan;
pub mod record;
pub mod relay;
mod run;
mod scene;

pub use options::DrillOptions;

/// How often a run is tried that does not come to its fault: on a busy machine a side may seem lost that is not.
const TRIES: u32 = 5;

/// Runs whose timelines are shown, beside those that went wrong.
const SHOWN: usize = 4;

/// Why there is no drill.
#[derive(Debug, Error)]
pub enum DrillError {
    /// The guest's parameters.
    #[error("boot_args: the value of {} is wrong", .0.0.name())]
    Workload(BadParameter),
    /// The guest's configuration.
    #[error(transparent)]
    Config(Box<ConfigError>),
    /// The network.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The pair did not come about.
    #[error("the drill did not begin: {0}")]
    NotBegun(String),
    /// It came to nothing, before its fault could say anything.
    #[error("the guest was not protected any more when the fault came; this machine may be too busy")]
    Unprotected,
    /// A history cannot be read.
    #[error("{path}: {source}")]
    History {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: HistoryError,
    },
    /// A disk image cannot be read.
    #[error(transparent)]
    Image(#[from] image::ImageError),
    /// Something cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The user has had enough.
    #[error("interrupted")]
    Interrupted,
    /// The system.
    #[error("cannot set up the drill: {0}")]
    System(io::Error),
}

impl DrillError {
    /// The exit status that tells of it.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Workload(_) | Self::Config(_) => ExitStatus::Config,
            Self::Network(_) => ExitStatus::Unavailable,
            Self::Interrupted => ExitStatus::Interrupted,
            _ => ExitStatus::Failure,
        }
    }
}

/// Does what `understudy drill` is asked to.
///
/// # Errors
/// [`DrillError`]: a run could not be made.
pub fn drill(options: &DrillOptions) -> Result<ExitStatus, DrillError> {
    match (&options.command, options.running.name) {
        (Some(DrillCommand::Check(options)), _) => check(options),
        (None, Some(name)) => run_all(&options.running, name),
        (Some(DrillCommand::List) | None, _) => {
            let width = Name::All.each().iter().map(|name| name.text().len()).max().unwrap_or_default();
            for name in Name::All.each().into_iter().chain([Name::All]) {
                say(&format!("{:<width$}  {}\n", name.text(), name.help()))?;
            }
            Ok(ExitStatus::Success)
        }
    }
}

fn run_all(options: &Running, name: Name) -> Result<ExitStatus, DrillError> {
    // First of all: it takes a process of one thread.
    network::enter()?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    process::on_end_request(move || flag.store(true, Ordering::Relaxed)).map_err(DrillError::System)?;
    let seed = options.seed.unwrap_or_else(|| Uuid::new_v4().as_u64_pair().0);
    let mut runs: Vec<Run> = Vec::new();
    'drills: for drill in name.each() {
        for number in 1..=options.runs {
            let plan = Plan::new(options, drill, number, seed)?;
            let mut tries = 0;
            let mut run = loop {
                tries += 1;
                let again = match run(&plan, options.history.as_deref(), &interrupted) {
                    Ok(Tried::Run(run)) => break run,
                    Ok(Tried::Skipped) => continue 'drills,
                    Ok(Tried::Again) => DrillError::Unprotected,
                    Err(error @ DrillError::NotBegun(_)) => error,
                    Err(error) => return Err(error),
                };
                if tries == TRIES {
                    return Err(again);
                }
                eprintln!("REPEATED: {} {number}: {again}", drill.text());
            };
            let json = || serde_json::json!(run).to_string();
            say(&format!("{}\n", if options.json { json() } else { run.line() }))?;
            let shown = runs.iter().filter(|run| run.drill == drill && run.timeline.is_some()).count();
            if run.is_good() && shown >= SHOWN {
                run.timeline = None;
            }
            runs.push(*run);
        }
    }
    if let Some(path) = &options.report {
        let written = std::fs::write(path, page::page(&runs, seed));
        written.map_err(|source| DrillError::Write { path: path.clone(), source })?;
    }
    if !options.json {
        say(&format!("\n{}", record::totals(&runs)))?;
    }
    if !runs.iter().all(Run::is_good) {
        eprintln!("seed {seed}");
        return Ok(ExitStatus::Failure);
    }
    Ok(ExitStatus::Success)
}

fn check(options: &CheckOptions) -> Result<ExitStatus, DrillError> {
    let failed = |source| DrillError::History { path: options.history.clone(), source };
    let file = File::open(&options.history).map_err(|error| failed(error.into()))?;
    let history = history::read(BufReader::new(file)).map_err(failed)?;
    let mut findings = history::check(&history);
    let mut blocks = 0;
    if let Some(path) = &options.image {
        let found = image::check(&history, path)?;
        blocks = found.blocks;
        findings.violations.count += found.violations.count;
        findings.violations.told.extend(found.violations.told);
    }
    if options.json {
        let mut json = serde_json::json!(findings);
        json["image_blocks"] = blocks.into();
        say(&format!("{json}\n"))?;
    } else {
        for told in &findings.violations.told {
            say(&format!("VIOLATION: {told}\n"))?;
        }
        say(&format!(
            "{} requests, {} answered; {} writes acknowledged to {} keys; {} bytes of streams; {blocks} blocks of the image; {} violations\n",
            findings.operations,
            findings.answered,
            findings.acknowledged,
            findings.keys,
            findings.stream_bytes,
            findings.violations.count
        ))?;
    }
    Ok(if findings.violations.count == 0 { ExitStatus::Success } else { ExitStatus::Failure })
}

fn say(text: &str) -> Result<(), DrillError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(DrillError::System)
}
