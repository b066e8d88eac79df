//! Each operation of Firecracker's API, asked of a real process before and after its guest's start: what is here answers as
//! Firecracker's description says, what is not here says so.

use serde_json::Value;
use tests::http::request;
use tests::process::Process;
use understudy::server::firecracker::{OPERATIONS, Operation};
use understudy::server::{TOO_EARLY, TOO_LATE, When};

/// What an operation is to answer.
#[derive(Clone, Copy, Debug)]
enum Answer {
    /// 204, and nothing.
    Done,
    /// 200, and an object with these fields.
    Shows(&'static [&'static str]),
    /// 400, and a message with these words.
    Refused(&'static str),
}

use Answer::{Done, Refused, Shows};

const EARLY: Answer = Refused(TOO_EARLY);
const LATE: Answer = Refused(TOO_LATE);

struct Case {
    request: &'static str,
    body: &'static str,
    before: Answer,
    after: Answer,
}

const fn case(request: &'static str, body: &'static str, before: Answer, after: Answer) -> Case {
    Case { request, body, before, after }
}

const fn get(request: &'static str, before: Answer, after: Answer) -> Case {
    case(request, "", before, after)
}

const INFO: Answer = Shows(&["app_name", "id", "state", "vmm_version"]);
const VERSION: Answer = Shows(&["firecracker_version"]);
const MACHINE: Answer = Shows(&["vcpu_count", "mem_size_mib", "smt", "track_dirty_pages", "huge_pages"]);
const BALLOON: Answer = Shows(&["amount_mib", "deflate_on_oom", "stats_polling_interval_s"]);
const STATISTICS: Answer = Shows(&["target_pages", "actual_pages", "target_mib", "actual_mib"]);
const CONFIG: Answer = Shows(&[
    "boot-source",
    "machine-config",
    "drives",
    "network-interfaces",
    "vsock",
    "entropy",
    "balloon",
    "cpu-config",
    "logger",
    "metrics",
    "serial",
    "mmds-config",
]);
/// The embedded guest has no driver for its keyboard; Linux, which has one, is asked in `tests/hosts`.
const DEAF: Answer = Refused("the guest does not listen to its keyboard");
const METADATA: Answer = Shows(&["instance", "owner"]);

/// In the order in which they are asked, before the start and once more after it; the last one is the start. `FOLDER` stands
/// for the test's folder.
const CASES: &[Case] = &[
    get("GET /", INFO, INFO),
    get("GET /version", VERSION, VERSION),
    case(
        "PUT /boot-source",
        r#"{"kernel_image_path": "embedded:guest", "boot_args": "workload=count"}"#,
        Done,
        LATE,
    ),
    case("PUT /machine-config", r#"{"vcpu_count": 2, "mem_size_mib": 32}"#, Done, LATE),
    case("PATCH /machine-config", r#"{"vcpu_count": 1, "track_dirty_pages": true}"#, Done, LATE),
    get("GET /machine-config", MACHINE, MACHINE),
    case("PUT /cpu-config", r#"{"kvm_capabilities": ["!0"]}"#, Done, LATE),
    case(
        "PUT /drives/disk",
        r#"{"drive_id": "disk", "path_on_host": "FOLDER/disk", "is_root_device": false, "is_read_only": true}"#,
        Done,
        LATE,
    ),
    case("PATCH /drives/disk", r#"{"drive_id": "disk", "path_on_host": "FOLDER/disk"}"#, EARLY, Done),
    case("PUT /network-interfaces/net", r#"{"iface_id": "net", "host_dev_name": "fc-tap"}"#, Done, LATE),
    case(
        "PATCH /network-interfaces/net",
        r#"{"iface_id": "net", "tx_rate_limiter": {"ops": {"size": 1000, "refill_time": 100}}}"#,
        EARLY,
        Done,
    ),
    case("PUT /vsock", r#"{"guest_cid": 3, "uds_path": "FOLDER/vsock"}"#, Done, LATE),
    case("PUT /entropy", "{}", Done, LATE),
    case(
        "PUT /balloon",
        r#"{"amount_mib": 0, "deflate_on_oom": true, "stats_polling_interval_s": 1}"#,
        Done,
        LATE,
    ),
    get("GET /balloon", BALLOON, BALLOON),
    case("PATCH /balloon", r#"{"amount_mib": 1}"#, EARLY, Done),
    get("GET /balloon/statistics", EARLY, STATISTICS),
    case("PATCH /balloon/statistics", r#"{"stats_polling_interval_s": 2}"#, EARLY, Done),
    case("PUT /logger", r#"{"log_path": "FOLDER/log", "level": "Info"}"#, Done, LATE),
    case("PUT /metrics", r#"{"metrics_path": "FOLDER/metrics"}"#, Done, LATE),
    case("PUT /serial", r#"{"serial_out_path": "FOLDER/serial"}"#, Done, LATE),
    case("PUT /mmds/config", r#"{"network_interfaces": ["net"], "version": "V2"}"#, Done, LATE),
    case("PUT /mmds", r#"{"instance": {"id": "i-1"}}"#, Done, Done),
    case("PATCH /mmds", r#"{"owner": "me"}"#, Done, Done),
    get("GET /mmds", METADATA, METADATA),
    get("GET /vm/config", CONFIG, CONFIG),
    case(
        "PUT /snapshot/load",
        r#"{"snapshot_path": "/none/state", "mem_file_path": "/none/memory"}"#,
        Refused("Load snapshot error"),
        LATE,
    ),
    case("PATCH /vm", r#"{"state": "Paused"}"#, EARLY, Done),
    case(
        "PUT /snapshot/create",
        r#"{"snapshot_path": "FOLDER/state", "mem_file_path": "FOLDER/memory"}"#,
        EARLY,
        Done,
    ),
    case("PATCH /vm", r#"{"state": "Resumed"}"#, EARLY, Done),
    case("PUT /actions", r#"{"action_type": "FlushMetrics"}"#, EARLY, Done),
    case("PUT /actions", r#"{"action_type": "SendCtrlAltDel"}"#, EARLY, DEAF),
    case("PUT /actions", r#"{"action_type": "InstanceStart"}"#, Done, LATE),
];

/// Whether `request` is of `operation`, whose path may have a name in braces.
fn is_of(request: &str, operation: &Operation) -> bool {
    let (method, path) = request.split_once(' ').unwrap();
    let (mut found, mut wanted) = (path.split('/'), operation.path.split('/'));
    method == operation.method
        && path.split('/').count() == operation.path.split('/').count()
        && found.all(|part| wanted.next().is_some_and(|wanted| wanted == part || wanted.starts_with('{')))
}

#[test]
fn each_operation_has_a_case_that_agrees_with_the_table_on_when_it_is_possible() {
    for operation in OPERATIONS.iter().filter(|operation| operation.missing.is_none()) {
        let Operation { method, path, when, .. } = operation;
        let cases: Vec<_> = CASES.iter().filter(|case| is_of(case.request, operation)).collect();
        assert!(!cases.is_empty(), "{method} {path} has no case; add one to CASES");
        for case in cases {
            let late = matches!(case.after, Refused(TOO_LATE));
            let early = matches!(case.before, Refused(TOO_EARLY));
            let agrees = match when {
                When::Before => late && !early,
                When::After => early && !late,
                // Of the actions each has its time.
                When::Always => *path == "/actions" || !(early || late),
            };
            assert!(
                agrees,
                "{method} {path} is possible {when:?}, not as {:?}, {:?}",
                case.before, case.after
            );
        }
    }
}

mod kvm {
    mod tap {
        use std::fs::File;
        use std::path::Path;

        use super::super::*;

        fn assert_answer(api: &Path, request_line: &str, body: &str, wanted: Answer) {
            let (method, path) = request_line.split_once(' ').unwrap();
            let (status, answer) = request(api, method, path, body).unwrap();
            let told = format!("{request_line} {body}: {status} {answer}, not {wanted:?}");
            match wanted {
                Done => assert!(status == 204 && answer.is_empty(), "{told}"),
                Shows(fields) => {
                    let answer: Value = serde_json::from_str(&answer).expect(&told);
                    assert!(
                        status == 200 && fields.iter().all(|field| answer.get(field).is_some()),
                        "{told}"
                    );
                }
                Refused(words) => {
                    let answer: Value = serde_json::from_str(&answer).expect(&told);
                    let message = answer["fault_message"].as_str().expect(&told);
                    assert!(status == 400 && message.contains(words), "{told}");
                }
            }
        }

        /// What is not here says why, whether the guest has started or not.
        fn assert_missing(api: &Path) {
            for operation in OPERATIONS {
                let Some(why) = operation.missing else { continue };
                let path = operation.path.replace("{drive_id}", "disk").replace("{iface_id}", "net");
                let request = format!("{} {}", operation.method, path.replace("{id}", "any"));
                let words = format!("{request} is not supported: {why}.");
                assert_answer(api, &request, "{}", Refused(words.leak()));
            }
        }

        #[test]
        fn each_operation_answers_as_described_before_and_after_the_start() {
            tests::lan::alone(|_| {
                let folder = tempfile::tempdir().unwrap();
                let place = folder.path().to_str().unwrap();
                File::create(folder.path().join("disk")).unwrap().set_len(1 << 20).unwrap();
                let api = folder.path().join("api");
                let process = Process::start(&["run", "--api-sock", api.to_str().unwrap()]);
                process.await_api(&api);

                assert_missing(&api);
                for case in CASES {
                    assert_answer(&api, case.request, &case.body.replace("FOLDER", place), case.before);
                }
                for case in CASES {
                    assert_answer(&api, case.request, &case.body.replace("FOLDER", place), case.after);
                }
                assert_missing(&api);
            });
        }
    }
}
