//! Kernels, command lines and RAM disks that cannot be booted are clear errors.

mod common;

use std::fs;
use std::path::PathBuf;

use common::{CODE, Code, SMALL, boot, console, elf};
use vmm::{Boot, BootError, KernelImage, Machine, MachineConfig, MachineError};

fn load(boot: &Boot) -> Result<(), BootError> {
    load_in(&SMALL, boot)
}

fn load_in(config: &MachineConfig, boot: &Boot) -> Result<(), BootError> {
    let mut machine = Machine::create(config, console().0).unwrap();
    machine.load(boot).map_err(|error| match error {
        MachineError::Boot(error) => error,
        other => panic!("{other}"),
    })
}

#[test]
fn every_truncation_of_a_kernel_is_refused() {
    let good = elf(&Code::new().exit(0).spin().0, true);
    load(&boot(good.clone())).unwrap();
    let mut machine = Machine::create(&SMALL, console().0).unwrap();
    for len in 0..good.len() {
        let error = machine.load(&boot(good[..len].to_vec())).expect_err("a truncated kernel");
        assert!(
            matches!(error, MachineError::Boot(BootError::Truncated(_) | BootError::NotAKernel(_))),
            "{len} bytes: {error}"
        );
    }
}

#[test]
fn garbage_is_no_kernel() {
    for byte in [0, 0x7f, 0xff] {
        let error = load(&boot(vec![byte; 100_000])).unwrap_err();
        assert!(matches!(error, BootError::NotAKernel(_)), "{error}");
    }
}

#[test]
fn no_damage_to_the_headers_is_worse_than_an_error() {
    let good = elf(&Code::new().exit(0).spin().0, true);
    let mut machine = Machine::create(&SMALL, console().0).unwrap();
    for at in 0..64 + 2 * 56 + 20 {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bad = good.clone();
            bad[at] = value;
            // Some damage does not matter; none may panic or hang.
            let _ = machine.load(&boot(bad));
        }
    }
}

#[test]
fn missing_kernel_and_directory_are_named() {
    for path in ["/nonexistent/vmlinux", "/tmp"] {
        let kernel = KernelImage::Path(PathBuf::from(path));
        let error = load(&Boot { kernel, initrd: None, cmdline: String::new() }).unwrap_err();
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[test]
fn kernel_that_does_not_fit_memory_says_so() {
    let large = MachineConfig { mem_size_mib: 2, ..SMALL };
    let error = load_in(&large, &boot(elf(&vec![0x90; 2 << 20], true))).unwrap_err();
    assert!(matches!(error, BootError::KernelFit { start: CODE, .. }), "{error}");
    assert!(error.to_string().contains("more memory"), "{error}");
}

#[test]
fn command_line_that_is_too_long_or_has_a_nul_is_refused() {
    let kernel = elf(&Code::new().spin().0, true);
    let with = |cmdline: String| load(&Boot { cmdline, ..boot(kernel.clone()) });
    with("x".repeat(2047)).unwrap();
    assert!(matches!(with("x".repeat(2048)), Err(BootError::CmdlineLength { len: 2048, max: 2047 })));
    assert!(matches!(with("a\0b".into()), Err(BootError::CmdlineNul)));
}

#[test]
fn missing_or_oversized_initrd_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("initrd");
    let kernel = elf(&Code::new().spin().0, true);
    let with = || load(&Boot { initrd: Some(path.clone()), ..boot(kernel.clone()) });
    assert!(matches!(with(), Err(BootError::Initrd { .. })));
    fs::write(&path, vec![1; 15 << 20]).unwrap();
    let error = with().unwrap_err();
    assert!(matches!(error, BootError::InitrdFit { .. }), "{error}");
    fs::write(&path, vec![1; 14 << 20]).unwrap();
    with().unwrap();
}

/// A bzImage whose 64-bit entry is `code`, as far as a boot loader looks at it.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let setup_sectors = 1_u8;
    let mut image = vec![0; 512 * 2];
    image[0x1f1] = setup_sectors;
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let loaded = [&[0xf4; 0x200], code].concat();
    put(0x1f4, &(loaded.len().div_ceil(16) as u32).to_le_bytes());
    put(0x1fe, &[0x55, 0xaa]);
    put(0x202, b"HdrS");
    put(0x206, &0x20f_u16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x236, &0x7f_u16.to_le_bytes());
    put(0x238, &100_u32.to_le_bytes());
    put(0x258, &0x20_0000_u64.to_le_bytes());
    put(0x260, &0x10_0000_u32.to_le_bytes());
    image.extend(loaded);
    image.resize(image.len().next_multiple_of(16), 0);
    image
}

#[test]
fn bzimage_runs_from_its_64_bit_entry_with_a_zero_page() {
    // cmp dword [rsi + 0x202], "HdrS"; then print the first byte of the command line that the zero page points to:
    // mov eax, [rsi + 0x228]; mov bl, [rax]
    let code = Code::new()
        .bytes(&[0x81, 0xbe, 0x02, 0x02, 0, 0])
        .bytes(b"HdrS")
        .bytes(&[0x75, 0xfe])
        .bytes(&[0x8b, 0x86, 0x28, 0x02, 0, 0, 0x8a, 0x18])
        .print_bl()
        .exit(0)
        .spin();
    let (console, mut output) = console();
    let mut machine = Machine::create(&SMALL, console).unwrap();
    machine.load(&Boot { cmdline: "quiet".into(), ..boot(bzimage(&code.0)) }).unwrap();
    machine.start();
    assert_eq!(machine.exit_handle().wait_timeout(common::PATIENCE), Some(vmm::Exit::Code(0)));
    assert_eq!(output.wait_for(1), b"q");
}

#[test]
fn bzimage_that_is_truncated_or_lacks_the_64_bit_entry_or_room_is_refused() {
    let good = bzimage(&[0x90; 1000]);
    let mut machine = Machine::create(&SMALL, console().0).unwrap();
    for len in 0..good.len() {
        let error = machine.load(&boot(good[..len].to_vec())).expect_err("truncated");
        match error {
            MachineError::Boot(BootError::Truncated(_)) => {}
            MachineError::Boot(BootError::NotAKernel(_)) if len < 0x268 => {}
            other => panic!("{len} bytes: {other}"),
        }
    }
    let with = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        load(&boot(image)).unwrap_err()
    };
    assert!(matches!(with(0x236, &[0]), BootError::No64BitEntry { flags: 0, .. }));
    assert!(matches!(with(0x206, &[0x0b, 2]), BootError::No64BitEntry { version: 0x20b, .. }));
    assert!(matches!(with(0x260, &(64_u32 << 20).to_le_bytes()), BootError::KernelFit { .. }));
    let long = Boot { cmdline: "x".repeat(101), ..boot(good.clone()) };
    assert!(matches!(load(&long), Err(BootError::CmdlineLength { max: 100, .. })));
}
