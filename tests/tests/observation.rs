//! What processes tell of themselves: Prometheus text, Firecracker's lines of metrics, the log.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use mirror::report::Report;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use serde_json::{Value, json};
use tests::http::request;
use tests::pair::await_report;
use tests::process::{Process, configuration};

const CONFIG: i32 = 78;

/// The value of `series` in the exposition of the process that serves `api`.
fn value(api: &Path, series: &str) -> f64 {
    let (status, text) = request(api, "GET", "/metrics/prometheus", "").unwrap();
    assert_eq!(status, 200, "{text}");
    let found = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok());
    found.unwrap_or_else(|| panic!("{series} is not in\n{text}"))
}

fn put(api: &Path, resource: &str, body: &Value) -> (u16, String) {
    request(api, "PUT", resource, &body.to_string()).unwrap()
}

fn accepted(api: &Path, resource: &str, body: &Value) {
    let (status, answer) = put(api, resource, body);
    assert_eq!(status, 204, "{resource}: {answer}");
}

/// It is a 400 whose message has all of `words`.
fn refused(api: &Path, resource: &str, body: &Value, words: &[&str]) {
    let (status, answer) = put(api, resource, body);
    assert_eq!(status, 400, "{resource}: {answer}");
    assert!(answer.contains("fault_message") && words.iter().all(|word| answer.contains(word)), "{answer}");
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
}

fn metrics(path: &Path) -> Vec<Value> {
    lines(path).iter().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// A process that waits for what it is to run, and its API.
fn waiting(folder: &Path) -> (Process, PathBuf) {
    let api = folder.join("api");
    let process = Process::start(&["run", "--api-sock", &api.display().to_string(), "--id", "vm7"]);
    process.await_api(&api);
    (process, api)
}

#[test]
fn log_and_metrics_that_cannot_be_written_are_refused_by_their_path_and_change_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (_process, api) = waiting(folder.path());
    let nowhere = "/nonexistent/file";
    refused(&api, "/logger", &json!({"log_path": nowhere}), &["logger.log_path", nowhere, "FIFO"]);
    refused(&api, "/metrics", &json!({"metrics_path": nowhere}), &["metrics.metrics_path", nowhere, "FIFO"]);
    refused(&api, "/metrics", &json!({"metrics_path": folder.path()}), &["directory"]);
    refused(&api, "/actions", &json!({"action_type": "FlushMetrics"}), &["before starting"]);
    let (_, shown) = request(&api, "GET", "/vm/config", "").unwrap();
    assert!(!shown.contains("logger") && !shown.contains(nowhere), "{shown}");
    let twice = r#"understudy_api_requests_total{method="PUT",route="/metrics",status="400"}"#;
    assert!((value(&api, twice) - 2.0).abs() < 0.1);
}

#[test]
fn configuration_file_with_a_log_that_cannot_be_written_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.json");
    let text = json!({
        "boot-source": {"kernel_image_path": "embedded:guest"},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64},
        "logger": {"log_path": "/nonexistent/log"},
    });
    std::fs::write(&config, text.to_string()).unwrap();
    let mut process = Process::start(&["run", "--config-file", config.to_str().unwrap()]);
    assert_eq!(process.wait().code(), Some(CONFIG));
    process.errors.await_text(|text| text.contains("/nonexistent/log"));
}

#[test]
fn routes_that_there_are_not_make_up_no_labels() {
    let folder = tempfile::tempdir().unwrap();
    let (_process, api) = waiting(folder.path());
    for path in ["/a", "/b/c", "/metrics/prometheus/x"] {
        assert_eq!(request(&api, "GET", path, "").unwrap().0, 400);
    }
    let none = r#"understudy_api_requests_total{method="GET",route="none",status="400"}"#;
    assert!((value(&api, none) - 3.0).abs() < 0.1);
    assert!(value(&api, r#"understudy_guest_state{state="not_started"}"#) > 0.9);
}

mod kvm {
    use super::*;

    #[test]
    fn guest_started_by_the_api_writes_metrics_at_its_start_when_flushed_and_at_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let (log, file) = (folder.path().join("log"), folder.path().join("metrics"));
        let (mut process, api) = waiting(folder.path());
        accepted(&api, "/logger", &json!({"log_path": log, "show_level": true, "show_log_origin": true}));
        // What is left out stays as it is.
        accepted(&api, "/logger", &json!({"level": "Info"}));
        let section = json!({"metrics_path": file, "emit_id": true, "properties": {"rack": 7}});
        accepted(&api, "/metrics", &section);
        let boot = json!({"kernel_image_path": "embedded:guest", "boot_args": "workload=count"});
        accepted(&api, "/boot-source", &boot);
        accepted(&api, "/actions", &json!({"action_type": "InstanceStart"}));
        process.console.await_text(|text| text.contains("count cpu=0 n=3 "));

        assert_eq!(request(&api, "PATCH", "/vm", r#"{"state": "Paused"}"#).unwrap().0, 204);
        accepted(&api, "/actions", &json!({"action_type": "FlushMetrics"}));
        refused(&api, "/metrics", &section, &["after starting"]);
        process.signal(Signal::TERM);
        process.wait();

        let told = metrics(&file);
        assert_eq!(told.len(), 3, "{told:#?}");
        assert!(told.iter().all(|line| line["id"] == "vm7" && line["properties"]["rack"] == 7), "{told:#?}");
        assert!(told.is_sorted_by_key(|line| line["utc_timestamp_ms"].as_u64().unwrap()));
        let count = |line: usize, place: &str| told[line].pointer(place).and_then(Value::as_u64).unwrap();
        assert!(count(1, "/latencies_us/pause_vm") > 0, "{}", told[1]);
        assert_eq!(count(0, "/put_api_requests/logger_count"), 2);
        assert_eq!(count(1, "/put_api_requests/logger_count"), 0, "it was told before");
        assert_eq!(
            (count(2, "/put_api_requests/metrics_fails"), count(1, "/put_api_requests/metrics_fails")),
            (1, 0)
        );
        assert!(count(0, "/vcpu/exit_io_out") + count(1, "/vcpu/exit_io_out") > 0, "{told:#?}");
        assert_eq!(told[1]["mirror"]["role"], "none");
        let logged = lines(&log);
        let place = |line: &String| line.contains("[vm7:") && line.contains(":api/src/");
        assert!(logged.iter().all(place), "{logged:#?}");
        assert!(
            logged
                .iter()
                .any(|line| line.contains(":INFO:") && line.contains(r#"PUT request on "/actions""#))
        );
        assert!(logged.iter().any(|line| line.contains(":ERROR:") && line.contains("400")), "{logged:#?}");
        assert_eq!(process.errors.text(), "");
    }

    #[test]
    fn configured_guest_writes_metrics_to_a_fifo_and_json_lines_to_its_log() {
        let folder = tempfile::tempdir().unwrap();
        let (fifo, log) = (folder.path().join("fifo"), folder.path().join("log"));
        mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let config = configuration(folder.path(), "embedded:guest", None);
        let mut text: Value = serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
        text["metrics"] = json!({"metrics_path": fifo});
        text["logger"] = json!({"log_path": log, "format": "Json"});
        std::fs::write(&config, text.to_string()).unwrap();
        let api = folder.path().join("api");
        let mut process =
            Process::start(&["run", "--config-file", &config, "--api-sock", &api.display().to_string()]);
        let mut reader = BufReader::new(std::fs::File::open(&fifo).unwrap());
        let mut next = || {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            serde_json::from_str::<Value>(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"))
        };
        let first = next();
        assert!(first["utc_timestamp_ms"].as_u64().unwrap() > 0 && first.get("id").is_none(), "{first}");
        process.await_api(&api);
        accepted(&api, "/actions", &json!({"action_type": "FlushMetrics"}));
        assert!(next()["vmm"]["uptime_ms"].as_u64() > first["vmm"]["uptime_ms"].as_u64());

        process.signal(Signal::TERM);
        process.wait();

        next();
        for line in lines(&log) {
            let line: Value = serde_json::from_str(&line).unwrap();
            assert!(line["message"].is_string() && line["level"] == "INFO", "{line}");
        }
    }

    #[test]
    fn both_sides_tell_of_seeding_epochs_and_the_failover() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let [witness, listen, api, other] = ["witness", "standby", "api", "other"].map(path);
        let standby = Process::standby_with(
            &format!("unix:{}", listen.display()),
            &["--witness", &witness.display().to_string(), "--api-sock", &other.display().to_string()],
        );
        standby.await_api(&other);
        let (log, file) = (path("log"), path("metrics"));
        accepted(&other, "/logger", &json!({"log_path": log, "level": "Debug", "show_level": true}));
        accepted(&other, "/metrics", &json!({"metrics_path": file}));
        refused(&other, "/metrics", &json!({"metrics_path": "/nonexistent/m"}), &["/nonexistent/m"]);
        // The kill is noticed at once; a busy machine is not to look like one.
        let mirror = format!(
            r#""standby": "unix:{}", "witness": "{}", "heartbeat_ms": 2000"#,
            listen.display(),
            witness.display()
        );
        let config = configuration(folder.path(), "embedded:guest", Some(&mirror));
        let primary =
            Process::start(&["run", "--config-file", &config, "--api-sock", &api.display().to_string()]);
        for _ in 0..20 {
            await_report(&primary.reports, |report| matches!(report, Report::Committed { .. }));
        }

        let of = |name: &str| value(&api, &format!("understudy_{name}"));
        let epochs = of("epochs_total");
        assert!(epochs >= 20.0, "{epochs}");
        for name in ["pause", "commit"] {
            assert!(of(&format!("{name}_duration_seconds_count")) >= epochs, "{name}");
            assert!((0.0..60.0).contains(&of(&format!("{name}_duration_seconds_sum"))), "{name}");
        }
        for phase in ["stop", "harvest", "copy", "capture", "resume"] {
            let phase = format!(r#"pause_phase_duration_seconds_count{{phase="{phase}"}}"#);
            assert!(of(&phase) >= epochs, "{phase}");
        }
        assert!(of("output_hold_duration_seconds_count") > 0.0);
        assert!(of("seeding_round_duration_seconds_count") >= 1.0 && of("seeding_pages_total") > 0.0);
        assert!(of("epoch_pages_total") > 0.0 && of("epoch_wire_bytes_total") > 0.0);
        assert!(of(r#"mirror_phase{role="primary",phase="lockstep"}"#) > 0.0 && of("protected") > 0.0);
        let of = |name: &str| value(&other, &format!("understudy_{name}"));
        assert!(of("standby_epochs_total") >= 20.0 && of("standby_pages_total") > 0.0);
        assert!(of(r#"guest_state{state="not_started"}"#) > 0.0 && of("protected") > 0.0);

        primary.signal(Signal::KILL);
        await_report(&standby.reports, |report| matches!(report, Report::Active { .. }));
        accepted(&other, "/actions", &json!({"action_type": "FlushMetrics"}));

        assert!((of("failover_duration_seconds_count") - 1.0).abs() < 0.1);
        assert!(of("failover_duration_seconds_sum") >= of("activation_duration_seconds_sum"));
        assert!((of(r#"detection_duration_seconds_count{lost="primary"}"#) - 1.0).abs() < 0.1);
        assert!(of(r#"guest_state{state="running"}"#) > 0.0 && of("protected") < 0.1);
        let told = metrics(&file);
        let last = &told.last().unwrap()["mirror"];
        assert_eq!((&last["role"], &last["failovers"]), (&json!("active"), &json!(1)), "{last}");
        let logged = lines(&log);
        let lost = logged.iter().find(|line| line.contains("standby: the primary is lost")).unwrap();
        assert!(lost.contains(":ERROR] "), "{lost}");
        assert!(!standby.errors.text().contains("lost"), "{}", standby.errors.text());
    }
}
