//! Requests a second and their times at the embedded guest's TCP service, asked from outside, without protection.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use tests::client::{Client, SERVICE, load};
use tests::lan::{GUEST, alone};

use crate::figures::quantile;

const TIME: Duration = Duration::from_secs(3);
const DOWNLOAD: u64 = 256 << 20;

/// Of so many connections, each with one request at a time.
#[derive(Debug, Serialize)]
pub(crate) struct Service {
    connections: u64,
    pairs_per_s: f64,
    p50_us: f64,
    p99_us: f64,
    /// The same client at a server that is a thread of this process, over the loopback device: what the client and the
    /// host's TCP take alone.
    loopback_pairs_per_s: f64,
    share_of_loopback: f64,
    /// One connection that downloads.
    download_mb_per_s: f64,
}

/// Measures `understudy run` with one vCPU, without a mirror.
pub(crate) fn measure(understudy: &Path) -> Vec<Service> {
    alone(|lan| {
        lan.add_tap("tap0");
        let folder = tempfile::tempdir().expect("a folder");
        let config = folder.path().join("vm.json");
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "count.rate=1 net.ip={GUEST}"}},
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 128}},
                "network-interfaces": [{{"iface_id": "net", "host_dev_name": "tap0"}}]}}"#
        );
        std::fs::write(&config, text).expect("a configuration");
        let mut child = Command::new(understudy)
            .args(["run", "--config-file"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("understudy starts");
        let guest: SocketAddr = SERVICE.parse().expect("an address");
        let loopback = count_in_a_thread();
        let results = [1, 4, 16].map(|connections| at(guest, loopback, connections)).into();
        child.kill().expect("the child is ours");
        child.wait().expect("the child is ours");
        results
    })
}

fn at(guest: SocketAddr, loopback: SocketAddr, connections: u64) -> Service {
    let mut seen = load(guest, connections, TIME).expect("the guest serves");
    let reference = load(loopback, connections, TIME).expect("the thread serves");
    let rate = |load: &tests::client::Load| load.times.len() as f64 / load.took.as_secs_f64();
    let mut times: Vec<f64> = seen.times.drain(..).map(|time| time.as_secs_f64() * 1e6).collect();
    let pairs_per_s = times.len() as f64 / seen.took.as_secs_f64();
    let began = Instant::now();
    Client::connect(guest).and_then(|mut client| client.download(DOWNLOAD, |_| {})).expect("a download");
    Service {
        connections,
        pairs_per_s,
        p50_us: quantile(&mut times, 0.5),
        p99_us: quantile(&mut times, 0.99),
        loopback_pairs_per_s: rate(&reference),
        share_of_loopback: pairs_per_s / rate(&reference),
        download_mb_per_s: DOWNLOAD as f64 / 1e6 / began.elapsed().as_secs_f64(),
    }
}

/// Answers any line by a number that goes up, a thread for each connection.
fn count_in_a_thread() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                stream.set_nodelay(true).expect("a setting");
                let mut to = stream.try_clone().expect("a descriptor");
                for (count, _) in BufReader::new(stream).lines().map_while(Result::ok).enumerate() {
                    if writeln!(to, "value {count}").is_err() {
                        return;
                    }
                }
            });
        }
    });
    address
}
