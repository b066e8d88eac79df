//! The mirror's link, led through this process: so it can be cut, one way or both, and slowed.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::net::sockopt;

/// Bytes that are led on at a time.
const CHUNK: usize = 16 << 10;

/// What the kernel may keep of each connection and direction: a network holds little, so that a cut loses what is sent
/// after it, and a slow one is felt at once.
const BUFFER: usize = 64 << 10;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From whoever connected to whoever listens: from primary to standby.
    Forth,
    /// The other.
    Back,
}

/// How a direction is.
#[derive(Clone, Copy, Debug, Default)]
struct Condition {
    cut: bool,
    /// Time for each chunk, on top of all else.
    delay: Duration,
}

#[derive(Default)]
struct Shared {
    conditions: Mutex<[Condition; 2]>,
    changed: Condvar,
}

/// A relay. It serves until its process ends.
pub struct Relay {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Relay {
    /// Leads all that connects to the relay on to `target`, a `HOST:PORT`.
    ///
    /// # Errors
    /// It cannot listen.
    pub fn start(target: &str) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let relay = Self { address: listener.local_addr()?, shared: Arc::default() };
        let (shared, target) = (Arc::clone(&relay.shared), target.to_owned());
        thread::Builder::new().name("relay".into()).spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // Who cannot be led on is closed.
                let _ = TcpStream::connect(&target).and_then(|far| lead(near, far, &shared));
            }
        })?;
        Ok(relay)
    }

    /// Where to connect instead of to the target.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Cuts a direction: nothing that is sent comes through, and nobody is told.
    pub fn cut(&self, way: Way) {
        self.change(|conditions| conditions[way as usize].cut = true);
    }

    /// Lets each chunk of 16 KiB take `delay`, in both directions.
    pub fn slow(&self, delay: Duration) {
        self.change(|conditions| conditions.iter_mut().for_each(|condition| condition.delay = delay));
    }

    /// Makes all well again. What was sent meanwhile and not lost comes through now, late.
    pub fn heal(&self) {
        self.change(|conditions| *conditions = <[Condition; 2]>::default());
    }

    fn change(&self, change: impl FnOnce(&mut [Condition; 2])) {
        change(&mut self.shared.conditions.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.changed.notify_all();
    }
}

impl Shared {
    /// Waits until something may pass.
    fn pass(&self, way: Way) {
        let conditions = self.conditions.lock().unwrap_or_else(PoisonError::into_inner);
        let cut = |conditions: &mut [Condition; 2]| conditions[way as usize].cut;
        let conditions = self.changed.wait_while(conditions, cut).unwrap_or_else(PoisonError::into_inner);
        let delay = conditions[way as usize].delay;
        drop(conditions);
        if !delay.is_zero() {
            thread::sleep(delay);
        }
    }
}

fn lead(near: TcpStream, far: TcpStream, shared: &Arc<Shared>) -> io::Result<()> {
    for stream in [&near, &far] {
        stream.set_nodelay(true)?;
        sockopt::set_socket_recv_buffer_size(stream, BUFFER)?;
        sockopt::set_socket_send_buffer_size(stream, BUFFER)?;
    }
    let (near_too, far_too) = (near.try_clone()?, far.try_clone()?);
    pump(near, far_too, Way::Forth, Arc::clone(shared))?;
    pump(far, near_too, Way::Back, Arc::clone(shared))
}

fn pump(mut from: TcpStream, mut to: TcpStream, way: Way, shared: Arc<Shared>) -> io::Result<()> {
    let run = move || {
        let mut chunk = [0; CHUNK];
        while let Ok(count @ 1..) = from.read(&mut chunk) {
            shared.pass(way);
            if to.write_all(&chunk[..count]).is_err() {
                break;
            }
        }
        // The end of a connection needs the network, too.
        shared.pass(way);
        let _ = to.shutdown(Shutdown::Write);
    };
    thread::Builder::new().name("relay".into()).spawn(run).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A connection through a relay, its other end, and the relay.
    fn through() -> (TcpStream, TcpStream, Relay) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let relay = Relay::start(&listener.local_addr().unwrap().to_string()).unwrap();
        let near = TcpStream::connect(relay.address()).unwrap();
        let far = listener.accept().unwrap().0;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        }
        (near, far, relay)
    }

    fn arrives(mut stream: &TcpStream) -> bool {
        stream.read_exact(&mut [0]).is_ok()
    }

    #[test]
    fn cut_in_one_direction_leaves_the_other_and_heals() {
        let (mut near, mut far, relay) = through();
        relay.cut(Way::Forth);
        near.write_all(b"x").unwrap();
        far.write_all(b"y").unwrap();
        assert!(arrives(&near) && !arrives(&far));
        relay.heal();
        far.set_read_timeout(None).unwrap();
        assert!(arrives(&far), "what was sent during the cut comes late");
    }

    #[test]
    fn end_of_a_connection_is_not_seen_through_a_cut() {
        let (near, far, relay) = through();
        relay.cut(Way::Forth);
        drop(near);
        let error = (&far).read_exact(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        relay.heal();
        far.set_read_timeout(None).unwrap();
        assert_eq!((&far).read_exact(&mut [0]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
