//! `understudy demo`: kills a primary and lets everybody see that its guest survives.
//!
//! The parent of both processes believes neither: it reads both consoles, and [`console`](crate::sides::console) judges what it saw.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use resources::protocol::BadParameter;
use thiserror::Error;

use crate::exit::ExitStatus;
use crate::process;
use crate::sides::Side;
use display::Display;
use report::{Outcome, RunReport};

mod display;
pub mod options;
pub mod report;
mod trial;

pub use options::DemoOptions;

/// Why there is no demo.
#[derive(Debug, Error)]
pub enum DemoError {
    /// The workload that `--boot-args` asks for.
    #[error("--boot-args: the value of {} is wrong", .0.0.name())]
    Workload(BadParameter),
    /// A process ended before it was to.
    #[error("the {} ended early ({how}):\n{stderr}", .side.name())]
    Ended {
        /// Which.
        side: Side,
        /// Its exit status.
        code: Option<i32>,
        /// The same in words.
        how: String,
        /// The last lines that it wrote to stderr.
        stderr: String,
    },
    /// The guest runs without a mirror.
    #[error("the guest is not mirrored: {0}")]
    NotMirrored(String),
    /// Something takes too long.
    #[error("it took more than {seconds} s until {what}; give --timeout more")]
    TimedOut {
        /// What was waited for.
        what: &'static str,
        /// How long, from the start of the run.
        seconds: f64,
    },
    /// The user has had enough.
    #[error("interrupted")]
    Interrupted,
    /// The system.
    #[error("cannot set up the demo: {0}")]
    System(io::Error),
}

impl DemoError {
    fn ended(side: Side) -> Self {
        Self::Ended { side, code: None, how: String::new(), stderr: String::new() }
    }

    /// The exit status that tells of it: that of the process that ended early, where it means something.
    pub fn status(&self) -> ExitStatus {
        match self {
            Self::Workload(_) => ExitStatus::Usage,
            Self::Ended { code: Some(code), .. } => {
                ExitStatus::from_code(*code).unwrap_or(ExitStatus::Failure)
            }
            Self::Interrupted => ExitStatus::Interrupted,
            _ => ExitStatus::Failure,
        }
    }
}

/// Runs the demo and prints its reports on stdout.
///
/// # Errors
/// [`DemoError`]: a run could not be made.
pub fn demo(options: &DemoOptions) -> Result<ExitStatus, DemoError> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    process::on_end_request(move || flag.store(true, Ordering::Relaxed)).map_err(DemoError::System)?;
    let mut reports: Vec<RunReport> = Vec::new();
    for run in 1..=options.runs {
        let plan = options.plan(run).map_err(DemoError::Workload)?;
        let mut display = Display::new(!options.json && options.runs == 1);
        let report = trial::carry_out(&plan, options.tcp, &mut display, &interrupted)?;
        let text = if options.json {
            format!("{}\n", serde_json::json!(report))
        } else if options.runs == 1 {
            report.text()
        } else {
            format!("{}\n", report.line())
        };
        say(&text)?;
        reports.push(report);
    }
    if options.runs > 1 && !options.json {
        say(&format!("{}\n", report::totals(&reports)))?;
    }
    let lost = reports.iter().any(|report| report.outcome == Outcome::Lost);
    Ok(if lost { ExitStatus::Failure } else { ExitStatus::Success })
}

fn say(text: &str) -> Result<(), DemoError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(DemoError::System)
}
