//! Snapshots by the command line: real processes, one that is killed and one that goes on.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use mirror::memory::PAGE_SIZE;
use mirror::report::Report;
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::http::request;
use tests::pair::await_report;
use tests::process::{Process, configuration, understudy};
use vmm::snapshot::pages::{DATA, PageReader};

/// Runs the command to its end.
fn command(arguments: &[&str], api: &Path) -> Output {
    Command::new(understudy()).args(arguments).arg("--api-sock").arg(api).output().unwrap()
}

fn succeeds(arguments: &[&str], api: &Path) {
    let output = command(arguments, api);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The numbers that the guest has counted, in lines that are whole.
fn counts(text: &str) -> Vec<u64> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let counts = whole.lines().filter_map(|line| line.strip_prefix("count cpu=0 n="));
    counts.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

fn assert_contiguous(numbers: &[u64]) {
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

/// A guest that is snapshotted while it stands still, and killed; its files of state and memory in `folder`.
fn killed(folder: &Path) -> (Process, String, String) {
    let path = |name: &str| folder.join(name).display().to_string();
    let (api, state, memory) = (folder.join("api"), path("state"), path("memory"));
    let config = configuration(folder, "embedded:guest", None);
    let primary =
        Process::start(&["run", "--config-file", &config, "--api-sock", &api.display().to_string()]);
    primary.console.await_text(|text| text.contains("count cpu=0 n=30 "));
    succeeds(&["pause"], &api);
    succeeds(&["snapshot", "--state", &state, "--memory", &memory], &api);
    primary.signal(Signal::KILL);
    (primary, state, memory)
}

/// Lets a guest go on in a new process in each of the ways `how`, and checks that it does so exactly.
fn goes_on_exactly(how: &[Option<&str>]) -> Vec<Process> {
    let folder = tempfile::tempdir().unwrap();
    let (primary, state, memory) = killed(folder.path());
    let go_on = |how: Option<&str>| {
        let mut arguments = vec!["restore", "--state", &state, "--memory", &memory];
        arguments.extend(how);
        let restored = Process::start(&arguments);
        let first = *counts(&primary.console.text()).last().unwrap();
        restored.console.await_text(|text| counts(text).last().is_some_and(|&n| n > first + 30));
        // A line may begin in the one and end in the other.
        let text = primary.console.text() + &restored.console.text();
        assert_contiguous(&counts(&text));
        let verified: Vec<&str> = text.lines().filter(|line| line.contains("wrong=")).collect();
        assert!(verified.iter().all(|line| line.contains("wrong=0")), "{verified:?}");
        restored
    };
    how.iter().copied().map(go_on).collect()
}

mod kvm {
    use super::*;

    #[test]
    fn guest_goes_on_in_a_new_process_with_nothing_lost_or_repeated() {
        goes_on_exactly(&[None, Some("--copy")]);
    }

    mod userfault {
        use super::*;

        #[test]
        fn guest_goes_on_while_its_memory_comes_and_all_of_it_does() {
            let restored = goes_on_exactly(&[Some("--on-demand")]).remove(0);
            await_report(&restored.reports, |report| matches!(report, Report::MemoryComplete { .. }));
        }

        #[test]
        fn firecrackers_uffd_backend_is_memory_on_demand() {
            let folder = tempfile::tempdir().unwrap();
            let (primary, state, memory) = killed(folder.path());
            let api = folder.path().join("later");
            let later = Process::start(&["run", "--api-sock", &api.display().to_string()]);
            later.await_api(&api);
            let backend = json!({"backend_type": "Uffd", "backend_path": memory});
            let load = json!({"snapshot_path": state, "mem_backend": backend, "resume_vm": true});
            assert_eq!(request(&api, "PUT", "/snapshot/load", &load.to_string()).unwrap().0, 204);
            await_report(&later.reports, |report| matches!(report, Report::MemoryComplete { .. }));
            later.console.await_text(|text| counts(text).len() > 30);
            assert_contiguous(&counts(&(primary.console.text() + &later.console.text())));
        }

        #[test]
        fn guest_whose_memory_cannot_be_read_ends_its_process_which_says_why() {
            let folder = tempfile::tempdir().unwrap();
            let (_, state, memory) = killed(folder.path());
            // The last pages that there are: the guest runs when they are missed.
            let file = std::fs::File::options().read(true).write(true).open(&memory).unwrap();
            let last = PageReader::open(Path::new(&memory)).unwrap().present().iter().last().unwrap();
            file.write_all_at(&[0x5a; PAGE_SIZE], DATA + last * PAGE_SIZE as u64).unwrap();
            let mut restored =
                Process::start(&["restore", "--on-demand", "--state", &state, "--memory", &memory]);
            assert_eq!(restored.wait().code(), Some(4));
            let said = restored.errors.await_text(|text| text.contains("guest memory cannot be fetched"));
            assert!(said.contains(&memory), "{said}");
        }
    }

    /// The answer to a request that is turned down.
    fn fault(api: &Path, method: &str, resource: &str, body: &Value) -> String {
        let (status, answer) = request(api, method, resource, &body.to_string()).unwrap();
        assert_eq!(status, 400, "{answer}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        answer["fault_message"].as_str().unwrap().to_owned()
    }

    #[test]
    fn process_without_a_guest_loads_a_snapshot_as_firecracker_does_and_only_then() {
        let folder = tempfile::tempdir().unwrap();
        let (primary, state, memory) = killed(folder.path());
        let load = |mut fields: Value| {
            fields["snapshot_path"] = state.clone().into();
            fields
        };
        let api = folder.path().join("later");
        let later = Process::start(&["run", "--api-sock", &api.display().to_string()]);
        later.await_api(&api);
        let info: Value = serde_json::from_str(&request(&api, "GET", "/", "").unwrap().1).unwrap();
        assert_eq!(info["state"], "Not started");

        let paused = json!({"state": "Paused"});
        let wrong = |body: Value| fault(&api, "PUT", "/snapshot/load", &body);
        assert!(fault(&api, "PATCH", "/vm", &paused).contains("before starting the microVM"));
        assert!(wrong(load(json!({}))).contains("either `mem_backend` or `mem_file_path`"));
        let both =
            json!({"mem_file_path": memory, "mem_backend": {"backend_type": "File", "backend_path": memory}});
        assert!(wrong(load(both)).contains("exclusively"));
        assert!(
            wrong(json!({"snapshot_path": memory, "mem_file_path": memory})).contains("is no state file")
        );
        assert!(wrong(load(json!({"mem_file_path": "/none/memory"}))).contains("/none/memory"));
        let socket = json!({"backend_type": "Uffd", "backend_path": api});
        assert!(wrong(load(json!({"mem_backend": socket}))).contains("is a socket"));
        let other_tap = json!([{"iface_id": "eth9", "host_dev_name": "tap9"}]);
        let no_such = wrong(load(json!({"mem_file_path": memory, "network_overrides": other_tap})));
        assert!(no_such.contains("eth9"), "{no_such}");
        assert!(
            wrong(load(json!({"mem_file_path": memory, "clock_realtime": true}))).contains("clock_realtime")
        );
        assert!(wrong(load(json!({"mem_file_path": memory, "unknown": 1}))).contains("unknown field"));

        let good = load(json!({"mem_file_path": memory, "track_dirty_pages": true})).to_string();
        assert_eq!(request(&api, "PUT", "/snapshot/load", &good).unwrap().0, 204);
        let info: Value = serde_json::from_str(&request(&api, "GET", "/", "").unwrap().1).unwrap();
        assert_eq!(info["state"], "Paused");
        assert!(wrong(load(json!({"mem_file_path": memory}))).contains("after starting the microVM"));
        assert_eq!(later.console.text(), "");
        succeeds(&["resume"], &api);
        later.console.await_text(|text| counts(text).len() > 30);
        assert_contiguous(&counts(&(primary.console.text() + &later.console.text())));
        let diff = |name: &str| folder.path().join(name).display().to_string();
        succeeds(&["snapshot", "--diff", "--state", &diff("d.s"), "--memory", &diff("d.m")], &api);
    }

    #[test]
    fn running_guest_is_snapshotted_without_being_paused_and_what_cannot_be_done_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let api = folder.path().join("api");
        let config = configuration(folder.path(), "embedded:guest", None);
        let primary =
            Process::start(&["run", "--config-file", &config, "--api-sock", &api.display().to_string()]);
        primary.console.await_text(|text| text.contains("count cpu=0 n=10 "));
        succeeds(&["snapshot", "--state", &path("state"), "--memory", &path("memory")], &api);
        let diff = command(&["snapshot", "--diff", "--state", &path("d.s"), "--memory", &path("d.m")], &api);
        assert_eq!(diff.status.code(), Some(75));
        let said = String::from_utf8_lossy(&diff.stderr).into_owned();
        assert!(said.contains("track_dirty_pages"), "{said}");
        let lost = command(&["snapshot", "--state", "/none/s", "--memory", "/none/m"], &api);
        assert!(String::from_utf8_lossy(&lost.stderr).contains("/none/m"));
        let seen = counts(&primary.console.text()).len();
        primary.console.await_text(|text| counts(text).len() > seen + 20);
        assert_contiguous(&counts(&primary.console.text()));

        let wrong = Command::new(understudy())
            .args(["restore", "--state", &path("memory"), "--memory", &path("state")])
            .output()
            .unwrap();
        assert!(!wrong.status.success());
        assert!(String::from_utf8_lossy(&wrong.stderr).contains("is no state file of a snapshot"));
    }
}
