//! What a demo is asked to do, and the plan of one run.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use resources::protocol::{BadParameter, MAX_CPUS, Params};
use uuid::Uuid;

use crate::config::{BootSource, Config, EMBEDDED_GUEST, HugePages, MachineSection, MirrorSection};
use mirror::link::Address;

/// `understudy demo`
///
/// Without --kill-after a single demo kills the primary one to three seconds after the guest is protected; with
/// --runs the moments are random from when the standby has joined on, so that some fall into the seeding: the standby
/// must then refuse to run the guest (outcome not_protected, which is right: nothing was promised yet).
#[derive(Clone, Debug, Args)]
#[command(verbatim_doc_comment)]
pub struct DemoOptions {
    /// One JSON object a run instead of text
    #[arg(long)]
    pub json: bool,
    /// vCPUs of the guest
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=i64::from(MAX_CPUS)))]
    pub vcpus: u8,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = 512, value_name = "MIB", value_parser = clap::value_parser!(u32).range(16..=1_048_576))]
    pub mem: u32,
    /// Pages that the guest writes per second
    #[arg(long, default_value_t = 20_000, value_name = "PAGES/S", value_parser = clap::value_parser!(u32).range(0..=100_000_000))]
    pub dirty_rate: u32,
    /// Kill the primary so long after its start
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub kill_after: Option<f64>,
    /// Mirror the guest so long after its start: it has filled its memory by then, and seeding has something to do
    #[arg(long, default_value_t = 1.5, value_name = "SECONDS", value_parser = seconds)]
    pub mirror_after: f64,
    /// How often to do it
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub runs: u32,
    /// Boot this kernel instead of the embedded guest; its initrd must run the workload `linux-workload`
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// The initrd for --kernel
    #[arg(long, value_name = "PATH", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// The command line for --kernel; its workload words must say what the guest does
    #[arg(long, value_name = "ARGS", requires = "kernel", allow_hyphen_values = true)]
    pub boot_args: Option<String>,
    /// Longest time between two epochs
    #[arg(long, default_value_t = 25, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub interval_ms: u32,
    /// Shortest time between two epochs: output that waits ends an epoch early, but not earlier
    #[arg(long, default_value_t = 1, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub min_interval_ms: u32,
    /// Time between two signs of life of each side
    #[arg(long, default_value_t = 50, value_name = "MS", value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pub heartbeat_ms: u32,
    /// Missed signs of life after which the other side counts as lost
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub heartbeat_misses: u32,
    /// A run that takes longer has failed
    #[arg(long, default_value_t = 120.0, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: f64,
    /// Mirror by TCP instead of a Unix socket
    #[arg(long)]
    pub tcp: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if (0.0..=1e6).contains(&value) => Ok(value),
        _ => Err("give a number of seconds from 0 to 1000000".into()),
    }
}

/// When the primary is killed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KillMoment {
    /// So long after its process was started.
    AfterStart(Duration),
    /// So long after the standby joined.
    AfterJoin(Duration),
    /// So long after the guest was protected.
    AfterProtection(Duration),
}

/// One run, with everything decided.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Counted from 1.
    pub run: u32,
    /// When the primary is killed.
    pub kill: KillMoment,
    /// What the guest was told to do.
    pub params: Params,
    /// The configuration of the primary, but for the standby's address and the witness.
    pub config: Config,
    /// Whether nothing but the workload writes to the console.
    pub only_workload: bool,
    /// Longest time from start to end.
    pub timeout: Duration,
    /// Time of silence after which a side counts as lost.
    pub detection: Duration,
}

impl DemoOptions {
    /// Decides on everything in run number `run`.
    ///
    /// # Errors
    /// The workload words in `--boot-args` are wrong.
    pub fn plan(&self, run: u32) -> Result<Plan, BadParameter> {
        let random = Uuid::new_v4().as_u128();
        let boot = self.boot_source(random as u64 >> 32);
        let params = Params::parse(boot.boot_args.as_deref().unwrap_or_default())?;
        // Not used: the standby is not there yet.
        let mut mirror = MirrorSection::to(Address::Tcp("127.0.0.1:0".into()));
        mirror.interval_ms = self.interval_ms.max(self.min_interval_ms);
        mirror.min_interval_ms = self.min_interval_ms;
        mirror.heartbeat_ms = self.heartbeat_ms;
        mirror.heartbeat_misses = self.heartbeat_misses;
        mirror.guid = Some(Uuid::new_v4());
        mirror.delay_ms = (self.mirror_after * 1000.0) as u32;
        let machine = MachineSection {
            vcpu_count: self.vcpus,
            mem_size_mib: self.mem,
            smt: false,
            track_dirty_pages: false,
            huge_pages: HugePages::None,
            cpu_template: None,
        };
        Ok(Plan {
            run,
            kill: self.kill_moment(fraction(random)),
            params,
            config: Config::plain(boot, machine, mirror),
            only_workload: self.kernel.is_none(),
            timeout: Duration::from_secs_f64(self.timeout),
            detection: Duration::from_millis(u64::from(self.heartbeat_ms) * u64::from(self.heartbeat_misses)),
        })
    }

    fn boot_source(&self, seed: u64) -> BootSource {
        match &self.kernel {
            Some(kernel) => BootSource {
                kernel_image_path: kernel.display().to_string(),
                boot_args: self.boot_args.clone(),
                initrd_path: self.initrd.clone(),
            },
            None => BootSource {
                kernel_image_path: EMBEDDED_GUEST.into(),
                boot_args: Some(format!(
                    "workload=count,dirty,verify cpus={} dirty.rate={} seed={seed}",
                    self.vcpus, self.dirty_rate
                )),
                initrd_path: None,
            },
        }
    }

    /// `fraction`: a random number from 0 to 1.
    fn kill_moment(&self, fraction: f64) -> KillMoment {
        if let Some(seconds) = self.kill_after {
            KillMoment::AfterStart(Duration::from_secs_f64(seconds))
        } else if self.runs > 1 {
            // Seeding takes about a third of this.
            let window = 2.0 + f64::from(self.mem) / 512.0;
            KillMoment::AfterJoin(Duration::from_secs_f64(window * fraction))
        } else {
            KillMoment::AfterProtection(Duration::from_secs_f64(1.0 + 2.0 * fraction))
        }
    }
}

/// The upper bits of `random` as a number from 0 to 1.
fn fraction(random: u128) -> f64 {
    (random >> 96) as f64 / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        demo: DemoOptions,
    }

    fn options(line: &str) -> DemoOptions {
        Line::try_parse_from(line.split_whitespace()).unwrap().demo
    }

    #[test]
    fn guest_does_what_the_plan_expects_of_it() {
        let plan = options("demo --vcpus 2 --dirty-rate 7").plan(1).unwrap();
        assert_eq!((plan.params.cpus, plan.params.dirty_rate), (2, 7));
        assert!(plan.params.count && plan.params.verify && plan.params.dirty);
        assert_ne!(
            plan.params.seed,
            options("demo").plan(1).unwrap().params.seed,
            "each run has a seed of its own"
        );
    }

    #[test]
    fn single_demo_kills_in_lockstep_and_many_kill_anywhere() {
        assert!(matches!(options("demo").plan(1).unwrap().kill, KillMoment::AfterProtection(_)));
        assert!(matches!(options("demo --runs 2").plan(1).unwrap().kill, KillMoment::AfterJoin(_)));
        let given = options("demo --runs 2 --kill-after 1.5").plan(1).unwrap().kill;
        assert_eq!(given, KillMoment::AfterStart(Duration::from_millis(1500)));
    }

    #[test]
    fn random_fraction_is_from_0_to_1() {
        assert!(fraction(0).abs() < f64::EPSILON);
        assert!((fraction(u128::MAX) - 1.0).abs() < f64::EPSILON);
    }

    #[test]
    fn senseless_times_are_refused() {
        for line in ["demo --kill-after -1", "demo --timeout nan", "demo --kill-after x", "demo --vcpus 0"] {
            assert!(Line::try_parse_from(line.split_whitespace()).is_err(), "{line}");
        }
    }
}
