//! A virtio network card (virtio 1.2, 5.1) on a tap of the host.
//!
//! Frames that the guest sends are held until the epoch that knows of them is committed: their chains stay in flight, so
//! a full queue slows the guest down, and a standby that takes over sends them (again). Frames for the guest are not
//! held. Frames go from guest memory to the tap and back without a copy.

mod announce;
pub mod config;
mod control;
mod receive;
mod service;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM,
    VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_ANNOUNCE,
    VIRTIO_NET_S_LINK_UP,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

pub use config::{MAX_QUEUE_PAIRS, Mac, NetConfig};
pub use service::ServiceState;
pub use tap::{TapError, queue_pairs};

use self::announce::{Announcer, rarp};
use self::control::Command;
use self::receive::{MAX_FRAME, Pause, Receiver};
use self::service::Service;
use self::tap::{Tap, offload};
use super::chain::Chain;
use super::counters::{DeviceCounters, NetCounters};
use super::device::{DeviceError, DeviceType, Source, VirtioDevice, read_config};
use super::held::{Held, OutputPolicy};
use super::iovec::IoVecs;
use super::queue::VirtQueue;
use super::slot::RestoreError;
use super::state::DeviceState;
use crate::metadata::{Metadata, MetadataConfig};
use crate::rate_limiter::{RateLimiter, RateLimiterConfig};
use crate::timer::Timer;

/// Descriptors of a queue for frames.
pub const QUEUE_SIZE: u16 = 256;
const CONTROL_SIZE: u16 = 16;
/// Length of `struct virtio_net_hdr_v1`, which precedes each frame.
const HEADER: u32 = 12;
/// Longest frame without segmentation offload and with the usual MTU, with header, addresses and a VLAN tag.
const ORDINARY_FRAME: u32 = HEADER + 1500 + 18;
/// Most frames that are received or sent before others get their turn.
const BATCH: usize = 256;
/// Most frames that are thrown away when the guest moves here.
const MAX_STALE: usize = 4096;

/// What a network card holds beyond its registers and queues.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// Whether the driver has been asked to announce the guest and has not done so.
    pub announce: bool,
    /// Pairs of queues in use.
    pub pairs: u16,
    /// By pair: heads of the chains taken from the receive queue and not used yet.
    pub receiving: Vec<Vec<u16>>,
    /// By pair: heads of the frames to be sent.
    pub sending: Vec<Vec<u16>>,
    /// The limits in force on what the guest receives.
    pub receive_limits: RateLimiterConfig,
    /// The limits in force on what it sends.
    pub send_limits: RateLimiterConfig,
    /// The metadata service, if it is on this card.
    pub service: Option<ServiceState>,
}

/// Why a network card cannot be had.
#[derive(Debug, Error)]
pub enum NetError {
    /// The tap.
    #[error("network interface {id}: {cause}")]
    Tap {
        /// The card's name.
        id: String,
        /// What is wrong with its tap.
        cause: TapError,
    },
    /// Timers.
    #[error("network interface {id}: cannot set up its timers: {cause}")]
    Timer {
        /// The card's name.
        id: String,
        /// What the system answered.
        cause: io::Error,
    },
}

/// A queue to receive, one to send, and the queue of the tap that they go with.
struct Pair {
    tap: Tap,
    /// There may be frames to read.
    readable: bool,
    /// The tap takes no frames for now.
    full: bool,
    receiver: Receiver,
    held: Held<Chain>,
}

/// A virtio network card.
pub struct Net {
    mac: Mac,
    mtu: Option<u16>,
    queue_sizes: Vec<u16>,
    offered: u64,
    accepted: u64,
    pairs: Vec<Pair>,
    in_use: u16,
    policy: OutputPolicy,
    announcer: Announcer,
    announce_timer: Timer,
    /// Whether the driver is to be asked to announce the guest.
    ask_driver: bool,
    /// Whether it has been asked.
    asked_driver: bool,
    receive_limiter: RateLimiter,
    send_limiter: RateLimiter,
    counters: Arc<NetCounters>,
    /// The metadata service, if it is on this card.
    service: Option<Service>,
    /// Set when a batch has ended and more is to be done.
    again: EventFd,
}

impl Net {
    /// Attaches to the tap that `config` names.
    ///
    /// # Errors
    /// [`NetError`]
    pub fn create(config: &NetConfig) -> Result<Self, NetError> {
        let timer = |cause| NetError::Timer { id: config.id.clone(), cause };
        let count = config.queue_pairs.clamp(1, MAX_QUEUE_PAIRS);
        let mut pairs = Vec::new();
        for _ in 0..count {
            let tap = Tap::open(&config.tap, count > 1)
                .map_err(|cause| NetError::Tap { id: config.id.clone(), cause })?;
            let held = Held::with_capacity(QUEUE_SIZE.into());
            pairs.push(Pair { tap, readable: true, full: false, receiver: Receiver::default(), held });
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * pairs.len()];
        queue_sizes.push(CONTROL_SIZE);
        let limiter = |limits: &Option<RateLimiterConfig>| {
            RateLimiter::new(&limits.unwrap_or_default(), Instant::now())
        };
        Ok(Self {
            mac: config.mac,
            mtu: config.mtu,
            queue_sizes,
            offered: features(config, count),
            accepted: 0,
            pairs,
            in_use: 1,
            policy: OutputPolicy::Pass,
            announcer: Announcer::default(),
            announce_timer: Timer::new().map_err(timer)?,
            ask_driver: false,
            asked_driver: false,
            receive_limiter: limiter(&config.receive_limits).map_err(timer)?,
            send_limiter: limiter(&config.send_limits).map_err(timer)?,
            counters: Arc::default(),
            service: None,
            again: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC).map_err(timer)?,
        })
    }

    /// Puts the metadata service that `config` describes on the card, from its start on; `keeper`: it saves what is in
    /// `metadata`.
    ///
    /// # Errors
    /// The process has no descriptor left.
    pub fn serve_metadata(
        &mut self,
        metadata: &Metadata,
        config: &MetadataConfig,
        keeper: bool,
    ) -> io::Result<()> {
        self.service = Some(Service::new(metadata, config, self.mtu.unwrap_or(1500), keeper)?);
        Ok(())
    }

    /// Other limits from now on; what the changes do not name stays as it is. [`attend`](VirtioDevice::attend) must follow.
    pub fn update_limits(&mut self, receive: &RateLimiterConfig, send: &RateLimiterConfig) {
        let now = Instant::now();
        self.receive_limiter.update(receive, now);
        self.send_limiter.update(send, now);
    }

    fn has(&self, feature: u32) -> bool {
        self.accepted & 1 << feature != 0
    }

    /// Where the control queue is: behind the pairs that the driver knows of.
    fn control(&self) -> usize {
        if self.has(VIRTIO_NET_F_MQ) { 2 * self.pairs.len() } else { 2 }
    }

    fn longest_frame(&self) -> u32 {
        if self.has(VIRTIO_NET_F_GUEST_TSO4) || self.has(VIRTIO_NET_F_GUEST_TSO6) {
            MAX_FRAME
        } else {
            ORDINARY_FRAME.max(self.mtu.map_or(0, |mtu| HEADER + u32::from(mtu) + 18))
        }
    }

    fn again(&self) {
        let _ = self.again.write(1);
    }

    /// Moves frames of pair `index` from the tap to the guest.
    fn receive(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let (longest, mergeable) = (self.longest_frame(), self.has(VIRTIO_NET_F_MRG_RXBUF));
        let (Some(pair), Some(queue)) = (self.pairs.get_mut(index), queues.get_mut(2 * index)) else {
            return Ok(());
        };
        if self.policy == OutputPolicy::Freeze || !queue.is_ready() {
            return Ok(());
        }
        queue.silence()?;
        let mut frames = 0;
        if index == 0
            && let Some(service) = &mut self.service
        {
            frames = service.deliver(&mut pair.receiver, queue, longest, mergeable, BATCH)?;
        }
        while pair.readable {
            if frames == BATCH {
                self.again();
                break;
            }
            if !self.receive_limiter.may_take_now() {
                self.counters.receive_limited.add(1);
                break;
            }
            match pair.receiver.receive(&pair.tap, queue, longest, mergeable)? {
                Ok(len) => {
                    frames += 1;
                    self.receive_limiter.charge(len as u64);
                    self.counters.received_bytes.add(len as u64);
                }
                Err(Pause::Empty) => pair.readable = false,
                Err(Pause::NoBuffers) => {
                    if !queue.listen()? {
                        break;
                    }
                    queue.silence()?;
                }
            }
        }
        self.counters.received.add(frames as u64);
        if frames > 0 { Ok(queue.notify()?) } else { Ok(()) }
    }

    /// Takes the frames that the guest wants to send by pair `index`. Those for the metadata service go there at once:
    /// nobody outside ever sees them.
    fn take(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let (Some(pair), Some(queue)) = (self.pairs.get_mut(index), queues.get_mut(2 * index + 1)) else {
            return Ok(());
        };
        let mut service = self.service.as_mut().filter(|_| self.policy != OutputPolicy::Freeze);
        let size = usize::from(queue.size());
        let (mut frames, mut served) = (0, false);
        loop {
            queue.silence()?;
            while frames < BATCH
                && let Some(chain) = queue.pop()?
            {
                frames += 1;
                if service.as_mut().is_some_and(|service| service.take(&chain)) {
                    queue.complete(chain.head(), 0)?;
                    served = true;
                    continue;
                }
                if pair.held.len() >= size {
                    return Err(DeviceError::Request("more frames in flight than the queue is long"));
                }
                pair.held.push(chain);
            }
            if frames == BATCH || !queue.listen()? {
                break;
            }
        }
        if served {
            queue.notify()?;
        }
        if frames == BATCH {
            self.again();
        }
        if served { self.receive(0, queues) } else { Ok(()) }
    }

    /// Sends what may be sent by pair `index`.
    fn send(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let (Some(pair), Some(queue)) = (self.pairs.get_mut(index), queues.get_mut(2 * index + 1)) else {
            return Ok(());
        };
        let mut sent = false;
        while !pair.full {
            if !pair.held.is_empty() && !self.send_limiter.may_take_now() {
                self.counters.send_limited.add(1);
                break;
            }
            let Some(chain) = pair.held.pop() else { break };
            let len = chain.readable_len();
            let mut accepted = false;
            if (HEADER..=MAX_FRAME).contains(&len) {
                match pair.tap.send(&IoVecs::readable(&chain, 0, len)) {
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        // It tells when it takes frames again.
                        pair.full = true;
                        pair.held.put_back(chain);
                        break;
                    }
                    // What the tap does not take (a header that lies, a link that is down) is lost, as on a wire.
                    outcome => accepted = outcome.is_ok(),
                }
            }
            if accepted {
                self.counters.sent.add(1);
                self.counters.sent_bytes.add(len.into());
            } else {
                self.counters.errors.add(1);
            }
            self.send_limiter.charge(u64::from(len));
            queue.complete(chain.head(), 0)?;
            sent = true;
        }
        if sent { Ok(queue.notify()?) } else { Ok(()) }
    }

    fn work(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if index == 0
            && let Some(service) = &mut self.service
        {
            service.work();
        }
        self.receive(index, queues)?;
        self.send(index, queues)?;
        self.take(index, queues)?;
        self.send(index, queues)
    }

    fn obey(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        let index = self.control();
        let Some(queue) = queues.get_mut(index) else { return Ok(()) };
        let mut answered = 0;
        while answered < usize::from(CONTROL_SIZE)
            && let Some(chain) = queue.pop()?
        {
            let ok = match Command::parse(&chain)? {
                Some(Command::Announced) => {
                    self.asked_driver = false;
                    true
                }
                Some(Command::Pairs(count)) => self.use_pairs(count),
                None => false,
            };
            control::answer(&chain, queue, ok)?;
            answered += 1;
        }
        if answered == usize::from(CONTROL_SIZE) {
            self.again();
        }
        if queue.listen()? {
            queue.come_back();
        }
        if answered > 0 { Ok(queue.notify()?) } else { Ok(()) }
    }

    /// Lets frames come by the first `count` pairs; says whether there are so many.
    fn use_pairs(&mut self, count: u16) -> bool {
        if count == 0 || usize::from(count) > self.pairs.len() {
            return false;
        }
        self.in_use = count;
        if self.pairs.len() == 1 {
            return true;
        }
        let in_use = |index: usize| index < usize::from(count);
        self.pairs.iter().enumerate().all(|(index, pair)| pair.tap.set_enabled(in_use(index)).is_ok())
    }

    /// Tells the network and the driver that the guest has moved, as far as it is time.
    fn announce(&mut self, queues: &mut [VirtQueue]) {
        if self.policy != OutputPolicy::Pass {
            return;
        }
        if self.announcer.is_active() && self.announce_timer.clear() {
            if let Some(pair) = self.pairs.first() {
                // Lost like any frame if the link is down; there are more.
                let _ = pair.tap.send_bytes(&rarp(self.mac));
            }
            if let Some(wait) = self.announcer.next() {
                self.announce_timer.set(wait);
            }
        }
        if self.ask_driver
            && let Some(queue) = queues.first()
        {
            self.ask_driver = false;
            if self.has(VIRTIO_NET_F_GUEST_ANNOUNCE) {
                self.asked_driver = true;
                queue.interrupt().config_changed();
            }
        }
    }

    fn everything(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.announce(queues);
        if queues.is_empty() {
            return Ok(());
        }
        for index in 0..self.pairs.len() {
            if index == 0 || self.has(VIRTIO_NET_F_MQ) {
                self.work(index, queues)?;
            }
        }
        self.obey(queues)
    }

    fn set_offload(&self) {
        let wanted = [
            (VIRTIO_NET_F_GUEST_CSUM, offload::CHECKSUM),
            (VIRTIO_NET_F_GUEST_TSO4, offload::TSO4),
            (VIRTIO_NET_F_GUEST_TSO6, offload::TSO6),
            (VIRTIO_NET_F_GUEST_ECN, offload::TSO_ECN),
        ];
        let offload = wanted.into_iter().filter(|&(feature, _)| self.has(feature)).map(|(_, bit)| bit).sum();
        for pair in &self.pairs {
            // A kernel that does not know one of them leaves the work to itself, which is always right.
            let _ = pair.tap.set_offload(offload);
        }
    }
}

fn features(config: &NetConfig, pairs: u16) -> u64 {
    let mut list = vec![
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_STATUS,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_GUEST_ANNOUNCE,
    ];
    list.extend(config.mtu.map(|_| VIRTIO_NET_F_MTU));
    list.extend((pairs > 1).then_some(VIRTIO_NET_F_MQ));
    list.into_iter().fold(0, |bits, feature| bits | 1 << feature)
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn counters(&self) -> DeviceCounters {
        DeviceCounters::Net(Arc::clone(&self.counters))
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = VIRTIO_NET_S_LINK_UP | if self.asked_driver { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.mac.0);
        config[6..8].copy_from_slice(&(status as u16).to_le_bytes());
        config[8..10].copy_from_slice(&(self.pairs.len() as u16).to_le_bytes());
        config[10..].copy_from_slice(&self.mtu.unwrap_or_default().to_le_bytes());
        read_config(&config, offset, data);
    }

    fn activate(&mut self, features: u64, queues: &mut [VirtQueue]) {
        self.accepted = features;
        self.set_offload();
        self.use_pairs(1);
        for pair in &mut self.pairs {
            pair.readable = true;
        }
        // Queues are looked at when they are rung; the control queue rings from the start.
        let control = self.control();
        if let Some(queue) = queues.get_mut(control) {
            let _ = queue.listen();
        }
        self.again();
    }

    fn reset(&mut self) {
        self.accepted = 0;
        self.asked_driver = false;
        self.in_use = 1;
        if let Some(service) = &mut self.service {
            service.reset();
        }
        for pair in &mut self.pairs {
            pair.receiver.clear();
            pair.held.clear();
            (pair.readable, pair.full) = (true, false);
        }
    }

    fn doorbell(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if index == self.control() {
            return self.obey(queues);
        }
        if index.is_multiple_of(2) {
            return self.receive(index / 2, queues);
        }
        self.take(index / 2, queues)?;
        self.send(index / 2, queues)
    }

    fn sources(&self) -> Vec<Source> {
        let both = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let mut sources: Vec<_> =
            self.pairs.iter().map(|pair| Source { fd: pair.tap.as_raw_fd(), events: both }).collect();
        let mut add = |fd| sources.push(Source { fd, events: EventSet::IN });
        add(self.again.as_raw_fd());
        add(self.announce_timer.as_raw_fd());
        add(self.receive_limiter.fd());
        add(self.send_limiter.fd());
        if let Some(service) = &self.service {
            add(service.fd());
        }
        sources
    }

    fn ready(&mut self, index: usize, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        if let Some(pair) = self.pairs.get_mut(index) {
            (pair.readable, pair.full) = (true, false);
            self.receive(index, queues)?;
            return self.send(index, queues);
        }
        let _ = self.again.read();
        self.receive_limiter.clear_timer();
        self.send_limiter.clear_timer();
        if let Some(service) = &self.service {
            service.clear_timer();
        }
        self.everything(queues)?;
        if self.policy != OutputPolicy::Pass || !self.announcer.is_active() {
            self.announce_timer.clear();
        }
        Ok(())
    }

    fn set_output(&mut self, policy: OutputPolicy) {
        if self.policy != OutputPolicy::Freeze {
            self.policy = policy;
        }
        for pair in &mut self.pairs {
            pair.held.set_policy(policy);
        }
    }

    fn release_output(&mut self) {
        for pair in &mut self.pairs {
            pair.held.release();
        }
    }

    fn output_waits(&self) -> bool {
        self.pairs.iter().any(|pair| pair.held.waits())
    }

    fn attend(&mut self, queues: &mut [VirtQueue]) -> Result<(), DeviceError> {
        self.everything(queues)
    }

    fn moved(&mut self) {
        for pair in &mut self.pairs {
            // Meant for the guest while it was elsewhere, where it had them too.
            let _ = (0..MAX_STALE).all(|_| pair.tap.discard());
            pair.readable = true;
        }
        self.ask_driver = true;
        self.announcer.begin();
        self.announce_timer.set(std::time::Duration::ZERO);
    }

    fn save(&mut self, state: &mut DeviceState) {
        if !matches!(state, DeviceState::Net(_)) {
            let lists = || self.pairs.iter().map(|_| Vec::with_capacity(QUEUE_SIZE.into())).collect();
            *state =
                DeviceState::Net(NetState { receiving: lists(), sending: lists(), ..NetState::default() });
        }
        let DeviceState::Net(state) = state else { return };
        state.announce = self.asked_driver;
        state.pairs = self.in_use;
        state.receive_limits = self.receive_limiter.limits();
        state.send_limits = self.send_limiter.limits();
        if let Some(service) = &self.service {
            service.save(state.service.get_or_insert_with(|| service.room()));
        }
        let lists = state.receiving.iter_mut().zip(&mut state.sending);
        for (pair, (receiving, sending)) in self.pairs.iter_mut().zip(lists) {
            receiving.clear();
            receiving.extend(pair.receiver.heads());
            sending.clear();
            sending.extend(pair.held.iter().map(Chain::head));
            pair.held.mark();
        }
    }

    fn restore(&mut self, state: &DeviceState, queues: &mut [VirtQueue]) -> Result<(), RestoreError> {
        let DeviceState::Net(state) = state else { return Err(RestoreError::Kind(DeviceType::Net)) };
        let wrong = |reason| RestoreError::Field { device: DeviceType::Net, reason };
        if state.receiving.len() != self.pairs.len() || state.sending.len() != self.pairs.len() {
            return Err(wrong("it has another number of queues"));
        }
        self.asked_driver = state.announce;
        let now = Instant::now();
        self.receive_limiter.set(&state.receive_limits, now);
        self.send_limiter.set(&state.send_limits, now);
        let restored = match (&mut self.service, &state.service) {
            (Some(service), Some(state)) => service.restore(state, !queues.is_empty()),
            (None, None) => true,
            _ => false,
        };
        if !restored {
            return Err(wrong("its metadata service is another"));
        }
        if queues.is_empty() {
            return Ok(());
        }
        if !self.use_pairs(state.pairs) {
            return Err(wrong("it uses more queues than there are"));
        }
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            let (Some(receive), Some(send)) = (queues.get(2 * index), queues.get(2 * index + 1)) else {
                return Err(wrong("it has another number of queues"));
            };
            let (receiving, sending) = (&state.receiving[index], &state.sending[index]);
            if receiving.len() > receive.size().into() || sending.len() > send.size().into() {
                return Err(wrong("more is in flight than its queues are long"));
            }
            let chain = |queue: &VirtQueue, head| {
                queue.chain(head).map_err(|cause| RestoreError::Queue { device: DeviceType::Net, cause })
            };
            for &head in receiving {
                pair.receiver.add(chain(receive, head)?);
            }
            for &head in sending {
                pair.held.push(chain(send, head)?);
            }
        }
        Ok(())
    }
}
