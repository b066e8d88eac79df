//! The `understudy` command.

use std::fmt::Display;
use std::process::ExitCode;

use clap::Parser;
use understudy::cli::{Cli, Command};
use understudy::client::{self, ClientError};
use understudy::exit::ExitStatus;
use understudy::server::types::VmState;
use understudy::{attach, demo, drill, flags, pages, run, snapshot, standby, status, switchover, top};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let Some(command) = cli.command else {
        return flags::run(&cli.firecracker).unwrap_or_else(|error| say(&error, error.status())).into();
    };
    let status = match command {
        Command::Demo(options) => demo::demo(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Drill(options) => drill::drill(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Run(options) => run::run(&options).unwrap_or_else(|error| say(&error, error.status())),
        Command::Restore(options) => {
            snapshot::restore(&options).unwrap_or_else(|error| say(&error, error.status()))
        }
        Command::Snapshot(options) => answered(snapshot::snapshot(&options)),
        Command::Pause(options) => done(client::set_state(&options.api_sock, VmState::Paused)),
        Command::Resume(options) => done(client::set_state(&options.api_sock, VmState::Resumed)),
        Command::Standby(options) => {
            standby::standby(&options).unwrap_or_else(|error| say(&error, error.status()))
        }
        Command::Switchover(options) => done(switchover::switchover(&options)),
        Command::Status(options) => answered(status::status(&options)),
        Command::Top(options) => answered(top::top(&options)),
        Command::Attach(options) => answered(attach::attach(&options)),
        Command::Detach(options) => done(attach::detach(&options)),
        Command::Promote(options) => done(switchover::promote(&options)),
        Command::Metrics(options) => {
            done(client::text(&options.api_sock, "/metrics/prometheus").map(|text| print!("{text}")))
        }
        Command::Completions { shell } => {
            pages::completions(shell);
            ExitStatus::Success
        }
        Command::Man { folder } => match pages::man(folder.as_deref()) {
            Ok(()) => ExitStatus::Success,
            Err(error) => say(&format!("cannot write the manual page: {error}"), ExitStatus::Failure),
        },
    };
    status.into()
}

/// How a question to another process went.
fn done(outcome: Result<(), ClientError>) -> ExitStatus {
    answered(outcome.map(|()| ExitStatus::Success))
}

/// How a question to another process went that has several good ends.
fn answered(outcome: Result<ExitStatus, impl Display>) -> ExitStatus {
    outcome.unwrap_or_else(|error| say(&error, ExitStatus::Unreachable))
}

fn say(error: &impl Display, status: ExitStatus) -> ExitStatus {
    eprintln!("error: {error}");
    status
}
