//! One request to the API, as any HTTP client sends it.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Sends a request to the API on `socket` and returns the status and the body of the answer.
///
/// # Errors
/// Nobody serves there, or the answer is none.
pub fn request(socket: &Path, method: &str, resource: &str, body: &str) -> io::Result<(u16, String)> {
    let mut stream = UnixStream::connect(socket)?;
    write!(
        stream,
        "{method} {resource} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let no_answer = || io::Error::new(io::ErrorKind::InvalidData, format!("no answer: {answer:?}"));
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok()).ok_or_else(no_answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").ok_or_else(no_answer)?;
    Ok((status, body.to_owned()))
}
