//! The guest's console as a byte stream with positions, and output commit for it.
//!
//! A byte has one position on both sides, counted from the guest's first output. Three marks walk along the stream:
//! `written <= allowed <= produced`. What the guest has produced is held until the mirror allows it (the epoch is
//! committed), and is told to the standby as released only when it has been *written*, that is handed to the kernel:
//! a byte that died in this process's buffer must not be thought of as seen.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Held bytes beyond which the guest is not run until the console drains.
pub const HOLD_LIMIT: u64 = 1 << 20;

/// Most bytes handed to the sink in one write.
const WRITE_CHUNK: usize = 64 << 10;

/// What happens to bytes that the guest produces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Policy {
    /// They may leave at once.
    Pass,
    /// They wait for [`Console::allow`].
    Hold,
    /// Nothing leaves any more.
    Freeze,
}

struct Stream {
    /// The bytes from `written` to `produced`.
    bytes: VecDeque<u8>,
    written: u64,
    allowed: u64,
    policy: Policy,
    /// Why the sink takes no more, if so: what is allowed is then dropped, as a terminal that is gone drops it.
    broken: Option<io::Error>,
    /// Counts the guests that have written here: what is under way to the sink belongs to one of them.
    guests: u64,
}

/// A console whose output is released by the mirror. Shared between the serial port and the mirror.
pub struct Console {
    stream: Mutex<Stream>,
    changed: Condvar,
    /// Copy of the produced mark that the pause can read without a lock.
    produced: AtomicU64,
}

impl Console {
    /// A console that writes to `sink` from a thread of its own and passes everything at once until told to hold.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn new(sink: impl Write + Send + 'static) -> io::Result<Arc<Self>> {
        let console = Arc::new(Self {
            stream: Mutex::new(Stream {
                bytes: VecDeque::with_capacity(WRITE_CHUNK),
                written: 0,
                allowed: 0,
                policy: Policy::Pass,
                broken: None,
                guests: 0,
            }),
            changed: Condvar::new(),
            produced: AtomicU64::new(0),
        });
        let writer = Arc::clone(&console);
        thread::Builder::new().name("console".into()).spawn(move || writer.write_out(sink))?;
        Ok(console)
    }

    /// Appends what the guest wrote. Never blocks for long and never drops; see [`Self::has_room`].
    pub fn push(&self, bytes: &[u8]) {
        let mut stream = self.lock();
        stream.bytes.extend(bytes);
        let produced = self.produced.load(Ordering::Relaxed) + bytes.len() as u64;
        self.produced.store(produced, Ordering::Release);
        if stream.policy == Policy::Pass {
            stream.allowed = produced;
            self.changed.notify_all();
        }
    }

    /// How many bytes wait here.
    pub fn held(&self) -> u64 {
        let stream = self.lock();
        self.produced() - stream.written
    }

    /// Whether the guest may go on producing. A vCPU that finds no room waits before it runs on.
    pub fn has_room(&self) -> bool {
        self.held() < HOLD_LIMIT
    }

    /// Position after the last byte that the guest produced. Takes no lock: exact while the guest is paused.
    pub fn produced(&self) -> u64 {
        self.produced.load(Ordering::Acquire)
    }

    /// Position after the last byte that has left this process.
    pub fn written(&self) -> u64 {
        self.lock().written
    }

    /// From now on what the guest produces waits for [`Self::allow`].
    pub fn hold(&self) {
        let mut stream = self.lock();
        if stream.policy == Policy::Pass {
            stream.policy = Policy::Hold;
        }
    }

    /// Releases held bytes up to position `end`: their epoch is committed.
    pub fn allow(&self, end: u64) {
        let mut stream = self.lock();
        if stream.policy != Policy::Freeze {
            stream.allowed = stream.allowed.max(end.min(self.produced()));
            self.changed.notify_all();
        }
    }

    /// Releases everything, now and later: nobody mirrors this guest any more, and it is the live one.
    pub fn pass(&self) {
        let mut stream = self.lock();
        if stream.policy != Policy::Freeze {
            stream.policy = Policy::Pass;
            stream.allowed = self.produced();
            self.changed.notify_all();
        }
    }

    /// Nothing leaves any more, not even what was allowed before: another side is the live one. Only a chunk that the
    /// writer has handed to the kernel already can still come out; its epoch was committed.
    pub fn freeze(&self) {
        self.lock().policy = Policy::Freeze;
        self.changed.notify_all();
    }

    /// The bytes from position `start` on up to `end`, as far as they are still here, and the position they start at.
    pub fn copy(&self, start: u64, end: u64) -> (u64, Vec<u8>) {
        let stream = self.lock();
        let start = start.max(stream.written);
        let skip = (start - stream.written) as usize;
        let len = end.min(self.produced()).saturating_sub(start) as usize;
        (start, stream.bytes.iter().skip(skip).take(len).copied().collect())
    }

    /// Goes on where another side left off: at position `start`, with `bytes` that it is not known to have written.
    /// They are released at once. What a guest before it has left here, frozen, is forgotten.
    pub fn take_over(&self, start: u64, bytes: &[u8]) {
        let mut stream = self.lock();
        let produced = start + bytes.len() as u64;
        stream.guests += 1;
        stream.policy = Policy::Pass;
        stream.bytes.clear();
        stream.bytes.extend(bytes);
        stream.written = start;
        stream.allowed = produced;
        self.produced.store(produced, Ordering::Release);
        self.changed.notify_all();
    }

    /// Waits until everything that is allowed has been written, so that the process may exit.
    pub fn flush(&self) {
        let mut stream = self.lock();
        while stream.policy != Policy::Freeze && stream.written < stream.allowed && stream.broken.is_none() {
            stream = self.changed.wait(stream).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until everything that is allowed has been written, at most `patience`, and says whether it has.
    pub fn flush_within(&self, patience: Duration) -> bool {
        let until = Instant::now() + patience;
        let mut stream = self.lock();
        while stream.written < stream.allowed {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            stream = self.changed.wait_timeout(stream, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, Stream> {
        // A panic elsewhere cannot leave the marks inconsistent: each is written in one step.
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The writer thread.
    fn write_out(&self, mut sink: impl Write) {
        let mut chunk = Vec::with_capacity(WRITE_CHUNK);
        let mut stream = self.lock();
        loop {
            while stream.policy == Policy::Freeze || stream.written == stream.allowed {
                stream = self.changed.wait(stream).unwrap_or_else(PoisonError::into_inner);
            }
            let len = ((stream.allowed - stream.written) as usize).min(WRITE_CHUNK);
            chunk.clear();
            chunk.extend(stream.bytes.iter().take(len));
            let (broken, guest) = (stream.broken.is_some(), stream.guests);
            drop(stream);
            let outcome = if broken { Ok(len) } else { write_some(&mut sink, &chunk) };
            stream = self.lock();
            match outcome {
                Ok(_) if guest != stream.guests => {}
                Ok(count) => {
                    stream.written += count as u64;
                    stream.bytes.drain(..count);
                }
                Err(error) => stream.broken = Some(error),
            }
            self.changed.notify_all();
        }
    }
}

/// Writes and flushes as much as the sink takes at once.
fn write_some(sink: &mut impl Write, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match sink.write(bytes).and_then(|count| sink.flush().map(|()| count)) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// A sink whose bytes the test receives.
    struct Pipe(Sender<Vec<u8>>);

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console() -> (Arc<Console>, Receiver<Vec<u8>>) {
        let (sender, receiver) = channel();
        (Console::new(Pipe(sender)).unwrap(), receiver)
    }

    #[test]
    fn held_bytes_leave_only_up_to_the_allowed_position() {
        let (console, out) = console();
        console.hold();
        console.push(b"committed, not committed");
        console.allow(9);
        console.flush();
        assert_eq!(out.recv().unwrap(), b"committed");
        assert!(out.try_recv().is_err());
        assert_eq!((console.written(), console.produced()), (9, 24));
    }

    #[test]
    fn frozen_console_releases_nothing_more() {
        let (console, out) = console();
        console.hold();
        console.push(b"abc");
        console.freeze();
        console.allow(3);
        console.pass();
        console.push(b"def");
        console.flush();
        assert!(out.try_recv().is_err());
        assert_eq!(console.written(), 0);
    }

    #[test]
    fn successor_goes_on_at_the_position_it_was_given() {
        let (console, out) = console();
        console.take_over(100, b"xy");
        console.push(b"z");
        console.flush();
        let bytes: Vec<u8> = out.try_iter().flatten().collect();
        assert_eq!(bytes, b"xyz");
        assert_eq!(console.written(), 103);
    }

    #[test]
    fn console_of_a_guest_that_went_away_serves_the_one_that_comes_back() {
        let (console, out) = console();
        console.push(b"seen");
        console.flush();
        console.hold();
        console.push(b"never committed");
        console.freeze();
        console.take_over(4, b" and ");
        console.push(b"on");
        console.flush();
        let bytes: Vec<u8> = out.try_iter().flatten().collect();
        assert_eq!(bytes, b"seen and on");
        assert_eq!((console.written(), console.produced()), (11, 11));
    }

    #[test]
    fn copy_gives_the_bytes_that_are_not_written_yet() {
        let (console, _out) = console();
        console.hold();
        console.push(b"0123456789");
        console.allow(4);
        console.flush();
        assert_eq!(console.copy(0, 8), (4, b"4567".to_vec()));
        assert_eq!(console.copy(6, 99), (6, b"6789".to_vec()));
    }

    #[test]
    fn full_hold_has_no_room_until_it_is_released() {
        let (console, _out) = console();
        console.hold();
        console.push(&vec![b'x'; HOLD_LIMIT as usize]);
        assert!(!console.has_room());
        console.pass();
        console.flush();
        assert!(console.has_room());
    }
}
