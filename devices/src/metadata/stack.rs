//! The service on one network card: ARP, and TCP by smoltcp.
//!
//! Everything here is bounded, whatever the guest does: connections, what each of them buffers, frames that wait for the
//! guest, and the work for each frame that comes.

use std::collections::VecDeque;
use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{
    HardwareAddress, IpAddress, IpCidr, IpEndpoint, IpProtocol, Ipv4Packet, Ipv4Repr, TcpControl, TcpPacket,
    TcpRepr, TcpSeqNumber,
};

use super::http::{self, MAX_REQUEST};
use super::{Metadata, MetadataConfig};

/// Bytes at the beginning of a frame that tell whether it is for the service.
pub const FRAME_START: usize = 42;
/// Most connections at a time.
pub const MAX_CALLERS: usize = 30;
/// Most frames that wait for the guest to take them; what comes then is lost, as on a wire.
const MAX_WAITING: usize = 64;
/// Longest frame that is taken: a segment that fills a connection's buffer, with all headers.
const MAX_FRAME: usize = MAX_REQUEST + 14 + 60 + 60;
/// What a connection buffers on its way to the guest.
const SEND_BUFFER: usize = 4096;
const PORT: u16 = 80;
/// How long a guest may not answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection may be there with nothing going on.
pub(super) const IDLE: Duration = Duration::from_secs(15);
/// Least time between two looks at the clock, so that none is done over and over.
const TICK: Duration = Duration::from_millis(5);

/// The service's address on the wire. Firecracker's has been the same for all guests, and they never meet.
const MAC: [u8; 6] = [0x06, 0x01, 0x23, 0x45, 0x67, 0x01];
const ETHERNET: usize = 14;
const ARP: usize = 28;
const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
/// Ethernet, IPv4, lengths of their addresses.
const ARP_KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];

/// The guest's end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Its address.
    pub address: Ipv4Addr,
    /// Its port.
    pub port: u16,
}

/// Frames between smoltcp, which sees IP packets, and the card.
struct Wire {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    /// Where the guest's last frame came from.
    guest: [u8; 6],
    mtu: usize,
}

impl Wire {
    fn is_full(&self) -> bool {
        self.outgoing.len() >= MAX_WAITING
    }

    /// Sends what `fill` makes of `len` zeros.
    fn send<R>(&mut self, kind: [u8; 2], len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        let mut frame = Vec::with_capacity(ETHERNET + len);
        frame.extend(self.guest);
        frame.extend(MAC);
        frame.extend(kind);
        frame.resize(ETHERNET + len, 0);
        let outcome = fill(&mut frame[ETHERNET..]);
        self.outgoing.push_back(frame);
        outcome
    }
}

struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct Outgoing<'a>(&'a mut Wire);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        self.0.send(TYPE_IPV4, len, fill)
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: StackInstant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        (!self.is_full()).then_some((Incoming(packet), Outgoing(self)))
    }

    fn transmit(&mut self, _now: StackInstant) -> Option<Outgoing<'_>> {
        (!self.is_full()).then_some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        // The guest leaves checksums to its card, which is to say to us, and nothing gets lost between.
        capabilities.checksum.ipv4 = Checksum::Tx;
        capabilities.checksum.tcp = Checksum::Tx;
        capabilities.checksum.icmpv4 = Checksum::Tx;
        capabilities
    }
}

/// A connection, or the place of one.
struct Connection {
    socket: SocketHandle,
    /// What has come of requests that are not answered.
    request: Vec<u8>,
    /// What is still to be sent of an answer.
    answer: Vec<u8>,
    sent: usize,
    /// No other request follows.
    last: bool,
    /// When something happened last; `None` while nobody has called.
    active: Option<Instant>,
}

/// The service on one network card.
pub struct Stack {
    metadata: Metadata,
    config: MetadataConfig,
    wire: Wire,
    interface: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// When time began.
    began: Instant,
}

impl Stack {
    /// The service that `config` describes, with what is in `metadata`, for a guest whose packets have at most `mtu` bytes.
    ///
    /// # Errors
    /// The kernel has no random numbers.
    pub fn new(metadata: &Metadata, config: &MetadataConfig, mtu: u16) -> io::Result<Self> {
        let mut seed = [0; 8];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())?;
        // Less than every host must take, and smoltcp has no use for it.
        let mtu = usize::from(mtu).clamp(576, 9216);
        let mut wire = Wire { incoming: None, outgoing: VecDeque::new(), guest: [0xff; 6], mtu };
        let mut options = Config::new(HardwareAddress::Ip);
        options.random_seed = u64::from_ne_bytes(seed);
        let mut interface = Interface::new(options, &mut wire, StackInstant::ZERO);
        interface.update_ip_addrs(|list| {
            // It has room for one.
            let _ = list.push(IpCidr::new(IpAddress::Ipv4(config.address), 32));
        });
        // Every address is behind this one card.
        let _ = interface.routes_mut().add_default_ipv4_route(config.address);
        let now = Instant::now();
        let mut sockets = SocketSet::new(Vec::with_capacity(MAX_CALLERS));
        let connections = (0..MAX_CALLERS).map(|_| Connection::new(&mut sockets)).collect();
        let (metadata, config) = (metadata.clone(), config.clone());
        Ok(Self { metadata, config, wire, interface, sockets, connections, began: now })
    }

    /// What the service tells about.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Whether a frame that begins with `start`, its first [`FRAME_START`] bytes, is for the service and for nobody else.
    pub fn is_for_it(&self, start: &[u8]) -> bool {
        let address = self.config.address.octets();
        match start.get(12..14) {
            Some(kind) if kind == TYPE_IPV4 => start.get(30..34) == Some(&address),
            // A request: who has this address?
            Some(kind) if kind == TYPE_ARP => {
                start.get(14..20) == Some(&ARP_KIND)
                    && start.get(20..22) == Some(&[0, 1])
                    && start.get(38..42) == Some(&address)
            }
            _ => false,
        }
    }

    /// Takes a frame from the guest, for which [`is_for_it`](Self::is_for_it) is true. One that is too long is lost.
    pub fn take(&mut self, frame: &[u8]) {
        self.take_at(frame, Instant::now());
    }

    pub(super) fn take_at(&mut self, frame: &[u8], now: Instant) {
        if frame.len() < ETHERNET || frame.len() > MAX_FRAME {
            return;
        }
        self.wire.guest.copy_from_slice(&frame[6..12]);
        if frame[12..14] == TYPE_ARP {
            self.answer_arp(&frame[ETHERNET..]);
        } else {
            self.wire.incoming = Some(frame[ETHERNET..].into());
            self.work_at(now);
        }
    }

    /// RFC 826.
    fn answer_arp(&mut self, request: &[u8]) {
        let Some(asker) = request.get(8..18) else { return };
        if self.wire.is_full() {
            return;
        }
        let address = self.config.address.octets();
        self.wire.send(TYPE_ARP, ARP, |answer| {
            answer[..6].copy_from_slice(&ARP_KIND);
            answer[6..8].copy_from_slice(&[0, 2]);
            answer[8..14].copy_from_slice(&MAC);
            answer[14..18].copy_from_slice(&address);
            answer[18..28].copy_from_slice(asker);
        });
    }

    /// Goes on with what there is to do now.
    pub fn work(&mut self) {
        self.work_at(Instant::now());
    }

    pub(super) fn work_at(&mut self, now: Instant) {
        // Twice: what is read may be answered, and what is answered may close a connection.
        for _ in 0..2 {
            self.interface.poll(self.time(now), &mut self.wire, &mut self.sockets);
            for connection in &mut self.connections {
                connection.work(&mut self.sockets, &self.metadata, &self.config, now);
            }
        }
        self.interface.poll(self.time(now), &mut self.wire, &mut self.sockets);
    }

    /// When [`work`](Self::work) is to be called again even if nothing happens.
    pub fn next_work(&mut self) -> Option<Duration> {
        let now = Instant::now();
        let time = self.time(now);
        let busy = self.connections.iter().filter(|connection| connection.is_busy(&self.sockets));
        let idle = busy
            .map(|connection| (connection.active.unwrap_or(now) + IDLE).saturating_duration_since(now))
            .min();
        // With no room for frames only the guest can let anything go on.
        let own = if self.wire.is_full() { None } else { self.interface.poll_delay(time, &self.sockets) };
        let own = own.map(|delay| Duration::from_micros(delay.total_micros()));
        idle.into_iter().chain(own).min().map(|delay| delay.max(TICK))
    }

    /// The next frame for the guest.
    pub fn front(&self) -> Option<&[u8]> {
        self.wire.outgoing.front().map(Vec::as_slice)
    }

    /// The guest has the frame that [`front`](Self::front) gives; or has lost it.
    pub fn pop(&mut self) {
        self.wire.outgoing.pop_front();
    }

    /// The guest's driver begins anew: nothing is under way.
    pub fn reset(&mut self) {
        self.wire.outgoing.clear();
        self.wire.incoming = None;
        for connection in &mut self.connections {
            connection.recycle(self.sockets.get_mut(connection.socket));
        }
    }

    /// Where the guest's frames came from last.
    pub fn guest(&self) -> [u8; 6] {
        self.wire.guest
    }

    /// The connections that are under way.
    pub fn callers(&self) -> impl Iterator<Item = Caller> + '_ {
        self.connections.iter().filter_map(|connection| {
            let socket: &Socket<'_> = self.sockets.get(connection.socket);
            let IpEndpoint { addr: IpAddress::Ipv4(address), port } = socket.remote_endpoint()?;
            connection.is_busy(&self.sockets).then_some(Caller { address, port })
        })
    }

    /// The guest comes from elsewhere and has connections there, which are reset: to `guest`, its card's address, goes for
    /// each an acknowledgement out of nowhere. The guest answers by telling where it stands (RFC 9293, 3.10.7.4), and
    /// what it stands in is unknown here, which it is told in turn.
    pub fn reset_callers(&mut self, guest: [u8; 6], callers: impl Iterator<Item = Caller>) {
        self.wire.guest = guest;
        for caller in callers.take(MAX_CALLERS) {
            // Where the guest's window is nobody knows; it is not at both places.
            self.provoke(caller, TcpSeqNumber(0));
            self.provoke(caller, TcpSeqNumber(i32::MIN));
        }
    }

    fn provoke(&mut self, caller: Caller, place: TcpSeqNumber) {
        let segment = TcpRepr {
            src_port: PORT,
            dst_port: caller.port,
            control: TcpControl::None,
            seq_number: place,
            ack_number: Some(TcpSeqNumber(0)),
            window_len: 0,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        let packet = Ipv4Repr {
            src_addr: self.config.address,
            dst_addr: caller.address,
            next_header: IpProtocol::Tcp,
            payload_len: segment.buffer_len(),
            hop_limit: 64,
        };
        let checksums = ChecksumCapabilities::default();
        let (source, destination) = (packet.src_addr.into(), packet.dst_addr.into());
        self.wire.send(TYPE_IPV4, packet.buffer_len() + segment.buffer_len(), |bytes| {
            packet.emit(&mut Ipv4Packet::new_unchecked(&mut *bytes), &checksums);
            let mut rest = TcpPacket::new_unchecked(&mut bytes[packet.buffer_len()..]);
            segment.emit(&mut rest, &source, &destination, &checksums);
        });
    }

    fn time(&self, now: Instant) -> StackInstant {
        StackInstant::from_micros(now.saturating_duration_since(self.began).as_micros() as i64)
    }
}

impl Connection {
    fn new(sockets: &mut SocketSet<'static>) -> Self {
        let buffer = |len| SocketBuffer::new(vec![0; len]);
        let mut socket = Socket::new(buffer(MAX_REQUEST), buffer(SEND_BUFFER));
        socket.set_timeout(Some(smoltcp::time::Duration::from_secs(PATIENCE.as_secs())));
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        let mut connection = Self {
            socket: sockets.add(socket),
            request: Vec::new(),
            answer: Vec::new(),
            sent: 0,
            last: false,
            active: None,
        };
        connection.recycle(sockets.get_mut(connection.socket));
        connection
    }

    /// Makes room for another.
    fn recycle(&mut self, socket: &mut Socket<'_>) {
        socket.abort();
        // It is closed, and the port is one.
        let _ = socket.listen(PORT);
        (self.request, self.answer) = (Vec::new(), Vec::new());
        (self.sent, self.last, self.active) = (0, false, None);
    }

    fn is_busy(&self, sockets: &SocketSet<'_>) -> bool {
        !matches!(sockets.get::<Socket<'_>>(self.socket).state(), State::Listen | State::Closed)
    }

    fn work(
        &mut self,
        sockets: &mut SocketSet<'_>,
        metadata: &Metadata,
        config: &MetadataConfig,
        now: Instant,
    ) {
        let socket: &mut Socket<'_> = sockets.get_mut(self.socket);
        match socket.state() {
            State::Listen => return,
            // Both sides are done. That the guest's last word may come again is no reason to wait: it is then told that
            // there is no such connection.
            State::TimeWait => return self.recycle(socket),
            // The guest has reset it, or is yet to be told of our doing so.
            State::Closed => {
                if socket.remote_endpoint().is_none() {
                    self.recycle(socket);
                }
                return;
            }
            _ => {}
        }
        let active = *self.active.get_or_insert(now);
        if self.go_on(socket, metadata, config) {
            self.active = Some(now);
        } else if now.saturating_duration_since(active) >= IDLE {
            socket.abort();
        }
    }

    /// Reads and answers as far as it is possible now; says whether anything was.
    fn go_on(&mut self, socket: &mut Socket<'_>, metadata: &Metadata, config: &MetadataConfig) -> bool {
        let before = (self.request.len(), self.sent, self.answer.len());
        loop {
            self.read(socket);
            if self.answer.is_empty()
                && !self.last
                && let Some(answer) = http::answer(&self.request, metadata, config)
            {
                self.request.drain(..answer.request.min(self.request.len()));
                (self.answer, self.sent, self.last) = (answer.bytes, 0, answer.last);
            }
            if self.answer.is_empty() {
                break;
            }
            // A connection that takes nothing any more is about to be closed.
            let Ok(count) = socket.send_slice(&self.answer[self.sent..]) else { break };
            self.sent += count;
            if self.sent < self.answer.len() {
                break;
            }
            self.answer = Vec::new();
            self.sent = 0;
        }
        // The guest is told no more, or says no more.
        let all_read = socket.state() == State::CloseWait && !socket.may_recv();
        if self.answer.is_empty() && (self.last || all_read) {
            socket.close();
        }
        before != (self.request.len(), self.sent, self.answer.len())
    }

    fn read(&mut self, socket: &mut Socket<'_>) {
        if self.last {
            // It is not answered; but a guest that goes on sending is let come to its end.
            while socket.can_recv() && socket.recv(|bytes| (bytes.len(), ())).is_ok() {}
        }
        while socket.can_recv() && self.request.len() < MAX_REQUEST {
            let room = MAX_REQUEST - self.request.len();
            let request = &mut self.request;
            let read = socket.recv(|bytes| {
                let count = bytes.len().min(room);
                request.extend_from_slice(&bytes[..count]);
                (count, ())
            });
            if read.is_err() {
                break;
            }
        }
    }
}
