//! The Unix socket on which the host's programs ask for a port of the guest: they send `CONNECT PORT` and a newline, and
//! are told `OK PORT` and a newline once the guest has accepted (Firecracker's convention).

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// Longest line that asks for a port.
const LINE: usize = 32;

/// The listening socket; it is removed when this is dropped.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

impl Listener {
    /// Listens at `path`. What a process that is gone has left there is replaced.
    pub(super) fn bind(path: &Path) -> io::Result<Self> {
        if let Err(error) = UnixStream::connect(path)
            && error.kind() == ErrorKind::ConnectionRefused
        {
            fs::remove_file(path)?;
        }
        let socket = UnixListener::bind(path)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, path: path.into() })
    }

    /// The next program that wants to connect.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        let (stream, _) = self.socket.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some(stream)
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have removed it.
        let _ = fs::remove_file(&self.path);
    }
}

/// A program that has connected and not said yet to which port.
pub(super) struct Caller {
    pub(super) stream: UnixStream,
    line: Vec<u8>,
}

/// What a caller has said.
pub(super) enum Said {
    /// Nothing whole yet.
    Nothing,
    /// It wants this port.
    Port(u32),
    /// Nothing that means anything.
    Nonsense,
}

impl Caller {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream, line: Vec::new() }
    }

    /// Reads on. Not a byte behind the line is read: those are for the guest.
    pub(super) fn listen(&mut self) -> Said {
        let mut byte = [0];
        loop {
            match (&self.stream).read(&mut byte) {
                Ok(0) => return Said::Nonsense,
                Ok(_) if byte == *b"\n" => return parse(&self.line).map_or(Said::Nonsense, Said::Port),
                Ok(_) if self.line.len() >= LINE => return Said::Nonsense,
                Ok(_) => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Said::Nothing,
                Err(_) => return Said::Nonsense,
            }
        }
    }
}

fn parse(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?;
    let mut words = text.split_ascii_whitespace();
    let command = words.next().filter(|word| word.eq_ignore_ascii_case("connect"));
    let port = words.next().filter(|_| command.is_some())?.parse().ok()?;
    words.next().is_none().then_some(port)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_request_for_a_port_is_one() {
        assert_eq!(parse(b"CONNECT 52"), Some(52));
        assert_eq!(parse(b"connect 4294967295"), Some(u32::MAX));
        for line in
            [&b""[..], b"CONNECT", b"CONNECT x", b"CONNECT 4294967296", b"CONNECT 1 2", b"\xff 1", b"GET 1"]
        {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
