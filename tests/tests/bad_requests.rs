//! Bad input to the API of a real process: each request is answered by 400 and a message that names the field, the value and
//! the remedy, and nothing has changed then.

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use tests::http::request;
use tests::process::{Process, understudy};

/// A request, its body, and words that the message is to have.
type Wrong = (&'static str, &'static str, &'static [&'static str]);

/// Wrong whenever it is asked.
const ALWAYS: &[Wrong] = &[
    // Fields.
    ("PUT /boot-source", r#"{"kernel_image_path": "k", "boot_arg": "x"}"#, &["boot_arg", "boot_args"]),
    (
        "PUT /machine-config",
        r#"{"vcpu_count": 1, "mem_size_mib": 16, "cores": 2}"#,
        &["`cores`", "vcpu_count"],
    ),
    ("PATCH /machine-config", r#"{"vcpus": 2}"#, &["`vcpus`", "vcpu_count"]),
    ("PUT /machine-config", r#"{"vcpu_count": 1}"#, &["mem_size_mib", "missing"]),
    ("PUT /actions", r#"{"action": "InstanceStart"}"#, &["`action`", "action_type"]),
    ("PATCH /vm", r#"{"state": "Paused", "now": true}"#, &["`now`", "state"]),
    ("PUT /mirror", r#"{"standby": "unix:/s", "standbye": "x"}"#, &["`standbye`", "standby"]),
    ("PUT /snapshot/create", r#"{"snapshot_path": "a", "memory": "b"}"#, &["`memory`", "mem_file_path"]),
    // Types.
    ("PUT /machine-config", r#"{"vcpu_count": "two", "mem_size_mib": 16}"#, &["vcpu_count", "two", "u8"]),
    ("PUT /machine-config", r#"{"vcpu_count": 300, "mem_size_mib": 16}"#, &["vcpu_count", "300", "u8"]),
    ("PUT /machine-config", r#"{"vcpu_count": 1, "mem_size_mib": -1}"#, &["mem_size_mib", "-1", "u32"]),
    (
        "PUT /drives/a",
        r#"{"drive_id": "a", "path_on_host": 7, "is_root_device": false}"#,
        &["path_on_host", "7", "string"],
    ),
    ("PUT /cpu-config", r#"{"msr_modifiers": [{"addr": "16", "bitmap": "1"}]}"#, &["addr", "16", "0x"]),
    ("PUT /actions", r#"{"action_type": "Start"}"#, &["action_type", "Start", "InstanceStart"]),
    ("PATCH /vm", r#"{"state": "Stopped"}"#, &["state", "Stopped", "Paused"]),
    ("PUT /mirror", r#"{"standby": "nonsense"}"#, &["standby", "nonsense", "unix:"]),
    // What is no JSON, or not one object.
    ("PUT /machine-config", "", &["EOF"]),
    ("PUT /machine-config", "{", &["EOF"]),
    ("PUT /machine-config", "[1, 16]", &["list", "object"]),
    ("PUT /vsock", r#"{"guest_cid": 3, "uds_path": "v"} {}"#, &["trailing"]),
    // Paths.
    ("GET /nope", "", &["Invalid request method and/or path", "GET /nope"]),
    ("DELETE /machine-config", "", &["Invalid request method and/or path", "DELETE /machine-config"]),
    ("PUT /drives/a", r#"{"drive_id": "b", "path_on_host": "p", "is_root_device": false}"#, &["[a]", "[b]"]),
    ("PUT /drives/%ff", r#"{"drive_id": "b", "path_on_host": "p", "is_root_device": false}"#, &["UTF-8"]),
    // Values.
    (
        "PUT /mirror",
        r#"{"standby": "unix:/none/standby"}"#,
        &["/none/standby", "understudy standby --listen"],
    ),
    ("PUT /mirror/failover", "", &["standby"]),
];

/// Wrong before the start.
const BEFORE: &[Wrong] = &[
    ("PUT /machine-config", r#"{"vcpu_count": 0, "mem_size_mib": 16}"#, &["vcpu_count", "0", "1 to 32"]),
    ("PATCH /machine-config", r#"{"mem_size_mib": 1}"#, &["mem_size_mib", "1", "2 to 1048576"]),
    ("PATCH /machine-config", r#"{"smt": true}"#, &["smt", "true", "leave it out"]),
    ("PATCH /machine-config", r#"{"cpu_template": "T2"}"#, &["cpu_template", "cpu-config"]),
    ("PUT /boot-source", r#"{"kernel_image_path": ""}"#, &["kernel_image_path", "empty", "embedded:guest"]),
    (
        "PUT /drives/a-b",
        r#"{"drive_id": "a-b", "path_on_host": "p", "is_root_device": false}"#,
        &["drive_id", "a-b", "letters"],
    ),
    (
        "PUT /drives/second",
        r#"{"drive_id": "second", "path_on_host": "p", "is_root_device": true}"#,
        &["is_root_device", "one root device"],
    ),
    (
        "PUT /network-interfaces/n",
        r#"{"iface_id": "n", "host_dev_name": "t", "mtu": 60}"#,
        &["mtu", "68 to 65535"],
    ),
    ("PUT /vsock", r#"{"guest_cid": 2, "uds_path": "v"}"#, &["guest_cid", "2", "3 to"]),
    ("PUT /console", r#"{"columns": 80}"#, &["console", "socket_path", "output_path"]),
    ("PUT /mirror", r#"{"standby": "unix:/s", "interval_ms": 0}"#, &["interval_ms", "0", "1 to 60000"]),
    ("PUT /serial", r#"{"rate_limiter": {"size": 1, "refill_time": 1}}"#, &["rate_limiter", "leave it out"]),
    ("PATCH /vm", r#"{"state": "Paused"}"#, &["before starting"]),
    ("PUT /mirror/switchover", "", &["before starting"]),
];

/// Wrong after it.
const AFTER: &[Wrong] = &[
    ("PUT /machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 16}"#, &["after starting"]),
    ("PUT /actions", r#"{"action_type": "InstanceStart"}"#, &["after starting"]),
    ("PUT /snapshot/load", r#"{"snapshot_path": "s", "mem_file_path": "m"}"#, &["after starting"]),
    ("PATCH /drives/none", r#"{"drive_id": "none", "path_on_host": "x"}"#, &["none"]),
    ("PATCH /drives/root", r#"{"drive_id": "root", "path_on_host": "/none/image"}"#, &["/none/image"]),
    ("PATCH /network-interfaces/none", r#"{"iface_id": "none"}"#, &["none"]),
    ("PATCH /balloon", r#"{"amount_mib": 1}"#, &["no balloon", "before the guest is started"]),
    ("PUT /snapshot/create", r#"{"snapshot_path": "/none/s", "mem_file_path": "/none/m"}"#, &["/none/m"]),
    (
        "PUT /snapshot/create",
        r#"{"snapshot_type": "Diff", "snapshot_path": "/none/s", "mem_file_path": "/none/m"}"#,
        &["track_dirty_pages"],
    ),
    ("DELETE /snapshot/create", "", &["no snapshot is being taken"]),
    ("DELETE /mirror", "", &["not mirrored"]),
    ("PATCH /mirror", r#"{"interval_ms": 10}"#, &["not mirrored"]),
    ("PUT /mirror/switchover", "", &["not mirrored"]),
    ("PUT /mirror", r#"{"standby": "unix:/s", "heartbeat_ms": 0}"#, &["heartbeat_ms", "0", "1 to 60000"]),
    ("PUT /mirror", r#"{"standby": "unix:/s", "listen": "unix:/s"}"#, &["listen", "address of its own"]),
];

fn ask(api: &Path, line: &str, body: &str) -> (u16, String) {
    let (method, path) = line.split_once(' ').unwrap();
    request(api, method, path, body).unwrap()
}

fn done(api: &Path, line: &str, body: &str) {
    assert_eq!(ask(api, line, body), (204, String::new()), "{line} {body}");
}

/// All that the API tells of the guest.
fn told(api: &Path) -> Vec<(u16, String)> {
    ["GET /", "GET /vm/config", "GET /machine-config", "GET /mirror"].map(|line| ask(api, line, "")).into()
}

fn assert_refused(api: &Path, (line, body, words): Wrong) {
    let before = told(api);
    let (status, answer) = ask(api, line, body);
    assert_eq!(status, 400, "{line} {body}: {answer}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    let message = answer["fault_message"].as_str().unwrap();
    assert!(words.iter().all(|word| message.contains(word)), "{line} {body}: {message}");
    assert_eq!(told(api), before, "{line} {body} has changed something");
}

/// A process without a guest, its API, and its folder.
fn serve(arguments: &[&str]) -> (TempDir, PathBuf, Process) {
    let folder = tempfile::tempdir().unwrap();
    let api = folder.path().join("api");
    let process = Process::start(&[&["run", "--api-sock", api.to_str().unwrap()], arguments].concat());
    process.await_api(&api);
    (folder, api, process)
}

const BOOT: &str = r#"{"kernel_image_path": "embedded:guest", "boot_args": "workload=count"}"#;
const MACHINE: &str = r#"{"vcpu_count": 1, "mem_size_mib": 16}"#;
const START: (&str, &str) = ("PUT /actions", r#"{"action_type": "InstanceStart"}"#);

#[test]
fn body_over_the_limit_is_refused_with_the_option_that_sets_it() {
    let (_folder, api, _process) = serve(&["--http-api-max-payload-size", "1000"]);
    let body = format!(r#"{{"kernel_image_path": "{}"}}"#, "k".repeat(1000));
    // Far over it, too, the answer comes and the connection does not break; and whoever reads no body gets it nevertheless.
    for (line, body) in [
        ("PUT /boot-source", body.clone()),
        ("PUT /boot-source", "k".repeat(1 << 20)),
        ("PUT /nope", "k".repeat(1 << 20)),
    ] {
        let (status, answer) = ask(&api, line, &body);
        assert!(status == 400 && answer.contains("--http-api-max-payload-size"), "{status} {answer}");
    }
    done(&api, "PUT /boot-source", &body.replacen(&"k".repeat(100), "", 1));
}

/// Serving there fails, with these words.
fn assert_not_served(path: &Path, words: &str) {
    let output = Command::new(understudy()).args(["run", "--api-sock"]).arg(path).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && errors.contains(words), "{errors}");
    assert!(errors.contains(path.to_str().unwrap()), "{errors}");
}

#[test]
fn socket_of_another_process_and_file_that_is_no_socket_stay_as_they_are() {
    let (folder, api, _process) = serve(&[]);
    assert_not_served(&api, "another process does; end it or name another socket");
    assert_eq!(ask(&api, "GET /", "").0, 200);
    let precious = folder.path().join("vm.json");
    std::fs::write(&precious, "precious").unwrap();
    assert_not_served(&precious, "name another path");
    assert_eq!(std::fs::read_to_string(&precious).unwrap(), "precious");
    assert_not_served(&folder.path().join("none/api"), "No such file or directory");
}

#[test]
fn socket_that_a_process_left_behind_is_replaced_and_removed_in_the_end() {
    let folder = tempfile::tempdir().unwrap();
    let api = folder.path().join("api");
    drop(UnixListener::bind(&api).unwrap());
    let mut process = Process::start(&["run", "--api-sock", api.to_str().unwrap()]);
    process.await_api(&api);
    assert!(api.metadata().unwrap().file_type().is_socket());
    process.signal(rustix::process::Signal::TERM);
    process.wait();
    assert!(!api.exists());
}

mod kvm {
    use super::*;

    #[test]
    fn bad_requests_are_refused_before_and_after_the_start_and_change_nothing() {
        let (folder, api, process) = serve(&[]);
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        done(&api, "PUT /boot-source", BOOT);
        done(&api, "PUT /machine-config", MACHINE);
        let drive = format!(
            r#"{{"drive_id": "root", "path_on_host": "{}", "is_root_device": true}}"#,
            image.display()
        );
        done(&api, "PUT /drives/root", &drive);
        // An address that nobody listens on is no matter before there is a guest to mirror.
        let always = |&&(line, body, _): &&Wrong| line != "PUT /mirror" || !body.contains("/none/");
        for wrong in ALWAYS.iter().filter(always).chain(BEFORE) {
            assert_refused(&api, *wrong);
        }
        done(&api, START.0, START.1);
        for wrong in ALWAYS.iter().chain(AFTER) {
            assert_refused(&api, *wrong);
        }
        process.console.await_text(|text| text.contains("count cpu=0 n=10 "));
        assert!(!process.errors.text().contains("panicked"), "{}", process.errors.text());
    }

    #[test]
    fn start_that_fails_names_what_is_missing_and_can_be_tried_again() {
        let (folder, api, process) = serve(&[]);
        let start = |words: &'static [&'static str]| assert_refused(&api, (START.0, START.1, words));
        start(&["boot-source", "missing"]);
        done(&api, "PUT /machine-config", MACHINE);
        done(&api, "PUT /boot-source", r#"{"kernel_image_path": "/none/kernel"}"#);
        start(&["/none/kernel"]);
        done(&api, "PUT /boot-source", BOOT);
        let drive = r#"{"drive_id": "d", "path_on_host": "/none/image", "is_root_device": false}"#;
        done(&api, "PUT /drives/d", drive);
        start(&["/none/image"]);
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        done(&api, "PUT /drives/d", &drive.replace("/none/image", image.to_str().unwrap()));
        done(&api, START.0, START.1);
        process.console.await_text(|text| text.contains("count cpu=0 n=10 "));
    }

    #[test]
    fn of_two_starts_at_once_one_succeeds() {
        let (_folder, api, process) = serve(&[]);
        done(&api, "PUT /boot-source", BOOT);
        done(&api, "PUT /machine-config", MACHINE);
        let answers = std::thread::scope(|scope| {
            let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| ask(&api, START.0, START.1))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(answers.iter().filter(|answer| answer.0 == 204).count(), 1, "{answers:?}");
        let late = |answer: &&(u16, String)| answer.0 == 400 && answer.1.contains("after starting");
        assert_eq!(answers.iter().filter(late).count(), 3, "{answers:?}");
        process.console.await_text(|text| text.contains("count cpu=0 n=10 "));
    }

    /// What `/vm/config` shows is taken by `--config-file`, and shown again as it was.
    #[test]
    fn configuration_that_one_process_shows_another_takes() {
        let (folder, api, process) = serve(&[]);
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        done(&api, "PUT /boot-source", BOOT);
        done(
            &api,
            "PUT /machine-config",
            r#"{"vcpu_count": 1, "mem_size_mib": 16, "track_dirty_pages": true}"#,
        );
        let drive = format!(
            r#"{{"drive_id": "d", "path_on_host": "{}", "is_root_device": false, "is_read_only": true,
                "rate_limiter": {{"ops": {{"size": 1000, "refill_time": 100}}}}}}"#,
            image.display()
        );
        done(&api, "PUT /drives/d", &drive);
        done(&api, "PUT /vsock", &format!(r#"{{"guest_cid": 3, "uds_path": "{}"}}"#, path("vsock")));
        done(&api, "PUT /entropy", "{}");
        done(&api, "PUT /balloon", r#"{"amount_mib": 0, "deflate_on_oom": true}"#);
        done(&api, "PUT /console", &format!(r#"{{"socket_path": "{}"}}"#, path("console")));
        done(&api, "PUT /cpu-config", r#"{"kvm_capabilities": ["!0"]}"#);
        done(&api, "PUT /logger", &format!(r#"{{"log_path": "{}", "level": "Debug"}}"#, path("log")));
        done(&api, "PUT /metrics", &format!(r#"{{"metrics_path": "{}"}}"#, path("metrics")));
        done(&api, "PUT /serial", &format!(r#"{{"serial_out_path": "{}"}}"#, path("serial")));
        let (status, shown) = ask(&api, "GET /vm/config", "");
        assert_eq!(status, 200);
        drop(process);
        std::fs::write(path("vm.json"), &shown).unwrap();

        let again = Process::start(&["run", "--config-file", &path("vm.json"), "--api-sock", &path("again")]);
        again.await_api(Path::new(&path("again")));
        assert_eq!(ask(Path::new(&path("again")), "GET /vm/config", ""), (200, shown));
    }
}
