//! The shells over real sockets, with a guest that is plain memory and a thread.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use mirror::console::Console;
use mirror::dirty::DirtySet;
use mirror::guest::{DiskSync, FenceOut, Guest, GuestError, StandbyMachine};
use mirror::ids::{Epoch, Guid, LinkId, Term};
use mirror::link::{Address, FrameReader, FrameWriter, Listener, Stream};
use mirror::memory::{GuestRam, Layout, PAGE_SIZE, PageMemory};
use mirror::primary::Settings;
use mirror::report::Report;
use mirror::shell::primary::{AttachError, Handle, Options, Outcome, attach};
use mirror::shell::{Watcher, standby};
use mirror::wire::message::{Body, Message, Policy};
use mirror::wire::pages::{BatchEncoder, BufferPool};
use mirror::witness::{FileWitness, Witness};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const PAGES: u64 = 1024;
/// Far fewer than the guest dirties between two epochs.
const STAGING_PAGES: usize = 16;
const PATIENCE: Duration = Duration::from_secs(20);

/// What the guest's thread and its machine share.
struct Board {
    memory: PageMemory,
    dirty: Mutex<DirtySet>,
    given_back: Mutex<DirtySet>,
    steps: AtomicU64,
    stopped: AtomicBool,
    console: Arc<Console>,
}

impl Board {
    /// One step: a page is given back, three pages are written and a line is printed.
    fn step(&self) {
        let mut dirty = self.dirty.lock().unwrap();
        if self.stopped.load(Ordering::Acquire) || !self.console.has_room() {
            return;
        }
        let step = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        let page = given_back_in(step);
        self.memory.write(page, &[0; PAGE_SIZE]).unwrap();
        self.given_back.lock().unwrap().insert(page);
        for write in 0..3 {
            let page = (step * 7 + write * 311) % PAGES;
            self.memory.write(page, &[step as u8; PAGE_SIZE]).unwrap();
            dirty.insert(page);
        }
        self.console.push(format!("{step}\n").as_bytes());
    }
}

/// A page that is sometimes written again at once, and sometimes many epochs later.
fn given_back_in(step: u64) -> u64 {
    (step * 7 + step % 5 * 311) % PAGES
}

/// A guest that is memory and a thread which writes to it.
struct PlainGuest {
    board: Arc<Board>,
    captured: u64,
    alive: Arc<AtomicBool>,
}

impl PlainGuest {
    fn start(console: &Arc<Console>) -> Self {
        let board = Arc::new(Board {
            memory: memory(),
            dirty: Mutex::new(DirtySet::new(PAGES)),
            given_back: Mutex::new(DirtySet::new(PAGES)),
            steps: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            console: Arc::clone(console),
        });
        let alive = Arc::new(AtomicBool::new(true));
        let (running, living) = (Arc::clone(&board), Arc::clone(&alive));
        thread::spawn(move || {
            while living.load(Ordering::Relaxed) {
                running.step();
                thread::yield_now();
            }
        });
        Self { board, captured: 0, alive }
    }
}

impl Drop for PlainGuest {
    fn drop(&mut self) {
        self.alive.store(false, Ordering::Relaxed);
    }
}

fn memory() -> PageMemory {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGES as usize * PAGE_SIZE)]).unwrap();
    PageMemory::new(Arc::new(ram)).unwrap()
}

impl Guest for PlainGuest {
    fn ram(&self) -> &Arc<GuestRam> {
        self.board.memory.ram()
    }

    fn describe(&self) -> Vec<u8> {
        b"plain".to_vec()
    }

    fn start_tracking(&mut self) -> Result<(), GuestError> {
        self.freed(&mut DirtySet::new(PAGES));
        Ok(())
    }

    fn stop_tracking(&mut self) -> Result<(), GuestError> {
        Ok(())
    }

    fn populated(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        into.insert_range(0, PAGES);
        Ok(())
    }

    fn harvest(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        let mut dirty = self.board.dirty.lock().unwrap();
        into.union(&dirty);
        dirty.clear();
        Ok(())
    }

    fn freed(&mut self, into: &mut DirtySet) {
        let mut given_back = self.board.given_back.lock().unwrap();
        into.union(&given_back);
        given_back.clear();
    }

    fn peek_dirty(&mut self) -> Result<Option<u64>, GuestError> {
        Ok(Some(self.board.dirty.lock().unwrap().count()))
    }

    fn agree(&mut self, _link: LinkId, _disks: &[u8]) -> Result<(), GuestError> {
        Ok(())
    }

    fn follow(&mut self, _links: &[LinkId]) -> Result<(), GuestError> {
        Ok(())
    }

    fn part(&mut self, _link: LinkId) {}

    fn encode_log(&mut self, _link: LinkId, _out: &mut Vec<u8>) -> Result<(), GuestError> {
        Ok(())
    }

    fn sync_disks(&mut self, _link: LinkId, _out: &mut Vec<u8>) -> Result<(), GuestError> {
        Ok(())
    }

    fn disk_sync(&self, _link: Option<LinkId>) -> DiskSync {
        DiskSync::default()
    }

    fn pause(&mut self) -> Result<(), GuestError> {
        let _whole_step = self.board.dirty.lock().unwrap();
        self.board.stopped.store(true, Ordering::Release);
        Ok(())
    }

    fn capture(&mut self) -> Result<(), GuestError> {
        self.captured = self.board.steps.load(Ordering::Relaxed);
        Ok(())
    }

    fn encode_captured(&mut self, out: &mut Vec<u8>) -> Result<(), GuestError> {
        out.extend(self.captured.to_le_bytes());
        Ok(())
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.board.stopped.store(false, Ordering::Release);
        Ok(())
    }
}

/// A standby machine that tells with which memory and state it was activated.
struct PlainTwin {
    memory: Option<PageMemory>,
    /// The guest's memory, from an earlier time.
    kept: Option<PageMemory>,
    activated: Sender<(PageMemory, u64)>,
    fence: Option<Fence>,
}

/// What keeps others out once it is `closed`.
#[derive(Clone, Default)]
struct Fence {
    closed: Arc<AtomicBool>,
    /// Whether the primary had given the guest up.
    handed_over: Arc<AtomicBool>,
}

impl StandbyMachine for PlainTwin {
    fn space(&self) -> u64 {
        PAGES * PAGE_SIZE as u64
    }

    fn allocate(&mut self, _: Guid, description: &[u8], _: &Layout) -> Result<Arc<GuestRam>, GuestError> {
        assert_eq!(description, b"plain");
        self.memory = Some(self.kept.clone().unwrap_or_else(memory));
        Ok(Arc::clone(self.memory.as_ref().unwrap().ram()))
    }

    fn held(&mut self, into: &mut DirtySet) -> Result<(), GuestError> {
        if self.kept.is_some() {
            into.insert_range(0, PAGES);
        }
        Ok(())
    }

    fn prepare(&mut self, state: &[u8]) -> Result<(), GuestError> {
        <[u8; 8]>::try_from(state)?;
        Ok(())
    }

    fn fence_out(&mut self, handed_over: bool) -> Option<FenceOut> {
        let fence = self.fence.clone()?;
        fence.handed_over.store(handed_over, Ordering::Release);
        let mut attempts = 0;
        Some(Box::new(move |tell| {
            attempts += 1;
            tell(format!("attempt {attempts}"));
            if fence.closed.load(Ordering::Acquire) { Ok(()) } else { Err("it is open".into()) }
        }))
    }

    fn activate(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let step = u64::from_le_bytes(state.try_into()?);
        self.activated.send((self.memory.clone().unwrap(), step))?;
        Ok(())
    }

    fn release(&mut self) {
        self.memory = None;
    }
}

struct Pipe(Sender<Vec<u8>>);

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let _ = self.0.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn console() -> (Arc<Console>, Receiver<Vec<u8>>) {
    let (sender, receiver) = channel();
    (Console::new(Pipe(sender)).unwrap(), receiver)
}

fn watcher() -> (Watcher, Receiver<Report>) {
    let (sender, receiver) = channel();
    (Arc::new(move |report| drop(sender.send(report))), receiver)
}

fn await_report(reports: &Receiver<Report>, wanted: impl Fn(&Report) -> bool) -> Report {
    loop {
        let report = reports.recv_timeout(PATIENCE).expect("the report comes");
        if wanted(&report) {
            return report;
        }
    }
}

/// A pair in lockstep.
struct Pair {
    /// Pages of the first round.
    seeded: u64,
    folder: tempfile::TempDir,
    primary: Handle<PlainGuest>,
    primary_out: Receiver<Vec<u8>>,
    primary_reports: Receiver<Report>,
    standby: standby::Handle<PlainTwin>,
    standby_out: Receiver<Vec<u8>>,
    standby_reports: Receiver<Report>,
    activated: Receiver<(PageMemory, u64)>,
}

fn options(standby: Address, witness: Option<Arc<dyn Witness>>) -> Options {
    // Busy test machines keep threads waiting: silence is judged generously, closed links at once.
    let settings = Settings { heartbeat: Duration::from_millis(200), misses: 25, ..Settings::default() };
    Options {
        term: None,
        settings,
        guid: Guid::new_v4(),
        name: "primary".into(),
        witness,
        standby,
        staging_pages: STAGING_PAGES,
    }
}

fn pair(listen: &str) -> Pair {
    pair_with(listen, PlainGuest::start, None)
}

/// A pair of this guest, and of a standby that has this memory of it.
fn pair_with(
    listen: &str,
    guest: impl FnOnce(&Arc<Console>) -> PlainGuest,
    kept: Option<PageMemory>,
) -> Pair {
    let folder = tempfile::tempdir().unwrap();
    let listen = listen.replace("FOLDER", folder.path().to_str().unwrap());
    let witness: Arc<dyn Witness> = Arc::new(FileWitness::new(folder.path().join("witness")));
    let witness = Some(witness);
    let (activated_sender, activated) = channel();
    let (standby_console, standby_out) = console();
    let (standby_watcher, standby_reports) = watcher();
    let listener = Listener::bind(&listen.parse().unwrap()).unwrap();
    let address = listener.address();
    let standby = standby::serve(
        listener,
        PlainTwin { memory: None, kept, activated: activated_sender, fence: None },
        standby_console,
        standby::Options {
            name: "standby".into(),
            witness: witness.clone(),
            occupied: false,
            second_listen: None,
        },
        standby_watcher,
    )
    .unwrap();
    let (primary_console, primary_out) = console();
    let (primary_watcher, primary_reports) = watcher();
    let guest = guest(&primary_console);
    let primary = attach(guest, primary_console, options(address, witness), primary_watcher)
        .unwrap_or_else(|failure| panic!("{}", failure.error));
    let round = await_report(&primary_reports, |report| matches!(report, Report::RoundStarted { .. }));
    let Report::RoundStarted { pages: seeded, .. } = round else { unreachable!() };
    await_report(&primary_reports, |report| matches!(report, Report::Protected { .. }));
    Pair {
        seeded,
        folder,
        primary,
        primary_out,
        primary_reports,
        standby,
        standby_out,
        standby_reports,
        activated,
    }
}

fn assert_same_memory(ours: &PageMemory, theirs: &PageMemory) {
    let (mut a, mut b) = ([0; PAGE_SIZE], [0; PAGE_SIZE]);
    for page in 0..PAGES {
        ours.read(page, &mut a).unwrap();
        theirs.read(page, &mut b).unwrap();
        assert!(a == b, "page {page} differs");
    }
}

/// What the guest has printed after so many steps.
fn lines(steps: u64) -> String {
    (1..=steps).fold(String::new(), |text, step| text + &step.to_string() + "\n")
}

fn drain(out: &Receiver<Vec<u8>>) -> Vec<u8> {
    out.try_iter().flatten().collect()
}

#[test]
fn quiesced_pair_is_equal_over_unix_and_tcp() {
    for listen in ["unix:FOLDER/standby", "tcp:127.0.0.1:0"] {
        let pair = pair(listen);
        let epoch = pair.primary.quiesce().expect("lockstep");
        assert!(epoch.0 > 1);
        let twin = pair.standby.with_machine(|machine| machine.memory.clone()).unwrap();
        pair.primary.notifier().guest_ended("test");
        let (outcome, guest) = pair.primary.wait();
        assert_eq!(outcome, Outcome::Ended);
        assert_same_memory(&guest.board.memory, &twin);
    }
}

#[test]
fn side_that_has_the_guests_memory_still_is_sent_only_what_differs() {
    let kept = memory();
    let ours = |console: &Arc<Console>| {
        let guest = PlainGuest::start(console);
        // It does nothing more.
        guest.alive.store(false, Ordering::Relaxed);
        guest.board.stopped.store(true, Ordering::Release);
        drop(guest.board.dirty.lock().unwrap());
        for page in 0..PAGES {
            guest.board.memory.write(page, &[page as u8; PAGE_SIZE]).unwrap();
        }
        guest
    };
    for page in 5..PAGES {
        kept.write(page, &[page as u8; PAGE_SIZE]).unwrap();
    }
    kept.write(700, &[1; PAGE_SIZE]).unwrap();

    let pair = pair_with("unix:FOLDER/standby", ours, Some(kept.clone()));

    // Page 0 is full of zeros on both sides.
    assert_eq!(pair.seeded, 5);
    pair.primary.quiesce().expect("lockstep");
    pair.primary.notifier().guest_ended("test");
    let (_, guest) = pair.primary.wait();
    assert_same_memory(&guest.board.memory, &kept);
}

#[test]
fn switchover_loses_and_repeats_nothing_and_tells_its_pause() {
    for listen in ["unix:FOLDER/standby", "tcp:127.0.0.1:0"] {
        let pair = pair(listen);
        let pause = pair.primary.switchover().unwrap();
        assert!(pause > Duration::ZERO && pause < PATIENCE, "{pause:?}");
        let (outcome, _) = pair.primary.wait();
        assert_eq!(outcome, Outcome::HandedOver);
        let (_, step) = pair.activated.recv_timeout(PATIENCE).unwrap();
        let report = await_report(&pair.standby_reports, |report| matches!(report, Report::Active { .. }));
        let Report::Active { output_start, .. } = report else { unreachable!() };
        let mut seen = drain(&pair.primary_out);
        assert_eq!(seen.len() as u64, output_start, "each byte leaves on one side");
        pair.standby.flush_console();
        seen.extend(drain(&pair.standby_out));
        assert_eq!(String::from_utf8(seen).unwrap(), lines(step));
    }
}

#[test]
fn guest_does_not_run_before_the_old_primary_is_fenced_out() {
    let pair = pair("unix:FOLDER/standby");
    let fence = Fence::default();
    pair.standby.with_machine(|machine| machine.fence = Some(fence.clone()));
    pair.primary.switchover().unwrap();
    for wanted in ["attempt 1", "it is open", "attempt 2"] {
        await_report(
            &pair.standby_reports,
            |report| matches!(report, Report::Fencing { reason } if reason == wanted),
        );
    }
    assert!(fence.handed_over.load(Ordering::Acquire));
    assert!(pair.activated.try_recv().is_err(), "others may still write");
    assert_eq!(pair.standby.status().phase, standby::FENCING);
    fence.closed.store(true, Ordering::Release);
    pair.activated.recv_timeout(PATIENCE).unwrap();
    await_report(&pair.standby_reports, |report| matches!(report, Report::Active { .. }));
}

#[test]
fn switchover_before_the_guest_is_protected_is_refused_and_changes_nothing() {
    let pair = pair("unix:FOLDER/standby");
    let primary = pair.primary.notifier();
    pair.standby.cut();
    let (outcome, _guest) = pair.primary.wait();
    assert_ne!(outcome, Outcome::HandedOver);
    assert!(primary.switchover(None).unwrap_err().contains("no longer mirrored"));
}

#[test]
fn lost_link_leaves_exactly_one_side_live_with_nothing_lost() {
    let pair = pair("unix:FOLDER/standby");
    let ours = pair.primary.quiesce().expect("lockstep");
    pair.primary.unquiesce();
    // Both sides find the link closed and ask the witness.
    pair.standby.cut();
    let (outcome, guest) = pair.primary.wait();
    match outcome {
        Outcome::HandedOver | Outcome::Detached(_) | Outcome::Suspended(_) => {
            panic!("nobody asked for {outcome:?}")
        }
        Outcome::Frozen => {
            let (memory, step) = pair.activated.recv_timeout(PATIENCE).unwrap();
            let report =
                await_report(&pair.standby_reports, |report| matches!(report, Report::Active { .. }));
            let Report::Active { epoch, output_start, .. } = report else { unreachable!() };
            assert!(epoch >= ours);
            let mut seen = drain(&pair.primary_out);
            assert!(output_start as usize <= seen.len(), "output was lost");
            seen.truncate(output_start as usize);
            pair.standby.flush_console();
            seen.extend(drain(&pair.standby_out));
            let expected = lines(step);
            assert_eq!(String::from_utf8(seen).unwrap(), expected);
            // Memory is that of the step: the last writer of each page tells.
            let mut page_bytes = [0; PAGE_SIZE];
            let mut last = vec![0_u8; PAGES as usize];
            for step in 1..=step {
                last[given_back_in(step) as usize] = 0;
                for write in 0..3 {
                    last[((step * 7 + write * 311) % PAGES) as usize] = step as u8;
                }
            }
            for page in 0..PAGES {
                memory.read(page, &mut page_bytes).unwrap();
                assert!(
                    page_bytes == [last[page as usize]; PAGE_SIZE],
                    "page {page} is not that of step {step}"
                );
            }
        }
        Outcome::Solo(_) => {
            await_report(&pair.standby_reports, |report| matches!(report, Report::Refused { .. }));
            assert!(pair.activated.try_recv().is_err());
        }
        Outcome::Ended => panic!("the guest did not end"),
    }
    drop(guest);
    drop(pair.folder);
}

#[test]
fn ended_guest_has_all_its_output_released_and_the_standby_forgets_it() {
    let pair = pair("tcp:127.0.0.1:0");
    // As a real guest does: it stands still, then its end is told.
    pair.primary.quiesce().expect("lockstep");
    pair.primary.notifier().guest_ended("exit code 0");
    let (outcome, guest) = pair.primary.wait();
    assert_eq!(outcome, Outcome::Ended);
    guest.board.console.flush();
    let steps = guest.board.steps.load(Ordering::Relaxed);
    let expected = lines(steps);
    assert_eq!(String::from_utf8(drain(&pair.primary_out)).unwrap(), expected);
    await_report(&pair.standby_reports, |report| matches!(report, Report::Ended { .. }));
    assert!(pair.standby.with_machine(|machine| machine.memory.is_none()));
}

#[test]
fn epoch_that_does_not_fit_staging_is_still_whole() {
    let pair = pair("unix:FOLDER/standby");
    let many =
        |report: &Report| matches!(report, Report::Committed { pages, .. } if *pages > STAGING_PAGES as u64);
    await_report(&pair.primary_reports, many);
    pair.primary.quiesce().expect("lockstep");
    let status = pair.primary.status_handle();
    let twin = pair.standby.with_machine(|machine| machine.memory.clone()).unwrap();
    pair.primary.notifier().guest_ended("test");
    let (_, guest) = pair.primary.wait();
    assert!(status.status().unwrap().epochs_stalled > 0, "no epoch was larger than staging");
    assert_same_memory(&guest.board.memory, &twin);
    assert!(pair.primary_reports.try_iter().all(|report| !matches!(report, Report::Failed { .. })));
}

#[test]
fn absent_standby_leaves_the_guest_with_its_owner() {
    let (console, _out) = console();
    let guest = PlainGuest::start(&console);
    let address = "/nonexistent/standby".parse().unwrap();
    let failure = attach(guest, console, options(address, None), watcher().0).err().unwrap();
    assert!(matches!(failure.error, AttachError::Link(_)));
    let steps = failure.guest.board.steps.load(Ordering::Relaxed);
    while failure.guest.board.steps.load(Ordering::Relaxed) == steps {
        thread::yield_now();
    }
}

#[test]
fn hostile_bytes_close_their_link_and_nothing_else() {
    let pair = pair("tcp:127.0.0.1:0");
    let address = pair.standby.status().listen;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n GET / HTTP/1.1 GET / HTTP/1.1 GET / HTTP/1.1"[..],
        &[0xff; 4096],
        &[0; 64],
    ] {
        let stream = Stream::connect(&address).unwrap();
        (&stream).write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = std::io::Read::read_to_end(&mut (&stream), &mut answer);
    }
    // The pair goes on.
    assert!(pair.primary.quiesce().is_some());
    pair.primary.notifier().guest_ended("test");
    assert_eq!(pair.primary.wait().0, Outcome::Ended);
}

/// Agrees on an allocation as a primary does, then sends rounds without a break and without listening.
#[test]
fn standby_that_is_kept_busy_still_gives_signs_of_life() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("standby"));
    let (standby_console, _out) = console();
    let machine = PlainTwin { memory: None, kept: None, activated: channel().0, fence: None };
    let options =
        standby::Options { name: "standby".into(), witness: None, occupied: false, second_listen: None };
    let listener = Listener::bind(&address).unwrap();
    let _standby = standby::serve(listener, machine, standby_console, options, watcher().0).unwrap();
    let stream = Arc::new(Stream::connect(&address).unwrap());
    let mut reader = FrameReader::new(Arc::clone(&stream), BufferPool::default());
    let mut writer = FrameWriter::new(stream);
    let stamp = (Guid::from_u128(5), Term(1), Epoch::NONE);
    let allocate = Message::Allocate {
        layout: memory().layout().clone(),
        policy: Policy { block_size: PAGE_SIZE as u32 },
        machine: b"plain".to_vec(),
        heartbeat_ms: 10,
        misses: 1000,
    };
    let space = Message::SpaceRequest { bytes: PAGES * PAGE_SIZE as u64, wait: false };
    for message in [space, allocate, Message::AllocateRead] {
        writer.send(stamp, &message).unwrap();
        while !matches!(
            reader.receive().unwrap().unwrap().body,
            Body::Message(Message::SpaceResponse(_) | Message::Allocated | Message::AllocateReadResponse)
        ) {}
    }
    let (pages, bodies) = ((0..256).collect::<Vec<u32>>(), vec![7; 256 * PAGE_SIZE]);
    let mut encoder = BatchEncoder::new();
    encoder.encode(&pages, &bodies);

    let busy = Arc::new(AtomicBool::new(true));
    let sending = Arc::clone(&busy);
    let sender = thread::spawn(move || {
        while sending.load(Ordering::Relaxed) {
            writer.send_pages(stamp, &encoder, &bodies).unwrap();
        }
        writer
    });

    for _ in 0..20 {
        let frame = reader.receive().unwrap().unwrap();
        assert!(matches!(frame.body, Body::Message(Message::Heartbeat { .. })), "{:?}", frame.body);
    }
    busy.store(false, Ordering::Relaxed);
    drop(sender.join().unwrap());
}
