//! The embedded guest boots and does its work under another VMM: QEMU, on KVM and on its own emulation.
//!
//! Not every machine has qemu-system-x86_64 and /dev/kvm: `--skip qemu::` and `--skip kvm::` leave out what needs them,
//! as `tests/run` does, loudly. Otherwise these tests fail where they are missing, and say so.

use std::collections::HashMap;
use std::process::{Command, Output};

use resources::GUEST_ELF;
use resources::protocol::{EXIT_BAD_PARAMETER, ExpectedCounter, Key, Line};

/// How the machine runs the guest.
#[derive(Clone, Copy, Debug)]
enum Accelerator {
    Kvm,
    Emulation,
}

/// Boots the guest with 128 MiB and `vcpus` vCPUs and waits until it ends itself, a minute at most.
fn boot(accelerator: Accelerator, vcpus: u32, command_line: &str) -> Output {
    let kernel = tempfile::NamedTempFile::new().expect("cannot make a temporary file for the guest");
    std::fs::write(kernel.path(), GUEST_ELF).expect("cannot write the guest to a temporary file");
    let accelerator: &[&str] = match accelerator {
        Accelerator::Kvm => &["-accel", "kvm", "-cpu", "host,arch-capabilities=off"],
        Accelerator::Emulation => &["-accel", "tcg", "-cpu", "EPYC-Rome"],
    };
    Command::new("timeout")
        .args(["60", "qemu-system-x86_64", "-M", "microvm,x-option-roms=off,isa-serial=on,rtc=off"])
        .args(accelerator)
        .args(["-m", "128", "-smp", &vcpus.to_string(), "-display", "none", "-serial", "stdio", "-no-reboot"])
        .args(["-device", "isa-debug-exit,iobase=0x501,iosize=0x01", "-append", command_line, "-kernel"])
        .arg(kernel.path())
        .output()
        .expect("cannot run timeout and qemu-system-x86_64 (Debian: coreutils, qemu-system-x86)")
}

/// The exit code of the guest: the debug exit device turns code into 2 * code + 1.
fn guest_exit_code(output: &Output) -> i32 {
    let status = output.status.code().expect("qemu was killed");
    assert!(!output.stdout.is_empty(), "the guest said nothing: {}", String::from_utf8_lossy(&output.stderr));
    status / 2
}

fn lines(output: &Output) -> Vec<Line> {
    let text = String::from_utf8_lossy(&output.stdout);
    // What the other vCPUs were printing when vCPU 0 ended the machine may be cut.
    let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
    whole.lines().map(|text| Line::parse(text).unwrap_or_else(|| panic!("not a line: {text:?}"))).collect()
}

/// Runs all workloads for two seconds of the guest's time and checks all that it says.
fn all_workloads_are_right(accelerator: Accelerator, vcpus: u32) {
    let command_line = format!(
        "cpus={vcpus} workload=count,dirty,verify dirty.rate=20000 dirty.set=64 seed=7 count.limit=100"
    );
    let output = boot(accelerator, vcpus, &command_line);

    let code = guest_exit_code(&output);
    let lines = lines(&output);
    let mut counters: HashMap<u32, ExpectedCounter> =
        (0..vcpus).map(|cpu| (cpu, ExpectedCounter::new(cpu, 7))).collect();
    let (mut ready, mut counts, mut walks) = (0, 0, 0);
    for line in &lines {
        match *line {
            Line::Ready { cpus, pages, .. } => {
                assert_eq!((cpus, pages), (vcpus, 64 * 256));
                ready += 1;
            }
            Line::Count { cpu, n, sum } => {
                let expected = counters.get_mut(&cpu).expect("a vCPU that does not exist").advance();
                assert_eq!((n, sum), expected, "on vCPU {cpu}");
                counts += 1;
            }
            Line::Verify { wrong, pages, .. } => {
                assert_eq!((wrong, pages), (0, u64::from(64 * 256 / vcpus)));
                walks += 1;
            }
            Line::Exit { code } => assert_eq!(code, 0),
            Line::Wrong { .. } | Line::Error { .. } | Line::Panic { .. } => panic!("{line:?}"),
        }
    }
    assert_eq!((code, ready), (0, vcpus), "{lines:?}");
    assert!(counts >= 100 && walks >= vcpus, "{counts} counts, {walks} walks");
}

mod qemu {
    use super::*;

    mod kvm {
        use super::*;

        #[test]
        fn all_workloads_are_right_on_kvm_with_one_two_and_four_vcpus() {
            for vcpus in [1, 2, 4] {
                all_workloads_are_right(Accelerator::Kvm, vcpus);
            }
        }
    }

    #[test]
    fn all_workloads_are_right_on_a_processor_with_ordinary_ring_0() {
        for vcpus in [1, 2] {
            all_workloads_are_right(Accelerator::Emulation, vcpus);
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_named_and_ends_the_run() {
        let cases = [
            ("dirty.rate=fast", Key::DirtyRate),
            ("workload=dirty dirty.set=128", Key::DirtySet),
            // The machine has one.
            ("cpus=2", Key::Cpus),
        ];
        for (command_line, key) in cases {
            let output = boot(Accelerator::Emulation, 1, command_line);
            assert_eq!(lines(&output), [Line::Error { key }], "{command_line}");
            assert_eq!(guest_exit_code(&output), i32::from(EXIT_BAD_PARAMETER), "{command_line}");
        }
    }
}
