//! A network of the drills' own: a bridge, a tap for each side, and on the bridge the clients.
//!
//! It is in a network namespace that ends with this process, so nothing of the host's network changes. A mount namespace
//! comes with it, for the drill that fills a disk. Who is not root is so in a user namespace.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::process::Command;

use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
use rustix::process::{getgid, getuid};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use thiserror::Error;

use crate::sides::Side;

/// The address of the clients.
const OUTSIDE: &str = "10.9.0.1/24";
/// The address of the guest.
pub(super) const GUEST: &str = "10.9.0.2/24";
/// Where its service is.
pub(super) const SERVICE: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 9, 0, 2)), 7000);
/// Sides that a drill may have.
const TAPS: u8 = 4;

/// Why there is no network.
#[derive(Debug, Error)]
pub enum NetworkError {
    /// No namespace.
    #[error(
        "cannot make a network for the drill: {0}; run it as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0)"
    )]
    Namespace(io::Error),
    /// No `ip`.
    #[error(
        "cannot make a network for the drill: 'ip {arguments}': {reason}; it takes ip (iproute2) and /dev/net/tun"
    )]
    Ip {
        /// What was asked of it.
        arguments: String,
        /// What came of it.
        reason: String,
    },
}

/// Moves this process into namespaces of its own and makes the network there. Only this thread may run.
///
/// # Errors
/// [`NetworkError`]
pub(super) fn enter() -> Result<(), NetworkError> {
    let (user, group) = (getuid(), getgid());
    let mut flags = UnshareFlags::NEWNET | UnshareFlags::NEWNS;
    if !user.is_root() {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: no file descriptor changes, only this process' view of the network, of mounts and of user numbers.
    unsafe { unshare_unsafe(flags) }.map_err(|error| NetworkError::Namespace(error.into()))?;
    if !user.is_root() {
        let maps = [
            ("setgroups", "deny".into()),
            ("uid_map", format!("0 {} 1", user.as_raw())),
            ("gid_map", format!("0 {} 1", group.as_raw())),
        ];
        for (file, text) in maps {
            fs::write(format!("/proc/self/{file}"), text).map_err(NetworkError::Namespace)?;
        }
    }
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(|error| NetworkError::Namespace(error.into()))?;
    // Else the kernel has things of its own to say on each new interface; where it cannot be said, it says them.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    ip("link set lo up")?;
    ip("link add lan type bridge forward_delay 0")?;
    ip(&format!("address add {OUTSIDE} dev lan"))?;
    ip("link set lan up")?;
    // What is measured is the guest's absence, not the time after which TCP asks again.
    ip("route change 10.9.0.0/24 dev lan proto kernel scope link src 10.9.0.1 rto_min 20ms")?;
    for number in 0..TAPS {
        let name = tap(Side(number));
        ip(&format!("tuntap add {name} mode tap vnet_hdr"))?;
        ip(&format!("link set {name} master lan up"))?;
    }
    Ok(())
}

/// Forgets which side had the guest in the run before.
///
/// # Errors
/// [`NetworkError`]
pub(super) fn forget() -> Result<(), NetworkError> {
    ip("link set lan type bridge fdb_flush")?;
    ip("neighbor flush dev lan")
}

/// The tap of a side.
pub(super) fn tap(side: Side) -> String {
    format!("tap{}", side.0)
}

/// Mounts an empty file system of `kib` KiB in memory on `folder`; it is gone with this process.
///
/// # Errors
/// This system does not let it.
pub(super) fn mount_small(folder: &std::path::Path, kib: u32) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let size = std::ffi::CString::new(format!("size={kib}k")).map_err(io::Error::other)?;
    mount("tmpfs", folder, "tmpfs", MountFlags::empty(), Some(size.as_c_str())).map_err(Into::into)
}

/// Takes it away again, as far as nobody uses it.
pub(super) fn unmount(folder: &std::path::Path) {
    // It goes with this process at the latest.
    let _ = rustix::mount::unmount(folder, rustix::mount::UnmountFlags::DETACH);
}

fn ip(arguments: &str) -> Result<(), NetworkError> {
    let failed = |reason: String| NetworkError::Ip { arguments: arguments.into(), reason };
    let output = Command::new("ip").args(arguments.split(' ')).output();
    let output = output.map_err(|error| failed(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
