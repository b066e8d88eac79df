//! Frames on a stream: numbered, sealed, verified.

use std::io::{self, IoSlice, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

use super::socket::Stream;
use crate::ids::{Epoch, Guid, Term};
use crate::wire::header::{FrameError, HEADER_LEN, Header, Kind};
use crate::wire::message::{Body, Message};
use crate::wire::pages::{BatchEncoder, BufferPool};

/// GUID, term and epoch of a header.
pub type Stamp = (Guid, Term, Epoch);

/// The sending half of a link.
#[derive(Debug)]
pub struct FrameWriter {
    stream: Arc<Stream>,
    sequence: u64,
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
        Self { stream, sequence: 0 }
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
        let header = Header::seal(kind, stamp, self.sequence, payload.clone());
        self.sequence += 1;
        let head = header.to_bytes();
        let mut pieces = vec![IoSlice::new(&head)];
        for piece in payload {
            pieces.push(IoSlice::new(piece));
        }
        write_all(&self.stream, &mut pieces)?;
        Ok(Sent { bytes: HEADER_LEN as u64 + u64::from(header.length), checksum: header.checksum })
    }
}

fn write_all(mut stream: &Stream, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
    while !pieces.is_empty() {
        match stream.write_vectored(pieces) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => IoSlice::advance_slices(&mut pieces, count),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the other side takes no data"));
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
            writer.send(STAMP, &Message::Heartbeat { released }).unwrap();
        }
        for released in 0..3 {
            let frame = reader.receive().unwrap().unwrap();
            assert_eq!((frame.header.guid, frame.header.term, frame.header.epoch), STAMP);
            assert!(
                matches!(frame.body, Body::Message(Message::Heartbeat { released: got }) if got == released)
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
    fn side_that_takes_no_data_times_out() {
        let (mut writer, _reader, stream) = link();
        stream.set_write_timeout(Duration::from_millis(10)).unwrap();
        let big = Message::WriteState(vec![0; 1 << 20]);
        let error = (0..16).find_map(|_| writer.send(STAMP, &big).err()).unwrap();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
