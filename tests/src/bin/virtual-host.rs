//! What a virtual host of the drills needs beyond busybox: taps with several queues, and requests to the API.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use rustix::ioctl::{IntegerSetter, Setter, ioctl};
use tests::http;

const USAGE: &str =
    "usage: virtual-host tap NAME                            creates a tap with several queues, for good
       virtual-host request SOCKET METHOD RESOURCE BODY   sends a request, and prints the answer's body";

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

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words[..] {
        ["tap", name] => create_tap(name),
        ["request", socket, method, resource, body] => request(socket, method, resource, body),
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
