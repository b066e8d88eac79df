//! A guest's TCP, for tests: smoltcp as well, but behind Ethernet and ARP as a guest's is.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant as StackInstant;
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

use crate::metadata::{DEFAULT_ADDRESS, Stack};

#[derive(Default)]
struct Card {
    incoming: VecDeque<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
}

struct Incoming(Vec<u8>);

impl RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        take(&self.0)
    }
}

struct Outgoing<'a>(&'a mut Card);

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let mut frame = vec![0; len];
        let outcome = fill(&mut frame);
        self.0.outgoing.push_back(frame);
        outcome
    }
}

impl Device for Card {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _now: StackInstant) -> Option<(Incoming, Outgoing<'_>)> {
        let frame = self.incoming.pop_front()?;
        Some((Incoming(frame), Outgoing(self)))
    }

    fn transmit(&mut self, _now: StackInstant) -> Option<Outgoing<'_>> {
        Some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

/// A guest with one connection to the service.
pub(crate) struct Client {
    card: Card,
    interface: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    began: Instant,
    /// How long the service has heard of nobody before.
    pub(crate) silence: Duration,
    answer: Vec<u8>,
}

impl Client {
    /// One that connects from port 1024 + `number`.
    pub(crate) fn new(number: u16) -> Self {
        let mut card = Card::default();
        let mut config = Config::new(EthernetAddress([2, 0, 0, 0, 0, 7]).into());
        config.random_seed = number.into();
        let mut interface = Interface::new(config, &mut card, StackInstant::ZERO);
        interface.update_ip_addrs(|list| {
            list.push(IpCidr::new(IpAddress::Ipv4(Ipv4Addr::new(169, 254, 1, 1)), 16)).unwrap();
        });
        let buffer = || SocketBuffer::new(vec![0; 4096]);
        let mut sockets = SocketSet::new(Vec::new());
        let socket = sockets.add(Socket::new(buffer(), buffer()));
        let connecting: &mut Socket<'_> = sockets.get_mut(socket);
        connecting.connect(interface.context(), (DEFAULT_ADDRESS, 80), 1024 + number).unwrap();
        Self {
            card,
            interface,
            sockets,
            socket,
            began: Instant::now(),
            silence: Duration::ZERO,
            answer: Vec::new(),
        }
    }

    /// Takes the frames for the guest, and returns those that it sends.
    pub(crate) fn turn(&mut self, frames: impl IntoIterator<Item = Vec<u8>>) -> Vec<Vec<u8>> {
        self.card.incoming.extend(frames);
        let now = StackInstant::from_micros(self.began.elapsed().as_micros() as i64);
        self.interface.poll(now, &mut self.card, &mut self.sockets);
        let socket: &mut Socket<'_> = self.sockets.get_mut(self.socket);
        while socket.can_recv() {
            self.answer.extend(socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap());
        }
        // Either side may be the first to say that this was all.
        if socket.state() == State::CloseWait {
            socket.close();
        }
        self.interface.poll(now, &mut self.card, &mut self.sockets);
        self.card.outgoing.drain(..).collect()
    }

    /// Says `request`.
    pub(crate) fn say(&mut self, request: &str) {
        let socket: &mut Socket<'_> = self.sockets.get_mut(self.socket);
        assert_eq!(socket.send_slice(request.as_bytes()).unwrap(), request.len());
    }

    pub(crate) fn is_open(&self) -> bool {
        self.sockets.get::<Socket<'_>>(self.socket).state() == State::Established
    }

    /// Whether the service has said that this was all.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.sockets.get::<Socket<'_>>(self.socket).state(), State::Closed | State::TimeWait)
    }

    /// What was answered so far.
    pub(crate) fn answer(&self) -> String {
        String::from_utf8(self.answer.clone()).unwrap()
    }

    /// Carries frames to and fro until none are left.
    pub(crate) fn exchange(&mut self, stack: &mut Stack) {
        let mut quiet = 0;
        while quiet < 3 {
            let frames: Vec<_> = std::iter::from_fn(|| {
                let frame = stack.front()?.to_vec();
                stack.pop();
                Some(frame)
            })
            .collect();
            quiet = if frames.is_empty() { quiet + 1 } else { 0 };
            for frame in self.turn(frames) {
                assert!(stack.is_for_it(&frame), "{frame:x?}");
                stack.take_at(&frame, Instant::now() + self.silence);
                quiet = 0;
            }
            stack.work_at(Instant::now() + self.silence);
        }
    }

    pub(crate) fn open(&mut self, stack: &mut Stack) {
        self.exchange(stack);
    }

    /// The answer to `request`, after which the connection is to have ended.
    pub(crate) fn ask(&mut self, stack: &mut Stack, request: &str) -> String {
        self.open(stack);
        self.say(request);
        self.exchange(stack);
        let state = self.sockets.get::<Socket<'_>>(self.socket).state();
        assert!(self.is_over(), "the connection is {state}; answered: {}", self.answer());
        self.answer()
    }
}
