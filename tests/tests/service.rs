//! The embedded guest's TCP service, its network card and its disk, used from outside of its host.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc::channel;
use std::thread;

use mirror::guest::Guest;
use mirror::report::Report;
use resources::protocol::{Reply, Request};
use rustix::process::Signal;
use tests::client::{Client, SERVICE};
use tests::lan::{GUEST, Lan, alone};
use tests::pair::{PATIENCE, await_report, start_guest};
use tests::process::{Process, understudy};
use understudy::config::Config;
use understudy::guest::machine_config;

const BLOCKS: u64 = 64;

/// A configuration with a network card on `tap`, and a disk.
fn configuration(folder: &Path, tap: &str, mirror: &str) -> String {
    let (path, disk) = (folder.join("vm.json"), folder.join("disk"));
    std::fs::File::create(&disk).and_then(|file| file.set_len(BLOCKS * 4096)).unwrap();
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "count.rate=20 net.ip={GUEST}"}},
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
            "drives": [{{"drive_id": "disk", "path_on_host": "{}", "is_root_device": false, "cache_type": "Writeback"}}],
            "network-interfaces": [{{"iface_id": "net", "host_dev_name": "{tap}"}}]{mirror}}}"#,
        disk.display()
    );
    std::fs::write(&path, text).unwrap();
    path.display().to_string()
}

/// A guest in lockstep, with a tap on each side.
struct Two {
    primary: Process,
    standby: Process,
    folder: tempfile::TempDir,
}

impl Two {
    fn start(lan: &Lan) -> Self {
        lan.add_tap("tap0");
        lan.add_tap("tap1");
        let folder = tempfile::tempdir().unwrap();
        let (witness, listen) = (folder.path().join("witness"), folder.path().join("standby"));
        let standby = Process::standby_with(
            &format!("unix:{}", listen.display()),
            &["--witness", &witness.display().to_string(), "--net", "net=tap1"],
        );
        let mirror = format!(
            r#", "mirror": {{"standby": "unix:{}", "witness": "{}"}}"#,
            listen.display(),
            witness.display()
        );
        let config = configuration(folder.path(), "tap0", &mirror);
        let api = folder.path().join("api").display().to_string();
        let primary = Process::start(&["run", "--config-file", &config, "--api-sock", &api]);
        await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
        Self { primary, standby, folder }
    }

    /// Lets clients count, store and download while `fault` happens, and on after it; each on one connection, and none of
    /// them notices more than a pause.
    fn serve_through(&self, fault: impl FnOnce(&Self)) {
        let address = SERVICE.parse().unwrap();
        let (progress, halfway) = std::sync::mpsc::channel();
        let moved = std::sync::atomic::AtomicBool::new(false);
        let moved = &moved;
        let go_on = move |after: &mut u32| {
            *after += u32::from(moved.load(std::sync::atomic::Ordering::Acquire));
            *after < 100
        };
        thread::scope(|scope| {
            for register in 0..4 {
                let progress = progress.clone();
                scope.spawn(move || {
                    let mut client = Client::connect(address).unwrap();
                    let (mut last, mut after) = (0, 0);
                    while go_on(&mut after) {
                        let value = client.number(&Request::Increment { register }).unwrap();
                        assert_eq!(value, last + 1, "register {register}");
                        last = value;
                        if value == 50 {
                            progress.send("count").unwrap();
                        }
                    }
                });
            }
            let stored = progress.clone();
            scope.spawn(move || {
                let mut client = Client::connect(address).unwrap();
                let (mut stores, mut after) = (0, 0);
                while go_on(&mut after) {
                    let request = Request::Store { block: stores % BLOCKS, value: stores };
                    assert_eq!(client.ask(&request).unwrap(), Reply::Done);
                    stores += 1;
                    if stores == 10 {
                        stored.send("store").unwrap();
                    }
                }
                for back in 1..=stores.min(BLOCKS) {
                    let (block, value) = ((stores - back) % BLOCKS, stores - back);
                    assert_eq!(client.number(&Request::Load { block }).unwrap(), value);
                }
            });
            scope.spawn(move || {
                let mut client = Client::connect(address).unwrap();
                let mut told = false;
                let mut after = 0;
                while go_on(&mut after) {
                    after += 9;
                    client
                        .download(1 << 20, |_| {
                            if !std::mem::replace(&mut told, true) {
                                progress.send("download").unwrap();
                            }
                        })
                        .unwrap();
                }
            });
            for _ in 0..6 {
                halfway.recv().unwrap();
            }
            fault(self);
            moved.store(true, std::sync::atomic::Ordering::Release);
        });
    }
}

mod tap {
    mod kvm {
        use super::super::*;

        #[test]
        fn guest_answers_over_tcp_and_keeps_blocks_on_its_disk() {
            understudy();
            alone(|lan| {
                lan.add_tap("tap0");
                let folder = tempfile::tempdir().unwrap();
                let config = configuration(folder.path(), "tap0", "");
                let _process = Process::start(&["run", "--config-file", &config]);
                let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();

                assert_eq!(client.ask(&Request::Set { register: 7, value: 41 }).unwrap(), Reply::Done);
                assert_eq!(client.number(&Request::Increment { register: 7 }).unwrap(), 42);
                assert_eq!(client.number(&Request::Get { register: 7 }).unwrap(), 42);
                assert_eq!(client.ask(&Request::Echo { text: b"hello" }).unwrap(), Reply::Echo(b"hello"));
                client.download(3_000_000, |_| {}).unwrap();
                for block in 0..BLOCKS {
                    assert_eq!(client.ask(&Request::Store { block, value: block + 9 }).unwrap(), Reply::Done);
                }
                for block in 0..BLOCKS {
                    assert_eq!(client.number(&Request::Load { block }).unwrap(), block + 9);
                }
                let beyond = client.ask(&Request::Load { block: BLOCKS }).unwrap();
                assert!(matches!(beyond, Reply::Refused(_)), "{beyond:?}");
                // What the guest stored is in the image.
                let image = std::fs::read(folder.path().join("disk")).unwrap();
                for (block, bytes) in image.chunks_exact(4096).enumerate() {
                    let block = block as u64;
                    let value = resources::protocol::read_block(bytes.try_into().unwrap(), block);
                    assert_eq!(value, Some(block + 9));
                }
            });
        }

        #[test]
        fn output_that_waits_is_told_of_and_not_only_found() {
            alone(|lan| {
                lan.add_tap("tap0");
                let folder = tempfile::tempdir().unwrap();
                let config = Config::load(Path::new(&configuration(folder.path(), "tap0", ""))).unwrap();
                let arguments = config.boot.boot_args.clone().unwrap();
                let (mut machine, _console, _screen) = start_guest(&machine_config(&config), &arguments);
                let mut client = Client::connect(SERVICE.parse().unwrap()).unwrap();
                client.ask(&Request::Set { register: 1, value: 1 }).unwrap();

                let (told, heard) = channel();
                machine.tell_of_output(Box::new(move || {
                    let _ = told.send(());
                }));
                machine.hold_output();
                let answer = thread::spawn(move || client.ask(&Request::Get { register: 1 }).is_ok());

                heard.recv_timeout(PATIENCE).unwrap();
                assert!(machine.output_waits());
                machine.pass_output();
                assert!(answer.join().unwrap());
            });
        }

        #[test]
        fn connections_survive_the_death_of_the_primary_and_no_answer_is_taken_back() {
            understudy();
            alone(|lan| {
                let two = Two::start(lan);
                two.serve_through(|two| {
                    two.primary.signal(Signal::KILL);
                    await_report(&two.standby.reports, |report| matches!(report, Report::Active { .. }));
                });
            });
        }

        #[test]
        fn connections_survive_a_switchover_and_no_answer_is_taken_back() {
            understudy();
            alone(|lan| {
                let two = Two::start(lan);
                two.serve_through(|two| {
                    let asked = Command::new(understudy())
                        .args(["switchover", "--api-sock"])
                        .arg(two.folder.path().join("api"))
                        .output()
                        .unwrap();
                    assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));
                });
            });
        }
    }
}
