//! The drills for operators (`resources/drills/`), run against a pair on one machine, on a network of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use mirror::report::Report;
use tests::lan::{GUEST, Lan, alone};
use tests::pair::await_report;
use tests::process::{Process, understudy};

/// Where the standby listens: on TCP, so that the link can be cut.
const PORT: &str = "7100";
const SECOND_PORT: &str = "7101";

/// A guest in lockstep, with a service, a tap on each side, and an API socket on each side.
struct Two {
    _primary: Process,
    _standby: Process,
    folder: tempfile::TempDir,
}

impl Two {
    /// `disk` is where the image is to lie.
    fn start(lan: &Lan, disk: &Path) -> Self {
        for tap in ["tap0", "tap1", "tap2"] {
            lan.add_tap(tap);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::create_dir(path("witness")).unwrap();
        let image = disk.join("image");
        fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let standby = Process::standby_with(
            &format!("tcp:127.0.0.1:{PORT}"),
            &["--witness", &path("witness/record"), "--net", "net=tap1", "--api-sock", &path("standby.sock")],
        );
        let config = format!(
            r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "net.ip={GUEST}"}},
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
                "drives": [{{"drive_id": "disk", "path_on_host": "{}", "is_root_device": false}}],
                "network-interfaces": [{{"iface_id": "net", "host_dev_name": "tap0"}}],
                "mirror": {{"standby": "tcp:127.0.0.1:{PORT}", "witness": "{}"}}}}"#,
            image.display(),
            path("witness/record")
        );
        fs::write(path("vm.json"), config).unwrap();
        let primary =
            Process::start(&["run", "--config-file", &path("vm.json"), "--api-sock", &path("primary.sock")]);
        await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
        Self { _primary: primary, _standby: standby, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/drills").join(name)
}

/// Runs a script in the test's own network against a pair of its own, with what `more` says.
fn drill(name: &str, more: impl FnOnce(&Two) -> Vec<String> + Send) {
    let disk = tempfile::tempdir().unwrap();
    drill_with_disk(name, disk.path(), more);
}

fn drill_with_disk(name: &str, disk: &Path, more: impl FnOnce(&Two) -> Vec<String> + Send) {
    understudy();
    alone(|lan| {
        let two = Two::start(lan, disk);
        let output: Output = Command::new(script(name))
            .args(["--yes", "--counter", "10.9.0.2:7000", "--understudy"])
            .arg(understudy())
            .args(["--primary", &two.text("primary.sock"), "--standby", &two.text("standby.sock")])
            .args(more(&two))
            .output()
            .unwrap();
        let (said, errors) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        println!("{said}\n{errors}");
        assert!(output.status.success(), "{name}: {}\n{said}\n{errors}", output.status);
        assert!(said.contains(" counts, ") && said.trim_end().ends_with("passed"), "{said}");
        let left = Command::new("nft").args(["list", "ruleset"]).output();
        assert!(left.is_ok_and(|left| left.stdout.is_empty()), "rules are left");
        assert!(!two.path("witness.away").exists() && !disk.join("understudy-drill-filler").exists());
    });
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(String::from).collect()
}

#[test]
fn scripts_say_how_they_are_used_and_do_nothing_without_a_pair() {
    let scripts = fs::read_dir(script("")).unwrap().map(|entry| entry.unwrap().path());
    let scripts: Vec<PathBuf> = scripts.filter(|path| !path.ends_with("lib.sh")).collect();
    assert_eq!(scripts.len(), 9);
    for script in scripts {
        let help = Command::new(&script).arg("--help").output().unwrap();
        let text = String::from_utf8_lossy(&help.stdout);
        assert!(help.status.success() && text.contains("Must hold") && text.contains("--counter"), "{text}");
        let bare = Command::new(&script).output().unwrap();
        assert_eq!(bare.status.code(), Some(2), "{}", script.display());
    }
}

mod tap {
    mod kvm {
        use super::super::*;

        #[test]
        fn kill() {
            drill("kill.sh", |_| Vec::new());
        }

        #[test]
        fn stop() {
            drill("stop.sh", |_| words("--asleep 0.5"));
        }

        #[test]
        fn power_loss_of_what_runs_the_primary() {
            drill("power.sh", |two| {
                // From its beginning on: the script that is told of it is not meant.
                let pattern = format!("^[^ ]*understudy run .*--api-sock {}", two.text("primary.sock"));
                vec!["--off".into(), format!("pkill -KILL -f -- '{pattern}'")]
            });
        }

        #[test]
        fn cut_both_ways() {
            drill("cut.sh", |_| words(&format!("--port {PORT} --apart 0.5")));
        }

        #[test]
        fn cut_towards_the_standby() {
            drill("cut.sh", |_| words(&format!("--port {PORT} --apart 0.5 --way to-standby")));
        }

        #[test]
        fn cut_towards_the_primary() {
            drill("cut.sh", |_| words(&format!("--port {PORT} --apart 0.5 --way to-primary")));
        }

        #[test]
        fn slow() {
            drill("slow.sh", |_| words("--device lo --for 1"));
        }

        #[test]
        fn witness_away_while_the_primary_dies() {
            drill("witness.sh", |two| words(&format!("--file {} --for 1", two.text("witness/record"))));
        }

        #[test]
        fn witness_away_while_the_standby_dies() {
            drill("witness.sh", |two| {
                words(&format!("--file {} --for 1 --kill standby", two.text("witness/record")))
            });
        }

        #[test]
        fn standby_lost_and_replaced() {
            drill("standby.sh", |two| {
                let (program, witness) = (understudy().display(), two.text("witness/record"));
                let start = format!(
                    "{program} standby --once --listen tcp:127.0.0.1:{SECOND_PORT} --witness {witness} --net net=tap2 >/dev/null 2>&1 &"
                );
                let mut more = vec!["--start".into(), start];
                more.extend(words(&format!("--attach tcp:127.0.0.1:{SECOND_PORT} --witness {witness}")));
                more
            });
        }

        #[test]
        fn switchover() {
            drill("switchover.sh", |_| Vec::new());
        }

        mod mount {
            use super::super::super::*;

            /// A small file system of its own; gone when this is dropped.
            struct Small(tempfile::TempDir);

            impl Small {
                fn mount() -> Self {
                    let folder = tempfile::tempdir().unwrap();
                    let options = ["-t", "tmpfs", "-o", "size=2m", "small"];
                    let mounted = Command::new("mount").args(options).arg(folder.path()).status();
                    assert!(mounted.unwrap().success(), "a tmpfs can be mounted");
                    Self(folder)
                }
            }

            impl Drop for Small {
                fn drop(&mut self) {
                    let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
                }
            }

            #[test]
            fn disk_full() {
                let small = Small::mount();
                let folder = small.0.path().to_path_buf();
                drill_with_disk("disk-full.sh", &folder, |_| {
                    words(&format!("--folder {} --for 1", folder.display()))
                });
            }
        }
    }
}
