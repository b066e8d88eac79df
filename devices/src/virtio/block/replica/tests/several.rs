//! Three hosts, of which one has the guest: they lose power, the links, and each other, at any moment.

use super::*;

/// A standby, as the primary sees it and as it is.
struct Member {
    link: LinkId,
    twin: Arc<Replica>,
    hand: Hand,
    follows: bool,
}

/// The hosts.
struct World<L> {
    hosts: [Files; 3],
    /// Which host has the guest.
    live: usize,
    guest: Arc<Replica>,
    /// By host.
    members: BTreeMap<usize, Member>,
    epoch: u64,
    /// The image at the end of the last epoch that was committed.
    committed: Vec<u8>,
    /// That of an epoch that was sent since.
    sent: Option<Vec<u8>>,
    links: LinkId,
    /// Bytes that were sent to make images equal.
    copied: usize,
    luck: L,
}

impl<L: FnMut() -> u64> World<L> {
    fn new(seed: u64, luck: L) -> Self {
        let hosts = [pattern(seed), vec![1; DISK as usize], vec![2; DISK as usize]].map(Files::new);
        let guest = hosts[0].replica();
        let committed = hosts[0].image.bytes();
        Self {
            hosts,
            live: 0,
            guest,
            members: BTreeMap::new(),
            epoch: 0,
            committed,
            sent: None,
            links: 0,
            copied: 0,
            luck,
        }
    }

    fn image(&self) -> Vec<u8> {
        self.hosts[self.live].image.bytes()
    }

    /// `host` begins to be a standby. `None`, as below: somebody has lost power.
    fn join(&mut self, host: usize) -> Option<()> {
        let twin = self.hosts[host].replica();
        let mut hand = self.hosts[host].try_hand(&twin).ok()?;
        hand.pass = 8 << 10;
        self.links += 1;
        let link = self.links;
        agree(&[Arc::clone(&self.guest)], link, &answer(&[Arc::clone(&twin)])).ok()?;
        self.members.insert(host, Member { link, twin, hand, follows: false });
        Some(())
    }

    /// What `host` lacks is sent to it, or a part of it.
    fn round(&mut self, host: usize) -> Option<()> {
        let Some(member) = self.members.get_mut(&host).filter(|member| !member.follows) else {
            return Some(());
        };
        let mut log = Vec::new();
        self.guest.sync_round(member.link, &mut log).ok()?;
        self.copied += log.len();
        member.hand.copy(&log).ok()
    }

    /// An epoch of all that lag no more. `dies`: the primary has sent it to so many of them when it dies.
    fn take_epoch(&mut self, dies: Option<usize>) -> Option<()> {
        let ready = |member: &Member| member.follows || !self.guest.progress(Some(member.link)).lags;
        let part: Vec<(usize, LinkId)> = self
            .members
            .iter()
            .filter(|(_, member)| ready(member))
            .map(|(&host, member)| (host, member.link))
            .collect();
        let links: Vec<LinkId> = part.iter().map(|&(_, link)| link).collect();
        self.guest.follow(&links).ok()?;
        self.guest.close_log();
        if part.is_empty() {
            return Some(());
        }
        self.epoch += 1;
        self.sent = Some(self.image());
        let turned = (self.luck)() as usize % part.len();
        for (index, &(host, link)) in part.iter().cycle().skip(turned).take(part.len()).enumerate() {
            if dies == Some(index) {
                return None;
            }
            let mut log = Vec::new();
            self.guest.encode_log(link, &mut log);
            let member = self.members.get_mut(&host)?;
            if log.is_empty() || member.hand.keep(self.epoch, &log).is_ok() {
                member.follows = true;
                // It is durable; whether it is in the image when power is lost does not matter.
                let _ = member.hand.apply(&log);
            } else {
                self.lose(host);
            }
        }
        let part: Vec<usize> =
            self.members.iter().filter(|(_, member)| member.follows).map(|(&host, _)| host).collect();
        if part.is_empty() {
            self.guest.go_alone();
            self.members.clear();
            self.sent = None;
            return Some(());
        }
        self.guest.acknowledged();
        self.committed = self.sent.take()?;
        for host in part.into_iter().filter(|&host| self.hosts[host].has_power()) {
            assert!(self.hosts[host].image.bytes() == self.committed, "epoch {} of host {host}", self.epoch);
        }
        Some(())
    }

    /// `host`, a standby, is lost.
    fn lose(&mut self, host: usize) {
        if let Some(member) = self.members.remove(&host) {
            self.guest.part(member.link);
        }
        self.restart(host);
    }

    fn restart(&mut self, host: usize) {
        if !self.hosts[host].has_power() {
            self.hosts[host] = self.hosts[host].back(&mut self.luck);
        }
    }

    /// The host of the guest is lost: one of those that follow goes on.
    fn fail_over(&mut self) {
        let old = self.live;
        if self.hosts[old].has_power() {
            // Nobody sees this any more, but it is on the disk.
            let _ = try_scribble(&self.guest, &mut self.luck);
        }
        let mut able: Vec<usize> =
            self.members.keys().copied().filter(|host| self.members[host].follows).collect();
        able.retain(|&host| self.hosts[host].has_power());
        let mut members = std::mem::take(&mut self.members);
        if !able.is_empty() {
            let next = able[(self.luck)() as usize % able.len()];
            if let Some(mut member) = members.remove(&next) {
                self.hosts[next].end.store(u64::MAX, Ordering::Relaxed);
                member.hand.take_over().unwrap();
                let image = self.hosts[next].image.bytes();
                assert!(
                    image == self.committed || self.sent.as_ref() == Some(&image),
                    "it goes on from an epoch"
                );
                (self.live, self.guest) = (next, member.twin);
            }
        } else if self.hosts[old].has_power() {
            self.guest.go_alone();
        }
        drop(members);
        (0..3).for_each(|host| self.restart(host));
        if able.is_empty() {
            self.hosts[old].end.store(u64::MAX, Ordering::Relaxed);
            self.guest = self.hosts[old].replica();
            self.hosts[old].hand(&self.guest);
            self.guest.check_complete().unwrap();
        }
        (self.committed, self.sent, self.epoch) = (self.image(), None, 0);
    }

    /// Whoever has lost power, or has failed, is lost.
    fn settle(&mut self, suspect: Option<usize>) {
        if !self.hosts[self.live].has_power() {
            self.fail_over();
            return;
        }
        for host in 0..3 {
            if host != self.live && (suspect == Some(host) || !self.hosts[host].has_power()) {
                self.lose(host);
            }
        }
    }

    fn step(&mut self) {
        let host = (self.luck)() as usize % 3;
        let standby = host != self.live;
        let mut suspect = None;
        let done = match (self.luck)() % 24 {
            0 if self.hosts[host].has_power() => {
                let within = 1 + (self.luck)() % 60;
                self.hosts[host].lose_power_within(within);
                Some(())
            }
            1 if standby && self.members.contains_key(&host) => {
                // Only the link is lost.
                suspect = Some(host);
                None
            }
            2 => {
                let after = (self.luck)() as usize % 3;
                if self.take_epoch(Some(after)).is_none() {
                    self.fail_over();
                }
                Some(())
            }
            3 | 4 => self.guest.shorten_note().ok(),
            5..=8 if standby && !self.members.contains_key(&host) => {
                suspect = Some(host);
                self.join(host)
            }
            5..=12 if standby => {
                suspect = Some(host);
                self.round(host)
            }
            13..=19 => self.take_epoch(None),
            _ => try_scribble(&self.guest, &mut self.luck).ok(),
        };
        if done.is_none() {
            self.settle(suspect);
        }
    }

    /// In the end all have the same.
    fn finish(&mut self) {
        self.settle(None);
        (0..3).for_each(|host| self.hosts[host].end.store(u64::MAX, Ordering::Relaxed));
        self.join_all();
        scribble(&self.guest, &mut self.luck);
        self.take_epoch(None).unwrap();
        let image = self.image();
        assert!(self.hosts.iter().all(|host| host.image.bytes() == image));
    }

    /// All are made standbys, and follow.
    fn join_all(&mut self) {
        for host in (0..3).filter(|&host| host != self.live).collect::<Vec<_>>() {
            if !self.members.contains_key(&host) {
                self.join(host).unwrap();
            }
            while !self.members[&host].follows && self.guest.progress(Some(self.members[&host].link)).lags {
                self.round(host).unwrap();
            }
        }
        self.take_epoch(None).unwrap();
    }

    /// How much it takes until all follow.
    fn cost_of_joining(&mut self) -> u64 {
        self.copied = 0;
        self.join_all();
        self.copied as u64
    }
}

/// Three hosts, two of which follow the third, and some epochs.
fn three() -> World<impl FnMut() -> u64> {
    let mut world = World::new(3, noise(3));
    world.join_all();
    for _ in 0..3 {
        scribble(&world.guest, &mut world.luck);
        world.take_epoch(None).unwrap();
    }
    world.guest.shorten_note().unwrap();
    world
}

#[test]
fn standby_that_follows_another_primary_is_sent_only_what_it_lacks() {
    for got_it in 0..3 {
        let mut world = three();
        // The last epoch is at none, one, or both of them.
        write(&world.guest, REGION + 512, &[0x33; 512]);
        assert_eq!(world.take_epoch(Some(got_it)), if got_it < 2 { None } else { Some(()) });
        world.fail_over();
        write(&world.guest, 0, &[0x44; 512]);
        let cost = world.cost_of_joining();
        // The old primary and the other standby: a region that was written here, and one of the last epoch, for each.
        assert!(cost <= 5 * REGION, "{cost} bytes were sent where {got_it} had the epoch");
        world.finish();
    }
}

#[test]
fn standby_that_returns_is_sent_only_what_was_written_while_others_followed() {
    let mut world = three();
    let host = (world.live + 1) % 3;
    world.lose(host);
    for number in 0..20 {
        write(&world.guest, 2 * REGION + number * 512, &[number as u8; 512]);
        world.take_epoch(None).unwrap();
        world.guest.shorten_note().unwrap();
    }
    let cost = world.cost_of_joining();
    assert!((REGION / 2..2 * REGION).contains(&cost), "{cost} bytes were sent");
    world.finish();
}

#[test]
fn standby_that_was_away_when_the_guest_went_elsewhere_is_sent_everything() {
    let mut world = three();
    let away = (world.live + 1) % 3;
    world.lose(away);
    for _ in 0..2 {
        write(&world.guest, 2 * REGION, &[0x55; 512]);
        world.take_epoch(None).unwrap();
    }
    world.fail_over();
    assert_ne!(world.live, away);
    world.join(away).unwrap();
    let link = world.members[&away].link;
    assert_eq!(world.guest.progress(Some(link)).left, DISK, "nobody knows what it lacks");
    world.finish();
}

#[test]
fn slow_copy_to_one_standby_takes_nothing_from_what_another_is_sent() {
    let mut world = World::new(5, noise(5));
    world.join(1).unwrap();
    while world.guest.progress(None).lags {
        world.round(1).unwrap();
    }
    world.take_epoch(None).unwrap();
    world.join(2).unwrap();
    world.round(2).unwrap();
    for number in 0..10 {
        write(&world.guest, number * 8192, &[number as u8; 4096]);
        world.take_epoch(None).unwrap();
        world.guest.shorten_note().unwrap();
    }
    assert!(!world.members[&2].follows);
    world.finish();
}

proptest! {
    // Each has images of its own.
    #![proptest_config(ProptestConfig::with_cases((ProptestConfig::default().cases / 16).max(8)))]

    #[test]
    fn whatever_is_lost_of_three_and_whenever_an_epoch_is_found_and_they_become_equal_again(seed: u64) {
        let mut world = World::new(seed, noise(seed));
        for _ in 0..150 {
            world.step();
        }
        world.finish();
    }
}
