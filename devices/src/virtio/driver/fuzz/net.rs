//! A network card as a subject. It needs a network namespace of its own: see [`super::super::tap`].

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use super::input::Input;
use super::{Driver, Subject};
use crate::virtio::driver::tap::Outside;
use crate::virtio::net::{Mac, Net, NetConfig};
use crate::virtio::{DeviceState, VirtioDevice};

const TAP: &str = "fuzz";
const RECEIVE: usize = 0;
const SEND: usize = 1;
const CONTROL: usize = 4;
const HEADER: usize = 12;

/// A network card of two pairs of queues, and the network.
pub struct NetSubject {
    config: NetConfig,
    outside: Outside,
    /// Keeps the tap, which is quicker than a new one for each card.
    _keeper: File,
    seen: u64,
}

impl NetSubject {
    /// A card on a tap of this thread's network.
    pub fn new() -> Self {
        let config = NetConfig {
            id: "eth0".into(),
            tap: TAP.into(),
            mac: Mac([2, 0, 0, 0, 0, 7]),
            mtu: Some(1400),
            queue_pairs: 2,
            receive_limits: None,
            send_limits: None,
        };
        let keeper = keep(TAP);
        Self { config, outside: Outside::on(TAP), _keeper: keeper, seen: 0 }
    }
}

impl Default for NetSubject {
    fn default() -> Self {
        Self::new()
    }
}

/// Makes the tap, of several queues, none of which is used here.
fn keep(name: &str) -> File {
    const TUNSETIFF: u64 = 0x4004_54ca;
    const TUNSETQUEUE: u64 = 0x4004_54d9;
    // Tap, without packet information, with virtio headers, of several queues.
    const FLAGS: i16 = 0x0002 | 0x1000 | 0x4000 | 0x0100;
    const DETACH: i16 = 0x0400;
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").unwrap();
    for (request, flags) in [(TUNSETIFF, FLAGS), (TUNSETQUEUE, DETACH)] {
        let mut argument = [0; 40];
        argument[..name.len()].copy_from_slice(name.as_bytes());
        argument[16..18].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: a `struct ifreq`, which has 40 bytes.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), request, argument.as_mut_ptr()) };
        assert!(answer >= 0, "{}", std::io::Error::last_os_error());
    }
    file
}

/// A frame of a kind that is left to experiments.
fn frame(number: u8, len: usize) -> Vec<u8> {
    let mut frame = [&[0xff; 6][..], &[2, 0, 0, 0, 0, 9], &[0x88, 0xb5]].concat();
    frame.resize(len.max(60), number);
    frame
}

fn is_ours(frame: &[u8]) -> bool {
    // Announcements are the card's own.
    frame.get(12..14) != Some(&[0x80, 0x35])
}

impl Subject for NetSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Net::create(&self.config).unwrap())
    }

    fn request(&mut self, queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>) {
        match queue {
            CONTROL => {
                let announced = vec![3, 0];
                let pairs = vec![4, 0, choices.byte() % 4, 0];
                (vec![if choices.one_in(2) { announced } else { pairs }], vec![1])
            }
            queue if queue % 2 == RECEIVE => (Vec::new(), vec![12 + usize::from(choices.word() % 2100)]),
            _ => {
                let frame = frame(choices.byte(), usize::from(choices.word() % 1514));
                (vec![vec![0; HEADER], frame], Vec::new())
            }
        }
    }

    fn in_flight(&self, state: &DeviceState, queue: usize) -> usize {
        let DeviceState::Net(state) = state else { panic!("another device's state: {state:?}") };
        let lists = if queue % 2 == RECEIVE { &state.receiving } else { &state.sending };
        lists.get(queue / 2).map_or(0, Vec::len)
    }

    fn outside(&mut self, choices: &mut Input<'_>) {
        let len = usize::from(choices.word() % 1400);
        for number in 0..=choices.byte() % 4 {
            self.outside.send(&frame(number, len));
        }
    }

    fn seen(&mut self) -> Vec<u8> {
        let frames = self.outside.receive(usize::MAX, Duration::ZERO);
        self.seen += frames.iter().filter(|frame| is_ours(frame)).count() as u64;
        self.seen.to_le_bytes().into()
    }

    fn prove(&mut self, driver: &mut Driver) {
        let until = Instant::now() + Duration::from_secs(10);
        self.seen();
        let sent = frame(0xee, 90);
        let request = driver.add(SEND, &[&[0; HEADER], &sent], &[]);
        driver.ring(SEND);
        while driver.used(SEND) != [(request.head, 0)] {
            driver.mmio.slot().ready(0);
            assert!(Instant::now() < until, "the frame is not sent");
        }
        while !self.outside.receive(1, Duration::from_millis(10)).contains(&sent) {
            assert!(Instant::now() < until, "the frame does not come");
        }
        let expected = frame(0xdd, 100);
        let buffers: Vec<_> = (0..64).map(|_| driver.add(RECEIVE, &[], &[2048])).collect();
        driver.ring(RECEIVE);
        let mut found = false;
        while !found {
            // Again, for the kernel takes its time to set up the way to a tap that was just attached to.
            self.outside.send(&expected);
            driver.mmio.slot().ready(0);
            for (head, len) in driver.used(RECEIVE) {
                let buffer = buffers.iter().find(|buffer| buffer.head == head).unwrap();
                let bytes = driver.read(buffer.writable[0].0, len as usize);
                found |= bytes[HEADER..] == expected;
                // The buffer is there for another frame.
                driver.make_available(RECEIVE, head);
            }
            driver.ring(RECEIVE);
            assert!(Instant::now() < until, "no frame comes in");
        }
    }
}
