//! A client of the embedded guest's network service, from outside.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use resources::protocol::{Reply, Request, stream_byte};

use crate::pair::PATIENCE;

/// Where the service is when the guest was told [`GUEST`](crate::lan::GUEST).
pub const SERVICE: &str = "10.9.0.2:7000";
/// How long is waited between two attempts to connect.
const RETRY: Duration = Duration::from_millis(5);

/// A connection.
pub struct Client {
    from: BufReader<TcpStream>,
    to: TcpStream,
    line: Vec<u8>,
}

impl Client {
    /// Connects, as soon as the guest is there.
    ///
    /// # Errors
    /// It is not there within [`PATIENCE`].
    pub fn connect(address: SocketAddr) -> io::Result<Self> {
        let until = Instant::now() + PATIENCE;
        let to = loop {
            match TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => return Err(error),
                Err(_) => thread::sleep(RETRY),
            }
        };
        to.set_nodelay(true)?;
        to.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { from: BufReader::new(to.try_clone()?), to, line: Vec::new() })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The connection is lost, or the answer is none.
    pub fn ask(&mut self, request: &Request<'_>) -> io::Result<Reply<'_>> {
        self.to.write_all(request.encode().as_bytes())?;
        self.line.clear();
        self.from.read_until(b'\n', &mut self.line)?;
        let line = self.line.strip_suffix(b"\n").ok_or(io::ErrorKind::UnexpectedEof)?;
        Reply::parse(line).ok_or_else(|| {
            io::Error::other(format!("no answer to {request:?}: {}", String::from_utf8_lossy(line)))
        })
    }

    /// Asks for something that is answered by a number.
    ///
    /// # Errors
    /// As [`Self::ask`]; or the answer is something else.
    pub fn number(&mut self, request: &Request<'_>) -> io::Result<u64> {
        match self.ask(request)? {
            Reply::Value(value) => Ok(value),
            other => Err(io::Error::other(format!("{request:?} was answered by {other:?}"))),
        }
    }

    /// Downloads `bytes` bytes and checks each; tells `progress` how many there are, time and again.
    ///
    /// # Errors
    /// The connection is lost, or a byte is wrong.
    pub fn download(&mut self, bytes: u64, mut progress: impl FnMut(u64)) -> io::Result<()> {
        if self.ask(&Request::Download { bytes })? != Reply::Bytes(bytes) {
            return Err(io::Error::other("the download was not accepted"));
        }
        let (mut position, mut chunk) = (0, vec![0; 64 << 10]);
        while position < bytes {
            let wanted = chunk.len().min(usize::try_from(bytes - position).unwrap_or(usize::MAX));
            let count = self.from.read(&mut chunk[..wanted])?;
            if count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            for byte in &chunk[..count] {
                if *byte != stream_byte(position) {
                    return Err(io::Error::other(format!("byte {position} of the download is wrong")));
                }
                position += 1;
            }
            progress(position);
        }
        Ok(())
    }
}

/// What a load has seen.
#[derive(Debug, Default)]
pub struct Load {
    /// Time from each request to its answer.
    pub times: Vec<Duration>,
    /// How long all of it took.
    pub took: Duration,
}

/// Counts up a register of its own on each of `connections` connections, one request at a time on each, for `duration`.
///
/// # Errors
/// A connection is lost, or a register does not go up by one.
pub fn load(address: SocketAddr, connections: u64, duration: Duration) -> io::Result<Load> {
    let mut clients =
        (0..connections).map(|_| Client::connect(address)).collect::<io::Result<Vec<Client>>>()?;
    let began = Instant::now();
    let one = |(register, client): (u64, &mut Client)| -> io::Result<Vec<Duration>> {
        let mut times = Vec::new();
        let mut last = client.number(&Request::Get { register })?;
        while began.elapsed() < duration {
            let asked = Instant::now();
            let value = client.number(&Request::Increment { register })?;
            times.push(asked.elapsed());
            if value != last + 1 {
                return Err(io::Error::other(format!("register {register} went from {last} to {value}")));
            }
            last = value;
        }
        Ok(times)
    };
    let series = thread::scope(|scope| {
        let running: Vec<_> =
            (0..).zip(&mut clients).map(|client| scope.spawn(move || one(client))).collect();
        running
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<io::Result<Vec<_>>>()
    })?;
    Ok(Load { times: series.concat(), took: began.elapsed() })
}
