//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use mirror::ids::Guid;
use mirror::link::Address;

use crate::config::StandbyLost;
use crate::demo::DemoOptions;
use crate::drill::DrillOptions;
use crate::exit::EXIT_STATUSES;
use crate::flags::FirecrackerOptions;
use crate::witness::WitnessOptions;

/// Virtual machines that survive the death of their host
///
/// Without a subcommand it takes Firecracker's flags and serves Firecracker's API.
#[derive(Debug, Parser)]
#[command(
    name = "understudy",
    version,
    after_help = EXIT_STATUSES,
    max_term_width = 100,
    args_conflicts_with_subcommands = true
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub firecracker: FirecrackerOptions,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Watch a guest survive: boots one, mirrors it, kills its primary, and checks what comes out
    #[command(after_help = EXIT_STATUSES)]
    Demo(DemoOptions),
    /// Do harm to a pair of its own and check from outside that nothing is lost, and nothing there twice
    #[command(after_help = EXIT_STATUSES)]
    Drill(DrillOptions),
    /// Run a guest, mirrored to a standby if the configuration says so
    #[command(after_help = EXIT_STATUSES)]
    Run(RunOptions),
    /// Go on with a guest from a snapshot
    #[command(after_help = EXIT_STATUSES)]
    Restore(RestoreOptions),
    /// Write a guest to files while it runs
    #[command(after_help = EXIT_STATUSES)]
    Snapshot(SnapshotOptions),
    /// Let a running guest stand still
    #[command(after_help = EXIT_STATUSES)]
    Pause(SocketOptions),
    /// Let a guest that stands still run on
    #[command(after_help = EXIT_STATUSES)]
    Resume(SocketOptions),
    /// Wait for a primary, hold the mirror of its guest, and take over when it dies
    #[command(after_help = EXIT_STATUSES)]
    Standby(StandbyOptions),
    /// Let the standby of a mirrored guest run it from now on, with nothing lost
    #[command(after_help = EXIT_STATUSES)]
    Switchover(SwitchoverOptions),
    /// Ask a running primary or standby how it is
    #[command(after_help = EXIT_STATUSES)]
    Status(StatusOptions),
    /// Watch a running primary or standby, full-screen
    #[command(after_help = EXIT_STATUSES)]
    Top(SocketOptions),
    /// Give a running guest a standby, and wait until it is protected
    #[command(after_help = EXIT_STATUSES)]
    Attach(AttachOptions),
    /// Let the standby forget the guest, which runs on without protection
    #[command(after_help = EXIT_STATUSES)]
    Detach(SocketOptions),
    /// Let a standby whose primary is lost run the guest; only where no witness can decide
    #[command(after_help = EXIT_STATUSES)]
    Promote(SocketOptions),
    /// Print the metrics of a running primary or standby in Prometheus' format
    #[command(after_help = EXIT_STATUSES)]
    Metrics(SocketOptions),
    /// Print the completions for a shell
    Completions {
        /// Which shell
        shell: Shell,
    },
    /// Print the manual page, or write one for each subcommand
    Man {
        /// Write all pages to this folder
        #[arg(long, value_name = "FOLDER")]
        folder: Option<PathBuf>,
    },
}

/// `understudy attach`
#[derive(Debug, Args)]
pub struct AttachOptions {
    /// The API socket of the process that runs the guest
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,
    /// Where the standby listens: unix:PATH or tcp:HOST:PORT; given several times, each is tried in turn
    #[arg(long, value_name = "ADDRESS", required = true)]
    pub standby: Vec<Address>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub witness: WitnessOptions,
    /// The name by which standby and witness know the guest; the one that it has, or a new one, if not given
    #[arg(long, value_name = "UUID")]
    pub guid: Option<Guid>,
    /// Where the process that runs the guest waits as a standby once another side runs it
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<Address>,
    /// Where that standby is to hear its primary besides, on another network at best
    #[arg(long, value_name = "ADDRESS", requires = "listen")]
    pub second_listen: Option<Address>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub pace: PaceOptions,
    /// Wait in the standby's queue if it has no space now
    #[arg(long)]
    pub wait_for_space: bool,
    /// Show how far it is even if stderr is no terminal
    #[arg(long)]
    pub progress: bool,
}

/// How a guest is mirrored
#[derive(Debug, Args)]
pub struct PaceOptions {
    /// Longest time between two epochs: so long they last while nobody outside waits
    #[arg(long, value_name = "MS")]
    pub interval_ms: Option<u32>,
    /// Shortest time between two epochs: output that waits ends them early; as long as --interval-ms: all last just as long
    #[arg(long, value_name = "MS")]
    pub min_interval_ms: Option<u32>,
    /// What the final pause of seeding may cost
    #[arg(long, value_name = "MS")]
    pub pause_budget_ms: Option<u32>,
    /// Dirty pages that end an epoch early
    #[arg(long, value_name = "PAGES")]
    pub dirty_budget_pages: Option<u64>,
    /// Time between two signs of life
    #[arg(long, value_name = "MS")]
    pub heartbeat_ms: Option<u32>,
    /// Missed signs of life after which the other side counts as lost
    #[arg(long, value_name = "COUNT")]
    pub heartbeat_misses: Option<u32>,
    /// Time beyond --interval-ms for which epochs may stand still before the primary counts as lost although it is heard of
    #[arg(long, value_name = "MS")]
    pub stall_ms: Option<u32>,
    /// How many of the standbys mirror the guest at the same time, if they are to be had
    #[arg(long, value_name = "COUNT")]
    pub standbys_at_once: Option<u32>,
    /// How many of them are to acknowledge an epoch before those that lag behind are done without; all, if not given
    #[arg(long, value_name = "COUNT")]
    pub standbys_needed: Option<u32>,
    /// Room for pages copied aside in a pause
    #[arg(long, value_name = "MIB")]
    pub staging_mib: Option<u32>,
    /// What becomes of a guest whose standby is lost
    #[arg(long, value_name = "WHAT")]
    pub standby_lost: Option<StandbyLost>,
}

/// `understudy run`
#[derive(Debug, Args)]
pub struct RunOptions {
    /// What to run: JSON in Firecracker's format, with a "mirror" section; without it, the API is waited for to load a
    /// snapshot
    #[arg(long, value_name = "FILE", required_unless_present = "api_sock")]
    pub config_file: Option<PathBuf>,
    /// Wait here as a standby once another side runs the guest, instead of ending: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Option<Address>,
    /// Then hear the primary here besides, on another network at best: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    pub second_listen: Option<Address>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub instance: InstanceOptions,
}

/// What every process with a guest of its own takes.
#[derive(Debug, Args)]
pub struct InstanceOptions {
    /// Serve the API on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Write what happens as JSON lines: a file, a FIFO or /dev/fd/N
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// The name of this instance
    #[arg(long, default_value = "anonymous-instance", value_name = "ID")]
    pub id: String,
    /// Longest body of an API request that is taken, in bytes
    #[arg(long, default_value_t = crate::server::MAX_BODY, value_name = "BYTES")]
    pub http_api_max_payload_size: usize,
    /// What the guest reads from its metadata service at first, in JSON: as put at /mmds
    #[arg(long, value_name = "FILE")]
    pub metadata: Option<PathBuf>,
    /// Most bytes of metadata that are kept for the guest, as JSON; by default as many as an API request may have
    #[arg(long, value_name = "BYTES")]
    pub mmds_size_limit: Option<usize>,
    /// Pass stdin to the guest's serial port even if it is not a terminal
    #[arg(long)]
    pub serial_in: bool,
    /// End when this parent process has ended
    #[arg(long, hide = true, value_name = "PID")]
    pub end_with_parent: Option<i32>,
}

/// `understudy snapshot`
#[derive(Debug, Args)]
pub struct SnapshotOptions {
    /// The API socket of the process that runs the guest
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,
    /// Write the machine's state here
    #[arg(long, value_name = "FILE")]
    pub state: PathBuf,
    /// Write its memory here
    #[arg(long, value_name = "FILE")]
    pub memory: PathBuf,
    /// Only the pages written since the snapshot before (the guest's track_dirty_pages must be true)
    #[arg(long)]
    pub diff: bool,
    /// Show how far it is even if stderr is no terminal
    #[arg(long)]
    pub progress: bool,
}

/// `understudy restore`
#[derive(Debug, Args)]
pub struct RestoreOptions {
    /// The state of a full snapshot
    #[arg(long, value_name = "FILE")]
    pub state: PathBuf,
    /// Its memory
    #[arg(long, value_name = "FILE")]
    pub memory: PathBuf,
    /// Lay a differential snapshot over it; several in the order in which they were taken
    #[arg(long = "diff", value_name = "STATE:MEMORY", value_parser = pair)]
    pub diffs: Vec<(PathBuf, PathBuf)>,
    /// Read and verify all of memory first, instead of mapping the file (always so with --diff, unless on demand)
    #[arg(long)]
    pub copy: bool,
    /// Let the guest run at once; its memory is read and verified as it is touched, and the rest meanwhile
    #[arg(long, conflicts_with = "copy")]
    pub on_demand: bool,
    /// Log the pages written, so that the next snapshot may be differential
    #[arg(long)]
    pub track_dirty_pages: bool,
    /// Do not let the guest run yet
    #[arg(long)]
    pub paused: bool,
    /// Show how far copying is even if stderr is no terminal
    #[arg(long)]
    pub progress: bool,
    /// Where a disk image of the guest lies now, if elsewhere than before
    #[arg(long = "drive", value_name = "ID=PATH", value_parser = named)]
    pub drives: Vec<(String, String)>,
    /// The tap of a network interface, if another than before
    #[arg(long = "net", value_name = "ID=TAP", value_parser = named)]
    pub nets: Vec<(String, String)>,
    /// The Unix socket of the vsock device, if another
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// The socket or output of the console, if another
    #[arg(long, value_name = "PATH")]
    pub console: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub instance: InstanceOptions,
}

/// `understudy standby`
#[derive(Debug, Args)]
pub struct StandbyOptions {
    /// Where to wait: unix:PATH or tcp:HOST:PORT (port 0: the system chooses)
    #[arg(long, value_name = "ADDRESS")]
    pub listen: Address,
    /// Where to hear the primary besides: an address that it can reach, on another network at best; a primary that is heard
    /// there is not lost when only the mirror's link is
    #[arg(long, value_name = "ADDRESS")]
    pub second_listen: Option<Address>,
    /// Whom the guest is to be mirrored to once it runs here; given several times, each is tried in turn
    #[arg(long, value_name = "ADDRESS")]
    pub standby: Vec<Address>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub witness: WitnessOptions,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub pace: PaceOptions,
    /// The name by which the witness knows this side; made up if not given
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Write what happens as JSON lines: a file, a FIFO or /dev/fd/N
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,
    /// Serve the API on this Unix socket
    #[arg(long, value_name = "PATH")]
    pub api_sock: Option<PathBuf>,
    /// Where a disk image of the guest lies on this host, if elsewhere than at the primary
    #[arg(long = "drive", value_name = "ID=PATH", value_parser = named)]
    pub drives: Vec<(String, String)>,
    /// The tap of a network interface on this host, if another than at the primary
    #[arg(long = "net", value_name = "ID=TAP", value_parser = named)]
    pub nets: Vec<(String, String)>,
    /// The Unix socket of the vsock device, if another
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<PathBuf>,
    /// The socket or output of the console, if another
    #[arg(long, value_name = "PATH")]
    pub console: Option<PathBuf>,
    /// End after the first guest: with its exit status if it ran here, with 6 if it was not run here
    #[arg(long)]
    pub once: bool,
    /// End when this parent process has ended
    #[arg(long, hide = true, value_name = "PID")]
    pub end_with_parent: Option<i32>,
}

/// `understudy switchover`
#[derive(Debug, Args)]
pub struct SwitchoverOptions {
    /// The API socket of the primary
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,
    /// The standby that is to run the guest, if it has several: unix:PATH or tcp:HOST:PORT
    #[arg(long, value_name = "ADDRESS")]
    pub to: Option<Address>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// `understudy status`
#[derive(Debug, Args)]
pub struct StatusOptions {
    /// The API socket of the primary or standby
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Ask again every second until Ctrl-C
    #[arg(long)]
    pub watch: bool,
}

/// What every subcommand takes that only asks another process
#[derive(Debug, Args)]
pub struct SocketOptions {
    /// The API socket of that process
    #[arg(long, value_name = "PATH")]
    pub api_sock: PathBuf,
}

/// Reads `STATE:MEMORY`.
fn pair(text: &str) -> Result<(PathBuf, PathBuf), String> {
    let (state, memory) = text.split_once(':').ok_or("write the state file, a colon, and the memory file")?;
    Ok((state.into(), memory.into()))
}

/// Reads `ID=VALUE`.
fn named(text: &str) -> Result<(String, String), String> {
    let (id, value) = text.split_once('=').ok_or("write the device's ID, =, and the value")?;
    if id.is_empty() || value.is_empty() {
        return Err("neither the device's ID nor the value may be empty".into());
    }
    Ok((id.into(), value.into()))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
