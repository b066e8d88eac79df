//! Both ends of vsock for the drill with a real Linux guest: in the guest with `AF_VSOCK`, on the host with Firecracker's
//! convention of Unix sockets (`CONNECT port` on the device's socket; `PATH_port` for calls from the guest).
//!
//! A listener answers each line with `heard LINE`. A caller sends one line, prints the answer and ends.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::thread;

use rustix::net::addr::{SocketAddrArg, SocketAddrLen, SocketAddrOpaque};
use rustix::net::{AddressFamily, SocketFlags, SocketType, accept, bind, connect, listen, socket_with};

const USAGE: &str = "usage: linux-vsock listen PORT | call PORT LINE        (in the guest)
       linux-vsock host-listen PATH | host-call PATH PORT LINE   (on the host)";

/// Any context, and the host's (Linux, `vm_sockets.h`).
const CID_ANY: u32 = u32::MAX;
const CID_HOST: u32 = 2;

/// `struct sockaddr_vm`.
#[repr(C)]
struct VsockAddress {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    flags_and_zero: [u8; 4],
}

impl VsockAddress {
    fn new(cid: u32, port: u32) -> Self {
        Self { family: AddressFamily::VSOCK.as_raw(), reserved: 0, port, cid, flags_and_zero: [0; 4] }
    }
}

// SAFETY: the address has the layout of `struct sockaddr_vm`, without padding, and lives while `f` runs.
unsafe impl SocketAddrArg for VsockAddress {
    unsafe fn with_sockaddr<R>(&self, f: impl FnOnce(*const SocketAddrOpaque, SocketAddrLen) -> R) -> R {
        f(std::ptr::from_ref(self).cast(), size_of::<Self>() as SocketAddrLen)
    }
}

fn vsock() -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::VSOCK, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

/// Answers every line of a connection.
fn answer(connection: OwnedFd) -> io::Result<()> {
    let mut out = File::from(connection);
    for line in BufReader::new(out.try_clone()?).lines() {
        let line = line?;
        println!("{line}");
        out.write_all(format!("heard {line}\n").as_bytes())?;
    }
    Ok(())
}

fn answer_in_background(connection: OwnedFd) {
    thread::spawn(move || {
        if let Err(error) = answer(connection) {
            eprintln!("linux-vsock: a connection has ended: {error}");
        }
    });
}

fn guest_listen(port: u32) -> io::Result<()> {
    let listener = vsock()?;
    bind(&listener, &VsockAddress::new(CID_ANY, port))?;
    listen(&listener, 16)?;
    loop {
        answer_in_background(accept(&listener)?);
    }
}

fn host_listen(path: &str) -> io::Result<()> {
    for connection in UnixListener::bind(path)?.incoming() {
        answer_in_background(connection?.into());
    }
    Ok(())
}

/// Sends `line` and prints the answer.
fn converse(connection: OwnedFd, line: &str) -> io::Result<()> {
    let mut out = File::from(connection);
    out.write_all(format!("{line}\n").as_bytes())?;
    print!("{}", read_line(&mut BufReader::new(out))?);
    Ok(())
}

fn guest_call(port: u32, line: &str) -> io::Result<()> {
    let connection = vsock()?;
    connect(&connection, &VsockAddress::new(CID_HOST, port))?;
    converse(connection, line)
}

fn host_call(path: &str, port: u32, line: &str) -> io::Result<()> {
    let mut connection = UnixStream::connect(path)?;
    connection.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // The guest says nothing unasked: there is nothing behind this line that the reader could swallow.
    let reply = read_line(&mut BufReader::new(connection.try_clone()?))?;
    if !reply.starts_with("OK ") {
        return Err(io::Error::other(format!("the device answers {reply:?} to CONNECT {port}")));
    }
    converse(connection.into(), line)
}

fn read_line(from: &mut impl io::BufRead) -> io::Result<String> {
    let mut line = String::new();
    if from.read_line(&mut line)? == 0 {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the other end has hung up"));
    }
    Ok(line)
}

fn port(text: &str) -> io::Result<u32> {
    text.parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, format!("{text:?} is no port")))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match arguments[..] {
        ["listen", number] => port(number).and_then(guest_listen),
        ["call", number, line] => port(number).and_then(|port| guest_call(port, line)),
        ["host-listen", path] => host_listen(path),
        ["host-call", path, number, line] => port(number).and_then(|port| host_call(path, port, line)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("linux-vsock {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}
