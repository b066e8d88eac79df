use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use proptest::prelude::*;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};
use tempfile::TempDir;

use super::packet::NO_RECEIVE;
use super::*;
use crate::virtio::VirtioState;
use crate::virtio::driver::fuzz::settle;
use crate::virtio::driver::{Driver, Request};

const RECEIVE: usize = 0;
const EVENT: usize = 2;
const CID: u64 = 3;
const ROOM: u32 = 1 << 16;

/// A guest with its device, and the folder of the sockets.
struct Guest {
    driver: Driver,
    buffers: Vec<Request>,
    folder: TempDir,
}

fn device(folder: &Path) -> Box<Vsock> {
    let config = VsockConfig { guest_cid: CID as u32, uds_path: folder.join("vsock") };
    Box::new(Vsock::create(&config).unwrap())
}

impl Guest {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut driver = Driver::start(device(folder.path()), 0);
        let buffers = (0..64).map(|_| driver.add(RECEIVE, &[], &[HEADER, 4096])).collect();
        driver.add(EVENT, &[], &[4]);
        driver.ring(RECEIVE);
        Self { driver, buffers, folder }
    }

    fn path(&self) -> std::path::PathBuf {
        self.folder.path().join("vsock")
    }

    /// Sends a packet from port `guest` to port `host`.
    fn send(&mut self, (host, guest): Ports, op: Op, flags: u32, data: &[u8]) {
        let header = Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            len: data.len() as u32,
            kind: STREAM,
            op: op as u16,
            flags,
            buf_alloc: ROOM,
            fwd_cnt: 0,
        };
        self.driver.add(SEND, &[&header.encode(), data], &[]);
        self.driver.ring(SEND);
        self.driver.used(SEND);
    }

    /// The packets that have come.
    fn received(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.driver.mmio.slot().ready(0);
        let mut packets = Vec::new();
        for (head, len) in self.driver.used(RECEIVE) {
            let buffer = self.buffers.iter().find(|buffer| buffer.head == head).unwrap();
            let bytes = self.driver.read(buffer.writable[0].0, HEADER);
            let header = Header::decode(bytes.as_slice().try_into().unwrap());
            assert_eq!(len as usize, HEADER + header.len as usize);
            packets.push((header, self.driver.read(buffer.writable[1].0, header.len as usize)));
        }
        packets
    }

    fn ops(&mut self) -> Vec<Op> {
        self.received().iter().map(|(header, _)| header.op().unwrap()).collect()
    }

    /// A program of the host that is connected to port 52 of the guest.
    fn called(&mut self) -> (UnixStream, Ports) {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.write_all(b"CONNECT 52\n").unwrap();
        let packets = self.received();
        let [(header, _)] = &packets[..] else { panic!("{packets:?}") };
        assert_eq!((header.op(), header.dst_port), (Some(Op::Request), 52));
        let ports = (header.src_port, header.dst_port);
        self.send(ports, Op::Response, 0, &[]);
        let mut line = [0; 32];
        let count = stream.read(&mut line).unwrap();
        assert_eq!(String::from_utf8_lossy(&line[..count]), format!("OK {}\n", ports.0));
        (stream, ports)
    }

    /// The guest's port 1000, connected to port 7 of the host.
    fn calling(&mut self) -> (UnixStream, Ports) {
        let listener = UnixListener::bind(self.folder.path().join("vsock_7")).unwrap();
        self.send((7, 1000), Op::Request, 0, &[]);
        assert_eq!(self.ops(), [Op::Response]);
        (listener.accept().unwrap().0, (7, 1000))
    }
}

#[test]
fn connections_and_bytes_are_counted() {
    let mut guest = Guest::new();
    let DeviceCounters::Vsock(counters) = guest.driver.mmio.slot().counters().clone() else { panic!() };
    let (mut stream, ports) = guest.called();
    let (_other, others) = guest.calling();
    stream.write_all(b"hello guest").unwrap();
    guest.received();
    guest.send(ports, Op::Data, 0, b"hello");
    guest.send(others, Op::Reset, 0, &[]);

    assert_eq!((counters.from_host.get(), counters.from_guest.get(), counters.closed.get()), (1, 1, 1));
    assert_eq!((counters.received.get(), counters.received_bytes.get()), (1, 11));
    assert_eq!((counters.sent.get(), counters.sent_bytes.get(), counters.errors.get()), (1, 5, 0));
    guest.send((9, 9), Op::Request, 0, &[]);
    assert_eq!(counters.errors.get(), 1, "nobody to talk to");
}

#[test]
fn program_of_the_host_talks_to_a_port_of_the_guest() {
    let mut guest = Guest::new();
    let (mut stream, ports) = guest.called();
    stream.write_all(b"hello guest").unwrap();
    guest.driver.begin_watch();
    let packets = guest.received();
    assert!(guest.driver.check_changes_are_marked() >= 2, "a buffer and the used ring");
    assert_eq!(packets[0].0.op(), Some(Op::Data));
    assert_eq!(packets[0].1, b"hello guest");
    guest.send(ports, Op::Data, 0, b"hello host");
    let mut answer = [0; 10];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello host");
    assert_eq!(guest.driver.config(0, 8), CID.to_le_bytes());
}

#[test]
fn guest_talks_to_a_program_of_the_host_and_each_end_closes_for_itself() {
    let mut guest = Guest::new();
    let (mut stream, ports) = guest.calling();
    guest.send(ports, Op::Data, 0, b"request");
    guest.send(ports, Op::Shutdown, NO_SEND, &[]);
    let mut request = String::new();
    stream.read_to_string(&mut request).unwrap();
    assert_eq!(request, "request");
    stream.write_all(b"response").unwrap();
    drop(stream);
    let packets = guest.received();
    assert_eq!(packets[0].1, b"response");
    assert_eq!((packets[1].0.op(), packets[1].0.flags), (Some(Op::Shutdown), NO_SEND));
    guest.send(ports, Op::Shutdown, NO_SEND | NO_RECEIVE, &[]);
    assert_eq!(guest.ops(), [Op::Reset]);
}

#[test]
fn connection_that_one_end_has_closed_leaves_the_device_at_rest() {
    let mut guest = Guest::new();
    let (_stream, ports) = guest.calling();
    guest.send(ports, Op::Shutdown, NO_SEND, &[]);
    settle(&guest.driver);
}

#[test]
fn program_that_accepts_nobody_does_not_keep_the_device_waiting() {
    let mut guest = Guest::new();
    let path = guest.folder.path().join("vsock_7");
    let listener = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    net::listen(&listener, 0).unwrap();
    for port in 1000..1004 {
        guest.send((7, port), Op::Request, 0, &[]);
    }
    assert_eq!(guest.ops(), [Op::Response, Op::Reset, Op::Reset, Op::Reset]);
}

#[test]
fn nobody_to_talk_to_is_a_reset() {
    let mut guest = Guest::new();
    guest.send((99, 1000), Op::Request, 0, &[]);
    guest.send((5, 5), Op::Data, 0, b"out of the blue");
    assert_eq!(guest.ops(), [Op::Reset, Op::Reset]);
    guest.send((5, 5), Op::Reset, 0, &[]);
    assert!(guest.ops().is_empty(), "no answer to a reset");

    // The guest refuses.
    let mut stream = UnixStream::connect(guest.path()).unwrap();
    stream.write_all(b"CONNECT 52\n").unwrap();
    let asked = guest.received()[0].0;
    guest.send((asked.src_port, 52), Op::Reset, 0, &[]);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);

    let mut nonsense = UnixStream::connect(guest.path()).unwrap();
    nonsense.write_all(b"GET / HTTP/1.1\n").unwrap();
    guest.received();
    assert_eq!(nonsense.read(&mut [0; 8]).unwrap_or(0), 0);
}

#[test]
fn bytes_flow_only_as_far_as_there_is_room() {
    let mut guest = Guest::new();
    let (mut stream, ports) = guest.called();
    stream.set_nonblocking(true).unwrap();
    let sent: Vec<u8> = (0..150_000_u32).map(|at| (at % 251) as u8).collect();
    let mut written = 0;
    let mut got = Vec::new();
    for _ in 0..40 {
        written += stream.write(&sent[written..]).unwrap_or(0);
        got.extend(guest.received().into_iter().flat_map(|(_, data)| data));
    }
    // The guest said that it has room for so much, and has given nothing back.
    assert_eq!(got, sent[..ROOM as usize]);
    // More than it was told there is room for ends the connection.
    for _ in 0..=BUFFERED {
        guest.send(ports, Op::Data, 0, &vec![0; 16_384]);
    }
    assert!(guest.ops().contains(&Op::Reset));
}

/// Packets of 16 KiB that fit the connection's buffer and, amply, a Unix socket's.
const BUFFERED: u32 = (connection::BUFFER + (1 << 20)) / 16_384;

#[test]
fn what_the_guest_sends_waits_for_its_epoch() {
    let mut guest = Guest::new();
    let (mut stream, ports) = guest.called();
    stream.set_nonblocking(true).unwrap();
    guest.driver.mmio.slot().set_output(OutputPolicy::Hold);
    guest.send(ports, Op::Data, 0, b"secret");
    assert!(guest.driver.mmio.slot().output_waits());
    assert!(stream.read(&mut [0; 8]).is_err(), "nothing is committed");
    guest.driver.mmio.save(&mut VirtioState::default());
    guest.driver.mmio.slot().release_output();
    guest.driver.mmio.slot().attend();
    let mut secret = [0; 6];
    stream.read_exact(&mut secret).unwrap();
    assert_eq!(&secret, b"secret");
}

#[test]
fn after_a_move_connections_are_gone_cleanly_and_new_ones_work() {
    let mut guest = Guest::new();
    let (mut stream, ports) = guest.called();
    guest.driver.mmio.slot().set_output(OutputPolicy::Hold);
    guest.send(ports, Op::Data, 0, b"never committed");
    let successor = device(guest.folder.path());
    let Guest { driver, buffers, folder } = guest;
    // The old side is dead: its sockets are closed, its path is left behind.
    let mut old = VirtioState::default();
    let mut driver = {
        let mut before = driver;
        before.mmio.save(&mut old);
        before.mmio.slot().set_output(OutputPolicy::Freeze);
        before.fail_over(successor)
    };
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "the host's end is closed");
    assert_eq!(driver.used(SEND).len(), 1, "in flight, and completed without effect");
    let events = driver.used(EVENT);
    assert_eq!(events.len(), 1, "the guest is told");
    driver.used(RECEIVE);
    let mut guest = Guest { driver, buffers, folder };
    let (mut stream, _) = guest.called();
    stream.write_all(b"again").unwrap();
    assert_eq!(guest.received()[0].1, b"again");
}

#[test]
fn socket_that_a_dead_process_left_behind_is_replaced_and_ours_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    drop(UnixListener::bind(folder.path().join("vsock")).unwrap());
    let mut driver = Driver::start(device(folder.path()), 0);
    driver.ring(RECEIVE);
    UnixStream::connect(folder.path().join("vsock")).unwrap();
    drop(driver);
    assert!(!folder.path().join("vsock").exists());
    let missing = VsockConfig { guest_cid: 3, uds_path: folder.path().join("no/such/vsock") };
    assert!(Vsock::create(&missing).err().unwrap().to_string().contains("no/such/vsock"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_packets_leave_the_device_in_order(
        packets in prop::collection::vec(
            (any::<[u8; HEADER]>(), 0_u16..9, any::<bool>(), 0_u32..4, prop::collection::vec(any::<u8>(), 0..300)),
            1..60,
        )
    ) {
        let mut guest = Guest::new();
        let (_stream, ports) = guest.called();
        for (mut header, op, aimed, flags, data) in packets {
            if aimed {
                // Mostly right: then the parts behind the first check are reached.
                let mut aim = Header::decode(&header);
                (aim.src_cid, aim.dst_cid, aim.kind, aim.op) = (CID, HOST_CID, STREAM, op);
                (aim.dst_port, aim.src_port, aim.flags) = (ports.0, ports.1, flags);
                header = aim.encode();
            }
            guest.driver.add(SEND, &[&header, &data], &[]);
            guest.driver.ring(SEND);
            guest.driver.used(SEND);
            let _ = guest.received();
        }
        // Either it works on or it says that it needs a reset.
        if !guest.driver.needs_reset() {
            guest.send((1, 1), Op::Data, 0, &[]);
        }
    }
}
