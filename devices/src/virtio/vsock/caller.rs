//! A program of the host that asks for a port of the guest: it sends `CONNECT PORT` and a newline, and is told `OK PORT`
//! and a newline once the guest has accepted (Firecracker's convention).

use std::io::{ErrorKind, Read};
use std::os::unix::net::UnixStream;

/// Longest line that asks for a port.
const LINE: usize = 32;

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
