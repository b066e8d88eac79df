use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Instant;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::virtio::VirtioState;
use crate::virtio::driver::{Driver, memory};

const RECEIVE: usize = 0;
const SEND: usize = 1;
/// Longer than anything takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn device(place: ConsolePlace) -> Box<Console> {
    Box::new(Console::create(&ConsoleConfig { place, columns: 132, rows: 43 }).unwrap())
}

/// A guest whose console is a socket in `folder`.
struct Guest {
    driver: Driver,
    folder: TempDir,
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut driver = Driver::start(device(ConsolePlace::Socket(folder.path().join("console"))), 0);
        driver.mmio.slot().ready(1);
        driver.take_interrupt();
        Self { driver, folder }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("console")
    }

    fn device(&self) -> Box<Console> {
        device(ConsolePlace::Socket(self.socket()))
    }

    /// A program that connects, seen by the device.
    fn connect(&mut self) -> UnixStream {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        self.turn();
        stream
    }

    /// Lets the device see what has happened outside.
    fn turn(&mut self) {
        self.driver.mmio.slot().ready(0);
    }

    fn write(&mut self, bytes: &[u8]) {
        self.driver.add(SEND, &[bytes], &[]);
        self.driver.ring(SEND);
    }

    fn policy(&mut self, policy: OutputPolicy) {
        self.driver.mmio.slot().set_output(policy);
        self.driver.mmio.slot().attend();
    }

    fn save(&mut self) -> VirtioState {
        let mut state = VirtioState::default();
        self.driver.mmio.save(&mut state);
        state
    }

    fn release(&mut self) {
        self.driver.mmio.slot().release_output();
        self.driver.mmio.slot().attend();
    }
}

fn read(stream: &mut UnixStream, len: usize) -> String {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    String::from_utf8(bytes).unwrap()
}

/// A long text in which nothing can be missing unnoticed.
fn numbers(end: u32) -> String {
    let words: Vec<String> = (0..end).map(|number| number.to_string()).collect();
    words.join(" ")
}

/// Whether nothing can be read now.
fn silent(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let outcome = stream.read(&mut [0]).map_err(|error| error.kind());
    stream.set_nonblocking(false).unwrap();
    outcome == Err(std::io::ErrorKind::WouldBlock)
}

#[test]
fn guest_and_program_talk_both_ways() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    guest.write(b"login: ");
    assert_eq!(read(&mut program, 7), "login: ");
    assert_eq!(guest.driver.used(SEND).len(), 1);
    let buffer = guest.driver.add(RECEIVE, &[], &[3, 4]);
    guest.driver.ring(RECEIVE);
    program.write_all(b"root\n").unwrap();
    guest.turn();
    assert_eq!(guest.driver.used(RECEIVE), [(buffer.head, 5)]);
    let bytes = [guest.driver.read(buffer.writable[0].0, 3), guest.driver.read(buffer.writable[1].0, 2)];
    assert_eq!(bytes.concat(), b"root\n");
    assert_eq!(guest.driver.take_interrupt() & 1, 1);
}

#[test]
fn input_in_guest_memory_is_marked_dirty() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    guest.driver.add(RECEIVE, &[], &[5000]);
    program.write_all(&[b'x'; 4000]).unwrap();
    guest.driver.begin_watch();
    guest.driver.ring(RECEIVE);
    assert!(guest.driver.check_changes_are_marked() >= 2, "the buffer and the used ring");
}

#[test]
fn input_waits_for_the_guests_buffers() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    program.write_all(b"early").unwrap();
    guest.turn();
    let buffer = guest.driver.add(RECEIVE, &[], &[2]);
    let rest = guest.driver.add(RECEIVE, &[], &[64]);
    guest.driver.ring(RECEIVE);
    assert_eq!(guest.driver.used(RECEIVE), [(buffer.head, 2), (rest.head, 3)]);
    assert_eq!(guest.driver.read(rest.writable[0].0, 3), b"rly");
}

#[test]
fn output_waits_for_its_epoch_but_the_guest_does_not() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    guest.policy(OutputPolicy::Hold);
    guest.write(b"first");
    assert_eq!(guest.driver.used(SEND).len(), 1, "the driver may be waiting for it with interrupts off");
    assert!(guest.driver.mmio.slot().output_waits());
    guest.save();
    assert!(!guest.driver.mmio.slot().output_waits());
    guest.write(b"second");
    assert!(silent(&mut program));
    guest.release();
    assert_eq!(read(&mut program, 5), "first");
    assert!(silent(&mut program));
    guest.save();
    guest.release();
    assert_eq!(read(&mut program, 6), "second");
}

#[test]
fn live_side_without_standby_lets_everything_out_and_a_frozen_one_nothing() {
    for (policy, heard) in [(OutputPolicy::Pass, true), (OutputPolicy::Freeze, false)] {
        let mut guest = Guest::new();
        let mut program = guest.connect();
        guest.policy(OutputPolicy::Hold);
        guest.write(b"held");
        guest.save();
        guest.policy(policy);
        guest.release();
        let mut bytes = Vec::new();
        drop(guest);
        program.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, if heard { &b"held"[..] } else { b"" });
    }
}

#[test]
fn successor_writes_what_was_held_and_goes_on() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    guest.policy(OutputPolicy::Hold);
    guest.write(b"held, ");
    let (device, folder) = (guest.device(), guest.folder);
    let mut driver = guest.driver.fail_over(device);
    // The old side's process is gone with its socket.
    assert_eq!(program.read(&mut [0; 9]).unwrap(), 0);
    driver.mmio.slot().ready(1);
    let mut program = UnixStream::connect(folder.path().join("console")).unwrap();
    driver.mmio.slot().ready(0);
    assert_eq!(driver.used(SEND).len(), 1);
    driver.add(SEND, &[b"and on"], &[]);
    driver.ring(SEND);
    assert_eq!(read(&mut program, 12), "held, and on");
}

#[test]
fn last_output_waits_for_whoever_comes() {
    let mut guest = Guest::new();
    for line in 0..1000 {
        guest.write(format!("{line:0>100}\n").as_bytes());
        assert_eq!(guest.driver.used(SEND).len(), 1, "a guest never waits for somebody to come");
    }
    let mut program = guest.connect();
    let text = read(&mut program, LIMIT);
    assert!(text.ends_with(&format!("{:0>100}\n", 999)));
    assert!(silent(&mut program));
}

#[test]
fn slow_reader_loses_nothing_and_the_guest_waits_for_it() {
    let text = numbers(60_000);
    let mut guest = Guest::new();
    let mut program = guest.connect();
    guest.write(text.as_bytes());
    assert!(guest.driver.used(SEND).is_empty(), "nobody reads, and there is more than fits");
    let (mut heard, mut chunk) = (Vec::<u8>::new(), [0; 1000]);
    while heard.len() < text.len() {
        guest.turn();
        let count = program.read(&mut chunk).unwrap();
        heard.extend(&chunk[..count]);
    }
    assert_eq!(guest.driver.used(SEND).len(), 1);
    assert!(heard == text.as_bytes());
}

#[test]
fn request_that_is_half_taken_is_taken_on_by_the_successor() {
    let text = numbers(8000);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut driver = Driver::start(device(ConsolePlace::Output(path.clone())), 0);
    driver.mmio.slot().set_output(OutputPolicy::Hold);
    driver.add(SEND, &[text.as_bytes()], &[]);
    driver.ring(SEND);
    assert!(driver.used(SEND).is_empty(), "it is longer than what may be held");
    let mut driver = driver.fail_over(device(ConsolePlace::Output(path.clone())));
    assert_eq!(driver.used(SEND).len(), 1);
    assert!(fs::read_to_string(&path).unwrap() == text);
}

#[test]
fn one_program_at_a_time_and_the_next_when_it_has_gone() {
    let mut guest = Guest::new();
    let mut first = guest.connect();
    let mut second = guest.connect();
    guest.write(b"one");
    assert_eq!(read(&mut first, 3), "one");
    assert!(silent(&mut second));
    drop(first);
    guest.turn();
    guest.write(b"two");
    assert_eq!(read(&mut second, 3), "two");
}

#[test]
fn what_a_program_sent_before_it_went_is_still_read() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    program.write_all(b"reboot\n").unwrap();
    drop(program);
    guest.turn();
    let buffer = guest.driver.add(RECEIVE, &[], &[64]);
    guest.driver.add(RECEIVE, &[], &[64]);
    guest.driver.ring(RECEIVE);
    assert_eq!(guest.driver.used(RECEIVE), [(buffer.head, 7)]);
    let mut next = guest.connect();
    guest.write(b"hello");
    assert_eq!(read(&mut next, 5), "hello");
}

#[test]
fn program_that_sends_no_more_still_hears() {
    let mut guest = Guest::new();
    let mut program = guest.connect();
    guest.driver.add(RECEIVE, &[], &[64]);
    guest.driver.add(RECEIVE, &[], &[64]);
    program.write_all(b"uptime\n").unwrap();
    program.shutdown(std::net::Shutdown::Write).unwrap();
    guest.turn();
    assert_eq!(guest.driver.used(RECEIVE).len(), 1);
    guest.write(b"7 days");
    assert_eq!(read(&mut program, 6), "7 days");
}

#[test]
fn file_is_appended_to_and_never_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    fs::write(&path, "before\n").unwrap();
    let mut driver = Driver::start(device(ConsolePlace::Output(path.clone())), 0);
    driver.add(RECEIVE, &[], &[64]);
    driver.add(SEND, &[b"hel", b"lo\n"], &[]);
    driver.ring(SEND);
    driver.ring(RECEIVE);
    assert_eq!(fs::read_to_string(&path).unwrap(), "before\nhello\n");
    assert!(driver.used(RECEIVE).is_empty());
}

#[test]
fn file_that_takes_no_more_stops_nobody() {
    let mut driver = Driver::start(device(ConsolePlace::Output("/dev/full".into())), 0);
    for _ in 0..10 {
        driver.add(SEND, &[&[b'x'; 5000]], &[]);
        driver.ring(SEND);
        assert_eq!(driver.used(SEND).len(), 1);
    }
}

#[test]
fn terminal_is_read_as_well_and_gets_its_modes_back() {
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{LocalModes, tcgetattr};
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let path = PathBuf::from(ptsname(&master, Vec::new()).unwrap().into_string().unwrap());
    // Without an open end the terminal would forget.
    let held = fs::File::options().read(true).write(true).open(&path).unwrap();
    let echoes = || tcgetattr(&held).unwrap().local_modes.contains(LocalModes::ECHO);
    let mut driver = Driver::start(device(ConsolePlace::Output(path)), 0);
    assert!(!echoes());
    let buffer = driver.add(RECEIVE, &[], &[64]);
    driver.ring(RECEIVE);
    rustix::io::write(&master, b"k").unwrap();
    let start = Instant::now();
    let mut used = Vec::new();
    while used.is_empty() && start.elapsed() < PATIENCE {
        driver.mmio.slot().ready(0);
        used = driver.used(RECEIVE);
    }
    assert_eq!(used, [(buffer.head, 1)]);
    driver.add(SEND, &[b"ok"], &[]);
    driver.ring(SEND);
    let mut answer = [0; 2];
    assert_eq!(rustix::io::read(&master, &mut answer).unwrap(), 2);
    assert_eq!(&answer, b"ok");
    drop(driver);
    assert!(echoes());
}

#[test]
fn size_is_told_and_told_again_when_it_changes() {
    let folder = tempfile::tempdir().unwrap();
    let mut console = device(ConsolePlace::Socket(folder.path().join("console")));
    console.resize(100, 40);
    let mut driver = Driver::start(console, 0);
    driver.mmio.slot().attend();
    assert_eq!(driver.take_interrupt() & 2, 2);
    assert_eq!(driver.config(0, 8), [100, 0, 40, 0, 1, 0, 0, 0]);
}

#[test]
fn size_is_told_once_to_a_guest_that_begins_to_write() {
    let mut guest = Guest::new();
    assert_eq!(guest.driver.take_interrupt() & 2, 0, "its driver may not be ready for that");
    guest.write(b"a");
    assert_eq!(guest.driver.take_interrupt() & 2, 2);
    guest.write(b"b");
    assert_eq!(guest.driver.take_interrupt() & 2, 0);
    guest.driver.negotiate(u64::MAX);
    guest.write(b"c");
    assert_eq!(guest.driver.take_interrupt() & 2, 2, "another driver does not know");
}

#[test]
fn emergency_write_comes_out_without_any_queue() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    let mut driver = Driver::idle(memory(), device(ConsolePlace::Output(path.clone())));
    for byte in b"oops" {
        driver.write_config(EMERGENCY, &[*byte, 0, 0, 0]);
    }
    driver.mmio.slot().ready(1);
    assert_eq!(fs::read_to_string(&path).unwrap(), "oops");
}

#[test]
fn impossible_places_and_states_are_clear_errors() {
    let create = |place| {
        let config = ConsoleConfig { place, columns: COLUMNS, rows: ROWS };
        Console::create(&config).err().unwrap().to_string()
    };
    let error = create(ConsolePlace::Socket("/nonexistent/console".into()));
    assert!(error.contains("/nonexistent/console"), "{error}");
    let error = create(ConsolePlace::Output("/nonexistent/log".into()));
    assert!(error.contains("/nonexistent/log"), "{error}");
    let mut guest = Guest::new();
    let mut state = guest.save();
    let output = vec![0; LIMIT + 1];
    state.device = DeviceState::Console(ConsoleState { output, ..ConsoleState::default() });
    assert!(guest.driver.mmio.restore(&state).is_err());
    state.device = DeviceState::None;
    assert!(guest.driver.mmio.restore(&state).is_err());
}

#[test]
fn saving_allocates_once() {
    let mut guest = Guest::new();
    let mut state = guest.save();
    guest.write(&[b'x'; LIMIT]);
    let place = |state: &VirtioState| match &state.device {
        DeviceState::Console(console) => console.output.as_ptr(),
        _ => unreachable!(),
    };
    let before = place(&state);
    guest.driver.mmio.save(&mut state);
    assert_eq!(place(&state), before);
}

fn chain() -> impl Strategy<Value = Vec<(u64, u32, u16)>> {
    let address = prop_oneof![0..0x40_0000_u64, any::<u64>()];
    let len = prop_oneof![0..0x3000_u32, any::<u32>()];
    prop::collection::vec((address, len, 0..8_u16), 1..6)
}

proptest! {
    #[test]
    fn random_chains_never_panic_nor_hang(
        chains in prop::collection::vec((0..2_usize, chain()), 1..40),
        input in prop::collection::vec(any::<u8>(), 0..3000),
    ) {
        let mut guest = Guest::new();
        let mut program = guest.connect();
        program.write_all(&input).unwrap();
        program.set_nonblocking(true).unwrap();
        for (queue, descriptors) in chains {
            guest.driver.add_chain(queue, &descriptors);
            guest.driver.ring(queue);
            let mut sink = [0; 4096];
            while let Ok(1..) = program.read(&mut sink) {
                guest.turn();
            }
            if guest.driver.needs_reset() {
                guest.driver.negotiate(u64::MAX);
            }
        }
        let mut state = guest.save();
        let device = device(ConsolePlace::Output(Path::new("/dev/null").into()));
        let mut next = Driver::idle(guest.driver.ram.clone(), device);
        prop_assert!(next.mmio.restore(&state).is_ok());
        next.mmio.save(&mut state);
    }
}
