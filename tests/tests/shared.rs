//! A disk of which both sides have the same image: the primary is stopped in the middle of its writes, the standby takes the
//! disk over, the primary goes on, and none of what it was about to write may be in the image.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mirror::report::Report;
use resources::protocol::{Reply, Request, read_block};
use rustix::process::{PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use tests::client::{Client, SERVICE};
use tests::lan::{GUEST, Lan, alone};
use tests::pair::{PATIENCE, await_report};
use tests::process::{Process, understudy};
use tests::tracer::Watched;

/// Bytes of the disk.
const DISK: u64 = 8 << 20;
/// Blocks that clients store to.
const BLOCKS: u64 = 64;

/// The folder in which everything is.
struct Place(tempfile::TempDir);

impl Place {
    fn new(lan: &Lan) -> Self {
        understudy();
        lan.add_tap("tap0");
        lan.add_tap("tap1");
        let place = Self(tempfile::tempdir().unwrap());
        File::create(place.path("disk")).unwrap().set_len(DISK).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    fn standby(&self, more: &[&str]) -> Process {
        let witness = self.text("witness");
        let options = ["--witness", &witness, "--net", "net=tap1"];
        Process::standby_with(&format!("unix:{}", self.text("standby")), &[&options, more].concat())
    }

    /// A guest whose disk is served by `engine`; its side waits for it at `back` once the standby has it. Patient: watching
    /// it makes it slow.
    fn primary(&self, engine: &str) -> Process {
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "count.rate=20 net.ip={GUEST}"}},
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
                "drives": [{{"drive_id": "disk", "path_on_host": "{}", "is_root_device": false, "io_engine": "{engine}",
                             "cache_type": "Writeback", "replication": {{"mode": "shared", "fence": "lock"}}}}],
                "network-interfaces": [{{"iface_id": "net", "host_dev_name": "tap0"}}],
                "mirror": {{"standby": "unix:{}", "witness": "{}", "heartbeat_ms": 100, "heartbeat_misses": 20,
                            "stall_ms": 10000}}}}"#,
            self.text("disk"),
            self.text("standby"),
            self.text("witness")
        );
        fs::write(self.path("vm.json"), text).unwrap();
        let back = format!("unix:{}", self.text("back"));
        let api = self.text("api");
        Process::start(&[
            "run",
            "--config-file",
            &self.text("vm.json"),
            "--listen",
            &back,
            "--api-sock",
            &api,
        ])
    }
}

/// Stores ascending values to the blocks, round after round, until `enough`; `confirmed` is the last one that was confirmed.
fn store(client: &mut Client, confirmed: &AtomicU64, enough: impl Fn(u64) -> bool) {
    let mut value = confirmed.load(Ordering::Acquire);
    while !enough(value) {
        value += 1;
        store_one(client, value);
        confirmed.store(value, Ordering::Release);
    }
}

fn store_one(client: &mut Client, value: u64) {
    let reply = client.ask(&Request::Store { block: value % BLOCKS, value });
    assert_eq!(reply.unwrap(), Reply::Done);
}

/// The value of `block` in the image at `path`.
fn stored(path: &Path, block: u64) -> Option<u64> {
    let image = fs::read(path).unwrap();
    read_block(image[block as usize * 4096..][..4096].try_into().unwrap(), block)
}

/// Every block holds exactly the newest value, of which `confirmed` was the last of all.
fn check(image: &Path, confirmed: u64) {
    for value in (1..=confirmed).rev().take(BLOCKS as usize) {
        assert_eq!(stored(image, value % BLOCKS), Some(value), "the last confirmed was {confirmed}");
    }
}

fn await_protected(side: &Process) {
    await_report(&side.reports, |report| matches!(report, Report::Protected { .. }));
}

fn await_active(side: &Process) {
    await_report(&side.reports, |report| matches!(report, Report::Active { .. }));
}

/// Takes the lock on its image from `process`, behind its back.
fn steal_lock(process: &Process, image: &Path) {
    let handle = pidfd_open(process.id(), PidfdFlags::empty()).unwrap();
    let folder = format!("/proc/{}", process.id().as_raw_nonzero());
    let mut stolen = 0;
    for entry in fs::read_dir(format!("{folder}/fdinfo")).unwrap() {
        let number = entry.unwrap().file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("{folder}/fdinfo/{number}")).unwrap_or_default();
        if !info.contains("OFDLCK") || fs::read_link(format!("{folder}/fd/{number}")).unwrap() != image {
            continue;
        }
        let theirs = pidfd_getfd(&handle, number.parse().unwrap(), PidfdGetfdFlags::empty()).unwrap();
        let all = libc::flock {
            l_type: libc::F_UNLCK as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: 0,
            l_len: 0,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open, and the command reads one `flock`, which is there.
        assert_eq!(unsafe { libc::fcntl(theirs.as_raw_fd(), libc::F_OFD_SETLK, &raw const all) }, 0);
        stolen += 1;
    }
    assert_eq!(stolen, 1, "the primary has the lock once");
}

/// A primary is stopped when a write that is committed is about to be carried out; its standby takes over, and the block is
/// overwritten there; then the primary goes on. Gives what the block then has to hold, and what it holds.
fn write_late(lan: &Lan, engine: &str, with_lock: bool) -> (u64, u64) {
    let place = Place::new(lan);
    let standby = place.standby(&[]);
    let mut primary = place.primary(engine);
    await_protected(&primary);
    let confirmed = AtomicU64::new(0);
    let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
    store(&mut client, &confirmed, |value| value >= BLOCKS);
    let victim = BLOCKS + 7;
    let block = victim % BLOCKS;

    let (thread, call) = match engine {
        "Sync" => ("disk", libc::SYS_pwritev2),
        _ => ("devices", libc::SYS_io_uring_enter),
    };
    let watched = Watched::new(primary.id(), thread);
    let caught = thread::scope(|scope| {
        // It is answered where the guest runs then.
        let storing = scope.spawn(|| store_one(&mut client, victim));
        // io_uring: something is handed over.
        let caught = watched.stop_before(|number, second| number == call && second > 0);
        if !with_lock {
            steal_lock(&primary, &place.path("disk"));
        }
        await_active(&standby);
        storing.join().unwrap();
        caught
    });
    assert_eq!(stored(&place.path("disk"), block), Some(victim), "what was in flight is carried out again");
    let newest = victim + BLOCKS;
    store_one(&mut client, newest);
    assert_eq!(stored(&place.path("disk"), block), Some(newest));

    caught.let_go();
    if with_lock {
        assert_eq!(primary.wait().signal(), Some(libc::SIGKILL));
    } else {
        let until = Instant::now() + PATIENCE;
        while stored(&place.path("disk"), block) == Some(newest) && Instant::now() < until {
            thread::sleep(Duration::from_millis(5));
        }
    }
    (newest, stored(&place.path("disk"), block).unwrap())
}

mod tap {
    mod kvm {
        use super::super::*;

        #[test]
        fn write_that_a_stopped_primary_was_about_to_carry_out_never_comes() {
            for engine in ["Sync", "Async"] {
                let (wanted, found) = alone(|lan| write_late(lan, engine, true));
                assert_eq!(found, wanted, "{engine}");
            }
        }

        /// Else the test before would show nothing.
        #[test]
        fn without_its_lock_such_a_write_comes_late() {
            for engine in ["Sync", "Async"] {
                let (newest, found) = alone(|lan| write_late(lan, engine, false));
                assert_eq!(found, newest - BLOCKS, "{engine}");
            }
        }

        #[test]
        fn image_holds_what_was_confirmed_whenever_its_primary_is_stopped_and_goes_on() {
            const RUNS: u32 = 5;
            let mut random = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos() | 1;
            for run in 0..RUNS {
                random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let moment = Duration::from_micros(u64::from(random % 300_000));
                println!("run {run}: SIGSTOP after {moment:?}");
                alone(|lan| {
                    let place = Place::new(lan);
                    let standby = place.standby(&[]);
                    let mut primary = place.primary(if run % 2 == 0 { "Sync" } else { "Async" });
                    await_protected(&primary);
                    let (confirmed, live) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
                    thread::scope(|scope| {
                        let (confirmed, live) = (&confirmed, &live);
                        let (sender, begun) = channel();
                        let storing = scope.spawn(move || {
                            let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
                            store(&mut client, confirmed, |value| value >= BLOCKS);
                            sender.send(()).unwrap();
                            // Each block twice more where the guest runs then.
                            store(&mut client, confirmed, |value| {
                                value >= live.load(Ordering::Acquire).saturating_add(2 * BLOCKS)
                            });
                        });
                        begun.recv().unwrap();
                        thread::sleep(moment);
                        primary.signal(Signal::STOP);
                        await_active(&standby);
                        live.store(confirmed.load(Ordering::Acquire), Ordering::Release);
                        primary.signal(Signal::CONT);
                        storing.join().unwrap();
                    });
                    assert_eq!(primary.wait().signal(), Some(libc::SIGKILL));
                    drop(standby);
                    check(&place.path("disk"), confirmed.load(Ordering::Acquire));
                });
            }
        }

        #[test]
        fn disk_goes_over_with_its_guest_and_comes_back() {
            alone(|lan| {
                let place = Place::new(lan);
                let (api, back) = (place.text("standby-api"), format!("unix:{}", place.text("back")));
                let b = place.standby(&["--api-sock", &api, "--standby", &back]);
                let a = place.primary("Async");
                await_protected(&a);
                let confirmed = AtomicU64::new(0);
                let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
                store(&mut client, &confirmed, |value| value >= BLOCKS);
                for (from, to, api) in [(&a, &b, "api"), (&b, &a, "standby-api"), (&a, &b, "api")] {
                    let enough = confirmed.load(Ordering::Acquire) + BLOCKS / 2;
                    understudy::client::switchover(&place.path(api), None).unwrap();
                    await_report(&from.reports, |report| matches!(report, Report::HandedOver { .. }));
                    await_active(to);
                    store(&mut client, &confirmed, |value| value >= enough);
                    await_protected(to);
                }
                a.signal(Signal::KILL);
                drop(a);
                store(&mut client, &confirmed, |value| value >= 4 * BLOCKS);
                check(&place.path("disk"), confirmed.load(Ordering::Acquire));
            });
        }

        #[test]
        fn standby_with_another_image_is_refused() {
            alone(|lan| {
                let place = Place::new(lan);
                fs::copy(place.path("disk"), place.path("other")).unwrap();
                let standby = place.standby(&["--drive", &format!("disk={}", place.text("other"))]);
                let primary = place.primary("Sync");
                for side in [&primary, &standby] {
                    let said = side.errors.await_text(|text| text.contains("each side an image of its own"));
                    assert!(said.contains("--drive disk=PATH") && said.contains("replicated"), "{said}");
                }
            });
        }

        #[test]
        fn image_of_a_guest_that_is_mirrored_is_not_another_guest_s() {
            alone(|lan| {
                let place = Place::new(lan);
                let _standby = place.standby(&[]);
                let primary = place.primary("Sync");
                await_protected(&primary);
                let name = format!("process {} (understudy)", primary.id().as_raw_nonzero());
                let text = format!(
                    r#"{{"boot-source": {{"kernel_image_path": "embedded:guest"}},
                        "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
                        "drives": [{{"drive_id": "theirs", "path_on_host": "{}", "is_root_device": false}}],
                        "mirror": {{"standby": "unix:{}", "witness": "{}"}}}}"#,
                    place.text("disk"),
                    place.text("nobody"),
                    place.text("another")
                );
                fs::write(place.path("second.json"), text).unwrap();
                let mut second = Process::start(&["run", "--config-file", &place.text("second.json")]);
                let said = second.errors.await_text(|text| text.contains("end that first"));
                assert!(said.contains(&name), "{said}");
                assert!(!second.wait().success());
            });
        }
    }
}
