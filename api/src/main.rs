//! The `understudy` command.

use std::fmt::Display;
use std::process::ExitCode;

use clap::Parser;
use understudy::cli::{Cli, Command};
use understudy::exit::ExitStatus;
use understudy::{demo, run, standby, status, switchover};

fn main() -> ExitCode {
    let status = match Cli::parse().command {
        Command::Demo(options) => demo::demo(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Run(options) => run::run(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Standby(options) => {
            standby::standby(&options).unwrap_or_else(|error| say(&error, error.status()))
        }
        Command::Switchover(options) => match switchover::switchover(&options) {
            Ok(()) => ExitStatus::Success,
            Err(error) => say(&error, ExitStatus::Unreachable),
        },
        Command::Status(options) => match status::status(&options) {
            Ok(()) => ExitStatus::Success,
            Err(error) => say(&error, ExitStatus::Unreachable),
        },
    };
    status.into()
}

fn say(error: &impl Display, status: ExitStatus) -> ExitStatus {
    eprintln!("error: {error}");
    status
}
