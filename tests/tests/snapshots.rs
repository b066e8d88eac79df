//! Snapshots by the command line: real processes, one that is killed and one that goes on.

use std::path::Path;
use std::process::{Command, Output};

use rustix::process::Signal;
use tests::process::{Process, configuration, understudy};

/// Runs the command to its end.
fn command(arguments: &[&str], api: &Path) -> Output {
    Command::new(understudy()).args(arguments).arg("--api-sock").arg(api).output().unwrap()
}

fn succeeds(arguments: &[&str], api: &Path) {
    let output = command(arguments, api);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The numbers that the guest has counted.
fn counts(text: &str) -> Vec<u64> {
    let counts = text.lines().filter_map(|line| line.strip_prefix("count cpu=0 n="));
    counts.filter_map(|rest| rest.split(' ').next()?.parse().ok()).collect()
}

fn assert_contiguous(numbers: &[u64]) {
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
}

mod kvm {
    use super::*;

    #[test]
    fn guest_goes_on_in_a_new_process_with_nothing_lost_or_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let (api, later) = (folder.path().join("api"), folder.path().join("later"));
        let config = configuration(folder.path(), "embedded:guest", None);
        let primary =
            Process::start(&["run", "--config-file", &config, "--api-sock", &api.display().to_string()]);
        primary.console.await_text(|text| text.contains("count cpu=0 n=30 "));
        succeeds(&["pause"], &api);
        let (state, memory) = (path("state"), path("memory"));
        succeeds(&["snapshot", "--state", &state, "--memory", &memory], &api);
        primary.signal(Signal::KILL);

        for (index, how) in [None, Some("--copy")].into_iter().enumerate() {
            let socket = format!("{}{index}", later.display());
            let mut arguments =
                vec!["restore", "--state", &state, "--memory", &memory, "--api-sock", &socket];
            arguments.extend(how);
            let restored = Process::start(&arguments);
            let first = *counts(&primary.console.text()).last().unwrap();
            restored.console.await_text(|text| counts(text).last().is_some_and(|&n| n > first + 30));
            let mut all = counts(&primary.console.text());
            all.extend(counts(&restored.console.text()));
            assert_contiguous(&all);
            let text = restored.console.text();
            let verified: Vec<&str> = text.lines().filter(|line| line.contains("wrong=")).collect();
            assert!(verified.iter().all(|line| line.contains("wrong=0")), "{verified:?}");
        }
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
