//! `understudy` without a subcommand: Firecracker's flags. What means something here is done; what cannot do harm is
//! taken; what would be believed and not be so is refused.

use std::path::PathBuf;

use clap::Args;
use vmm::snapshot::state_file::StateFile;

use crate::cli::InstanceOptions;
use crate::config::Draft;
use crate::config::operator::{LogLevel, Logger, Metrics};
use crate::exit::ExitStatus;
use crate::run::{RunError, run_draft};
use crate::waiting;

/// Firecracker's flags.
#[derive(Debug, Args)]
#[command(next_help_heading = "Firecracker's flags (without a subcommand)")]
pub struct FirecrackerOptions {
    /// Serve the API on this Unix socket
    #[arg(long, value_name = "PATH", default_value = "/run/firecracker.socket")]
    pub api_sock: PathBuf,
    /// The name of this instance: 1 to 64 letters, digits and hyphens
    #[arg(long, default_value = "anonymous-instance", value_name = "ID", value_parser = instance_id)]
    pub id: String,
    /// Run what this file says, in JSON
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Serve no API
    #[arg(long, requires = "config_file")]
    pub no_api: bool,
    /// Write messages here: a file or FIFO
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,
    /// Messages that are wanted: Error, Warning, Info, Debug, Trace or Off
    #[arg(long, value_name = "LEVEL", value_parser = level)]
    pub level: Option<LogLevel>,
    /// Only messages of this module
    #[arg(long, value_name = "MODULE")]
    pub module: Option<String>,
    /// Each message says its level
    #[arg(long)]
    pub show_level: bool,
    /// Each message says where in the program it comes from
    #[arg(long)]
    pub show_log_origin: bool,
    /// Write metrics here: a file or FIFO
    #[arg(long, value_name = "FILE")]
    pub metrics_path: Option<PathBuf>,
    /// What the guest reads from its metadata service at first, in JSON
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Most bytes of metadata that are kept; by default as many as an API request may have
    #[arg(long, value_name = "BYTES", hide_short_help = true)]
    pub mmds_size_limit: Option<usize>,
    /// Longest body of an API request that is taken, in bytes
    #[arg(long, default_value_t = crate::server::MAX_BODY, value_name = "BYTES")]
    pub http_api_max_payload_size: usize,
    /// A boot timer device; taken, but there is none
    #[arg(long, hide_short_help = true)]
    pub boot_timer: bool,
    /// A seccomp policy of one's own; not supported
    #[arg(long, value_name = "FILE", hide_short_help = true)]
    pub seccomp_filter: Option<PathBuf>,
    /// No seccomp policy; taken: there is none
    #[arg(long, hide_short_help = true, conflicts_with = "seccomp_filter")]
    pub no_seccomp: bool,
    /// Devices on PCI; not supported
    #[arg(long, hide_short_help = true)]
    pub enable_pci: bool,
    /// When the process was asked for, by the host's clock; taken and ignored
    #[arg(long, value_name = "MICROSECONDS", hide_short_help = true)]
    pub start_time_us: Option<u64>,
    /// The same in processor time; taken and ignored
    #[arg(long, value_name = "MICROSECONDS", hide_short_help = true)]
    pub start_time_cpu_us: Option<u64>,
    /// Processor time of whoever started the process; taken and ignored
    #[arg(long, value_name = "MICROSECONDS", hide_short_help = true)]
    pub parent_cpu_time_us: Option<u64>,
    /// Print the version of the snapshots that are written here
    #[arg(long)]
    pub snapshot_version: bool,
    /// Print the version of the snapshot whose state is in this file
    #[arg(long, value_name = "PATH", conflicts_with = "snapshot_version")]
    pub describe_snapshot: Option<PathBuf>,
}

/// Does what Firecracker would, until its guest has ended.
///
/// # Errors
/// [`RunError`]: the guest has then not run.
pub fn run(options: &FirecrackerOptions) -> Result<ExitStatus, RunError> {
    if options.snapshot_version {
        println!("{}", version());
        return Ok(ExitStatus::Success);
    }
    if let Some(path) = &options.describe_snapshot {
        // No other version is read.
        StateFile::read(path)
            .map_err(|error| RunError::Flag { flag: "describe-snapshot", reason: error.to_string() })?;
        println!("{}", version());
        return Ok(ExitStatus::Success);
    }
    options.refuse()?;
    let instance = InstanceOptions {
        api_sock: (!options.no_api).then(|| options.api_sock.clone()),
        events: None,
        id: options.id.clone(),
        http_api_max_payload_size: options.http_api_max_payload_size,
        metadata: options.metadata.clone(),
        mmds_size_limit: options.mmds_size_limit,
        serial_in: false,
        end_with_parent: None,
    };
    let Some(path) = &options.config_file else {
        let socket = options.api_sock.display();
        eprintln!(
            "waiting on {socket} to be told what to run, as Firecracker does; see --help for subcommands"
        );
        return waiting::wait_and_run(options.laid_over(Draft::default()), &instance);
    };
    run_draft(path, options.laid_over(Draft::load(path)?), &instance)
}

fn version() -> String {
    format!("v{}.0.0", vmm::snapshot::VERSION)
}

impl FirecrackerOptions {
    /// Whoever gives these counts on what is not there.
    fn refuse(&self) -> Result<(), RunError> {
        let asked = [
            (
                "seccomp-filter",
                self.seccomp_filter.is_some(),
                "this program takes no policies; leave it out, or confine the process from outside",
            ),
            ("enable-pci", self.enable_pci, "devices are on virtio-mmio here; leave it out"),
        ];
        match asked.into_iter().find(|(_, given, _)| *given) {
            Some((flag, _, reason)) => Err(RunError::Flag { flag, reason: reason.into() }),
            None => Ok(()),
        }
    }

    /// `draft` with what the command line says of messages and metrics.
    fn laid_over(&self, mut draft: Draft) -> Draft {
        let said = self.log_path.is_some() || self.level.is_some() || self.module.is_some();
        if said || self.show_level || self.show_log_origin {
            let said = Logger {
                log_path: self.log_path.clone(),
                level: self.level,
                show_level: self.show_level.then_some(true),
                show_log_origin: self.show_log_origin.then_some(true),
                module: self.module.clone(),
                format: None,
            };
            draft.logger = Some(said.over(draft.logger.take()));
        }
        if let Some(path) = &self.metrics_path {
            draft.metrics = Some(Metrics { metrics_path: path.clone(), emit_id: None, properties: None });
        }
        draft
    }
}

/// Reads a level by the names that the API takes.
fn level(text: &str) -> Result<LogLevel, String> {
    let mut name = text.to_lowercase();
    if let Some(first) = name.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    serde_json::from_value(name.into())
        .map_err(|_| "write Error, Warning, Info, Debug, Trace or Off".to_owned())
}

/// Reads an instance's name by Firecracker's rule.
fn instance_id(text: &str) -> Result<String, String> {
    let allowed = |letter: char| letter.is_ascii_alphanumeric() || letter == '-';
    if (1..=64).contains(&text.len()) && text.chars().all(allowed) {
        return Ok(text.into());
    }
    Err("write 1 to 64 letters, digits and hyphens".into())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn parse(arguments: &[&str]) -> FirecrackerOptions {
        Cli::try_parse_from([&["understudy"], arguments].concat()).unwrap().firecracker
    }

    #[test]
    fn every_flag_of_firecrackers_is_known() {
        let options = parse(&[
            "--api-sock=/s",
            "--id=a-1",
            "--config-file=/c",
            "--no-api",
            "--log-path=/l",
            "--level=Warn",
            "--module=m",
            "--show-level",
            "--show-log-origin",
            "--metrics-path=/m",
            "--metadata=/d",
            "--boot-timer",
            "--no-seccomp",
            "--start-time-us=1",
            "--start-time-cpu-us=2",
            "--parent-cpu-time-us=3",
            "--http-api-max-payload-size=9",
            "--mmds-size-limit=9",
            "--enable-pci",
        ]);
        assert_eq!(options.level, Some(LogLevel::Warning));
        parse(&["--seccomp-filter=/f"]);
        parse(&["--snapshot-version"]);
        parse(&["--describe-snapshot=/s"]);
        assert_eq!(parse(&[]).api_sock, PathBuf::from("/run/firecracker.socket"));
    }

    #[test]
    fn what_is_counted_on_and_not_there_is_refused_by_name() {
        for flag in ["--seccomp-filter=/f", "--enable-pci"] {
            let refused = parse(&[flag]).refuse().unwrap_err();
            assert!(flag.starts_with(refused.to_string().split(' ').next().unwrap()), "{refused}");
            assert_eq!(refused.status(), ExitStatus::Usage);
        }
        parse(&["--no-seccomp", "--boot-timer", "--start-time-us=1"]).refuse().unwrap();
    }

    #[test]
    fn flags_about_messages_go_before_the_files_and_leave_the_rest_of_it() {
        let file =
            Logger { module: Some("mirror".into()), level: Some(LogLevel::Error), ..Logger::default() };
        let mut draft = Draft::default();
        draft.logger = Some(file);
        let laid = parse(&["--level=debug", "--log-path=/l", "--metrics-path=/m"]).laid_over(draft.clone());
        let logger = laid.logger.unwrap();
        assert_eq!((logger.level, logger.module), (Some(LogLevel::Debug), Some("mirror".into())));
        assert_eq!(laid.metrics.unwrap().metrics_path, PathBuf::from("/m"));
        assert_eq!(parse(&["--no-seccomp"]).laid_over(draft.clone()), draft);
    }

    #[test]
    fn wrong_values_and_flags_beside_a_subcommand_are_errors() {
        let wrong: [&[&str]; 5] = [
            &["--level=loud"],
            &["--id=a b"],
            &["--id="],
            &["--no-api"],
            &["--id=x", "status", "--api-sock", "/s"],
        ];
        for arguments in wrong {
            let outcome = Cli::try_parse_from([&["understudy"], arguments].concat());
            assert!(outcome.is_err(), "{arguments:?}");
        }
    }
}
