//! Taps for tests: a network namespace of one's own, and the world at the other end.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};

/// Gives this thread a network namespace of its own.
pub fn leave() {
    // SAFETY: only this thread's view of the network changes.
    assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "{}", io::Error::last_os_error());
    // Else the kernel has things of its own to say on each new interface.
    std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
}

/// Runs `test` in a thread of its own, in a network namespace of its own.
pub fn alone(test: impl FnOnce() + Send) {
    thread::scope(|scope| {
        let run = || {
            leave();
            test();
        };
        if let Err(panic) = scope.spawn(run).join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// The world at the other end of a tap.
pub struct Outside(OwnedFd);

impl Outside {
    /// Sets the tap up and listens.
    pub fn on(tap: &str) -> Self {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        // SAFETY: a new descriptor, checked below.
        let fd = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, i32::from(protocol))
        };
        assert!(fd >= 0);
        // SAFETY: it is ours and open.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let name = std::ffi::CString::new(tap).unwrap();
        // SAFETY: a string that ends.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0);
        // SAFETY: zeros are a request.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(tap.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = libc::IFF_UP as i16;
        // SAFETY: the structure that the request takes.
        assert_eq!(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS, &raw mut request) }, 0);
        // SAFETY: zeros are an address.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index as i32;
        let len = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: an address of that length.
        assert_eq!(unsafe { libc::bind(fd, (&raw const address).cast(), len) }, 0);
        Self(socket)
    }

    /// Sends a frame to the tap.
    pub fn send(&self, frame: &[u8]) {
        rustix::net::send(&self.0, frame, SendFlags::empty()).unwrap();
    }

    /// The frames that come within `patience`, until there are `count`.
    pub fn receive(&self, count: usize, patience: Duration) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let mut wait = || {
            // SAFETY: one entry, of which there is one.
            unsafe { libc::poll(&raw mut poll, 1, patience.as_millis() as i32) }
        };
        while frames.len() < count && wait() > 0 {
            let mut frame = vec![0; 70_000];
            let (len, _) = rustix::net::recv(&self.0, &mut frame[..], RecvFlags::empty()).unwrap();
            frame.truncate(len);
            frames.push(frame);
        }
        frames
    }
}
