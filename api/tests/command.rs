//! The command as a user meets it: what it says and how it exits when something is wrong.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use tempfile::TempDir;

const GUID: &str = "11111111-1111-1111-1111-111111111111";

fn understudy(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_understudy")).args(arguments).output().unwrap()
}

/// Runs a guest that counts to 5 on `kernel`, with `mirror` as the fields of its mirror section.
fn run(folder: &TempDir, kernel: &str, mirror: Option<&str>) -> Output {
    let mirror = mirror.map_or_else(String::new, |fields| format!(r#", "mirror": {{{fields}}}"#));
    let config = folder.path().join("vm.json");
    let text = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{kernel}", "boot_args": "workload=count count.limit=5"}},
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": 16}}{mirror}}}"#
    );
    fs::write(&config, text).unwrap();
    understudy(&["run", "--config-file", config.to_str().unwrap()])
}

fn expect(output: &Output, status: i32, words: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert!(stderr.contains(words), "{words:?} is not in: {stderr}");
}

/// Whether guests can be run here; says so if not, for whoever counts.
#[test]
fn unknown_field_of_the_configuration_is_a_configuration_error() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.json");
    fs::write(&config, r#"{"boot-sauce": {}}"#).unwrap();
    expect(
        &understudy(&["run", "--config-file", config.to_str().unwrap()]),
        78,
        "unknown field `boot-sauce`",
    );
}

#[test]
fn api_that_nobody_serves_is_unreachable() {
    expect(&understudy(&["status", "--api-sock", "/nonexistent/api"]), 75, "--api-sock /nonexistent/api");
}

/// The fields of a mirror section that is to begin after 50 ms.
fn later(witness: &Path) -> String {
    let witness = witness.display();
    format!(
        r#""standby": "unix:/nonexistent/standby", "witness": "{witness}", "guid": "{GUID}", "delay_ms": 50"#
    )
}

mod kvm {
    use super::*;

    #[test]
    fn guest_that_ends_well_is_success_with_its_output_on_stdout() {
        let output = run(&tempfile::tempdir().unwrap(), "embedded:guest", None);
        expect(&output, 0, "exit code 0");
        assert!(String::from_utf8_lossy(&output.stdout).contains("count cpu=0 n=5 "));
    }

    #[test]
    fn kernel_that_is_missing_or_truncated_is_named() {
        let folder = tempfile::tempdir().unwrap();
        expect(&run(&folder, "/nonexistent/vmlinux", None), 66, "/nonexistent/vmlinux");
        let truncated = folder.path().join("vmlinux");
        fs::write(&truncated, &resources::GUEST_ELF[..3000]).unwrap();
        expect(&run(&folder, truncated.to_str().unwrap(), None), 66, "truncated");
    }

    #[test]
    fn guest_without_its_standby_does_not_run() {
        let folder = tempfile::tempdir().unwrap();
        let output = run(&folder, "embedded:guest", Some(r#""standby": "unix:/nonexistent/standby""#));
        expect(&output, 75, "understudy standby --listen unix:/nonexistent/standby");
        assert!(output.stdout.is_empty());
    }

    #[test]
    fn guest_that_is_live_elsewhere_does_not_run_even_if_it_is_to_be_mirrored_later() {
        let folder = tempfile::tempdir().unwrap();
        let witness = folder.path().join("witness");
        let record = format!(r#"{{"guid": "{GUID}", "term": 2, "owner": "the standby"}}"#);
        fs::write(&witness, &record).unwrap();

        let output = run(&folder, "embedded:guest", Some(&later(&witness)));

        expect(&output, 75, "the witness knows guest");
        assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
        assert_eq!(fs::read_to_string(&witness).unwrap(), record, "the owner keeps its term");
    }
}
