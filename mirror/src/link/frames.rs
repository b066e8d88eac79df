//! Frames on a stream: numbered, sealed, verified.

use std::io::{self, IoSlice, Read};
use std::net::Shutdown;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::socket::Stream;
use crate::ids::{Epoch, Guid, Term};
use crate::wire::header::{FrameError, HEADER_LEN, Header, Kind};
use crate::wire::message::{Body, Message};
use crate::wire::pages::{BatchEncoder, BufferPool};

/// GUID, term and epoch of a header.
pub type Stamp = (Guid, Term, Epoch);

/// The sending half of a link. Clones send on the same link, one frame at a time.
#[derive(Clone, Debug)]
pub struct FrameWriter {
    stream: Arc<Stream>,
    next: Arc<Mutex<Next>>,
}

/// What the next frame has to know of those before it.
#[derive(Debug)]
struct Next {
    sequence: u64,
    /// When the last one had gone.
    idle_since: Instant,
    /// Part of one may have gone, so that nothing can follow it.
    broken: bool,
}

/// What a sent frame came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// Bytes on the wire.
    pub bytes: u64,
    /// The frame's checksum, for the digest of its round or epoch.
    pub checksum: u64,
}

impl FrameWriter {
    /// The sending half of `stream`.
    pub fn new(stream: Arc<Stream>) -> Self {
        Self {
            stream,
            next: Arc::new(Mutex::new(Next { sequence: 0, idle_since: Instant::now(), broken: false })),
        }
    }

    /// Sends `message` if nothing else is being sent or was sent less than `silence` ago: what is on its way is a sign of
    /// life itself. `stamp` is asked for when nothing else can be sent before.
    ///
    /// # Errors
    /// As [`Self::send`].
    pub fn break_silence(
        &self,
        silence: Duration,
        stamp: impl FnOnce() -> Stamp,
        message: &Message,
    ) -> io::Result<()> {
        let next = match self.next.try_lock() {
            Ok(next) => next,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return Ok(()),
        };
        if next.idle_since.elapsed() >= silence {
            let payload = message.encode();
            self.write_next(next, Kind::Message, stamp(), std::iter::once(payload.as_slice()))?;
        }
        Ok(())
    }

    /// Sends a message.
    ///
    /// # Errors
    /// The link is then broken: part of the frame may have gone.
    pub fn send(&mut self, stamp: Stamp, message: &Message) -> io::Result<Sent> {
        let payload = message.encode();
        self.write(Kind::Message, stamp, std::iter::once(payload.as_slice()))
    }

    /// Sends what `encoder` made of `bodies`.
    ///
    /// # Errors
    /// The link is then broken: part of the frame may have gone.
    pub fn send_pages(&mut self, stamp: Stamp, encoder: &BatchEncoder, bodies: &[u8]) -> io::Result<Sent> {
        self.write(Kind::Pages, stamp, encoder.pieces(bodies))
    }

    /// Ends the link, after what was sent on it has gone.
    pub fn close(&self, how: Shutdown) {
        self.stream.shutdown(how);
    }

    fn write<'a>(
        &mut self,
        kind: Kind,
        stamp: Stamp,
        payload: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> io::Result<Sent> {
        let next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_next(next, kind, stamp, payload)
    }

    fn write_next<'a>(
        &self,
        mut next: MutexGuard<'_, Next>,
        kind: Kind,
        stamp: Stamp,
        payload: impl Iterator<Item = &'a [u8]> + Clone,
    ) -> io::Result<Sent> {
        if next.broken {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "an earlier frame could not be sent"));
        }
        let header = Header::seal(kind, stamp, next.sequence, payload.clone());
        next.sequence += 1;
        let head = header.to_bytes();
        let mut pieces = vec![IoSlice::new(&head)];
        for piece in payload {
            pieces.push(IoSlice::new(piece));
        }
        next.broken = true;
        write_all(&self.stream, &mut pieces)?;
        next.broken = false;
        next.idle_since = Instant::now();
        Ok(Sent { bytes: HEADER_LEN as u64 + u64::from(header.length), checksum: header.checksum })
    }
}

/// Returns when the system has taken all of it. How long that takes in all does not matter, as long as it goes on.
fn write_all(stream: &Stream, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !pieces.is_empty() {
        match stream.write_what_fits(pieces) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut pieces, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if !stream.await_space()? {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the other side takes no data"));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Why no frame came.
#[derive(Debug, Error)]
pub enum ReadError {
    /// The other side closed the link between two frames.
    #[error("the other side closed the link")]
    Closed,
    /// The link broke.
    #[error("the link broke: {0}")]
    Io(#[from] io::Error),
    /// What came is not a frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// A frame, verified.
#[derive(Debug)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// What it held.
    pub body: Body,
}

/// The receiving half of a link.
#[derive(Debug)]
pub struct FrameReader {
    stream: Arc<Stream>,
    pool: BufferPool,
    sequence: u64,
}

impl FrameReader {
    /// The receiving half of `stream`; payloads lie in buffers of `pool`.
    pub fn new(stream: Arc<Stream>, pool: BufferPool) -> Self {
        Self { stream, pool, sequence: 0 }
    }

    /// A link on which nothing comes for `limit` makes [`Self::receive`] return.
    ///
    /// # Errors
    /// The socket does not take the option.
    pub fn set_idle_limit(&self, limit: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(limit)
    }

    /// Waits for the next frame; `None` if nothing came for as long as the idle limit.
    ///
    /// # Errors
    /// [`ReadError`]; the link is of no more use then.
    pub fn receive(&mut self) -> Result<Option<Frame>, ReadError> {
        let mut head = [0; HEADER_LEN];
        match self.fill(&mut head) {
            Ok(()) => {}
            Err(Stop::Idle) => return Ok(None),
            Err(Stop::Error(error)) => return Err(error),
        }
        let header = Header::parse(&head)?;
        let mut payload = self.pool.take(header.length as usize);
        match self.fill(&mut payload) {
            Ok(()) => {}
            Err(Stop::Idle | Stop::Error(ReadError::Closed)) if !payload.is_empty() => {
                return Err(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "it ended in the middle of a frame",
                )
                .into());
            }
            Err(Stop::Idle) => return Ok(None),
            Err(Stop::Error(error)) => return Err(error),
        }
        header.verify(self.sequence, &payload)?;
        self.sequence += 1;
        let body = match header.kind {
            Kind::Pages => Body::Pages(payload),
            Kind::Message => Body::Message(
                Message::decode(&payload)
                    .map_err(|reason| FrameError::Payload { sequence: header.sequence, reason })?,
            ),
        };
        Ok(Some(Frame { header, body }))
    }

    fn fill(&self, into: &mut [u8]) -> Result<(), Stop> {
        let mut stream = &*self.stream;
        let mut filled = 0;
        while filled < into.len() {
            match stream.read(&mut into[filled..]) {
                Ok(0) if filled == 0 => return Err(Stop::Error(ReadError::Closed)),
                Ok(0) => return Err(Stop::Error(io::Error::from(io::ErrorKind::UnexpectedEof).into())),
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && filled == 0 => {
                    return Err(Stop::Idle);
                }
                Err(error) => return Err(Stop::Error(error.into())),
            }
        }
        Ok(())
    }
}

enum Stop {
    Idle,
    Error(ReadError),
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::*;

    const STAMP: Stamp = (Guid::from_u128(1), Term(2), Epoch(3));

    fn link() -> (FrameWriter, FrameReader, Arc<Stream>) {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b) = (Arc::new(Stream::Unix(a)), Arc::new(Stream::Unix(b)));
        (FrameWriter::new(Arc::clone(&a)), FrameReader::new(b, BufferPool::default()), a)
    }

    #[test]
    fn frames_arrive_in_order_with_their_stamps() {
        let (mut writer, mut reader, _) = link();
        for released in 0..3 {
            writer.send(STAMP, &Message::Heartbeat { released, epoch_within_ms: 0 }).unwrap();
        }
        for released in 0..3 {
            let frame = reader.receive().unwrap().unwrap();
            assert_eq!((frame.header.guid, frame.header.term, frame.header.epoch), STAMP);
            assert!(
                matches!(frame.body, Body::Message(Message::Heartbeat { released: got, .. }) if got == released)
            );
        }
    }

    #[test]
    fn closed_link_is_told_apart_from_a_cut_frame() {
        let (mut writer, mut reader, stream) = link();
        writer.send(STAMP, &Message::Allocated).unwrap();
        (&*stream).write_all(&[b'U'; 10]).unwrap();
        stream.shutdown(Shutdown::Both);
        assert!(reader.receive().unwrap().is_some());
        assert!(matches!(reader.receive(), Err(ReadError::Io(_))));

        let (writer, mut reader, _) = link();
        writer.close(Shutdown::Both);
        assert!(matches!(reader.receive(), Err(ReadError::Closed)));
    }

    #[test]
    fn silence_is_reported_as_idle() {
        let (_writer, mut reader, _stream) = link();
        reader.set_idle_limit(Duration::from_millis(1)).unwrap();
        assert!(matches!(reader.receive(), Ok(None)));
    }

    #[test]
    fn side_that_takes_no_data_times_out_once() {
        let (mut writer, _reader, stream) = link();
        let limit = Duration::from_millis(500);
        stream.set_write_timeout(limit).unwrap();
        // A part of it fits: the time counts from there, and not from there again.
        let big = Message::WriteState(vec![0; 1 << 20]);
        let began = Instant::now();
        assert_eq!(writer.send(STAMP, &big).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!((limit..2 * limit).contains(&began.elapsed()), "{:?}", began.elapsed());
        // What follows a part of a frame would be taken for the rest of it.
        let began = Instant::now();
        assert_eq!(writer.send(STAMP, &Message::Allocated).unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(began.elapsed() < limit);
    }

    #[test]
    fn side_that_takes_data_slowly_is_waited_for() {
        let (mut writer, mut reader, stream) = link();
        let limit = Duration::from_secs(1);
        stream.set_write_timeout(limit).unwrap();
        let piece = vec![7; 1 << 20];
        let slowly = std::thread::spawn(move || {
            (0..3)
                .map(|_| {
                    std::thread::sleep(limit / 2);
                    reader.receive().unwrap().unwrap()
                })
                .count()
        });
        for _ in 0..3 {
            writer.send(STAMP, &Message::WriteState(piece.clone())).unwrap();
        }
        assert_eq!(slowly.join().unwrap(), 3);
    }
}
