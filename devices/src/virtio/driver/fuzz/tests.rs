//! The promises of each device, held against whatever proptest makes up. PROPTEST_CASES says how often.

use std::cell::RefCell;
use std::fmt;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{TestError, TestRunner};

use super::balloon::BalloonSubject;
use super::block::BlockSubject;
use super::console::ConsoleSubject;
use super::input::{RECORD, operations};
use super::net::NetSubject;
use super::rng::RngSubject;
use super::vsock::VsockSubject;
use super::{Subject, outlast, run};
use crate::virtio::block::EngineKind;
use crate::virtio::driver::tap::alone;

/// Cases of each property, unless PROPTEST_CASES says otherwise.
const CASES: u32 = 256;

/// Bytes that show what they mean.
struct Operations(Vec<[u8; RECORD]>);

impl fmt::Debug for Operations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        operations(self.0.as_flattened()).iter().try_for_each(|operation| write!(f, "\n{operation:?}"))
    }
}

/// Holds the subject that `with` passes on against many cases; those that failed once come first. They are kept in
/// devices/proptest-regressions.
fn keeps_its_promises(with: impl Fn(&mut dyn FnMut(&mut dyn Subject))) {
    let asked_for = std::env::var_os("PROPTEST_CASES").is_some();
    let cases = if asked_for { ProptestConfig::default().cases } else { CASES };
    let source_file = Some(file!());
    let config = ProptestConfig { cases, source_file, max_shrink_iters: 4000, ..ProptestConfig::default() };
    let some = vec(any::<[u8; RECORD]>(), 1..64).prop_map(Operations);
    let outcome = TestRunner::new(config).run(&some, |operations| {
        with(&mut |subject| run(subject, operations.0.as_flattened()));
        Ok(())
    });
    match outcome {
        Ok(()) => {}
        Err(TestError::Fail(reason, operations)) => panic!("{reason}, at the end of {operations:?}"),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn disk_on_io_uring_keeps_its_promises_to_any_guest() {
    keeps_its_promises(|run| run(&mut BlockSubject::raw(EngineKind::IoUring)));
}

#[test]
fn disk_on_threads_keeps_its_promises_to_any_guest() {
    keeps_its_promises(|run| run(&mut BlockSubject::raw(EngineKind::Threads)));
}

#[test]
fn socket_device_keeps_its_promises_to_any_guest() {
    keeps_its_promises(|run| run(&mut VsockSubject::default()));
}

#[test]
fn source_of_random_numbers_keeps_its_promises_to_any_guest() {
    keeps_its_promises(|run| run(&mut RngSubject { limited: true }));
}

#[test]
fn balloon_keeps_its_promises_to_any_guest() {
    keeps_its_promises(|run| run(&mut BalloonSubject::default()));
}

#[test]
fn console_keeps_its_promises_to_any_guest() {
    keeps_its_promises(|run| run(&mut ConsoleSubject::default()));
}

/// Choices that make a disk tell its name.
const NAME: [u8; 1] = [12];

#[test]
fn guest_that_adds_requests_as_fast_as_they_are_served_does_not_keep_the_device_loop() {
    outlast(&mut RngSubject::default(), 0, &[]);
    outlast(&mut BlockSubject::raw(EngineKind::IoUring), 0, &NAME);
    outlast(&mut BlockSubject::raw(EngineKind::Threads), 0, &NAME);
    for queue in [0, 1, 2] {
        outlast(&mut BalloonSubject::default(), queue, &[200]);
    }
    outlast(&mut BalloonSubject::default(), 3, &[]);
    outlast(&mut VsockSubject::default(), 1, &[]);
    outlast(&mut ConsoleSubject::default(), 1, &[]);
}

mod qemu {
    use super::*;

    #[test]
    fn disk_on_qcow2_keeps_its_promises_to_any_guest() {
        keeps_its_promises(|run| run(&mut BlockSubject::qcow2()));
    }
}

mod tap {
    use super::*;

    #[test]
    fn guest_that_sends_without_end_does_not_keep_the_device_loop() {
        alone(|| {
            for queue in [1, 4] {
                outlast(&mut NetSubject::new(), queue, &[]);
            }
        });
    }

    #[test]
    fn network_card_keeps_its_promises_to_any_guest() {
        // One tap for all cases: it takes the kernel long to remove one.
        alone(|| {
            let subject = RefCell::new(NetSubject::new());
            keeps_its_promises(|run| run(&mut *subject.borrow_mut()));
        });
    }
}
