//! Hears which host sends frames in the guest's name, also those that a port that is cut off does not let through.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use mirror::report::monotonic_us;
use serde::{Deserialize, Serialize};

/// A frame of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Heard {
    /// When it was heard.
    pub at_us: u64,
    /// The port that it came from.
    pub port: String,
    /// What it carries: its EtherType, in hexadecimal digits.
    pub kind: String,
}

/// Writes down each frame with the source `mac`, for each `PORT=INTERFACE`, until the process is killed.
pub(crate) fn watch(mac: &str, frames: &Path, ports: &[&str]) -> io::Result<bool> {
    let mac: Vec<u8> = mac.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let frames = Arc::new(File::options().create(true).append(true).open(frames)?);
    let mut ears = Vec::new();
    for port in ports {
        let (port, interface) =
            port.split_once('=').ok_or_else(|| io::Error::other("write PORT=INTERFACE"))?;
        let (mut ear, port) = (ear_at(interface)?, port.to_owned());
        let (mac, frames) = (mac.clone(), Arc::clone(&frames));
        ears.push(thread::spawn(move || -> io::Result<()> {
            let mut frame = [0; 128];
            loop {
                let length = ear.read(&mut frame)?;
                if length < 14 || frame[6..12] != mac[..] {
                    continue;
                }
                let kind = format!("{:02x}{:02x}", frame[12], frame[13]);
                let mut line =
                    serde_json::to_vec(&Heard { at_us: monotonic_us(), port: port.clone(), kind })?;
                line.push(b'\n');
                (&*frames).write_all(&line)?;
            }
        }));
    }
    for ear in ears {
        ear.join().map_err(|_| io::Error::other("a listener panicked"))??;
    }
    Ok(true)
}

/// A packet socket (packet(7)) that hears all that comes in by an interface.
fn ear_at(interface: &str) -> io::Result<File> {
    let all = (libc::ETH_P_ALL as u16).to_be();
    // SAFETY: the call takes three numbers.
    let socket =
        unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(all)) };
    if socket < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a socket that was just made, and belongs to nobody else.
    let socket = unsafe { File::from_raw_fd(socket) };
    let index = rustix::net::netdevice::name_to_index(&socket, interface);
    let index = index.map_err(|error| io::Error::other(format!("{interface}: {error}")))?;
    let yes: libc::c_int = 1;
    // SAFETY: the option takes a C int, which `yes` is.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_IGNORE_OUTGOING,
            (&raw const yes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: all,
        sll_ifindex: index as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is of the family's own type, and its size is given.
    let status = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    if status != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}
