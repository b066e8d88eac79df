//! What of Firecracker's API is here, and what is not: one table, for the routes, the tests and the documentation.

use super::When;

/// An operation of Firecracker's API, by its published description and its parser.
pub struct Operation {
    /// HTTP method.
    pub method: &'static str,
    /// The path; what is in braces stands for a name.
    pub path: &'static str,
    /// When it is possible.
    pub when: When,
    /// Why it is not here, if it is not.
    pub missing: Option<&'static str>,
}

/// Always possible.
const fn here(method: &'static str, path: &'static str) -> Operation {
    Operation { method, path, when: When::Always, missing: None }
}

/// Possible before the guest has started.
const fn before(method: &'static str, path: &'static str) -> Operation {
    Operation { method, path, when: When::Before, missing: None }
}

/// Possible after that.
const fn after(method: &'static str, path: &'static str) -> Operation {
    Operation { method, path, when: When::After, missing: None }
}

const fn missing(method: &'static str, path: &'static str, why: &'static str) -> Operation {
    Operation { method, path, when: When::Always, missing: Some(why) }
}

const PMEM: &str = "there are no persistent memory devices; use a drive";
const HOTPLUG: &str = "memory cannot be plugged in; give the guest what it needs and a balloon";
const HINTING: &str = "free pages are not hinted; use free_page_reporting";
const UNPLUG: &str = "devices cannot be taken away from a guest";

/// All of it.
pub const OPERATIONS: &[Operation] = &[
    here("GET", "/"),
    here("PUT", "/actions"),
    here("GET", "/balloon"),
    before("PUT", "/balloon"),
    after("PATCH", "/balloon"),
    after("GET", "/balloon/statistics"),
    after("PATCH", "/balloon/statistics"),
    missing("PATCH", "/balloon/hinting/start", HINTING),
    missing("PATCH", "/balloon/hinting/stop", HINTING),
    missing("GET", "/balloon/hinting/status", HINTING),
    before("PUT", "/boot-source"),
    before("PUT", "/cpu-config"),
    before("PUT", "/drives/{drive_id}"),
    after("PATCH", "/drives/{drive_id}"),
    missing("DELETE", "/drives/{drive_id}", UNPLUG),
    missing("PUT", "/pmem/{id}", PMEM),
    missing("PATCH", "/pmem/{id}", PMEM),
    missing("DELETE", "/pmem/{id}", PMEM),
    before("PUT", "/logger"),
    before("PUT", "/metrics"),
    before("PUT", "/serial"),
    before("PUT", "/entropy"),
    before("PUT", "/vsock"),
    here("GET", "/machine-config"),
    before("PUT", "/machine-config"),
    before("PATCH", "/machine-config"),
    here("GET", "/mmds"),
    here("PUT", "/mmds"),
    here("PATCH", "/mmds"),
    before("PUT", "/mmds/config"),
    missing("GET", "/hotplug/memory", HOTPLUG),
    missing("PUT", "/hotplug/memory", HOTPLUG),
    missing("PATCH", "/hotplug/memory", HOTPLUG),
    before("PUT", "/network-interfaces/{iface_id}"),
    after("PATCH", "/network-interfaces/{iface_id}"),
    missing("DELETE", "/network-interfaces/{iface_id}", UNPLUG),
    after("PUT", "/snapshot/create"),
    before("PUT", "/snapshot/load"),
    here("GET", "/version"),
    here("GET", "/vm/config"),
    after("PATCH", "/vm"),
];

/// Why Firecracker's operation `method` on `path` is not here; `None` if it is, or if Firecracker has none such either.
pub fn why_missing(method: &str, path: &str) -> Option<&'static str> {
    OPERATIONS.iter().find(|operation| operation.method == method && matches(operation.path, path))?.missing
}

fn matches(pattern: &str, path: &str) -> bool {
    let (mut wanted, mut found) = (pattern.split('/'), path.split('/'));
    loop {
        match (wanted.next(), found.next()) {
            (None, None) => return true,
            (Some(wanted), Some(found)) if wanted == found => {}
            (Some(wanted), Some(found)) if wanted.starts_with('{') && !found.is_empty() => {}
            _ => return false,
        }
    }
}
