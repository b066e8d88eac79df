//! Bad input, absent and hostile peers: each a clear error and an exit status; nothing else is harmed.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use mirror::ids::{Epoch, Term};
use mirror::link::{Address, FrameReader, FrameWriter, Listener, Stream};
use mirror::memory::{Layout, Region};
use mirror::report::Report;
use mirror::wire::header::{HEADER_LEN, Header, Kind};
use mirror::wire::message::{Access, AllocationHeader, Body, Commit, Message, Policy, Space};
use mirror::wire::pages::BufferPool;
use tests::pair::await_report;
use tests::process::{Process, configuration, understudy};

/// Exit statuses, as `understudy --help` lists them.
const NO_KERNEL: i32 = 66;
const UNAVAILABLE: i32 = 69;
const UNREACHABLE: i32 = 75;
const CONFIG: i32 = 78;

/// Runs `understudy run` on a configuration file and expects this status and all of these words on stderr.
fn expect_refusal(config: &str, status: i32, words: &[&str]) {
    let mut run = Process::start(&["run", "--config-file", config]);
    let code = run.wait().code();
    let errors = run.errors.await_text(|text| words.iter().all(|word| text.contains(word)));
    assert_eq!(code, Some(status), "{errors}");
    assert!(!errors.contains("panicked"), "{errors}");
    assert_eq!(run.console.text(), "", "the guest has run");
}

#[test]
fn configuration_with_an_unknown_field_is_refused_with_its_place() {
    let folder = tempfile::tempdir().unwrap();
    let config = configuration(folder.path(), "embedded:guest", Some(r#""standbye": "unix:/x""#));
    expect_refusal(&config, CONFIG, &["vm.json", "standbye"]);
}

#[test]
fn configuration_that_is_no_json_or_missing_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.json");
    expect_refusal(config.to_str().unwrap(), CONFIG, &["vm.json", "cannot read"]);
    std::fs::write(&config, "{\"boot-source\": ").unwrap();
    expect_refusal(config.to_str().unwrap(), CONFIG, &["vm.json:1"]);
}

#[test]
fn section_of_firecracker_that_is_not_there_yet_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("vm.json");
    let text = r#"{"boot-source": {"kernel_image_path": "embedded:guest"}, "pmem": [{"id": "a"}],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64}}"#;
    std::fs::write(&config, text).unwrap();
    expect_refusal(config.to_str().unwrap(), CONFIG, &["pmem", "not supported yet"]);
}

#[test]
fn address_in_use_and_senseless_address_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let listen = format!("unix:{}", folder.path().join("standby").display());
    let _taken = Listener::bind(&listen.parse().unwrap()).unwrap();
    for (address, words) in [(listen.as_str(), "another process"), ("nonsense", "is no address")] {
        let output = Command::new(understudy()).args(["standby", "--listen", address]).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && errors.contains(words), "{errors}");
    }
}

mod kvm {
    use super::*;

    #[test]
    fn kernel_that_is_missing_truncated_or_garbage_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        let config = configuration(folder.path(), kernel.to_str().unwrap(), None);
        expect_refusal(&config, NO_KERNEL, &["cannot load the kernel"]);
        for length in [10, 100, 3000, resources::GUEST_ELF.len() / 2] {
            std::fs::write(&kernel, &resources::GUEST_ELF[..length]).unwrap();
            expect_refusal(&config, NO_KERNEL, &["cannot load the kernel"]);
        }
        std::fs::write(&kernel, vec![0x5a; 100_000]).unwrap();
        expect_refusal(&config, NO_KERNEL, &["cannot load the kernel"]);
    }

    #[test]
    fn host_without_kvm_is_told_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let config = configuration(folder.path(), "embedded:guest", None);
        // A mount namespace of its own, in which /dev is empty.
        let script = "mount -t tmpfs none /dev && exec \"$0\" run --config-file \"$1\"";
        let output = Command::new("unshare")
            .args(["--mount", "--map-root-user", "sh", "-c", script])
            .arg(understudy())
            .arg(&config)
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(UNAVAILABLE), "{errors}");
        assert!(errors.contains("/dev/kvm") && errors.contains("kvm-intel"), "{errors}");
    }

    #[test]
    fn standby_that_is_not_there_is_named() {
        let folder = tempfile::tempdir().unwrap();
        for standby in ["unix:/nonexistent/standby", "tcp:127.0.0.1:1"] {
            let config =
                configuration(folder.path(), "embedded:guest", Some(&format!(r#""standby": "{standby}""#)));
            expect_refusal(&config, UNREACHABLE, &[standby, "understudy standby --listen"]);
        }
    }

    #[test]
    fn witness_that_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let standby = listener.address();
        let damaged = folder.path().join("damaged");
        std::fs::write(&damaged, "no record").unwrap();
        let other = folder.path().join("other");
        let record = r#"{"guid": "00000000-0000-0000-0000-000000000001", "term": 4, "owner": "somebody"}"#;
        std::fs::write(&other, record).unwrap();
        let nowhere = Path::new("/nonexistent/witness");
        for (witness, words) in
            [(nowhere, "storage"), (&damaged, "not a record"), (&other, "belongs to guest 00000000")]
        {
            let mirror = format!(r#""standby": "{standby}", "witness": "{}""#, witness.display());
            let config = configuration(folder.path(), "embedded:guest", Some(&mirror));
            expect_refusal(&config, UNREACHABLE, &[words]);
        }
        assert_eq!(std::fs::read_to_string(&other).unwrap(), record, "its owner keeps it");
    }

    /// A primary whose standby is `fake` goes on unprotected and says why in these words.
    fn expect_unprotected(fake: FakeStandby, words: &str) {
        let folder = tempfile::tempdir().unwrap();
        let mirror = format!(r#""standby": "{}", "delay_ms": 1"#, fake.address);
        let config = configuration(folder.path(), "embedded:guest", Some(&mirror));
        let run = Process::start(&["run", "--config-file", &config]);
        let report = await_report(&run.reports, |report| matches!(report, Report::Unprotected { .. }));
        let Report::Unprotected { reason } = report else { unreachable!() };
        assert!(reason.contains(words), "{reason}");
        // The guest is unharmed.
        let lines = run.console.text().lines().count();
        run.console.await_text(|text| text.lines().count() > lines + 20);
        drop(run);
        fake.thread.join().unwrap();
    }

    #[test]
    fn standby_with_another_layout_is_refused_and_the_guest_goes_on() {
        expect_unprotected(FakeStandby::start(answer_with_another_layout), "laid out otherwise");
    }

    #[test]
    fn standby_of_another_protocol_version_is_refused_and_the_guest_goes_on() {
        let fake = FakeStandby::start(|stream| {
            let payload = Message::SpaceResponse(Space::Granted).encode();
            let id = (mirror::ids::Guid::nil(), Term(1), Epoch::NONE);
            let mut frame = Header::seal(Kind::Message, id, 0, std::iter::once(&payload[..])).to_bytes();
            frame[4] = 9;
            (&*stream).write_all(&[&frame[..], &payload].concat()).unwrap();
            read_to_end(&stream);
        });
        expect_unprotected(fake, "speaks version 9");
    }

    #[test]
    fn hostile_or_vanishing_standby_is_refused_and_the_guest_goes_on() {
        expect_unprotected(FakeStandby::start(drop), "closed the link");
        let garbage = FakeStandby::start(|stream| {
            let _ = (&*stream)
                .write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            read_to_end(&stream);
        });
        expect_unprotected(garbage, "does not speak the mirror protocol");
    }

    #[test]
    fn hostile_bytes_to_a_standby_harm_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let witness = folder.path().join("witness");
        let listen = format!("unix:{}", folder.path().join("standby").display());
        let standby = Process::standby(&listen, &witness);
        let address: Address = listen.parse().unwrap();
        for bytes in hostile_streams() {
            let stream = Stream::connect(&address).unwrap();
            // It may close while this is being written.
            let _ = (&stream).write_all(&bytes);
            stream.shutdown(std::net::Shutdown::Write);
            read_to_end(&stream);
        }

        let mirror = format!(r#""standby": "{listen}", "witness": "{}""#, witness.display());
        let config = configuration(folder.path(), "embedded:guest", Some(&mirror));
        let primary = Process::start(&["run", "--config-file", &config]);
        await_report(&primary.reports, |report| matches!(report, Report::Protected { .. }));
        let errors = standby.errors.text();
        assert!(!errors.contains("panicked"), "{errors}");
    }
}

/// What a standby's port may be sent by somebody who means harm.
fn hostile_streams() -> Vec<Vec<u8>> {
    let id = (mirror::ids::Guid::from_u128(7), Term(3), Epoch(1));
    let framed = |kind, payload: &[u8]| {
        [&Header::seal(kind, id, 0, std::iter::once(payload)).to_bytes()[..], payload].concat()
    };
    let message = |message: &Message| framed(Kind::Message, &message.encode());
    let mut damaged = message(&Message::LockRequest);
    damaged[HEADER_LEN - 1] ^= 1;
    let mut endless = message(&Message::LockRequest);
    endless[48..52].copy_from_slice(&u32::MAX.to_le_bytes());
    let layout = Layout::new(vec![Region { start: 0, pages: 64 }]).unwrap();
    let policy = Policy { block_size: 4096 };
    let allocate =
        Message::Allocate { layout, policy, machine: vec![0xff; 100], heartbeat_ms: 50, misses: 4 };
    let commit = Commit { pages: 0, digest: 0, output_end: 0, released: 0 };
    vec![
        (0..10_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect(),
        vec![0; 64],
        damaged,
        endless,
        message(&Message::Commit(commit)),
        message(&allocate),
        framed(Kind::Pages, &[0xff; 5000]),
        framed(Kind::Message, &[0xff; 100]),
        message(&Message::SpaceRequest { bytes: u64::MAX, wait: true }),
        message(&Message::AllocateWrite),
    ]
}

/// A peer that listens as a standby does and then behaves as a test wants it to.
struct FakeStandby {
    address: Address,
    thread: JoinHandle<()>,
}

impl FakeStandby {
    fn start(behave: impl FnOnce(Arc<Stream>) + Send + 'static) -> Self {
        let listener = Listener::bind(&"tcp:127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.address();
        let thread = thread::spawn(move || behave(Arc::new(listener.accept().unwrap())));
        Self { address, thread }
    }
}

fn read_to_end(mut stream: &Stream) {
    // A reset is an end, too.
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Agrees to everything, but its memory lies elsewhere.
fn answer_with_another_layout(stream: Arc<Stream>) {
    let mut reader = FrameReader::new(Arc::clone(&stream), BufferPool::default());
    let mut writer = FrameWriter::new(stream);
    while let Ok(Some(frame)) = reader.receive() {
        let Header { guid, term, .. } = frame.header;
        let answer = match frame.body {
            Body::Message(Message::SpaceRequest { .. }) => Message::SpaceResponse(Space::Granted),
            Body::Message(Message::Allocate { .. }) => Message::Allocated,
            Body::Message(Message::LockRequest) => {
                Message::LockResponse { term, owner: "primary".into(), access: Access::None }
            }
            Body::Message(Message::HeaderRequest) => Message::HeaderResponse(AllocationHeader {
                layout: Layout::new(vec![Region { start: 0, pages: 64 }]).unwrap(),
                guid,
                epoch: Epoch::NONE,
                policy: Policy { block_size: 4096 },
            }),
            _ => continue,
        };
        if writer.send((guid, term, Epoch::NONE), &answer).is_err() {
            return;
        }
    }
}
