//! Devices that are changed while their guest runs, by requests to the API.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use mirror::report::Report;
use rustix::process::Signal;
use tests::http;
use tests::pair::await_report;
use tests::process::{Process, understudy};

const LIMIT: &str = r#"{"ops": {"size": 100, "refill_time": 1000}}"#;

/// A guest with a disk, and the folder in which everything is.
struct WithDisk {
    guest: Process,
    folder: tempfile::TempDir,
}

impl WithDisk {
    fn start(mirror: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name).display().to_string();
        for (name, len) in [("disk", 1 << 20), ("other", 4 << 20)] {
            File::create(place(name)).unwrap().set_len(len).unwrap();
        }
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "embedded:guest", "boot_args": "workload=count"}},
                "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
                "drives": [{{"drive_id": "data", "path_on_host": "{}", "is_root_device": false}}]{mirror}}}"#,
            place("disk"),
        );
        fs::write(place("vm.json"), text).unwrap();
        let guest = Process::start(&["run", "--config-file", &place("vm.json"), "--api-sock", &place("api")]);
        guest.console.await_text(|text| text.contains("count cpu=0 n=10 "));
        Self { guest, folder }
    }

    fn place(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn patch(&self, resource: &str, body: &str) -> (u16, String) {
        http::request(&self.place("api"), "PATCH", resource, body).unwrap()
    }

    fn change_image(&self, to: &Path) -> (u16, String) {
        let body = format!(r#"{{"drive_id": "data", "path_on_host": "{}"}}"#, to.display());
        self.patch("/drives/data", &body)
    }

    fn still_runs(&self) {
        let before = self.guest.console.text().len();
        self.guest.console.await_text(|text| text.len() > before + 200);
    }
}

mod kvm {
    use super::*;

    #[test]
    fn disk_that_was_changed_is_the_one_that_a_snapshot_asks_for() {
        let machine = WithDisk::start("");
        assert_eq!(machine.change_image(&machine.place("other")), (204, String::new()));
        machine.still_runs();
        let place = |name| machine.place(name).display().to_string();
        let snapshot =
            ["snapshot", "--api-sock", &place("api"), "--state", &place("s"), "--memory", &place("m")];
        assert!(Command::new(understudy()).args(snapshot).status().unwrap().success());
        machine.guest.signal(Signal::KILL);
        fs::remove_file(machine.place("disk")).unwrap();
        let restored = Process::start(&["restore", "--state", &place("s"), "--memory", &place("m")]);
        restored.console.await_text(|text| text.contains("count cpu=0 n="));
    }

    #[test]
    fn limits_are_changed_and_requests_that_ask_for_what_is_not_there_say_so() {
        let machine = WithDisk::start("");
        let limit = format!(r#"{{"drive_id": "data", "rate_limiter": {LIMIT}}}"#);
        assert_eq!(machine.patch("/drives/data", &limit), (204, String::new()));
        assert_eq!(machine.patch("/drives/data", r#"{"drive_id": "data"}"#), (204, String::new()));

        let refused = |resource: &str, body: &str, reason: &str| {
            let (status, said) = machine.patch(resource, body);
            assert_eq!(status, 400, "{said}");
            assert!(said.contains(reason), "{said}");
        };
        let root = "The id from the path [root] does not match the id from the body [data]!";
        refused("/drives/root", &limit, root);
        refused("/drives/root", r#"{"drive_id": "root"}"#, "no drive \\\"root\\\"; it has data");
        refused("/drives/data", r#"{"drive_id": "data", "is_read_only": true}"#, "unknown field");
        refused("/drives/data", r#"{"drive_id": "data", "path_on_host": "/none"}"#, "/none");
        refused(
            "/network-interfaces/eth0",
            r#"{"iface_id": "eth1"}"#,
            "[eth0] does not match the id from the body [eth1]!",
        );
        let net = format!(r#"{{"iface_id": "eth0", "rx_rate_limiter": {LIMIT}}}"#);
        refused("/network-interfaces/eth0", &net, "no network interface \\\"eth0\\\"; it has none");
        machine.still_runs();
    }

    #[test]
    fn mirrored_guest_keeps_its_disk_and_its_limits_can_be_changed() {
        let folder = tempfile::tempdir().unwrap();
        let place = |name: &str| folder.path().join(name).display().to_string();
        let listen = format!("unix:{}", place("standby"));
        let _standby = Process::standby(&listen, &folder.path().join("witness"));
        let mirror = format!(r#", "mirror": {{"standby": "{listen}", "witness": "{}"}}"#, place("witness"));
        let machine = WithDisk::start(&mirror);
        await_report(&machine.guest.reports, |report| matches!(report, Report::Protected { .. }));
        let (status, said) = machine.change_image(&machine.place("other"));
        assert_eq!(status, 400);
        assert!(said.contains("the guest is mirrored"), "{said}");
        let limit = format!(r#"{{"drive_id": "data", "rate_limiter": {LIMIT}}}"#);
        assert_eq!(machine.patch("/drives/data", &limit), (204, String::new()));
        machine.still_runs();
    }
}
