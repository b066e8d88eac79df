//! Process start to first guest output, and what the VMM takes beyond the guest's memory.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use serde::Serialize;

use crate::figures::median;

const MEM_MIB: u32 = 128;
const RUNS: usize = 10;

/// Medians.
#[derive(Debug, Serialize)]
pub(crate) struct Boot {
    runs: usize,
    mem_mib: u32,
    first_output_ms: f64,
    /// Anonymous and file-backed memory of the process, without shared memory: that is the guest's.
    vmm_resident_mib: f64,
}

/// Measures `understudy run` without a mirror, with one disk and one network card.
pub(crate) fn measure(understudy: &Path) -> Boot {
    let folder = tempfile::tempdir().expect("a folder");
    let config = folder.path().join("vm.json");
    // As its users have it: with a disk and a network card, of which this guest makes no use.
    let disk = folder.path().join("disk");
    std::fs::File::create(&disk).and_then(|file| file.set_len(64 << 20)).expect("a disk");
    let (disk, tap) = (disk.display(), format!("boot{}", std::process::id()));
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "workload=count count.rate=1000"}},
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": {MEM_MIB}}},
            "drives": [{{"drive_id": "disk", "path_on_host": "{disk}", "is_root_device": false}}],
            "network-interfaces": [{{"iface_id": "net", "host_dev_name": "{tap}"}}]}}"#
    );
    std::fs::write(&config, text).expect("a configuration");
    let (mut times, mut sizes) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let began = Instant::now();
        let mut child = Command::new(understudy)
            .args(["run", "--config-file"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("understudy starts");
        let mut console = child.stdout.take().expect("a console");
        console.read_exact(&mut [0]).expect("the guest says something");
        times.push(began.elapsed().as_secs_f64() * 1000.0);
        // Some more output: everything that a running guest needs has been touched then.
        console.read_exact(&mut [0; 1000]).expect("the guest goes on");
        sizes.push(resident_kib(child.id()) as f64 / 1024.0);
        child.kill().expect("the child is ours");
        child.wait().expect("the child is ours");
    }
    Boot {
        runs: RUNS,
        mem_mib: MEM_MIB,
        first_output_ms: median(&mut times),
        vmm_resident_mib: median(&mut sizes),
    }
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the child lives");
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    field("RssAnon:") + field("RssFile:")
}
