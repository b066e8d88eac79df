//! A run with everything decided.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mirror::link::Address;
use resources::protocol::{BLOCK_BYTES, Params};
use uuid::Uuid;

use super::options::{Name, Random, Running};
use super::{DrillError, network};
use crate::config::devices::{Drive, DriveCache, DriveReplication, NetworkInterface, ReplicationMode};
use crate::config::{BootSource, Config, EMBEDDED_GUEST, HugePages, MachineSection, MirrorSection};

/// The name of the drill's own disk.
pub(super) const DRIVE: &str = "disk";

/// Memory of the embedded guest in MiB.
const MEMORY: u32 = 64;

/// Pages that it writes per second beside what clients ask of it.
const DIRTY_RATE: u32 = 5000;

/// Blocks that clients use; where the disk becomes full, more than it has room for.
const BLOCKS: u64 = 48;
const MANY_BLOCKS: u64 = 4096;

/// Bytes of a disk of which each side has an image of its own: several regions of its note.
const DISK: u64 = 16 << 20;

/// One run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) drill: Name,
    /// Counted from 1.
    pub(super) run: u32,
    pub(super) seed: u64,
    pub(super) random: Random,
    /// But for the mirror, and for the image of a disk without a path.
    pub(super) config: Config,
    /// What the guest was told to do.
    pub(super) params: Params,
    /// Whether it is the embedded guest, of which all is known.
    pub(super) embedded: bool,
    /// Whether clients can use it.
    pub(super) served: bool,
    /// The name of its network card.
    pub(super) card: String,
    /// Blocks that clients use.
    pub(super) blocks: u64,
    pub(super) guid: Uuid,
    /// Longest time from start to end.
    pub(super) timeout: Duration,
}

impl Plan {
    /// Decides on everything in run `run` of `drill`.
    ///
    /// # Errors
    /// The configuration that was given cannot be used.
    pub(super) fn new(options: &Running, drill: Name, run: u32, seed: u64) -> Result<Self, DrillError> {
        let mut config = match &options.config_file {
            Some(file) => given(file)?,
            None => embedded(drill, seed, run),
        };
        let embedded = config.boot.kernel_image_path == EMBEDDED_GUEST;
        let arguments = config.boot.boot_args.as_deref().unwrap_or_default();
        let params = Params::parse(arguments).map_err(DrillError::Workload)?;
        if let Some(card) = config.network_interfaces.first_mut() {
            card.host_dev_name = network::tap(crate::sides::Side::PRIMARY);
        }
        let card = config.network_interfaces.first().map_or("net".into(), |card| card.iface_id.clone());
        let serves = arguments.split(' ').any(|word| word == format!("net.ip={}", network::GUEST));
        Ok(Self {
            drill,
            run,
            seed,
            random: Random::of(seed, drill, run),
            params,
            embedded,
            served: embedded && serves && !config.network_interfaces.is_empty(),
            card,
            blocks: if drill == Name::DiskFull { MANY_BLOCKS } else { BLOCKS },
            config,
            guid: Uuid::new_v4(),
            timeout: Duration::from_secs(options.timeout.into()),
        })
    }

    /// Whether the disk is the drill's own, so that all that is in its image is known.
    pub(super) fn has_own_disk(&self) -> bool {
        self.config.drives.iter().any(|drive| drive.path_on_host.as_os_str().is_empty())
    }

    /// The size of that disk.
    pub(super) fn image_bytes(&self) -> u64 {
        if self.is_replicated() { DISK } else { self.blocks * BLOCK_BYTES as u64 }
    }

    /// Whether each side has an image of its own of that disk.
    pub(super) fn is_replicated(&self) -> bool {
        self.has_own_disk() && self.drill != Name::DiskFull
    }
}

fn given(file: &Path) -> Result<Config, DrillError> {
    let mut config = Config::load(file).map_err(|error| DrillError::Config(Box::new(error)))?;
    config.mirror = None;
    Ok(config)
}

fn embedded(drill: Name, seed: u64, run: u32) -> Config {
    let arguments = format!(
        "workload=count,dirty,verify dirty.rate={DIRTY_RATE} seed={} net.ip={}",
        (seed ^ u64::from(run)) >> 32,
        network::GUEST
    );
    let boot = BootSource {
        kernel_image_path: EMBEDDED_GUEST.into(),
        boot_args: Some(arguments),
        initrd_path: None,
    };
    let machine = MachineSection {
        vcpu_count: 1,
        mem_size_mib: MEMORY,
        smt: false,
        track_dirty_pages: false,
        huge_pages: HugePages::None,
        cpu_template: None,
    };
    // It is another in each run; the standby is not there yet.
    let mut config = Config::plain(boot, machine, MirrorSection::to(Address::Tcp("127.0.0.1:0".into())));
    config.mirror = None;
    config.drives.push(Drive {
        drive_id: DRIVE.into(),
        path_on_host: PathBuf::new(),
        is_root_device: false,
        is_read_only: false,
        partuuid: None,
        cache_type: DriveCache::Writeback,
        io_engine: None,
        rate_limiter: None,
        replication: DriveReplication {
            // What becomes of an image that both sides see is for the drill in which that has no room.
            mode: match drill {
                Name::DiskFull => ReplicationMode::Shared,
                _ => ReplicationMode::Replicated,
            },
            ..DriveReplication::default()
        },
    });
    config.network_interfaces.push(NetworkInterface {
        iface_id: "net".into(),
        host_dev_name: String::new(),
        guest_mac: "02:00:00:00:00:02".parse().ok(),
        mtu: None,
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    });
    config
}
