//! Metadata of a guest, put by requests to the API.

use std::path::PathBuf;

use tests::http;
use tests::process::Process;

/// A process that serves the API, and the folder in which everything is.
struct Served {
    _process: Process,
    folder: tempfile::TempDir,
}

impl Served {
    fn start(options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let socket = place(&folder).display().to_string();
        let arguments = [&["run", "--api-sock", &socket], options].concat();
        let process = Process::start(&arguments);
        process.await_api(&place(&folder));
        Self { _process: process, folder }
    }

    fn says(&self, method: &str, resource: &str, body: &str) -> (u16, String) {
        http::request(&place(&self.folder), method, resource, body).unwrap()
    }

    fn does(&self, method: &str, resource: &str, body: &str) {
        assert_eq!(self.says(method, resource, body), (204, String::new()), "{method} {resource} {body}");
    }

    fn refuses(&self, method: &str, resource: &str, body: &str, reason: &str) {
        let (status, said) = self.says(method, resource, body);
        assert_eq!(status, 400, "{method} {resource} {body}: {said}");
        assert!(said.contains("fault_message") && said.contains(reason), "{said}");
    }
}

fn place(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("api")
}

mod kvm {
    use super::*;

    #[test]
    fn metadata_is_put_patched_and_told_and_what_is_wrong_with_it_is_refused() {
        let api = Served::start(&["--mmds-size-limit", "40"]);
        let (status, said) = api.says("GET", "/mmds", "");
        assert_eq!(status, 404);
        assert!(said.contains("fault_message"), "{said}");
        api.refuses("PATCH", "/mmds", r#"{"a": 1}"#, "not initialized");
        api.refuses("PUT", "/mmds", "[1]", "send an object");
        api.does("PUT", "/mmds", r#"{"a": {"b": 1, "c": 2}}"#);
        api.does("PATCH", "/mmds", r#"{"a": {"b": null}, "d": "e"}"#);
        api.refuses("PATCH", "/mmds", r#"{"f": "01234567890123456789"}"#, "at most 40 are kept");
        assert_eq!(api.says("GET", "/mmds", ""), (200, r#"{"a":{"c":2},"d":"e"}"#.into()));

        let config = r#"{"version": "V2", "network_interfaces": ["eth0"], "imds_compat": true}"#;
        api.refuses("PUT", "/mmds/config", config, "does not correspond to any existing network interface");
        api.does("PUT", "/network-interfaces/eth0", r#"{"iface_id": "eth0", "host_dev_name": "tap0"}"#);
        api.does("PUT", "/mmds/config", config);
        let (_, shown) = api.says("GET", "/vm/config", "");
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert_eq!(shown["mmds-config"]["version"], "V2");
        assert_eq!(shown["mmds-config"]["ipv4_address"], "169.254.169.254");
    }

    #[test]
    fn metadata_that_was_put_first_may_change_while_the_guest_runs_but_not_where_it_is_read() {
        let api = Served::start(&[]);
        api.does("PUT", "/mmds", r#"{"a": 1}"#);
        let boot = r#"{"kernel_image_path": "embedded:guest", "boot_args": "workload=count"}"#;
        api.does("PUT", "/boot-source", boot);
        api.does("PUT", "/machine-config", r#"{"vcpu_count": 1, "mem_size_mib": 64}"#);
        api.does("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
        assert_eq!(api.says("GET", "/mmds", ""), (200, r#"{"a":1}"#.into()));
        api.does("PATCH", "/mmds", r#"{"b": 2}"#);
        assert_eq!(api.says("GET", "/mmds", ""), (200, r#"{"a":1,"b":2}"#.into()));
        let config = r#"{"network_interfaces": ["eth0"]}"#;
        api.refuses("PUT", "/mmds/config", config, "not supported after starting the microVM");
    }

    #[test]
    fn metadata_comes_from_a_file_and_a_file_that_is_none_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("metadata").display().to_string();
        std::fs::write(&file, r#"{"a": 1}"#).unwrap();
        let api = Served::start(&["--metadata", &file]);
        assert_eq!(api.says("GET", "/mmds", ""), (200, r#"{"a":1}"#.into()));

        for (text, limit, reason) in
            [("[1]", "99", "name a file with a JSON object"), (r#"{"a": 1}"#, "3", "at most 3 are kept")]
        {
            std::fs::write(&file, text).unwrap();
            let socket = place(&folder).display().to_string();
            let arguments = ["run", "--api-sock", &socket, "--metadata", &file, "--mmds-size-limit", limit];
            let mut process = Process::start(&arguments);
            assert_eq!(process.wait().code(), Some(78), "{text}");
            process.errors.await_text(|text| text.contains(reason));
        }
    }
}
