//! The `understudy` command.

use std::fmt::Display;
use std::process::ExitCode;

use clap::Parser;
use understudy::cli::{Cli, Command};
use understudy::client::ClientError;
use understudy::exit::ExitStatus;
use understudy::server::types::VmState;
use understudy::{demo, run, snapshot, standby, status, switchover};

fn main() -> ExitCode {
    let status = match Cli::parse().command {
        Command::Demo(options) => demo::demo(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Run(options) => run::run(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Restore(options) => {
            snapshot::restore(&options).unwrap_or_else(|error| say(&error, error.status()))
        }
        Command::Snapshot(options) => answered(snapshot::snapshot(&options)),
        Command::Pause(options) => answered(snapshot::set_state(&options, VmState::Paused)),
        Command::Resume(options) => answered(snapshot::set_state(&options, VmState::Resumed)),
        Command::Standby(options) => {
            standby::standby(&options).unwrap_or_else(|error| say(&error, error.status()))
        }
        Command::Switchover(options) => answered(switchover::switchover(&options)),
        Command::Status(options) => answered(status::status(&options)),
    };
    status.into()
}

/// How a question to another process went.
fn answered(outcome: Result<(), ClientError>) -> ExitStatus {
    match outcome {
        Ok(()) => ExitStatus::Success,
        Err(error) => say(&error, ExitStatus::Unreachable),
    }
}

fn say(error: &impl Display, status: ExitStatus) -> ExitStatus {
    eprintln!("error: {error}");
    status
}
