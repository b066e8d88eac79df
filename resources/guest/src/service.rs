//! The network service: answers [`Request`](crate::protocol::Request)s over TCP in the time that the workload leaves.
//!
//! It polls as long as something comes, and [`Params::net_spin_us`] longer; then it gives the processor away until a
//! device interrupts.

mod session;

use core::hint::spin_loop;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet, SocketStorage};
use smoltcp::socket::tcp;
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Address};

use crate::lapic;
use crate::memory::Frame;
use crate::protocol::{Address, BadParameter, Clock, Key, Params, REGISTERS};
use crate::virtio::{self, Disk, Nic, Outcome, Window};
use session::Session;

/// Connections at a time.
const SESSIONS: usize = virtio::DISK_SLOTS;
const RECEIVE_BYTES: usize = 8 << 10;
const SEND_BYTES: usize = 64 << 10;
/// A peer that does not answer for so long is forgotten.
const TIMEOUT: Duration = Duration::from_secs(30);
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// What all sessions share.
struct Common {
    registers: &'static mut [u64],
    disk: Option<Disk>,
}

impl Common {
    /// A register, whose number [`Request::parse`](crate::protocol::Request::parse) has checked.
    fn register(&mut self, number: u64) -> &mut u64 {
        let number = number as usize % self.registers.len();
        &mut self.registers[number]
    }
}

/// The service. Only vCPU 0 may have it: there devices interrupt.
pub struct Service {
    nic: Nic,
    interface: Interface,
    sockets: SocketSet<'static>,
    sessions: &'static mut [(SocketHandle, Session)],
    common: Common,
    port: u16,
    spin_ns: u64,
    clock: Clock,
    /// Nanoseconds of service.
    now_ns: u64,
    /// When something was done last.
    busy_ns: u64,
}

impl Service {
    /// The service that `params` ask for, on the first network card and the first disk among `windows`.
    pub fn new(
        params: &Params,
        address: Address,
        windows: impl Iterator<Item = Window> + Clone,
        mut frame: Frame,
        seed: u64,
    ) -> Result<&'static mut Self, BadParameter> {
        Self::try_new(params, address, windows, &mut frame, seed).ok_or(BadParameter(Key::NetIp))
    }

    fn try_new(
        params: &Params,
        address: Address,
        windows: impl Iterator<Item = Window> + Clone,
        frame: &mut Frame,
        seed: u64,
    ) -> Option<&'static mut Self> {
        let find = |kind| windows.clone().find(|window| window.kind() == kind);
        let mut nic = Nic::new(find(virtio::NIC)?, frame)?;
        let disk = match find(virtio::DISK) {
            Some(window) => Some(Disk::new(window, frame)?),
            None => None,
        };
        let mut config = Config::new(EthernetAddress(nic.mac).into());
        config.random_seed = seed;
        let mut interface = Interface::new(config, &mut nic, Instant::ZERO);
        let [a, b, c, d] = address.bytes;
        let cidr = IpCidr::new(Ipv4Address::new(a, b, c, d).into(), address.prefix);
        interface.update_ip_addrs(|addresses| {
            // It is the first, and there is room for it.
            let _ = addresses.push(cidr);
        });

        let mut sockets = SocketSet::new(frame.place(SESSIONS, || SocketStorage::EMPTY)?);
        let mut receive = frame.place(SESSIONS * RECEIVE_BYTES, || 0)?.chunks_exact_mut(RECEIVE_BYTES);
        let mut send = frame.place(SESSIONS * SEND_BYTES, || 0)?.chunks_exact_mut(SEND_BYTES);
        let sessions = frame.place(SESSIONS, || {
            let (receive, send) = (receive.next().unwrap_or_default(), send.next().unwrap_or_default());
            let socket = tcp::Socket::new(tcp::SocketBuffer::new(receive), tcp::SocketBuffer::new(send));
            (sockets.add(socket), Session::new())
        })?;
        let common = Common { registers: frame.place(REGISTERS as usize, || 0)?, disk };
        let mut service = Some(Self {
            nic,
            interface,
            sockets,
            sessions,
            common,
            port: params.net_port,
            spin_ns: params.net_spin_us * 1000,
            clock: Clock::default(),
            now_ns: 0,
            busy_ns: 0,
        });
        frame.place(1, || service.take())?.first_mut()?.as_mut()
    }

    /// Serves for `ns` nanoseconds as `clock_ns` counts them, or what is there at once if that is 0.
    pub fn serve_for(&mut self, ns: u64, mut clock_ns: impl FnMut() -> u64) {
        self.now_ns += self.clock.elapsed(clock_ns());
        let end_ns = self.now_ns + ns;
        loop {
            lapic::forget_events();
            if self.work() {
                self.busy_ns = self.now_ns;
            }
            self.now_ns += self.clock.elapsed(clock_ns());
            if self.now_ns >= end_ns {
                return;
            }
            if self.now_ns - self.busy_ns < self.spin_ns {
                spin_loop();
            } else {
                self.wait(end_ns - self.now_ns);
                self.now_ns += self.clock.elapsed(clock_ns());
            }
        }
    }

    /// Does what there is to do; whether there was anything.
    fn work(&mut self) -> bool {
        let mut worked = false;
        if let Some(disk) = &mut self.common.disk {
            while let Some(done) = disk.take_done() {
                worked = true;
                if let Some((_, session)) = self.sessions.get_mut(done.slot) {
                    session.disk_done(done.outcome == Outcome::Done);
                }
            }
        }
        let now = Instant::from_micros((self.now_ns / 1000) as i64);
        worked |= self.interface.poll(now, &mut self.nic, &mut self.sockets)
            == smoltcp::iface::PollResult::SocketStateChanged;
        for (slot, (handle, session)) in self.sessions.iter_mut().enumerate() {
            let socket = self.sockets.get_mut::<tcp::Socket>(*handle);
            if socket.is_open() {
                worked |= session.serve(slot, socket, &mut self.common);
            } else if !session.waits_for_disk() {
                *session = Session::new();
                socket.set_nagle_enabled(false);
                socket.set_timeout(Some(TIMEOUT));
                socket.set_keep_alive(Some(KEEP_ALIVE));
                // It fails for an open socket or port 0 only.
                let _ = socket.listen(self.port);
            }
        }
        if worked {
            self.interface.poll(now, &mut self.nic, &mut self.sockets);
        }
        self.nic.notify();
        if let Some(disk) = &mut self.common.disk {
            disk.notify();
        }
        worked
    }

    /// Gives the processor away for `ns` nanoseconds, or until a device or a timer of TCP wants attention.
    fn wait(&mut self, ns: u64) {
        let now = Instant::from_micros((self.now_ns / 1000) as i64);
        let delay = self.interface.poll_delay(now, &self.sockets);
        let ns = delay.map_or(ns, |delay| ns.min(delay.total_micros().saturating_mul(1000)));
        let disk_waits = self.common.disk.as_ref().is_none_or(Disk::listen);
        if self.nic.listen() && disk_waits && ns > 0 {
            lapic::idle_until_event(ns.min(u64::from(u32::MAX)) as u32);
        }
        self.nic.silence();
        if let Some(disk) = &self.common.disk {
            disk.silence();
        }
    }
}
