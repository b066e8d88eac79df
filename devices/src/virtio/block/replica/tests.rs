//! Two sides with an image each, on files that lose power.

mod losses;
mod several;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::journal::Journal;
use super::keeper::Hand;
use super::sync::BLOCK;
use super::*;

/// The standby, where there is one.
const LINK: LinkId = 7;

/// Bytes of the disk: a few regions.
const DISK: u64 = 3 * REGION + 4096;

/// What is done to a file, so that it can be done again in part.
#[derive(Clone, Debug)]
enum Act {
    Write(u64, Vec<u8>),
    Zero(u64, u64),
    Sync,
}

/// A file that remembers what was done to it. Clones are the same file.
#[derive(Clone, Default)]
struct Record {
    acts: Arc<Mutex<Vec<Act>>>,
    content: Arc<Mutex<Vec<u8>>>,
    /// Counts what is done to all files of a host.
    clock: Arc<AtomicU64>,
    /// When each act was done.
    times: Arc<Mutex<Vec<u64>>>,
    /// When the host loses power: nothing can be done from then on.
    end: Arc<AtomicU64>,
}

impl Record {
    fn of(content: Vec<u8>, clock: &Arc<AtomicU64>, end: &Arc<AtomicU64>) -> Self {
        let content = Arc::new(Mutex::new(content));
        Self { content, clock: Arc::clone(clock), end: Arc::clone(end), ..Self::default() }
    }

    fn note(&self, act: Act) -> io::Result<()> {
        let now = self.clock.fetch_add(1, Ordering::Relaxed);
        if now >= self.end.load(Ordering::Relaxed) {
            return Err(io::Error::other("there is no power"));
        }
        perform(&mut self.content.lock().unwrap(), &act);
        self.times.lock().unwrap().push(now);
        self.acts.lock().unwrap().push(act);
        Ok(())
    }

    fn bytes(&self) -> Vec<u8> {
        self.content.lock().unwrap().clone()
    }

    /// What is left of it if power is lost before act `time` of the host: all that was synchronised, and of what was done
    /// after that what `luck` leaves: any sectors of any writes.
    fn after_power_loss(&self, start: &[u8], time: u64, luck: &mut impl FnMut() -> u64) -> Vec<u8> {
        let acts = self.acts.lock().unwrap();
        let done = self.times.lock().unwrap().iter().take_while(|&&at| at < time).count();
        let durable = acts[..done].iter().rposition(|act| matches!(act, Act::Sync)).unwrap_or(0);
        let mut content = start.to_vec();
        acts[..durable].iter().for_each(|act| perform(&mut content, act));
        for act in &acts[durable..done] {
            match (luck() % 3, act) {
                (0, _) => {}
                (1, Act::Write(at, bytes)) => {
                    for (at, sector) in sectors(*at, bytes) {
                        if luck().is_multiple_of(2) {
                            perform(&mut content, &Act::Write(at, sector.to_vec()));
                        }
                    }
                }
                _ => perform(&mut content, act),
            }
        }
        content
    }
}

/// The parts of a write that lie in one sector each.
fn sectors(at: u64, bytes: &[u8]) -> Vec<(u64, &[u8])> {
    let (mut at, mut rest, mut sectors) = (at, bytes, Vec::new());
    while !rest.is_empty() {
        let (sector, behind) = rest.split_at(rest.len().min(512 - at as usize % 512));
        sectors.push((at, sector));
        (at, rest) = (at + sector.len() as u64, behind);
    }
    sectors
}

fn perform(content: &mut Vec<u8>, act: &Act) {
    let mut grow = |end: u64| {
        if content.len() < end as usize {
            content.resize(end as usize, 0);
        }
    };
    match act {
        Act::Write(at, bytes) => {
            grow(at + bytes.len() as u64);
            content[*at as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        Act::Zero(at, len) => {
            grow(at + len);
            content[*at as usize..][..*len as usize].fill(0);
        }
        Act::Sync => {}
    }
}

impl Store for Record {
    fn read(&self, at: u64, into: &mut [u8]) -> io::Result<()> {
        let content = self.content.lock().unwrap();
        let there = content.get(at as usize..).unwrap_or_default();
        let len = there.len().min(into.len());
        into[..len].copy_from_slice(&there[..len]);
        into[len..].fill(0);
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.note(Act::Write(at, bytes.to_vec()))
    }

    fn zero(&self, at: u64, len: u64, _unmap: bool) -> io::Result<()> {
        self.note(Act::Zero(at, len))
    }

    fn sync(&self) -> io::Result<()> {
        self.note(Act::Sync)
    }
}

/// The files of a side.
#[derive(Clone)]
struct Files {
    image: Record,
    note: Record,
    journal: Record,
    clock: Arc<AtomicU64>,
    end: Arc<AtomicU64>,
    /// What they held when they were recorded from.
    start: [Vec<u8>; 3],
}

impl Files {
    fn new(image: Vec<u8>) -> Self {
        Self::holding([image, Vec::new(), Vec::new()])
    }

    fn holding(start: [Vec<u8>; 3]) -> Self {
        let (clock, end) = (Arc::default(), Arc::new(AtomicU64::new(u64::MAX)));
        let [image, note, journal] = start.clone().map(|content| Record::of(content, &clock, &end));
        Self { image, note, journal, clock, end, start }
    }

    fn now(&self) -> u64 {
        self.clock.load(Ordering::Relaxed)
    }

    /// What a host finds that lost power before its act `time`.
    fn after_power_loss(&self, time: u64, luck: &mut impl FnMut() -> u64) -> Self {
        let [image, note, journal] = &self.start;
        Self::holding([
            self.image.after_power_loss(image, time, luck),
            self.note.after_power_loss(note, time, luck),
            self.journal.after_power_loss(journal, time, luck),
        ])
    }

    fn replica(&self) -> Arc<Replica> {
        let identity = ImageIdentity { len: DISK, inode: 1 };
        let note = Note::open(Box::new(self.note.clone()), identity).unwrap();
        let room = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let image = Box::new(self.image.clone());
        Arc::new(Replica::on("data", Path::new("/data"), DISK, image, note, room))
    }

    fn hand(&self, replica: &Arc<Replica>) -> Hand {
        self.try_hand(replica).unwrap()
    }

    fn try_hand(&self, replica: &Arc<Replica>) -> Result<Hand, KeepError> {
        Hand::open(vec![Arc::clone(replica)], Box::new(self.journal.clone()))
    }

    fn has_power(&self) -> bool {
        self.now() < self.end.load(Ordering::Relaxed)
    }

    /// The host loses power before it has done `acts` things more.
    fn lose_power_within(&self, acts: u64) {
        self.end.store(self.now() + acts, Ordering::Relaxed);
    }

    /// What it finds when it has power again.
    fn back(&self, luck: &mut impl FnMut() -> u64) -> Self {
        self.after_power_loss(self.end.load(Ordering::Relaxed), luck)
    }
}

/// A write as the device does it, in one go.
fn write(replica: &Replica, at: u64, bytes: &[u8]) {
    try_write(replica, at, bytes).unwrap();
}

fn try_write(replica: &Replica, at: u64, bytes: &[u8]) -> io::Result<()> {
    let operation = Operation::Write { at, len: bytes.len() as u32 };
    assert!(replica.admit(operation), "nothing else is under way, and there is room");
    let mut bytes = bytes.to_vec();
    replica.carry_out(operation, &mut bytes)?;
    replica.complete(operation, &bytes);
    Ok(())
}

fn zero(replica: &Replica, at: u64, len: u64) -> io::Result<()> {
    let operation = Operation::Discard { at, len };
    assert!(replica.admit(operation));
    replica.carry_out(operation, &mut Vec::new())?;
    replica.complete(operation, &[]);
    Ok(())
}

/// Closes the log of an epoch of one standby and gives it.
fn epoch(replica: &Replica) -> Vec<u8> {
    try_epoch(replica).unwrap()
}

fn try_epoch(replica: &Replica) -> io::Result<Vec<u8>> {
    let mut log = Vec::new();
    replica.follow(&[LINK])?;
    replica.close_log();
    replica.encode_log(LINK, &mut log);
    Ok(log)
}

/// Brings the standby's image up to the first epoch, and gives how many bytes that took. `between` comes after each round.
fn synchronise(primary: &Replica, hand: &mut Hand, mut between: impl FnMut()) -> usize {
    let mut sent = 0;
    while {
        let mut log = Vec::new();
        primary.sync_round(LINK, &mut log).unwrap();
        sent += log.len();
        hand.copy(&log).unwrap();
        between();
        primary.progress(None).lags
    } {}
    let log = epoch(primary);
    hand.keep(1, &log).unwrap();
    hand.apply(&log).unwrap();
    primary.acknowledged();
    sent + log.len()
}

fn noise(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state >> 8
    }
}

fn pattern(seed: u64) -> Vec<u8> {
    let mut luck = noise(seed);
    let mut image = vec![0; DISK as usize];
    // Some blocks are zeros.
    for block in image.chunks_mut(BLOCK as usize) {
        let byte = luck() as u8;
        block.fill(if byte < 64 { 0 } else { byte });
    }
    image
}

/// A few random writes.
fn scribble(replica: &Replica, luck: &mut impl FnMut() -> u64) {
    try_scribble(replica, luck).unwrap();
}

fn try_scribble(replica: &Replica, luck: &mut impl FnMut() -> u64) -> io::Result<()> {
    for _ in 0..luck() % 5 {
        let len = 512 * (1 + luck() % 40);
        let at = luck() % (DISK - len) / 512 * 512;
        if luck().is_multiple_of(5) {
            zero(replica, at, len)?;
        } else {
            try_write(replica, at, &vec![luck() as u8; len as usize])?;
        }
    }
    Ok(())
}

#[test]
fn image_is_sent_while_it_is_written_to_and_then_follows_epoch_by_epoch() {
    let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0xee; DISK as usize]));
    let (primary, standby) = (ours.replica(), theirs.replica());
    let mut hand = theirs.hand(&standby);
    let mut luck = noise(2);
    scribble(&primary, &mut luck);
    agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&standby)])).unwrap();
    assert!(primary.progress(None).lags);
    synchronise(&primary, &mut hand, || scribble(&primary, &mut luck));
    let images = || (ours.image.bytes(), theirs.image.bytes());
    let (a, b) = images();
    assert!(a == b, "the images are equal at the first epoch");
    standby.check_complete().unwrap();
    for number in 2..20 {
        scribble(&primary, &mut luck);
        let before = ours.image.bytes();
        let log = epoch(&primary);
        // What comes after the pause is not in it.
        write(&primary, 0, &[number as u8; 512]);
        hand.keep(number, &log).unwrap();
        hand.apply(&log).unwrap();
        primary.acknowledged();
        assert!(theirs.image.bytes() == before, "epoch {number}");
    }
}

#[test]
fn part_of_a_copy_is_not_run_from() {
    let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0; DISK as usize]));
    let (primary, standby) = (ours.replica(), theirs.replica());
    let mut hand = theirs.hand(&standby);
    agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&standby)])).unwrap();
    let mut log = Vec::new();
    primary.sync_round(LINK, &mut log).unwrap();
    hand.copy(&log).unwrap();
    assert!(hand.take_over().unwrap_err().to_string().contains("a part of a copy"));
    drop(standby);
    assert!(theirs.replica().check_complete().is_err(), "nor after a start anew");
}

/// Two sides in lockstep.
fn pair_of(ours: &Files, theirs: &Files) -> (Arc<Replica>, Arc<Replica>, Hand) {
    let (primary, standby) = (ours.replica(), theirs.replica());
    let mut hand = theirs.hand(&standby);
    agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&standby)])).unwrap();
    synchronise(&primary, &mut hand, || {});
    (primary, standby, hand)
}

#[test]
fn interrupted_synchronisation_goes_on_where_it_was() {
    let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0; DISK as usize]));
    let primary = ours.replica();
    let whole = {
        let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0; DISK as usize]));
        let (primary, standby) = (ours.replica(), theirs.replica());
        agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&standby)])).unwrap();
        synchronise(&primary, &mut theirs.hand(&standby), || {})
    };
    {
        let standby = theirs.replica();
        let mut hand = theirs.hand(&standby);
        agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&standby)])).unwrap();
        // All but the last region is there, and that is known to be durable; then the standby goes.
        let mut todo = Regions::none(DISK, BLOCK);
        for block in 3 * REGION / BLOCK..DISK.div_ceil(BLOCK) {
            todo.insert(block);
        }
        primary.state().twins.get_mut(&LINK).unwrap().todo = todo;
        let image = ours.image.bytes();
        let entry = Entry::Write { at: 0, bytes: &image[..3 * REGION as usize] };
        let mut entries = Vec::new();
        entry.append_to(&mut entries);
        let mut log = Vec::new();
        Section::new("data", primary.state().twins[&LINK].group, log::BEGIN, &entries).append_to(&mut log);
        hand.copy(&log).unwrap();
        let period = primary.state().turn();
        primary.state().twins.get_mut(&LINK).unwrap().acknowledged = period;
        let group = primary.state().twins[&LINK].group;
        primary.shorten_note_of(group).unwrap();
        primary.go_alone();
    }
    // Both processes are new.
    drop(primary);
    let (primary, standby) = (ours.replica(), theirs.replica());
    write(&primary, 5 * 512, &[0xaa; 512]);
    agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&standby)])).unwrap();
    let sent = synchronise(&primary, &mut theirs.hand(&standby), || {});
    assert!(ours.image.bytes() == theirs.image.bytes());
    assert!(sent < whole * 2 / 3, "{sent} bytes after {whole}");
}

#[test]
fn old_primary_that_returns_is_sent_what_either_side_has_written_since() {
    let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0; DISK as usize]));
    let (primary, standby, mut hand) = pair_of(&ours, &theirs);
    primary.shorten_note().unwrap();
    assert_eq!(primary.note.count(primary.state().common), 0, "both have everything");
    // In no log that counts: the primary dies before its epoch is committed.
    write(&primary, REGION + 512, &[0x11; 1024]);
    drop(primary);
    hand.take_over().unwrap();
    write(&standby, 2 * REGION, &[0x22; 512]);

    let returned = ours.replica();
    let mut hand = ours.hand(&returned);
    assert_ne!(ours.image.bytes(), theirs.image.bytes());
    agree(&[Arc::clone(&standby)], LINK, &answer(&[Arc::clone(&returned)])).unwrap();
    assert_eq!(standby.progress(None).left, 2 * REGION, "two regions and no more");
    synchronise(&standby, &mut hand, || {});
    assert!(ours.image.bytes() == theirs.image.bytes());
}

#[test]
fn image_that_nobody_knows_is_sent_whole() {
    let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0; DISK as usize]));
    let (primary, ..) = pair_of(&ours, &theirs);
    let another = Files::new(vec![0; DISK as usize]);
    agree(&[Arc::clone(&primary)], LINK, &answer(&[another.replica()])).unwrap();
    assert_eq!(primary.progress(Some(LINK)).left, DISK);
    // An image that was put in the place of another has another inode.
    let replaced = Note::open(Box::new(theirs.note.clone()), ImageIdentity { len: DISK, inode: 2 }).unwrap();
    assert!(replaced.groups().is_empty());
    let short = Note::open(Box::new(theirs.note), ImageIdentity { len: 512, inode: 1 }).unwrap();
    assert!(short.groups().is_empty());
}

#[test]
fn image_of_another_length_is_refused_with_what_to_do() {
    let primary = Files::new(pattern(1)).replica();
    let mut wrong = primary.name().to_owned();
    wrong = format!(r#"[{{"name":"{wrong}","len":512,"groups":[]}}]"#);
    let error = agree(&[primary], LINK, wrong.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("truncate"), "{error}");
}

#[test]
fn writes_to_the_same_bytes_come_one_after_the_other() {
    let replica = Files::new(pattern(1)).replica();
    let first = Operation::Write { at: 512, len: 1024 };
    assert!(replica.admit(first));
    assert!(!replica.admit(Operation::Write { at: 1024, len: 512 }));
    assert!(!replica.admit(Operation::Discard { at: 0, len: 4096 }));
    assert!(replica.admit(Operation::Write { at: 1536, len: 512 }));
    replica.complete(first, &[0; 1024]);
    assert!(replica.admit(Operation::Write { at: 1024, len: 512 }));
}

#[test]
fn full_log_ends_its_epoch_and_holds_the_guest_back() {
    let (ours, theirs) = (Files::new(pattern(1)), Files::new(vec![0; DISK as usize]));
    let (primary, ..) = pair_of(&ours, &theirs);
    let len = 1 << 20;
    let mut written = 0;
    while primary.admit(Operation::Write { at: 0, len }) {
        primary.complete(Operation::Write { at: 0, len }, &vec![1; len as usize]);
        written += 1;
        assert_eq!(primary.log_is_urgent(), written >= 4, "{written} MiB");
    }
    assert_eq!(written, 7, "the eighth, with what stands before it, is too much");
    assert!(primary.room.read().is_err());
    assert!(epoch(&primary).len() <= LOG_LIMIT + 64);
    assert!(primary.room.read().is_ok(), "whoever waits is woken");
    assert!(primary.admit(Operation::Write { at: 0, len }));
}

#[test]
fn journal_torn_at_any_byte_gives_whole_epochs_only() {
    let file = Files::new(Vec::new()).journal;
    let mut journal = Journal::open(Box::new(file.clone()), |_, _| Ok(())).unwrap();
    let mut ends = Vec::new();
    for epoch in 1..4_u64 {
        journal.append(epoch, &vec![epoch as u8; 20 + epoch as usize]).unwrap();
        ends.push(file.bytes().len());
    }
    let whole = file.bytes();
    for len in 0..=whole.len() {
        for garbage in [0, 0xff] {
            let mut torn = whole[..len].to_vec();
            torn.resize(whole.len() + 100, garbage);
            let mut found = Vec::new();
            let torn = Files::holding([Vec::new(), Vec::new(), torn]).journal;
            Journal::open(Box::new(torn), |epoch, log| {
                found.push((epoch, log.to_vec()));
                Ok(())
            })
            .unwrap();
            // Zeros at the end of a log may be what was there.
            let expected = ends.iter().filter(|&&end| end <= len).count();
            assert_eq!(found.len(), expected, "torn at {len}");
            assert!(found.iter().all(|(epoch, log)| *log == vec![*epoch as u8; 20 + *epoch as usize]));
        }
    }
}

#[test]
fn what_is_left_of_the_pass_before_is_never_replayed() {
    let file = Files::new(Vec::new()).journal;
    let mut journal = Journal::open(Box::new(file.clone()), |_, _| Ok(())).unwrap();
    (1..4_u64).for_each(|epoch| journal.append(epoch, &[1; 10]).unwrap());
    journal.clear().unwrap();
    journal.append(4, &[4; 10]).unwrap();
    let mut found = Vec::new();
    let open = |found: &mut Vec<u64>| {
        Journal::open(Box::new(file.clone()), |epoch, _| {
            found.push(epoch);
            Ok(())
        })
    };
    open(&mut found).unwrap();
    assert_eq!(found, [4]);
    journal.clear().unwrap();
    found.clear();
    open(&mut found).unwrap();
    assert!(found.is_empty());
}

#[test]
fn first_record_of_a_new_pass_never_leaves_a_part_of_the_pass_before() {
    let file = Files::new(Vec::new()).journal;
    let mut journal = Journal::open(Box::new(file.clone()), |_, _| Ok(())).unwrap();
    journal.append(1, &[1; 10]).unwrap();
    journal.append(2, &[2; 1000]).unwrap();
    let turned = file.clock.load(Ordering::Relaxed);
    journal.clear().unwrap();
    journal.append(3, &[3; 2000]).unwrap();
    for time in turned..=file.clock.load(Ordering::Relaxed) {
        for missing in 0..5 {
            // What was last made durable, and a write, of which a sector is missing.
            let mut calls = 0;
            let mut luck = || {
                calls += 1;
                u64::from(calls < 3 || calls - 3 != missing)
            };
            let left = file.after_power_loss(&[], time, &mut luck);
            let mut found = Vec::new();
            let left = Files::holding([Vec::new(), Vec::new(), left]).journal;
            Journal::open(Box::new(left), |epoch, _| {
                found.push(epoch);
                Ok(())
            })
            .unwrap();
            assert!(
                [&[1, 2][..], &[], &[3]].contains(&&found[..]),
                "{found:?} at {time} without sector {missing}"
            );
        }
    }
}

proptest! {
    // Each has images of its own.
    #![proptest_config(ProptestConfig::with_cases((ProptestConfig::default().cases / 8).max(8)))]

    /// The standby's host loses power at any moment: what it finds is exactly an epoch, and none older than the last that
    /// was acknowledged. From there the delta leads to the image of the primary that went on.
    #[test]
    fn loss_of_power_at_any_moment_leaves_exactly_a_committed_epoch(seed: u64, cut in 0_u64..1000, late: bool) {
        let mut luck = noise(seed);
        let (ours, theirs) = (Files::new(pattern(seed)), Files::new(vec![0; DISK as usize]));
        let (primary, standby, mut hand) = pair_of(&ours, &theirs);
        let first = theirs.now();
        let mut epochs = BTreeMap::from([(1, ours.image.bytes())]);
        // When each was acknowledged.
        let mut acknowledged = vec![(first, 1)];
        for number in 2..10 {
            scribble(&primary, &mut luck);
            epochs.insert(number, ours.image.bytes());
            let log = epoch(&primary);
            if !log.is_empty() {
                hand.keep(number, &log).unwrap();
            }
            primary.acknowledged();
            acknowledged.push((theirs.now(), number));
            if !log.is_empty() {
                hand.apply(&log).unwrap();
            }
            if luck().is_multiple_of(3) {
                primary.shorten_note().unwrap();
            }
        }
        scribble(&primary, &mut luck);
        let from = if late { acknowledged[8].0 } else { first };
        let time = from + cut * (theirs.now() - from + 1) / 1000;
        let oldest = acknowledged.iter().filter(|(at, _)| *at <= time).map(|(_, number)| *number).max().unwrap();

        let left = theirs.after_power_loss(time, &mut luck);
        let found = left.replica();
        left.hand(&found);
        let image = left.image.bytes();
        let which: Vec<u64> = epochs.iter().filter(|(_, other)| **other == image).map(|(number, _)| *number).collect();
        prop_assert!(which.iter().any(|&number| number >= oldest), "epochs {which:?} are found, {oldest} was acknowledged");
        found.check_complete().unwrap();

        // It comes back as the standby of the primary that went on, and that has heard no more of it than it could have.
        if oldest < 9 {
            return Ok(());
        }
        primary.go_alone();
        scribble(&primary, &mut luck);
        agree(&[Arc::clone(&primary)], LINK, &answer(&[Arc::clone(&found)])).unwrap();
        synchronise(&primary, &mut left.hand(&found), || {});
        prop_assert!(left.image.bytes() == ours.image.bytes(), "the delta did not make them equal");
        drop(standby);
    }

    /// The primary's host loses power: the standby goes on, and the old image becomes equal by the delta.
    #[test]
    fn primary_that_lost_power_becomes_equal_by_the_delta(seed: u64, cut in 0_u64..1000) {
        let mut luck = noise(seed);
        let (ours, theirs) = (Files::new(pattern(seed)), Files::new(vec![0; DISK as usize]));
        let (primary, standby, mut hand) = pair_of(&ours, &theirs);
        let first = ours.now();
        let mut logs = vec![(first, Vec::new())];
        for _ in 2..10 {
            scribble(&primary, &mut luck);
            logs.push((ours.now(), epoch(&primary)));
            primary.acknowledged();
            if luck().is_multiple_of(2) {
                primary.shorten_note().unwrap();
            }
        }
        let time = first + cut * (ours.now() - first + 1) / 1000;
        // The standby has those that were taken before, and perhaps not the last of these.
        let taken: Vec<_> = logs.iter().skip(1).filter(|(at, _)| *at < time).map(|(_, log)| log).collect();
        for (index, log) in taken.iter().enumerate().filter(|(_, log)| !log.is_empty()) {
            hand.keep(index as u64 + 2, log).unwrap();
            hand.apply(log).unwrap();
        }
        hand.take_over().unwrap();
        scribble(&standby, &mut luck);

        let left = ours.after_power_loss(time, &mut luck);
        let returned = left.replica();
        let mut hand = left.hand(&returned);
        agree(&[Arc::clone(&standby)], LINK, &answer(&[Arc::clone(&returned)])).unwrap();
        synchronise(&standby, &mut hand, || {});
        prop_assert!(left.image.bytes() == theirs.image.bytes());
    }
}
