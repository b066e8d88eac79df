//! A virtio network card (virtio 1.2, 5.1): one pair of queues, no offloads. smoltcp drives it.

use core::{ptr, slice};

use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use super::queue::Buffer;
use super::{Queue, Window};
use crate::memory::{Addresses, Frame};

/// In the numbers of virtio 1.2, section 5.
pub const KIND: u32 = 1;

const MAC: u64 = 1 << 5;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Frames that can be under way in each direction.
const FRAMES: usize = 128;
/// Before each frame (virtio 1.2, 5.1.6).
const HEADER: usize = 12;
const MTU: usize = 1514;

#[repr(C, align(2048))]
struct FrameBuffer([u8; 2048]);

/// A network card at work.
pub struct Nic {
    window: Window,
    addresses: Addresses,
    /// Its Ethernet address.
    pub mac: [u8; 6],
    receive: Queue<FRAMES>,
    transmit: Queue<FRAMES>,
    received: *mut FrameBuffer,
    transmitted: *mut FrameBuffer,
    /// Transmit buffers that the device does not have.
    free: [u16; FRAMES],
    free_count: usize,
    /// The receive buffer that is being read.
    lent: Option<u16>,
}

impl Nic {
    /// The card behind `window`. `None` if it refuses, or `frame` is full.
    pub fn new(window: Window, frame: &mut Frame) -> Option<Self> {
        window.negotiate(MAC, 0)?;
        let addresses = frame.addresses();
        let (receive, transmit) = (Queue::new(frame)?, Queue::new(frame)?);
        let made =
            window.set_up(RECEIVE, &receive, addresses) && window.set_up(TRANSMIT, &transmit, addresses);
        let mut buffers = || Some(frame.place(FRAMES, || FrameBuffer([0; 2048]))?.as_mut_ptr());
        let mut nic = Self {
            window,
            addresses,
            mac: core::array::from_fn(|index| window.read_config(index)),
            receive,
            transmit,
            received: buffers()?,
            transmitted: buffers()?,
            free: core::array::from_fn(|index| index as u16),
            free_count: FRAMES,
            lent: None,
        };
        window.begin();
        for index in 0..FRAMES as u16 {
            nic.offer(index);
        }
        nic.notify();
        made.then_some(nic)
    }

    /// Tells the device of what there is for it.
    pub fn notify(&mut self) {
        self.give_back();
        if self.receive.must_notify() {
            self.window.notify(RECEIVE);
        }
        if self.transmit.must_notify() {
            self.window.notify(TRANSMIT);
        }
    }

    /// Asks for an interrupt at the next frame, or, without a buffer left to answer it, at the next one that is sent.
    /// False if there is one already.
    pub fn listen(&mut self) -> bool {
        self.reclaim();
        if self.free_count == 0 { self.transmit.listen() } else { self.receive.listen() }
    }

    /// Asks for no interrupts.
    pub fn silence(&self) {
        self.receive.silence();
        self.transmit.silence();
    }

    fn offer(&mut self, index: u16) {
        let address = self.addresses.physical(self.received.wrapping_add(usize::from(index)));
        self.receive.add(index, &[Buffer { address, len: size_of::<FrameBuffer>() as u32, writable: true }]);
    }

    fn give_back(&mut self) {
        if let Some(index) = self.lent.take() {
            self.offer(index);
        }
    }

    fn reclaim(&mut self) {
        while let Some((index, _)) = self.transmit.take_used() {
            if let Some(slot) = self.free.get_mut(self.free_count) {
                *slot = index % FRAMES as u16;
                self.free_count += 1;
            }
        }
    }
}

impl Device for Nic {
    type RxToken<'a> = Received<'a>;
    type TxToken<'a> = Room<'a>;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received<'_>, Room<'_>)> {
        self.give_back();
        self.reclaim();
        if self.free_count == 0 {
            return None;
        }
        let (index, len) = self.receive.take_used()?;
        let index = index % FRAMES as u16;
        self.lent = Some(index);
        let len = (len as usize).clamp(HEADER, size_of::<FrameBuffer>());
        let begin = self.received.wrapping_add(usize::from(index)).cast::<u8>().wrapping_add(HEADER);
        // SAFETY: one of our buffers, which the device has given back and gets again only by `give_back`, which takes
        // the card that the token borrows.
        let frame = unsafe { slice::from_raw_parts(begin, len - HEADER) };
        Some((Received(frame), Room(self)))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Room<'_>> {
        self.reclaim();
        (self.free_count > 0).then_some(Room(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MTU;
        capabilities
    }
}

/// A frame that has come.
pub struct Received<'a>(&'a [u8]);

impl RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// Room for a frame to send.
pub struct Room<'a>(&'a mut Nic);

impl TxToken for Room<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, write: F) -> R {
        let nic = self.0;
        let len = len.min(MTU);
        // A token is made only when there is a free buffer.
        nic.free_count -= 1;
        let index = nic.free[nic.free_count];
        let buffer = nic.transmitted.wrapping_add(usize::from(index));
        // SAFETY: one of our buffers, which the device does not have: it was free.
        unsafe { ptr::write_bytes(buffer.cast::<u8>(), 0, HEADER) };
        // SAFETY: as above; the header and the longest frame fit.
        let frame = unsafe { slice::from_raw_parts_mut(buffer.cast::<u8>().add(HEADER), len) };
        let result = write(frame);
        let address = nic.addresses.physical(buffer);
        nic.transmit.add(index, &[Buffer { address, len: (HEADER + len) as u32, writable: false }]);
        result
    }
}
