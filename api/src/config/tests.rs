use ::devices::virtio::block::{FenceConfig, Replication, WatchdogConfig};
use mirror::link::Address;
use mirror::primary::Settings;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    let path = Path::new("vm.json");
    Draft::parse(path, text)?.finish(CpuTemplate::NONE).map_err(value_error(path))
}

fn error(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

/// A file with `machine` as the fields of machine-config and `more` behind it.
fn file(machine: &str, more: &str) -> String {
    format!(r#"{{"boot-source": {{"kernel_image_path": "vmlinux"}}, "machine-config": {{{machine}}}{more}}}"#)
}

const GOOD: &str = r#""vcpu_count": 2, "mem_size_mib": 512"#;

#[test]
fn file_as_firecracker_ships_it_is_taken_when_the_empty_sections_are_empty() {
    let config = parse(
        r#"{
            "boot-source": {
                "kernel_image_path": "vmlinux.bin",
                "boot_args": "console=ttyS0 reboot=k panic=1 pci=off",
                "initrd_path": null
            },
            "cpu-config": null,
            "drives": [],
            "machine-config": {
                "vcpu_count": 2, "mem_size_mib": 1024, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
            },
            "balloon": null, "network-interfaces": [], "vsock": null, "logger": null, "metrics": null,
            "mmds-config": null, "entropy": null
        }"#,
    )
    .unwrap();
    assert_eq!(config.machine.vcpu_count, 2);
    assert_eq!(config.boot.initrd_path, None);
    assert_eq!(config.mirror, None);
}

#[test]
fn unknown_field_is_named_with_its_place_and_the_fields_there_are() {
    let text = "{\n  \"boot-source\": {\n    \"kernel_path\": \"x\"\n  }\n}";
    let message = error(text);
    assert!(message.starts_with("vm.json:3:17: boot-source.kernel_path: unknown field"), "{message}");
    assert!(message.contains("kernel_image_path"), "{message}");
}

#[test]
fn unknown_section_is_not_taken_for_a_missing_feature() {
    let message = error(&file(GOOD, r#", "mirrors": {}"#));
    assert!(message.contains("unknown field `mirrors`") && message.contains("`mirror`"), "{message}");
}

#[test]
fn section_that_is_not_supported_yet_is_refused_by_name() {
    for (section, content) in
        [("pmem", r#"[{"id": "root"}]"#), ("memory-hotplug", r#"{"total_size_mib": 1024}"#)]
    {
        let message = error(&file(GOOD, &format!(", \"{section}\": {content}")));
        assert!(
            message.contains(&format!("the section \"{section}\" is not supported yet; remove it")),
            "{message}"
        );
    }
}

#[test]
fn value_of_a_wrong_type_is_named_by_its_field() {
    let message = error(&file(r#""vcpu_count": "two", "mem_size_mib": 512"#, ""));
    assert!(message.contains("machine-config.vcpu_count: invalid type: string \"two\""), "{message}");
}

#[test]
fn missing_field_is_named_with_its_section() {
    let message = error(&file(r#""vcpu_count": 1"#, ""));
    assert!(message.contains("machine-config: missing field `mem_size_mib`"), "{message}");
    let message = error("{}");
    assert!(message.contains("vm.json: boot-source: is missing"), "{message}");
}

#[test]
fn values_out_of_range_say_what_the_range_is() {
    let cases = [
        (
            r#""vcpu_count": 0, "mem_size_mib": 512"#,
            "machine-config.vcpu_count: 0 is out of range; give 1 to 32",
        ),
        (r#""vcpu_count": 33, "mem_size_mib": 512"#, "machine-config.vcpu_count: 33 is out of range"),
        (
            r#""vcpu_count": 1, "mem_size_mib": 1"#,
            "machine-config.mem_size_mib: 1 is out of range; give 2 to",
        ),
        (
            r#""vcpu_count": 1, "mem_size_mib": 2000000"#,
            "machine-config.mem_size_mib: 2000000 is out of range",
        ),
        (
            r#""vcpu_count": 1, "mem_size_mib": 3, "huge_pages": "2M""#,
            "machine-config.mem_size_mib: 3 is odd",
        ),
        (
            r#""vcpu_count": 1, "mem_size_mib": 64, "smt": true"#,
            "machine-config.smt: true is not supported yet",
        ),
    ];
    for (machine, expected) in cases {
        let message = error(&file(machine, ""));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn mirror_section_needs_no_more_than_a_standby() {
    let config = parse(&file(GOOD, r#", "mirror": {"standby": "tcp:10.0.0.2:7000"}"#)).unwrap();
    let section = config.mirror.unwrap();
    assert_eq!(section.settings(), Settings::default());
    assert_eq!(section.standby.to_string(), "tcp:10.0.0.2:7000");
}

#[test]
fn mirror_settings_are_checked() {
    let cases = [
        (r#""standby": "nowhere""#, "mirror.standby"),
        (r#""standby": ["unix:/s", "nowhere"]"#, "mirror.standby"),
        (r#""standby": []"#, "mirror.standby: 0 addresses"),
        (r#""standby": "unix:/s", "listen": "unix:/s""#, "mirror.listen: unix:/s is a standby's, too"),
        (
            r#""standby": "unix:/s", "second_listen": "unix:/t""#,
            "mirror.second_listen: this side waits for no guest",
        ),
        (
            r#""standby": "tcp:b:1", "listen": "tcp:a:1", "second_listen": "tcp:a:1""#,
            "mirror.second_listen: tcp:a:1 is where the mirror's link is",
        ),
        (
            r#""standby": "tcp:b:1", "listen": "tcp:a:1", "second_listen": "tcp:0.0.0.0:2""#,
            "mirror.second_listen: a primary cannot connect to tcp:0.0.0.0:2",
        ),
        (r#""standby": "unix:/s", "heartbeat_ms": 0"#, "mirror.heartbeat_ms: 0 is out of range"),
        (r#""standby": "unix:/s", "heartbeat_misses": 0"#, "mirror.heartbeat_misses: 0 is out of range"),
        (
            r#""standby": "unix:/s", "interval_ms": 4, "min_interval_ms": 5"#,
            "mirror.min_interval_ms: 5 is more than interval_ms",
        ),
        (r#""standby": "unix:/s", "guid": "7""#, "mirror.guid"),
        (r#""standby": "unix:/s", "interval": 4"#, "unknown field `interval`"),
    ];
    for (fields, expected) in cases {
        let message = error(&file(GOOD, &format!(r#", "mirror": {{{fields}}}"#)));
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn metadata_service_is_on_interfaces_that_there_are_at_a_link_local_address() {
    let net = r#", "network-interfaces": [{"iface_id": "eth0", "host_dev_name": "tap0"}]"#;
    let with = |mmds: &str| file(GOOD, &format!("{net}, \"mmds-config\": {mmds}"));
    let mmds = parse(&with(r#"{"network_interfaces": ["eth0"]}"#)).unwrap().mmds.unwrap();
    assert_eq!(
        serde_json::to_string(&mmds).unwrap(),
        r#"{"version":"V1","network_interfaces":["eth0"],"ipv4_address":"169.254.169.254","imds_compat":false}"#
    );
    for (wrong, reason) in [
        (r#"{"network_interfaces": []}"#, "is empty"),
        (
            r#"{"network_interfaces": ["eth0", "eth1"]}"#,
            "does not correspond to any existing network interface",
        ),
        (r#"{"network_interfaces": ["eth0"], "ipv4_address": "10.0.0.1"}"#, "is not link local"),
        (r#"{"network_interfaces": ["eth0"], "ipv4_address": "169.254.0.7"}"#, "is not link local"),
        (r#"{"network_interfaces": ["eth0"], "ipv4_address": "169.254.255.7"}"#, "is not link local"),
        (r#"{"network_interfaces": ["eth0"], "ipv4_address": "x"}"#, "mmds-config.ipv4_address"),
        (r#"{"network_interfaces": ["eth0"], "version": "V3"}"#, "mmds-config.version"),
    ] {
        let message = error(&with(wrong));
        assert!(message.contains("mmds-config") && message.contains(reason), "{message}");
    }
}

#[test]
fn console_has_one_other_end() {
    let config = |fields: &str| file(GOOD, &format!(r#", "console": {{{fields}}}"#));
    let console = parse(&config(r#""socket_path": "/run/vm.console""#)).unwrap().console.unwrap();
    assert_eq!((console.device().columns, console.device().rows), (80, 25));
    for fields in ["", r#""socket_path": "/a", "output_path": "/b""#] {
        let message = error(&config(fields));
        assert!(message.contains("console: give either socket_path or output_path"), "{message}");
    }
}

#[test]
fn cpu_template_is_read_from_its_own_file_and_errors_name_that() {
    let folder = tempfile::tempdir().unwrap();
    let [config, template] = ["vm.json", "cpu.json"].map(|name| folder.path().join(name));
    fs::write(&config, file(GOOD, &format!(", \"cpu-config\": {template:?}"))).unwrap();
    let message = Config::load(&config).unwrap_err().to_string();
    assert!(message.contains("cannot read") && message.contains("cpu.json"), "{message}");
    fs::write(&template, "{\n  \"msr_modifiers\": [{\"addr\": \"0x3a\", \"bitmap\": \"0b2\"}]}").unwrap();
    let message = Config::load(&config).unwrap_err().to_string();
    assert!(message.contains("cpu.json:2:"), "{message}");
    assert!(message.contains("msr_modifiers.bitmap: '2' in \"0b2\" is no bit"), "{message}");
    fs::write(&template, r#"{"msr_modifiers": [{"addr": "0x3a", "bitmap": "0bx1"}]}"#).unwrap();
    assert_eq!(Config::load(&config).unwrap().cpu_template.msrs[0].index, 0x3a);
}

#[test]
fn file_that_is_not_there_is_named() {
    let message = Config::load(Path::new("/nonexistent/vm.json")).unwrap_err().to_string();
    assert!(message.contains("/nonexistent/vm.json"), "{message}");
}

#[test]
fn what_is_written_is_read_back() {
    let mut config = parse(&file(GOOD, "")).unwrap();
    config.mirror = Some(MirrorSection::to("unix:/run/s.sock".parse::<Address>().unwrap()));
    assert_eq!(parse(&serde_json::to_string_pretty(&config).unwrap()).unwrap(), config);
}

/// The configuration of a guest with one drive, of which `replication` is said.
fn with_drive(replication: &str) -> String {
    format!(
        r#"{{"boot-source": {{"kernel_image_path": "k"}}, "machine-config": {{"vcpu_count": 1, "mem_size_mib": 64}},
            "drives": [{{"drive_id": "d", "path_on_host": "i", "is_root_device": false, "replication": {replication}}}]}}"#
    )
}

#[test]
fn shared_drive_has_a_fence_whatever_is_said() {
    let fence_of = |replication: &str| {
        let config = parse(&with_drive(replication)).unwrap();
        match config.drives[0].device().replication {
            Replication::Shared(fence) => fence,
            Replication::Replicated => panic!("{replication}"),
        }
    };
    for lock in
        ["{}", r#"{"mode": "shared"}"#, r#"{"mode": "shared", "fence": "lock"}"#, r#"{"fence": "lock"}"#]
    {
        assert_eq!(fence_of(lock), FenceConfig::Lock, "{lock}");
    }
    let watchdog =
        |device: &str, timeout_s| FenceConfig::Watchdog(WatchdogConfig { device: device.into(), timeout_s });
    assert_eq!(fence_of(r#"{"fence": "watchdog"}"#), watchdog("/dev/watchdog", 10));
    let other = r#"{"fence": "watchdog", "watchdog": {"device": "/dev/watchdog1", "timeout_s": 30}}"#;
    assert_eq!(fence_of(other), watchdog("/dev/watchdog1", 30));
}

#[test]
fn fence_that_does_not_fit_is_refused() {
    let cases = [
        (r#"{"mode": "replicated", "fence": "lock"}"#, "each side of a replicated drive has its own"),
        (r#"{"watchdog": {}}"#, r#"only used with "fence": "watchdog""#),
        (r#"{"fence": "watchdog", "watchdog": {"timeout_s": 0}}"#, "0 is out of range; give 1 to 600"),
        (r#"{"fence": "none"}"#, "expected `lock` or `watchdog`"),
    ];
    for (replication, reason) in cases {
        let message = error(&with_drive(replication));
        assert!(message.contains("replication") && message.contains(reason), "{message}");
    }
}
