//! A client of the embedded guest's service that writes down all that it asks and is answered.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use mirror::report::monotonic_us;
use resources::protocol::{Reply, Request, stream_byte};

use crate::history::image::block_key;
use crate::history::{Operation, What};

/// How long an answer may take. Beyond that the service counts as gone.
pub(super) const PATIENCE: Duration = Duration::from_secs(15);

/// How long a single attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(1);

/// Time between two attempts to connect.
const RETRY: Duration = Duration::from_millis(2);

/// A connection to the service, with a history of its own.
pub(super) struct Client {
    number: u32,
    from: BufReader<TcpStream>,
    to: TcpStream,
    line: Vec<u8>,
    history: Vec<Operation>,
}

/// The connection is of no use any more; the history says why.
#[derive(Debug)]
pub(super) struct Gone;

/// What a store came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stored {
    /// It is there.
    Yes,
    /// The disk failed: it may be there or not.
    Perhaps,
}

impl Client {
    /// Connects, and tries so again as long as `wanted`, at most for [`PATIENCE`]. Each connection has a number of its own
    /// from `numbers`.
    ///
    /// # Errors
    /// That of the last attempt.
    pub(super) fn connect(
        address: SocketAddr,
        numbers: &AtomicU32,
        wanted: impl Fn() -> bool,
    ) -> io::Result<Self> {
        let until = Instant::now() + PATIENCE;
        let to = loop {
            match TcpStream::connect_timeout(&address, ATTEMPT) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until || !wanted() => return Err(error),
                Err(_) => std::thread::sleep(RETRY),
            }
        };
        to.set_nodelay(true)?;
        to.set_read_timeout(Some(PATIENCE))?;
        let number = numbers.fetch_add(1, Ordering::Relaxed);
        Ok(Self { number, from: BufReader::new(to.try_clone()?), to, line: Vec::new(), history: Vec::new() })
    }

    /// Reads a register or counter.
    pub(super) fn get(&mut self, register: u64) -> Result<u64, Gone> {
        let what = |value| What::Get { key: register.to_string(), value };
        self.number(&Request::Get { register }, what)
    }

    /// Counts up.
    pub(super) fn increment(&mut self, register: u64) -> Result<u64, Gone> {
        let what = |value| What::Incr { key: register.to_string(), value };
        self.number(&Request::Increment { register }, what)
    }

    /// Sets a register.
    pub(super) fn set(&mut self, register: u64, value: u64) -> Result<(), Gone> {
        let begun = self.begin(What::Set { key: register.to_string(), value });
        match self.ask(&Request::Set { register, value })? {
            Reply::Done => {}
            other => return Err(garbled(&mut self.history, self.number, &other)),
        }
        self.end(begun);
        Ok(())
    }

    /// Stores a value in a block.
    pub(super) fn store(&mut self, block: u64, value: u64) -> Result<Stored, Gone> {
        let begun = self.begin(What::Set { key: block_key(block), value });
        let stored = match self.ask(&Request::Store { block, value })? {
            Reply::Done => Stored::Yes,
            Reply::Refused(_) => Stored::Perhaps,
            other => return Err(garbled(&mut self.history, self.number, &other)),
        };
        if stored == Stored::Yes {
            self.end(begun);
        }
        Ok(stored)
    }

    /// Reads a block.
    pub(super) fn load(&mut self, block: u64) -> Result<(), Gone> {
        let begun = self.begin(What::Get { key: block_key(block), value: None });
        let value = match self.ask(&Request::Load { block })? {
            Reply::Value(value) => Some(value),
            Reply::Refused(_) => None,
            other => return Err(garbled(&mut self.history, self.number, &other)),
        };
        self.history[begun].what = What::Get { key: block_key(block), value };
        self.end(begun);
        Ok(())
    }

    /// Downloads `bytes` bytes and compares each.
    pub(super) fn download(&mut self, bytes: u64) -> Result<(), Gone> {
        let begun = self.begin(What::Stream { bytes, got: 0, wrong_at: None });
        match self.ask(&Request::Download { bytes })? {
            Reply::Bytes(promised) if promised == bytes => {}
            other => return Err(garbled(&mut self.history, self.number, &other)),
        }
        let (mut got, mut chunk) = (0, [0; 16 << 10]);
        while got < bytes {
            let wanted = chunk.len().min(usize::try_from(bytes - got).unwrap_or(usize::MAX));
            let count = match self.from.read(&mut chunk[..wanted]) {
                Ok(0) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(error) => return Err(self.lost(&error)),
            };
            let wrong = (got..).zip(&chunk[..count]).find(|(at, byte)| **byte != stream_byte(*at));
            got += count as u64;
            self.history[begun].what = What::Stream { bytes, got, wrong_at: wrong.map(|(at, _)| at) };
            if wrong.is_some() {
                return Err(Gone);
            }
        }
        self.end(begun);
        Ok(())
    }

    /// All that was asked.
    pub(super) fn into_history(self) -> Vec<Operation> {
        self.history
    }

    /// A handle that ends the connection, whatever it waits for.
    pub(super) fn handle(&self) -> io::Result<TcpStream> {
        self.to.try_clone()
    }

    fn number(&mut self, request: &Request<'_>, what: impl Fn(Option<u64>) -> What) -> Result<u64, Gone> {
        let begun = self.begin(what(None));
        let value = match self.ask(request)? {
            Reply::Value(value) => value,
            other => return Err(garbled(&mut self.history, self.number, &other)),
        };
        self.history[begun].what = what(Some(value));
        self.end(begun);
        Ok(value)
    }

    fn begin(&mut self, what: What) -> usize {
        self.history.push(Operation {
            connection: self.number,
            start_us: monotonic_us(),
            end_us: None,
            what,
        });
        self.history.len() - 1
    }

    fn end(&mut self, begun: usize) {
        self.history[begun].end_us = Some(monotonic_us());
    }

    /// The reply borrows the line, not the history.
    fn ask(&mut self, request: &Request<'_>) -> Result<Reply<'static>, Gone> {
        let sent = self.to.write_all(request.encode().as_bytes());
        self.line.clear();
        match sent.and_then(|()| self.from.read_until(b'\n', &mut self.line)) {
            Ok(_) if self.line.ends_with(b"\n") => {}
            Ok(_) => return Err(self.lost(&io::ErrorKind::UnexpectedEof.into())),
            Err(error) => return Err(self.lost(&error)),
        }
        match Reply::parse(&self.line[..self.line.len() - 1]) {
            Some(Reply::Done) => Ok(Reply::Done),
            Some(Reply::Value(value)) => Ok(Reply::Value(value)),
            Some(Reply::Bytes(bytes)) => Ok(Reply::Bytes(bytes)),
            Some(Reply::Refused(_)) => Ok(Reply::Refused("")),
            Some(Reply::Echo(_)) | None => {
                let answer = String::from_utf8_lossy(&self.line).trim_end().to_owned();
                self.note(What::Garbled { answer });
                Err(Gone)
            }
        }
    }

    fn lost(&mut self, error: &io::Error) -> Gone {
        self.note(What::Lost { reason: error.to_string() });
        Gone
    }

    fn note(&mut self, what: What) {
        let now_us = monotonic_us();
        self.history.push(Operation {
            connection: self.number,
            start_us: now_us,
            end_us: Some(now_us),
            what,
        });
    }
}

fn garbled(history: &mut Vec<Operation>, connection: u32, reply: &Reply<'_>) -> Gone {
    let now_us = monotonic_us();
    let what = What::Garbled { answer: format!("{reply:?}") };
    history.push(Operation { connection, start_us: now_us, end_us: Some(now_us), what });
    Gone
}
