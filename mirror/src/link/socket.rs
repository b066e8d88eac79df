//! Unix and TCP sockets behind one type.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::set_tcp_user_timeout;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How long a connection attempt may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(5);

/// Where a standby listens: `unix:/path` or `tcp:host:port`; a bare path or `host:port` is understood too.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP host and port; port 0 lets the system choose when listening.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let tcp = |rest: &str| match rest.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(rest.into()))
            }
            _ => Err(format!("'{text}' is no address: write unix:/path/to/socket or tcp:HOST:PORT")),
        };
        match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            Some(("tcp", rest)) => tcp(rest),
            _ if text.starts_with(['/', '.']) => Ok(Self::Unix(text.into())),
            _ => tcp(text),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(host) => write!(f, "tcp:{host}"),
        }
    }
}

impl Address {
    /// Whether it can be listened on but not connected to: it stands for all of a host's addresses.
    pub fn is_wildcard(&self) -> bool {
        let Self::Tcp(host) = self else { return false };
        let name = host.rsplit_once(':').map_or(host.as_str(), |(name, _)| name);
        let name = name.trim_start_matches('[').trim_end_matches(']');
        name.parse::<IpAddr>().is_ok_and(|address| address.is_unspecified())
    }

    /// Whether both are Unix sockets, or both are reached by TCP.
    pub fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

/// Why there is no link.
#[derive(Debug, Error)]
pub enum LinkError {
    /// Nobody answers.
    #[error(
        "cannot reach a standby at {address}: {source}; start one with 'understudy standby --listen {address}'"
    )]
    Connect {
        /// Where.
        address: Address,
        /// What came of it.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Where.
        address: Address,
        /// What came of it.
        source: io::Error,
    },
    /// Another process listens there.
    #[error("cannot listen on {address}: another process does; end it or choose another address")]
    InUse {
        /// Where.
        address: Address,
    },
    /// Others are told this address, and cannot connect to it.
    #[error("nobody can connect to {address}, which stands for all addresses of a host; name one of them")]
    Wildcard {
        /// Which.
        address: Address,
    },
    /// A socket option was refused.
    #[error("cannot set up the connection: {0}")]
    Setup(#[from] io::Error),
}

/// A connected socket.
#[derive(Debug)]
pub enum Stream {
    /// A Unix socket.
    Unix(UnixStream),
    /// A TCP connection.
    Tcp(TcpStream),
}

impl Stream {
    /// Connects to `address`.
    ///
    /// # Errors
    /// [`LinkError::Connect`] after a few seconds at most.
    pub fn connect(address: &Address) -> Result<Self, LinkError> {
        let connected = match address {
            Address::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            Address::Tcp(host) => connect_tcp(host).map(Self::Tcp),
        };
        connected.map_err(|source| LinkError::Connect { address: address.clone(), source })
    }

    /// A second handle of the same socket.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        match self {
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
        }
    }

    /// A write that cannot go on for this long fails; so does [`Self::await_space`].
    ///
    /// # Errors
    /// The socket does not take the option.
    pub fn set_write_timeout(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_write_timeout(Some(limit)),
            Self::Tcp(stream) => stream.set_write_timeout(Some(limit)),
        }
    }

    /// Writes as much of `pieces` as the system takes at once.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if that is nothing; whatever else the system answers.
    pub fn write_what_fits(&self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        Ok(sendmsg(self, pieces, &mut SendAncillaryBuffer::default(), flags)?)
    }

    /// Waits until something can be written again, or the other end is gone; `false` if neither came within the write
    /// timeout.
    ///
    /// # Errors
    /// The system refuses to wait.
    pub fn await_space(&self) -> io::Result<bool> {
        let limit = match self {
            Self::Unix(stream) => stream.write_timeout()?,
            Self::Tcp(stream) => stream.write_timeout()?,
        };
        let until = limit.map(|limit| Instant::now() + limit);
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            let left = left
                .map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() });
            match poll(&mut [PollFd::new(self, PollFlags::OUT)], left.as_ref()) {
                Ok(ready) => return Ok(ready > 0),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// A connection whose other end confirms nothing of what was sent for this long is broken (tcp(7), `TCP_USER_TIMEOUT`).
    /// A Unix socket's other end is on this host.
    ///
    /// # Errors
    /// The socket does not take the option.
    pub fn limit_unconfirmed(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Unix(_) => Ok(()),
            Self::Tcp(stream) => Ok(set_tcp_user_timeout(stream, limit.as_millis() as u32)?),
        }
    }

    /// A read that gets nothing for this long fails.
    ///
    /// # Errors
    /// The socket does not take the option.
    pub fn set_read_timeout(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_read_timeout(Some(limit)),
            Self::Tcp(stream) => stream.set_read_timeout(Some(limit)),
        }
    }

    /// Ends one or both directions. A socket that is closed already is left alone.
    pub fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
        };
    }
}

fn connect_tcp(host: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in host.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_PATIENCE) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

impl Read for &Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).read(into),
            Stream::Tcp(stream) => (&mut &*stream).read(into),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).write(from),
            Stream::Tcp(stream) => (&mut &*stream).write(from),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener, PathBuf),
    Tcp(TcpListener),
}

/// A socket that takes connections. A Unix socket's file is removed when this is dropped.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
}

impl Listener {
    /// Listens on `address`. A socket file that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// [`LinkError::InUse`] or [`LinkError::Listen`].
    pub fn bind(address: &Address) -> Result<Self, LinkError> {
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => LinkError::InUse { address: address.clone() },
            _ => LinkError::Listen { address: address.clone(), source },
        };
        let socket = match address {
            Address::Unix(path) => {
                remove_stale(path).map_err(fail)?;
                Socket::Unix(UnixListener::bind(path).map_err(fail)?, path.clone())
            }
            Address::Tcp(host) => Socket::Tcp(TcpListener::bind(host).map_err(fail)?),
        };
        Ok(Self { socket })
    }

    /// Where it listens; with the port that the system chose.
    pub fn address(&self) -> Address {
        match &self.socket {
            Socket::Unix(_, path) => Address::Unix(path.clone()),
            Socket::Tcp(listener) => Address::Tcp(
                listener.local_addr().map_or_else(|_| "?:0".into(), |a: SocketAddr| a.to_string()),
            ),
        }
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// The system refuses one; the next may still come.
    pub fn accept(&self) -> io::Result<Stream> {
        match &self.socket {
            Socket::Unix(listener, _) => listener.accept().map(|(stream, _)| Stream::Unix(stream)),
            Socket::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Removes a socket file that no process listens on.
fn remove_stale(path: &Path) -> io::Result<()> {
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        for (text, address) in [
            ("unix:/run/a.sock", "unix:/run/a.sock"),
            ("/run/a.sock", "unix:/run/a.sock"),
            ("tcp:127.0.0.1:7000", "tcp:127.0.0.1:7000"),
            ("[::1]:7000", "tcp:[::1]:7000"),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), address);
        }
        for wrong in ["", "unix:", "host", "tcp:host", "host:99999", ":70"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn address_that_stands_for_all_of_a_host_is_told_from_one() {
        for (text, all) in [
            ("tcp:0.0.0.0:7000", true),
            ("tcp:[::]:7000", true),
            ("tcp:10.0.0.1:7000", false),
            ("tcp:standby:7000", false),
            ("/run/a.sock", false),
        ] {
            assert_eq!(text.parse::<Address>().unwrap().is_wildcard(), all, "{text}");
        }
    }

    #[test]
    fn stale_socket_file_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let address = Address::Unix(folder.path().join("s"));
        std::mem::forget(Listener::bind(&address).unwrap());
        assert!(matches!(Listener::bind(&address), Err(LinkError::InUse { .. })));

        let stale = folder.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        Listener::bind(&Address::Unix(stale)).unwrap();
    }

    #[test]
    fn absent_standby_is_an_error_that_says_what_to_do() {
        let error = Stream::connect(&"/nonexistent/s".parse().unwrap()).unwrap_err();
        assert!(error.to_string().contains("understudy standby --listen unix:/nonexistent/s"));
    }
}
