//! One queue of a tap device (Documentation/networking/tuntap.rst of Linux).

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

use super::{HEADER, MAX_QUEUE_PAIRS};
use crate::virtio::iovec::IoVecs;

const DEVICE: &str = "/dev/net/tun";

const IFF_TAP: i16 = 0x0002;
const IFF_NO_PI: i16 = 0x1000;
const IFF_VNET_HDR: i16 = 0x4000;
const IFF_MULTI_QUEUE: i16 = 0x0100;

/// The kernel takes no more vectors at once (IOV_MAX).
const MAX_VECTORS: usize = 1024;

const TUNSETIFF: u64 = 0x4004_54ca;
const TUNSETOFFLOAD: u64 = 0x4004_54d0;
const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUNSETQUEUE: u64 = 0x4004_54d9;

const IFF_ATTACH_QUEUE: i16 = 0x0200;
const IFF_DETACH_QUEUE: i16 = 0x0400;

/// What the kernel may leave to whoever reads frames from a tap.
pub(super) mod offload {
    pub(in super::super) const CHECKSUM: u32 = 1;
    pub(in super::super) const TSO4: u32 = 2;
    pub(in super::super) const TSO6: u32 = 4;
    pub(in super::super) const TSO_ECN: u32 = 8;
}

/// Why a tap cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// The name is none.
    #[error(
        "{0:?} cannot be the name of a network device: it has 1 to 15 characters, none of them a slash or blank"
    )]
    Name(String),
    /// There are no taps here.
    #[error(
        "cannot open {DEVICE} for tap {tap}: {cause} (is the module tun loaded, and may this process use it?)"
    )]
    Open {
        /// The tap's name.
        tap: String,
        /// What the system answered.
        cause: io::Error,
    },
    /// The tap is not to be had.
    #[error("cannot attach to tap {tap}: {cause}{}", hint(cause))]
    Attach {
        /// The tap's name.
        tap: String,
        /// What the system answered.
        cause: io::Error,
    },
    /// It does not do what is needed.
    #[error("cannot set up tap {tap} ({request}): {cause}")]
    Setup {
        /// The tap's name.
        tap: String,
        /// What was asked of it.
        request: &'static str,
        /// What the system answered.
        cause: io::Error,
    },
}

fn hint(cause: &io::Error) -> &'static str {
    match cause.raw_os_error() {
        Some(libc::EBUSY) => " (another process uses it: give each guest a tap of its own)",
        Some(libc::EPERM) => {
            " (it needs CAP_NET_ADMIN, or a tap that belongs to this user: ip tuntap add NAME mode tap user USER)"
        }
        Some(libc::EINVAL) => {
            " (it exists in another mode: with or without multi_queue, or as a tun device; remove it, or create it anew)"
        }
        _ => "",
    }
}

/// `struct ifreq` as far as taps use it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: i16,
    rest: [u8; 22],
}

/// An open queue of a tap.
pub(super) struct Tap {
    file: File,
    name: String,
}

/// How many pairs of queues a card for `vcpus` vCPUs has on the tap `name`: one a vCPU if the tap takes several readers,
/// otherwise one, as on a tap that is yet to be created.
pub fn queue_pairs(name: &str, vcpus: u8) -> u16 {
    // SAFETY: a string that ends.
    let exists = CString::new(name).is_ok_and(|name| unsafe { libc::if_nametoindex(name.as_ptr()) } != 0);
    // The kernel attaches nobody who wants several queues to a tap of one.
    let several = vcpus > 1 && exists && Tap::open(name, true).is_ok();
    if several { u16::from(vcpus).min(MAX_QUEUE_PAIRS) } else { 1 }
}

impl Tap {
    /// Attaches to the tap `name`, as one queue of several if `multi_queue`.
    pub(super) fn open(name: &str, multi_queue: bool) -> Result<Self, TapError> {
        let fits = (1..libc::IFNAMSIZ).contains(&name.len())
            && !name.contains(|c: char| c == '/' || c.is_whitespace() || c == '\0' || c == '%');
        if !fits {
            return Err(TapError::Name(name.into()));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(|cause| TapError::Open { tap: name.into(), cause })?;
        let tap = Self { file, name: name.into() };
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if multi_queue { IFF_MULTI_QUEUE } else { 0 };
        let mut request = Request { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
        request.name[..name.len()].copy_from_slice(name.as_bytes());
        tap.control(TUNSETIFF, (&raw mut request).cast())
            .map_err(|cause| TapError::Attach { tap: name.into(), cause })?;
        let mut len = libc::c_int::from(HEADER as u16);
        tap.control(TUNSETVNETHDRSZ, (&raw mut len).cast())
            .map_err(|cause| tap.refused("TUNSETVNETHDRSZ", cause))?;
        tap.set_offload(0)?;
        Ok(tap)
    }

    fn refused(&self, request: &'static str, cause: io::Error) -> TapError {
        TapError::Setup { tap: self.name.clone(), request, cause }
    }

    /// What of [`offload`] the reader of frames takes on itself.
    pub(super) fn set_offload(&self, offload: u32) -> Result<(), TapError> {
        self.control(TUNSETOFFLOAD, offload as usize as *mut libc::c_void)
            .map_err(|cause| self.refused("TUNSETOFFLOAD", cause))
    }

    /// Lets frames come to this queue of several, or not.
    pub(super) fn set_enabled(&self, enabled: bool) -> Result<(), TapError> {
        let flags = if enabled { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        let mut request = Request { name: [0; libc::IFNAMSIZ], flags, rest: [0; 22] };
        match self.control(TUNSETQUEUE, (&raw mut request).cast()) {
            // It is so already.
            Err(cause) if cause.raw_os_error() == Some(libc::EINVAL) => Ok(()),
            answer => answer.map_err(|cause| self.refused("TUNSETQUEUE", cause)),
        }
    }

    /// Reads a frame with its header into guest memory, and marks what it has written dirty.
    pub(super) fn receive(&self, into: &IoVecs) -> io::Result<usize> {
        let vectors = into.as_slice();
        let vectors = &vectors[..vectors.len().min(MAX_VECTORS)];
        // SAFETY: the vectors lead to guest memory, which `into` keeps mapped and no Rust reference points to.
        let count =
            unsafe { libc::readv(self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        into.mark_dirty(count);
        Ok(count)
    }

    /// Sends the frame with its header that lies in guest memory.
    pub(super) fn send(&self, from: &IoVecs) -> io::Result<()> {
        let vectors = from.as_slice();
        // SAFETY: as in `receive`; the kernel only reads.
        let count =
            unsafe { libc::writev(self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int) };
        usize::try_from(count).map(drop).map_err(|_| io::Error::last_os_error())
    }

    /// Sends a frame with its header.
    pub(super) fn send_bytes(&self, frame: &[u8]) -> io::Result<()> {
        rustix::io::write(&self.file, frame)?;
        Ok(())
    }

    /// Reads and forgets a frame; says whether there was one.
    pub(super) fn discard(&self) -> bool {
        rustix::io::read(&self.file, &mut [0; 64]).is_ok()
    }

    fn control(&self, request: u64, argument: *mut libc::c_void) -> io::Result<()> {
        // SAFETY: the argument is the number or the structure that each of the requests takes, and outlives the call.
        let answer = unsafe { libc::ioctl(self.file.as_raw_fd(), request, argument) };
        if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}
