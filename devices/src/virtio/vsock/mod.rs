//! A virtio socket device (virtio 1.2, 5.10): the guest's vsock ports as Unix sockets of the host, by Firecracker's
//! conventions.
//!
//! A program of the host connects to `uds_path` and names a port of the guest; a connection of the guest to port `P` of
//! the host goes to the Unix socket `uds_path_P`. What the guest sends is held until the epoch that knows of it is
//! committed. Connections do not survive a move: their other ends are with the old process. The guest is told so, and
//! drops them; its listening sockets stay.

mod caller;
mod connection;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::epoll;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::epoll::EventSet;

use self::caller::{Caller, Said};
use self::connection::{Connection, Phase};
use self::packet::{HEADER, HOST_CID, Header, NO_SEND, Op, STREAM};
use super::chain::Chain;
use super::counters::{DeviceCounters, VsockCounters};
use super::device::{DeviceError, DeviceType, Source, VirtioDevice, read_config};
use super::held::{Held, OutputPolicy};
use super::listener::{Listener, connect};
use super::queue::VirtQueue;
use super::slot::RestoreError;
use super::state::DeviceState;
use crate::timer::Timer;

/// Descriptors of each queue.
pub const QUEUE_SIZE: u16 = 256;
const SEND: usize = 1;

/// Most connections, and most programs of the host that have not said which port they want.
pub const MAX_CONNECTIONS: usize = 1024;
/// Most bytes of one packet, either way.
const MAX_PACKET: usize = 64 << 10;
/// Most answers that wait for a buffer of the guest; a guest that gives none loses the rest.
const MAX_ANSWERS: usize = 4096;
/// Most packets that are worked off before others get their turn.
const BATCH: usize = 256;
/// Local ports of connections that the host has asked for are counted from here on.
const FIRST_PORT: u32 = 1 << 30;
/// How long to wait before the socket's path is tried again, which the old side may still have.
const RETRY: Duration = Duration::from_millis(50);
/// The listener's mark among the descriptors; connections and callers have numbers from 1 on.
const LISTENER: u64 = 0;

/// What a socket device is made from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's address, at least 3.
    pub guest_cid: u32,
    /// The Unix socket for programs that want to connect to the guest, and the beginning of the names of those that the
    /// guest connects to.
    pub uds_path: PathBuf,
}

/// What a socket device holds beyond its registers and queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// Heads of the packets that the guest has sent and nobody has looked at.
    pub in_flight: Vec<u16>,
}

/// Why a socket device cannot be had.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Descriptors.
    #[error("cannot set up the vsock device: {0}")]
    Descriptors(#[from] io::Error),
    /// The folder of the socket is not there.
    #[error("the folder of the vsock socket {0} is not there: create it")]
    Folder(PathBuf),
}

/// The two ports of a connection: the host's, the guest's.
type Ports = (u32, u32);

/// A virtio socket device.
pub struct Vsock {
    cid: u64,
    path: PathBuf,
    listener: Option<Listener>,
    epoll: OwnedFd,
    retry: Timer,
    connections: BTreeMap<Ports, (u64, Connection)>,
    callers: BTreeMap<u64, Caller>,
    /// Which connection a number among the descriptors stands for.
    numbers: BTreeMap<u64, Ports>,
    next_number: u64,
    next_port: u32,
    /// Answers that wait for buffers of the guest.
    answers: VecDeque<Header>,
    /// Where to go on looking for bytes for the guest.
    turn: Ports,
    held: Held<Chain>,
    policy: OutputPolicy,
    /// Packets that were in flight when the device was saved: to be completed without effect.
    lost: VecDeque<u16>,
    /// The guest is to be told that all connections are gone.
    tell_reset: bool,
    counters: Arc<VsockCounters>,
}

impl Vsock {
    /// A device whose socket is made when the guest runs here.
    ///
    /// # Errors
    /// [`VsockError`]
    pub fn create(config: &VsockConfig) -> Result<Self, VsockError> {
        let folder = config.uds_path.parent().filter(|folder| !folder.as_os_str().is_empty());
        if folder.is_some_and(|folder| !folder.is_dir()) {
            return Err(VsockError::Folder(config.uds_path.clone()));
        }
        Ok(Self {
            cid: config.guest_cid.into(),
            path: config.uds_path.clone(),
            listener: None,
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC).map_err(io::Error::from)?,
            retry: Timer::new()?,
            connections: BTreeMap::new(),
            callers: BTreeMap::new(),
            numbers: BTreeMap::new(),
            next_number: LISTENER + 1,
            next_port: FIRST_PORT,
            answers: VecDeque::new(),
            turn: (0, 0),
            held: Held::with_capacity(QUEUE_SIZE.into()),
            policy: OutputPolicy::Pass,
            lost: VecDeque::new(),
            tell_reset: false,
            counters: Arc::default(),
        })
    }

    /// Listens, if the guest runs here.
    fn listen(&mut self) {
        if self.listener.is_some() || self.policy == OutputPolicy::Freeze {
            return;
        }
        match Listener::bind(&self.path) {
            Ok(listener) if self.watch(&listener, LISTENER, epoll::EventFlags::IN) => {
                self.listener = Some(listener);
            }
            // The side that had the guest before may have it still.
            _ => self.retry.set(RETRY),
        }
    }

    fn watch(&self, what: &impl AsFd, number: u64, flags: epoll::EventFlags) -> bool {
        epoll::add(&self.epoll, what, epoll::EventData::new_u64(number), flags).is_ok()
    }

    fn watch_stream(&self, stream: &UnixStream, number: u64) -> bool {
        self.watch(stream, number, epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET)
    }

    fn number(&mut self) -> u64 {
        let number = self.next_number;
        self.next_number += 1;
        number
    }

    /// Takes notice of what has happened on the host's sockets.
    fn hear(&mut self) {
        let mut events = [const {
            epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }
        }; 64];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        let Ok(count) = epoll::wait(&self.epoll, &mut events[..], Some(&now)) else { return };
        for event in &events[..count] {
            match event.data.u64() {
                LISTENER => self.accept(),
                number if self.callers.contains_key(&number) => self.listen_to(number),
                number => self.wake(number),
            }
        }
    }

    fn accept(&mut self) {
        while let Some(stream) = self.listener.as_ref().and_then(Listener::accept) {
            let number = self.number();
            if self.callers.len() < MAX_CONNECTIONS && self.watch_stream(&stream, number) {
                self.callers.insert(number, Caller::new(stream));
                self.listen_to(number);
            }
        }
    }

    fn listen_to(&mut self, number: u64) {
        let Some(caller) = self.callers.get_mut(&number) else { return };
        match caller.listen() {
            Said::Nothing => {}
            Said::Nonsense => drop(self.callers.remove(&number)),
            Said::Port(port) => {
                let Some(caller) = self.callers.remove(&number) else { return };
                let ports = (self.free_port(port), port);
                if self.connections.len() < MAX_CONNECTIONS {
                    self.counters.from_host.add(1);
                    self.connections.insert(ports, (number, Connection::new(caller.stream, Phase::Asked)));
                    self.numbers.insert(number, ports);
                    self.answer(ports, Op::Request, 0);
                }
            }
        }
    }

    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = self.next_port.checked_add(1).unwrap_or(FIRST_PORT);
            if !self.connections.contains_key(&(port, guest)) {
                return port;
            }
        }
    }

    /// A connection's socket can be read or written again.
    fn wake(&mut self, number: u64) {
        let Some(&ports) = self.numbers.get(&number) else { return };
        let Some((_, connection)) = self.connections.get_mut(&ports) else { return };
        connection.readable = true;
        if connection.pass_on().is_err() {
            self.reset(ports);
        } else if connection.should_tell() {
            self.answer(ports, Op::CreditUpdate, 0);
        }
    }

    /// Lets a packet of `op` follow to the guest.
    fn answer(&mut self, ports: Ports, op: Op, flags: u32) {
        let (buf_alloc, fwd_cnt) = match self.connections.get_mut(&ports) {
            Some((_, connection)) => connection.tell_credit(),
            None => (0, 0),
        };
        if self.answers.len() < MAX_ANSWERS {
            self.answers.push_back(self.header(ports, op, 0, flags, (buf_alloc, fwd_cnt)));
        }
    }

    fn header(
        &self,
        (host, guest): Ports,
        op: Op,
        len: u32,
        flags: u32,
        (buf_alloc, fwd_cnt): (u32, u32),
    ) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: host,
            dst_port: guest,
            len,
            kind: STREAM,
            op: op as u16,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, ports: Ports) {
        self.counters.errors.add(1);
        self.forget(ports);
        self.answer(ports, Op::Reset, 0);
    }

    fn forget(&mut self, ports: Ports) {
        if let Some((number, _)) = self.connections.remove(&ports) {
            self.numbers.remove(&number);
            self.counters.closed.add(1);
        }
    }

    /// Acts on a packet of the guest.
    fn act_on(&mut self, chain: &Chain) -> Result<(), DeviceError> {
        let mut bytes = [0; HEADER];
        if chain.read(0, &mut bytes) < HEADER {
            return Err(DeviceError::Request("a vsock packet without header"));
        }
        let header = Header::decode(&bytes);
        let room = chain.readable_len() as usize - HEADER;
        let ports = (header.dst_port, header.src_port);
        if header.dst_cid != HOST_CID || header.src_cid != self.cid {
            // For nobody who could answer.
            return Ok(());
        }
        let op = header.op().filter(|_| header.kind == STREAM && header.len as usize <= room.min(MAX_PACKET));
        let Some(op) = op else {
            self.reset(ports);
            return Ok(());
        };
        if op == Op::Request {
            self.connect(ports, &header);
            return Ok(());
        }
        let Some((_, connection)) = self.connections.get_mut(&ports) else {
            if op != Op::Reset {
                self.answer(ports, Op::Reset, 0);
            }
            return Ok(());
        };
        connection.note_credit(header.buf_alloc, header.fwd_cnt);
        match (op, connection.phase) {
            (Op::Reset, _) => self.forget(ports),
            (Op::Response, Phase::Asked) => {
                connection.phase = Phase::Open;
                let ok = format!("OK {}\n", ports.0);
                // A fresh socket takes a line.
                if (&connection.stream).write_all(ok.as_bytes()).is_err() {
                    self.reset(ports);
                }
            }
            (Op::Shutdown, _) => {
                if connection.shut_down(header.flags) {
                    // How an orderly end is answered.
                    self.forget(ports);
                    self.answer(ports, Op::Reset, 0);
                }
            }
            (Op::Data, Phase::Open) => {
                let mut data = vec![0; header.len as usize];
                chain.read(HEADER as u32, &mut data);
                self.counters.sent.add(1);
                self.counters.sent_bytes.add(data.len() as u64);
                if connection.take(&data).is_err() {
                    self.reset(ports);
                } else if connection.should_tell() {
                    self.answer(ports, Op::CreditUpdate, 0);
                }
            }
            (Op::CreditUpdate, _) => {}
            (Op::CreditRequest, _) => self.answer(ports, Op::CreditUpdate, 0),
            _ => self.reset(ports),
        }
        Ok(())
    }

    /// The guest wants to connect to a port of the host.
    fn connect(&mut self, ports: Ports, header: &Header) {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", ports.0));
        let full = self.connections.len() >= MAX_CONNECTIONS || self.connections.contains_key(&ports);
        let stream = (!full).then(|| connect(path.as_ref())).and_then(Result::ok);
        let number = self.number();
        let stream = stream.filter(|stream| self.watch_stream(stream, number));
        let Some(stream) = stream else {
            self.reset(ports);
            return;
        };
        let mut connection = Connection::new(stream, Phase::Open);
        connection.note_credit(header.buf_alloc, header.fwd_cnt);
        self.counters.from_guest.add(1);
        self.connections.insert(ports, (number, connection));
        self.numbers.insert(number, ports);
        self.answer(ports, Op::Response, 0);
    }

    /// Takes what the guest sends.
    fn take(&mut self, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        let mut packets = 0;
        loop {
            queue.silence()?;
            while packets < BATCH
                && let Some(chain) = queue.pop()?
            {
                if self.held.len() >= usize::from(queue.size()) {
                    return Err(DeviceError::Request("more vsock packets in flight than the queue is long"));
                }
                self.held.push(chain);
                packets += 1;
            }
            if packets == BATCH {
                return Ok(true);
            }
            if !queue.listen()? {
                return Ok(false);
            }
        }
    }

    /// Acts on what may be acted on.
    fn carry_out(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        let mut any = false;
        while let Some(head) = self.lost.pop_front() {
            queue.complete(head, 0)?;
            any = true;
        }
        while let Some(chain) = self.held.pop() {
            self.act_on(&chain)?;
            queue.complete(chain.head(), 0)?;
            any = true;
        }
        if any { Ok(queue.notify()?) } else { Ok(()) }
    }

    /// The connection that may send bytes to the guest next, in turn.
    fn next_reader(&self) -> Option<Ports> {
        let ready =
            |(ports, (_, connection)): (&Ports, &(u64, Connection))| connection.may_read().then_some(*ports);
        let after = (std::ops::Bound::Excluded(self.turn), std::ops::Bound::Unbounded);
        self.connections
            .range(after)
            .find_map(ready)
            .or_else(|| self.connections.range(..=self.turn).find_map(ready))
    }

    /// Sends what there is to the guest; says whether there is more.
    fn deliver(&mut self, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        let (mut sent, mut more) = (0, false);
        queue.silence()?;
        while !self.answers.is_empty() || self.next_reader().is_some() {
            if sent == BATCH {
                more = true;
                break;
            }
            let Some(chain) = queue.pop()? else {
                if queue.listen()? {
                    queue.silence()?;
                    continue;
                }
                break;
            };
            if (chain.writable_len() as usize) < HEADER {
                return Err(DeviceError::Request("a vsock buffer that has no room for a header"));
            }
            if self.fill(&chain, queue)? {
                sent += 1;
            } else {
                queue.undo_pop();
            }
        }
        if sent > 0 {
            queue.notify()?;
        }
        Ok(more)
    }

    /// Fills a buffer of the guest with the next packet; says whether there was one.
    fn fill(&mut self, chain: &Chain, queue: &mut VirtQueue) -> Result<bool, DeviceError> {
        if let Some(answer) = self.answers.pop_front() {
            chain.write(0, &answer.encode());
            queue.complete(chain.head(), HEADER as u32)?;
            return Ok(true);
        }
        let room = (chain.writable_len() as usize - HEADER).min(MAX_PACKET);
        if room == 0 {
            return Err(DeviceError::Request("a vsock buffer that has no room for data"));
        }
        let Some(ports) = self.next_reader() else { return Ok(false) };
        self.turn = ports;
        let Some((_, connection)) = self.connections.get_mut(&ports) else { return Ok(false) };
        let mut data = vec![0; room];
        match connection.read(&mut data) {
            Ok(0) => Ok(false),
            Ok(count) => {
                self.counters.received.add(1);
                self.counters.received_bytes.add(count as u64);
                let credit = connection.tell_credit();
                let header = self.header(ports, Op::Data, count as u32, 0, credit);
                chain.write(0, &header.encode());
                chain.write(HEADER as u32, &data[..count]);
                queue.complete(chain.head(), (HEADER + count) as u32)?;
                Ok(true)
            }
            Err(_) => {
                // It can still be written to: the guest is told only that nothing more comes.
                self.answer(ports, Op::Shutdown, NO_SEND);
                Ok(false)
            }
        }
    }

    /// Tells the guest that all its connections are gone (virtio 1.2, 5.10.6.7).
    fn tell(&mut self, queue: &mut VirtQueue) -> Result<(), DeviceError> {
        while self.tell_reset {
            if let Some(chain) = queue.pop()? {
                let written = chain.write(0, &0_u32.to_le_bytes());
                queue.complete(chain.head(), written as u32)?;
                self.tell_reset = false;
                queue.notify()?;
            } else if !queue.listen()? {
                break;
            }
        }
        Ok(())
    }

    fn work(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let [receive, send, event] = queues else { return Ok(()) };
        self.listen();
        self.hear();
        self.tell(event)?;
        self.carry_out(send)?;
        let more_out = self.take(send)?;
        self.carry_out(send)?;
        let more_in = self.deliver(receive)?;
        if more_out || more_in {
            self.retry.set(Duration::ZERO);
        }
        Ok(())
    }

    fn drop_everything(&mut self) {
        self.listener = None;
        self.counters.closed.add(self.connections.len() as u64);
        self.connections.clear();
        self.callers.clear();
        self.numbers.clear();
        self.answers.clear();
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn counters(&self) -> DeviceCounters {
        DeviceCounters::Vsock(Arc::clone(&self.counters))
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 3]
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _features: u64, _queues: &mut [VirtQueue]) {
        // The socket is made when the device loop comes to it: not while the guest stands still here.
        self.retry.set(Duration::ZERO);
    }

    fn reset(&mut self) {
        self.drop_everything();
        self.held.clear();
        self.lost.clear();
        self.tell_reset = false;
    }

    fn doorbell(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.work(queues)
    }

    fn sources(&self) -> Vec<Source> {
        let source = |fd| Source { fd, events: EventSet::IN };
        vec![source(self.epoll.as_fd().as_raw_fd()), source(self.retry.as_raw_fd())]
    }

    fn ready(&mut self, _index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.retry.clear();
        if queues.is_empty() {
            // Without a driver nobody listens.
            self.drop_everything();
        }
        self.work(queues)
    }

    fn set_output(&mut self, policy: OutputPolicy) {
        self.held.set_policy(policy);
        if self.policy != OutputPolicy::Freeze {
            self.policy = policy;
        }
        if self.policy == OutputPolicy::Freeze {
            // The live side wants the socket.
            self.drop_everything();
        }
    }

    fn release_output(&mut self) {
        self.held.release();
    }

    fn output_waits(&self) -> bool {
        self.held.waits()
    }

    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.work(queues)
    }

    fn save(&mut self, state: &mut DeviceState) {
        if !matches!(state, DeviceState::Vsock(_)) {
            let in_flight = Vec::with_capacity(QUEUE_SIZE.into());
            *state = DeviceState::Vsock(VsockState { in_flight });
        }
        if let DeviceState::Vsock(state) = state {
            state.in_flight.clear();
            state.in_flight.extend(self.lost.iter().copied().chain(self.held.iter().map(Chain::head)));
        }
        self.held.mark();
    }

    fn restore(&mut self, state: &DeviceState, queues: &mut [VirtQueue]) -> Result<(), RestoreError> {
        let DeviceState::Vsock(state) = state else { return Err(RestoreError::Kind(DeviceType::Vsock)) };
        let size = queues.get(SEND).map_or(0, |queue| usize::from(queue.size()));
        if state.in_flight.len() > size || state.in_flight.iter().any(|&head| usize::from(head) >= size) {
            let reason = "packets are in flight that its queue cannot have";
            return Err(RestoreError::Field { device: DeviceType::Vsock, reason });
        }
        self.lost.extend(&state.in_flight);
        self.tell_reset = !queues.is_empty();
        Ok(())
    }
}
