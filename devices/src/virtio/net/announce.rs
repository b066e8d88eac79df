//! Telling the network that a guest has moved: switches learn from frames behind which port an address is.

use std::time::Duration;

use super::HEADER;
use super::config::Mac;

/// How often a moved guest is announced, and how long after the announcement before.
const SPACING: [Duration; 5] = [
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(150),
    Duration::from_millis(250),
    Duration::from_millis(350),
];

/// Announcements that are still to be made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Announcer {
    made: usize,
    active: bool,
}

impl Announcer {
    /// The guest has moved.
    pub(super) fn begin(&mut self) {
        *self = Self { made: 0, active: true };
    }

    /// One is to be made now: when the next is to follow.
    pub(super) fn next(&mut self) -> Option<Duration> {
        let spacing = SPACING.get(self.made).copied();
        self.made += 1;
        self.active = spacing.is_some();
        spacing
    }

    /// Whether there are any left.
    pub(super) fn is_active(self) -> bool {
        self.active
    }
}

/// A reverse ARP request for the guest's own address, as a broadcast (RFC 903): every switch learns from it, and nobody
/// answers.
pub(super) fn rarp(mac: Mac) -> Vec<u8> {
    const FRAME: usize = 60;
    let mut frame = vec![0; HEADER as usize];
    frame.extend([0xff; 6]);
    frame.extend(mac.0);
    frame.extend([0x80, 0x35]);
    // Ethernet, IPv4, lengths of their addresses, "request reverse".
    frame.extend([0, 1, 8, 0, 6, 4, 0, 3]);
    for _ in 0..2 {
        frame.extend(mac.0);
        frame.extend([0; 4]);
    }
    frame.resize(HEADER as usize + FRAME, 0);
    frame
}
