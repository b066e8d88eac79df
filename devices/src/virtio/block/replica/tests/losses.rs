//! Two hosts that lose power, the link, and each other, again and again, at any moment of a synchronisation, an epoch or a
//! takeover.

use super::*;

/// Bytes of a pass through the journal: so few that there are several.
const PASS: u64 = 16 << 10;

/// The two hosts, and the image of the one that has the guest.
struct World<L> {
    hosts: [Files; 2],
    /// Which host has the guest.
    live: usize,
    guest: Arc<Replica>,
    luck: L,
}

/// What came of a time with a standby.
#[derive(Default)]
struct Past {
    /// The images at the ends of the epochs that were sent.
    epochs: Vec<Vec<u8>>,
    /// How many of them were acknowledged.
    acknowledged: usize,
}

impl<L: FnMut() -> u64> World<L> {
    fn new(seed: u64, mut luck: L) -> Self {
        let hosts = [Files::new(pattern(seed)), Files::new(vec![luck() as u8; DISK as usize])];
        let guest = hosts[0].replica();
        Self { hosts, live: 0, guest, luck }
    }

    fn standby(&self) -> &Files {
        &self.hosts[1 - self.live]
    }

    /// The guest is mirrored until something happens to it.
    fn mirror(&mut self, twin: &Arc<Replica>, past: &mut Past) -> Option<Hand> {
        let mut hand = self.standby().try_hand(twin).ok()?;
        hand.pass = PASS;
        agree(&[Arc::clone(&self.guest)], LINK, &answer(&[Arc::clone(twin)])).ok()?;
        loop {
            let mut log = Vec::new();
            self.guest.sync_round(LINK, &mut log).ok()?;
            hand.copy(&log).ok()?;
            if !self.guest.progress(None).lags {
                break;
            }
            try_scribble(&self.guest, &mut self.luck).ok()?;
        }
        for number in 1..=6 + (self.luck)() % 10 {
            if number > 1 {
                try_scribble(&self.guest, &mut self.luck).ok()?;
            }
            let log = try_epoch(&self.guest).ok()?;
            past.epochs.push(self.hosts[self.live].image.bytes());
            if !log.is_empty() {
                hand.keep(number, &log).ok()?;
            }
            past.acknowledged = past.epochs.len();
            self.guest.acknowledged();
            if !log.is_empty() && hand.apply(&log).is_err() {
                return Some(hand);
            }
            if self.standby().has_power() {
                assert!(self.standby().image.bytes() == past.epochs[past.acknowledged - 1], "epoch {number}");
            }
            if (self.luck)().is_multiple_of(3) {
                self.guest.shorten_note().ok()?;
            }
        }
        Some(hand)
    }

    /// The host of the guest has lost power, or all sight of the other.
    fn take_over(&mut self, mut hand: Hand, twin: Arc<Replica>, past: &Past) {
        hand.take_over().unwrap();
        let image = self.standby().image.bytes();
        // What was made durable last may be beyond what was acknowledged.
        assert!(past.epochs[past.acknowledged - 1..].contains(&image), "it goes on from an epoch");
        self.live = 1 - self.live;
        self.guest = twin;
    }

    /// The host has power again.
    fn boot(&mut self, host: usize) {
        self.hosts[host] = self.hosts[host].back(&mut self.luck);
    }

    fn generation(&mut self) {
        let live = self.live;
        let twin = self.standby().replica();
        let victim = (self.luck)() % 3;
        // Before, in the middle of, or after the first epoch.
        let acts = 1 + (self.luck)() % 150;
        if victim < 2 {
            self.hosts[victim as usize].lose_power_within(acts);
        }
        let mut past = Past::default();
        let hand = self.mirror(&twin, &mut past);
        let (host_lives, standby_lives) = (self.hosts[live].has_power(), self.standby().has_power());
        for host in self.hosts.iter().filter(|host| host.has_power()) {
            host.end.store(u64::MAX, Ordering::Relaxed);
        }
        if !standby_lives {
            drop((hand, twin));
            self.boot(1 - live);
            let found = self.standby().replica();
            self.standby().hand(&found);
            let image = self.standby().image.bytes();
            if past.acknowledged > 0 {
                found.check_complete().unwrap();
                let oldest = past.acknowledged - 1;
                assert!(
                    past.epochs[oldest..].contains(&image),
                    "{} epochs were acknowledged",
                    past.acknowledged
                );
            }
            self.guest.go_alone();
        } else if !host_lives {
            match hand {
                Some(hand) if past.acknowledged > 0 => self.take_over(hand, twin, &past),
                // The primary failed while it called for what the standby has: that has an epoch all the same.
                _ if past.acknowledged > 0 => {
                    let hand = self.standby().hand(&twin);
                    self.take_over(hand, twin, &past);
                }
                _ => {}
            }
            self.boot(live);
            if self.live == live {
                self.guest = self.hosts[live].replica();
                self.hosts[live].hand(&self.guest);
                self.guest.check_complete().unwrap();
            }
        } else if (self.luck)().is_multiple_of(2) {
            self.guest.go_alone();
        } else if let Some(hand) = hand {
            // Nobody sees these any more, but they are on the disk.
            scribble(&self.guest, &mut self.luck);
            self.take_over(hand, twin, &past);
        }
        scribble(&self.guest, &mut self.luck);
    }

    /// In the end both have the same.
    fn finish(mut self) {
        let twin = self.standby().replica();
        let mut past = Past::default();
        assert!(self.mirror(&twin, &mut past).is_some() && past.acknowledged == past.epochs.len());
        assert!(self.hosts[0].image.bytes() == self.hosts[1].image.bytes());
    }
}

proptest! {
    // Each has images of its own.
    #![proptest_config(ProptestConfig::with_cases((ProptestConfig::default().cases / 16).max(8)))]

    #[test]
    fn whatever_is_lost_and_whenever_an_epoch_is_found_and_the_sides_become_equal_again(seed: u64) {
        let mut world = World::new(seed, noise(seed));
        for _ in 0..6 {
            world.generation();
        }
        world.finish();
    }
}
