//! What a drill is asked to do.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};
use resources::protocol::mix;

/// `understudy drill`
///
/// Each run starts a pair of its own with the embedded guest, on a network of its own (root, or user namespaces, are
/// needed for that), lets clients write and read, injects the fault at a uniformly random moment, waits for the outcome, and
/// checks from outside: all that the clients were told must be so afterwards. Exit status 1: something was not.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct DrillOptions {
    /// What else there is than to run a drill.
    #[command(subcommand)]
    pub command: Option<DrillCommand>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its fields are what the command line shows")]
    pub running: Running,
}

/// What there is besides running drills.
#[derive(Debug, Subcommand)]
pub enum DrillCommand {
    /// Say what drills there are
    List,
    /// Check a history of requests and answers, as a drill writes it with --history
    Check(CheckOptions),
}

/// `understudy drill NAME`
#[derive(Debug, Args)]
pub struct Running {
    /// Which drill
    #[arg(value_enum, required = true, value_name = "NAME")]
    pub name: Option<Name>,
    /// How often, each
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub runs: u32,
    /// One JSON object a run instead of text
    #[arg(long)]
    pub json: bool,
    /// Write a page with timelines and what was checked
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// Choose the moments by this number, to do the same again; a random one if not given
    #[arg(long, value_name = "NUMBER")]
    pub seed: Option<u64>,
    /// The guest to run instead: its boot source, machine, and devices; the mirror is the drill's. Clients use the service
    /// of the embedded guest, if its boot_args have net.ip=10.9.0.2/24
    #[arg(long, value_name = "FILE")]
    pub config_file: Option<PathBuf>,
    /// Write what the clients asked and were answered to this folder, a file a run
    #[arg(long, value_name = "FOLDER")]
    pub history: Option<PathBuf>,
    /// A run that takes longer has failed
    #[arg(long, default_value_t = 90, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    pub timeout: u32,
}

/// `understudy drill check`
#[derive(Debug, Args)]
pub struct CheckOptions {
    /// JSON lines, a request and its answer each
    #[arg(value_name = "HISTORY")]
    pub history: PathBuf,
    /// Also check the raw disk image to which the embedded guest's service stored its blocks
    #[arg(long, value_name = "FILE")]
    pub image: Option<PathBuf>,
    /// One JSON object instead of text
    #[arg(long)]
    pub json: bool,
}

/// The drills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
pub enum Name {
    /// The primary is killed (SIGKILL)
    Kill,
    /// The primary is stopped (SIGSTOP) and wakes up later (SIGCONT): it must not speak then
    Stop,
    /// The link is cut, one way or both, and heals later: one side goes on, the other stops
    Cut,
    /// The link becomes slow, then the primary is killed
    Slow,
    /// The witness is out of reach while a side dies: nobody goes on before it is back
    Witness,
    /// The disk of the guest's image becomes full and empty again, then the primary is killed
    DiskFull,
    /// The standby is killed, a new one is attached, then the primary is killed
    Standby,
    /// The guest is handed over
    Switchover,
    /// All of them
    All,
}

impl Name {
    /// The drills that it stands for.
    pub fn each(self) -> Vec<Self> {
        match self {
            Self::All => Self::value_variants().iter().copied().filter(|name| *name != Self::All).collect(),
            one => vec![one],
        }
    }

    /// As it is written.
    pub fn text(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    /// What it does, in a sentence.
    pub fn help(self) -> String {
        let value = self.to_possible_value();
        value.and_then(|value| value.get_help().map(ToString::to_string)).unwrap_or_default()
    }
}

/// Random numbers that a seed determines.
#[derive(Clone, Debug)]
pub(super) struct Random(u64);

impl Random {
    /// Those of run `run` of a drill.
    pub(super) fn of(seed: u64, drill: Name, run: u32) -> Self {
        Self(mix(seed ^ mix((drill as u64) << 32 | u64::from(run))))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// Below `bound`, which is not 0.
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// A time between two, uniformly.
    pub(super) fn time(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_micros(from_ms * 1000 + self.below((to_ms - from_ms) * 1000))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seed_determines_each_run_and_runs_differ() {
        let moment = |seed, name, run| Random::of(seed, name, run).time(0, 1000);
        assert_eq!(moment(1, Name::Kill, 1), moment(1, Name::Kill, 1));
        assert_ne!(moment(1, Name::Kill, 1), moment(1, Name::Kill, 2));
        assert_ne!(moment(1, Name::Kill, 1), moment(1, Name::Stop, 1));
        assert_ne!(moment(1, Name::Kill, 1), moment(2, Name::Kill, 1));
    }

    #[test]
    fn all_are_all_but_itself() {
        let all = Name::All.each();
        assert_eq!(all.len(), 8);
        assert!(all.iter().all(|name| !name.help().is_empty() && *name != Name::All));
    }
}
