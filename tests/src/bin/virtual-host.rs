//! What a virtual host of the drills needs beyond busybox: taps with several queues, requests to the API, and its time.

use std::fs::OpenOptions;
use std::io;
use std::net::UdpSocket;
use std::path::Path;
use std::process::ExitCode;

use mirror::report::monotonic_us;
use rustix::ioctl::{IntegerSetter, Setter, ioctl};
use tests::http;

const USAGE: &str =
    "usage: virtual-host tap NAME                            creates a tap with several queues, for good
       virtual-host request SOCKET METHOD RESOURCE BODY   sends a request, and prints the answer's body
       virtual-host clock ADDRESS                         tells the microseconds of its clock to whoever asks by UDP";

const TUNSETIFF: u32 = 0x4004_54ca;
const TUNSETPERSIST: u32 = 0x4004_54cb;
/// IFF_TAP, IFF_NO_PI, IFF_VNET_HDR and IFF_MULTI_QUEUE.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000 | 0x0100;

/// `struct ifreq` as far as taps use it.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

fn create_tap(name: &str) -> io::Result<()> {
    let tap = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags: FLAGS, rest: [0; 22] };
    let place = request.name.get_mut(..name.len()).ok_or(io::ErrorKind::InvalidInput)?;
    place.copy_from_slice(name.as_bytes());
    // SAFETY: the structure that the request takes.
    let attach = unsafe { Setter::<TUNSETIFF, Request>::new(request) };
    // SAFETY: the request changes the tap alone.
    unsafe { ioctl(&tap, attach) }?;
    // SAFETY: this one takes a number.
    let persist = unsafe { IntegerSetter::<TUNSETPERSIST>::new_usize(1) };
    // SAFETY: as above.
    unsafe { ioctl(&tap, persist) }?;
    Ok(())
}

/// Succeeds if the answer is a success.
fn request(socket: &str, method: &str, resource: &str, body: &str) -> io::Result<()> {
    let (status, answer) = http::request(Path::new(socket), method, resource, body)?;
    if !(200..300).contains(&status) {
        return Err(io::Error::other(format!("{status}: {answer}")));
    }
    println!("{answer}");
    Ok(())
}

/// Answers each question of 8 bytes with the same and the time.
fn tell_time(address: &str) -> io::Result<()> {
    let socket = UdpSocket::bind(address)?;
    loop {
        let mut answer = [0; 16];
        let (8, asker) = socket.recv_from(&mut answer[..8])? else { continue };
        answer[8..].copy_from_slice(&monotonic_us().to_le_bytes());
        // Who has gone asks no more.
        let _ = socket.send_to(&answer, asker);
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["tap", name] => create_tap(name),
        ["request", socket, method, resource, body] => request(socket, method, resource, body),
        ["clock", address] => tell_time(address),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("virtual-host: {error}");
            ExitCode::FAILURE
        }
    }
}
