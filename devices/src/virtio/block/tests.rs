use std::fs;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::NamedTempFile;

use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG_GENERATION;

use super::*;
use crate::rate_limiter::TokenBucketConfig;
use crate::virtio::driver::Driver;
use crate::virtio::interrupt::CONFIG_CHANGE;

const READ: u32 = 0;
const WRITE: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const ENGINES: [EngineKind; 2] = [EngineKind::IoUring, EngineKind::Threads];

fn image() -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    let bytes: Vec<u8> = (0..1_u32 << 20).map(|at| (at / 512) as u8).collect();
    file.write_all(&bytes).unwrap();
    file
}

fn config(path: &Path, engine: EngineKind) -> BlockConfig {
    BlockConfig {
        id: "a disk with a name of more than twenty bytes".into(),
        path: path.into(),
        format: ImageFormat::Detect,
        read_only: false,
        root: false,
        cache: CacheType::Writeback,
        engine,
        limits: None,
        replication: Replication::default(),
    }
}

fn device(config: &BlockConfig) -> Box<Block> {
    Box::new(Block::create(config).unwrap())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn span(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Lets the device work until it has used `count` chains.
fn await_used(driver: &mut Driver, count: usize) -> Vec<(u16, u32)> {
    let mut used = driver.used(0);
    while used.len() < count {
        driver.mmio.slot().drain();
        driver.mmio.slot().ready(0);
        used.extend(driver.used(0));
    }
    used
}

/// Carries out one request and returns status and data.
fn carry_out(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, Vec<u8>) {
    let request = driver.add(0, &[&header(kind, sector), data], &[room, 1]);
    driver.ring(0);
    let used = await_used(driver, 1);
    assert_eq!(used[0].0, request.head);
    let status = driver.read(request.writable[1].0, 1)[0];
    (status, driver.read(request.writable[0].0, room))
}

#[test]
fn what_is_written_is_read_back_and_on_the_image() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        let data: Vec<u8> = (0..4096_u32).map(|at| (at % 251) as u8).collect();
        assert_eq!(carry_out(&mut driver, WRITE, 8, &data, 0).0, OK);
        assert_eq!(carry_out(&mut driver, FLUSH, 0, &[], 0).0, OK);
        assert_eq!(carry_out(&mut driver, READ, 8, &[], 4096), (OK, data.clone()));
        let mut stored = vec![0; 4096];
        image.as_file().read_exact_at(&mut stored, 4096).unwrap();
        assert_eq!(stored, data);
        assert_eq!(driver.take_interrupt(), 1);
    }
}

#[test]
fn every_write_to_guest_memory_is_marked_dirty() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        let request = driver.add(0, &[&header(READ, 3)], &[3 * 4096, 4096, 1]);
        driver.begin_watch();
        driver.ring(0);
        await_used(&mut driver, 1);
        assert!(driver.check_changes_are_marked() >= 5, "four pages of data and the used ring");
        assert_eq!(driver.read(request.writable[0].0, 512), [3; 512]);
        let request = driver.add(0, &[&header(GET_ID, 0)], &[20, 1]);
        driver.begin_watch();
        driver.ring(0);
        await_used(&mut driver, 1);
        driver.check_changes_are_marked();
        assert_eq!(driver.read(request.writable[0].0, 20), b"a disk with a name o");
    }
}

#[test]
fn discards_and_zeroes_leave_zeros() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        assert_eq!(carry_out(&mut driver, DISCARD, 0, &span(8, 8, 0), 0).0, OK);
        assert_eq!(carry_out(&mut driver, ZEROES, 0, &span(16, 8, 1), 0).0, OK);
        let zeroed = carry_out(&mut driver, ZEROES, 0, &span(24, 1, 0), 0).0;
        assert!(zeroed == OK || zeroed == UNSUPPORTED, "what the file system has not it says: {zeroed}");
        let sectors = if zeroed == OK { 17 } else { 16 };
        assert_eq!(carry_out(&mut driver, READ, 8, &[], 512 * sectors).1, vec![0; 512 * sectors]);
        assert_eq!(carry_out(&mut driver, READ, 25, &[], 512).1, [25; 512]);
        assert_eq!(carry_out(&mut driver, ZEROES, 0, &span(0, 8, 2), 0).0, UNSUPPORTED);
        assert_eq!(carry_out(&mut driver, DISCARD, 0, &span(2047, 2, 0), 0).0, IO_ERROR);
        assert_eq!(carry_out(&mut driver, DISCARD, 0, &[0; 15], 0).0, UNSUPPORTED);
    }
}

#[test]
fn requests_beyond_the_disk_or_of_half_sectors_fail_and_change_nothing() {
    let image = image();
    let before = fs::read(image.path()).unwrap();
    let mut driver = Driver::start(device(&config(image.path(), EngineKind::Auto)), 0);
    for sector in [2048, 2047, u64::MAX, u64::MAX / 512] {
        assert_eq!(carry_out(&mut driver, READ, sector, &[], 1024).0, IO_ERROR);
        assert_eq!(carry_out(&mut driver, WRITE, sector, &[1; 1024], 0).0, IO_ERROR);
    }
    assert_eq!(carry_out(&mut driver, WRITE, 0, &[1; 100], 0).0, IO_ERROR);
    assert_eq!(carry_out(&mut driver, READ, 0, &[], 100).0, IO_ERROR);
    assert_eq!(carry_out(&mut driver, 77, 0, &[], 0).0, UNSUPPORTED);
    assert_eq!(fs::read(image.path()).unwrap(), before);
}

#[test]
fn read_only_disk_is_not_written() {
    let image = image();
    let before = fs::read(image.path()).unwrap();
    let mut driver =
        Driver::start(device(&BlockConfig { read_only: true, ..config(image.path(), EngineKind::Auto) }), 0);
    assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(carry_out(&mut driver, WRITE, 0, &[1; 512], 0).0, IO_ERROR);
    assert_eq!(carry_out(&mut driver, DISCARD, 0, &span(0, 8, 0), 0).0, IO_ERROR);
    assert_eq!(fs::read(image.path()).unwrap(), before);
}

#[test]
fn request_without_header_or_status_needs_a_reset() {
    let image = image();
    for (readable, writable) in [(&[0; 8][..], &[1][..]), (&header(READ, 0), &[])] {
        let mut driver = Driver::start(device(&config(image.path(), EngineKind::Auto)), 0);
        driver.add(0, &[readable], writable);
        driver.ring(0);
        assert!(driver.needs_reset());
    }
}

#[test]
fn write_reaches_the_image_only_when_its_epoch_is_committed_and_reads_do_not_wait() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        driver.mmio.slot().set_output(OutputPolicy::Hold);
        driver.add(0, &[&header(WRITE, 0), &[0xaa; 512]], &[1]);
        driver.add(0, &[&header(READ, 9)], &[512, 1]);
        driver.ring(0);
        assert_eq!(await_used(&mut driver, 1).len(), 1, "the read");
        assert!(driver.mmio.slot().output_waits());
        let first = || fs::read(image.path()).unwrap()[0];
        driver.mmio.slot().release_output();
        driver.mmio.slot().attend();
        driver.mmio.slot().drain();
        assert_eq!(first(), 0, "no capture knows of it");

        driver.mmio.save(&mut crate::virtio::VirtioState::default());
        driver.mmio.slot().release_output();
        driver.mmio.slot().attend();
        await_used(&mut driver, 1);
        assert_eq!(first(), 0xaa);
    }
}

#[test]
fn successor_carries_out_what_was_in_flight_and_completes_it_once() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        driver.mmio.slot().set_output(OutputPolicy::Hold);
        let mut heads = Vec::new();
        for sector in 0..20 {
            heads.push(driver.add(0, &[&header(WRITE, sector), &[0xbb; 512]], &[1]).head);
        }
        heads.push(driver.add(0, &[&header(READ, 100)], &[512, 1]).head);
        driver.ring(0);
        driver.mmio.slot().drain();
        // The read is done, but nobody has looked: it is in flight as well.
        let mut next = driver.fail_over(device(&config(image.path(), engine)));
        let mut used: Vec<u16> = await_used(&mut next, 21).into_iter().map(|(head, _)| head).collect();
        used.sort_unstable();
        assert_eq!(used, heads);
        assert_eq!(fs::read(image.path()).unwrap()[..20 * 512], [0xbb; 20 * 512]);
        assert_eq!(carry_out(&mut next, READ, 19, &[], 512), (OK, vec![0xbb; 512]));
    }
}

/// What a successor does with requests that were in flight, when the old side had carried out `carried_out` of them since.
fn replayed_after(carried_out: usize, engine: EngineKind) -> Vec<u8> {
    let image = image();
    let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
    // It is completed before: the successor must not write it again, since another has written there meanwhile.
    assert_eq!(carry_out(&mut driver, WRITE, 3, &[0x11; 512], 0).0, OK);
    driver.mmio.slot().set_output(OutputPolicy::Hold);
    let writes: Vec<u16> = (0..20_u64)
        .map(|index| driver.add(0, &[&header(WRITE, 2 * index), &[0xb0 + index as u8; 512]], &[1]).head)
        .collect();
    driver.ring(0);
    for index in 0..carried_out {
        image.as_file().write_all_at(&[0xb0 + index as u8; 512], 2 * index as u64 * 512).unwrap();
    }
    let mut next = driver.fail_over(device(&config(image.path(), engine)));
    let mut used: Vec<u16> = await_used(&mut next, 20).into_iter().map(|(head, _)| head).collect();
    used.sort_unstable();
    assert_eq!(used, writes);
    fs::read(image.path()).unwrap()
}

#[test]
fn image_is_the_same_whatever_the_old_side_had_carried_out_of_what_was_in_flight() {
    for engine in ENGINES {
        let none = replayed_after(0, engine);
        assert_eq!(none[38 * 512..39 * 512], [0xb0 + 19; 512]);
        assert_eq!(none[3 * 512..4 * 512], [0x11; 512]);
        assert!(replayed_after(7, engine) == none, "some");
        assert!(replayed_after(20, engine) == none, "all");
    }
}

#[test]
fn flush_and_reads_do_not_wait_behind_writes_that_wait_for_their_epoch() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        driver.mmio.slot().set_output(OutputPolicy::Hold);
        let write = driver.add(0, &[&header(WRITE, 9), &[0xaa; 512]], &[1]);
        driver.ring(0);
        assert_eq!(carry_out(&mut driver, FLUSH, 0, &[], 0).0, OK);
        assert_eq!(carry_out(&mut driver, READ, 9, &[], 512), (OK, vec![9; 512]), "it is not written yet");
        driver.mmio.save(&mut crate::virtio::VirtioState::default());
        driver.mmio.slot().release_output();
        driver.mmio.slot().attend();
        assert_eq!(await_used(&mut driver, 1)[0].0, write.head);
        assert_eq!(carry_out(&mut driver, FLUSH, 0, &[], 0).0, OK);
        assert_eq!(carry_out(&mut driver, READ, 9, &[], 512), (OK, vec![0xaa; 512]));
    }
}

/// Pages of `file` that are only in memory (cachestat(2)).
fn dirty_pages(file: &fs::File) -> u64 {
    const CACHESTAT: libc::c_long = 451;
    let (all, mut found) = ([0_u64; 2], [0_u64; 5]);
    // SAFETY: reads the range and writes the five counters, both of which are there.
    let outcome = unsafe { libc::syscall(CACHESTAT, file.as_raw_fd(), all.as_ptr(), found.as_mut_ptr(), 0) };
    assert_eq!(outcome, 0, "{}", std::io::Error::last_os_error());
    found[1]
}

#[test]
fn what_is_completed_on_a_shared_image_is_not_lost_with_the_hosts_memory() {
    for engine in ENGINES {
        // On a disk: what is in memory anyway cannot be made durable.
        let mut image = NamedTempFile::new_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        image.write_all(&vec![7; 1 << 20]).unwrap();
        image.as_file().sync_all().unwrap();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        assert_eq!(carry_out(&mut driver, WRITE, 8, &[0xaa; 4096], 0).0, OK);
        assert_ne!(dirty_pages(image.as_file()), 0, "nobody else has the image yet");
        image.as_file().sync_all().unwrap();

        with_block(&driver, Block::write_through);
        assert_eq!(carry_out(&mut driver, WRITE, 800, &[0xaa; 4096], 0).0, OK);
        assert_eq!(dirty_pages(image.as_file()), 0);
        // The edges of what is to be zeros are written.
        assert_eq!(carry_out(&mut driver, ZEROES, 0, &span(1, 20, 0), 0).0, OK);
        assert_eq!(dirty_pages(image.as_file()), 0);
        assert_eq!(carry_out(&mut driver, READ, 20, &[], 512), (OK, vec![0; 512]));

        driver.mmio.slot().set_output(OutputPolicy::Pass);
        assert_eq!(carry_out(&mut driver, WRITE, 8, &[0xbb; 4096], 0).0, OK);
        assert_ne!(dirty_pages(image.as_file()), 0);
    }
}

fn with_block<T>(driver: &Driver, with: impl FnOnce(&mut Block) -> T) -> T {
    driver.mmio.slot().with_device(with).unwrap()
}

#[test]
fn disk_that_is_changed_has_another_size_and_loses_no_request() {
    for engine in ENGINES {
        let (first, mut second) = (image(), NamedTempFile::new().unwrap());
        second.write_all(&vec![0xdd; 4 << 20]).unwrap();
        let mut driver = Driver::start(device(&config(first.path(), engine)), 0);
        let before = driver.get(VIRTIO_MMIO_CONFIG_GENERATION);
        // One that is carried out, but that nobody has looked after yet, and one that waits for its epoch.
        driver.mmio.slot().set_output(OutputPolicy::Hold);
        let read = driver.add(0, &[&header(READ, 3)], &[512, 1]);
        let write = driver.add(0, &[&header(WRITE, 5), &[0xee; 512]], &[1]);
        driver.ring(0);
        with_block(&driver, |block| block.change_image(second.path())).unwrap();
        driver.mmio.slot().interrupt().config_changed();
        driver.mmio.slot().set_output(OutputPolicy::Pass);
        driver.mmio.slot().attend();
        let mut used: Vec<u16> = await_used(&mut driver, 2).into_iter().map(|(head, _)| head).collect();
        used.sort_unstable();
        assert_eq!(used, [read.head, write.head]);
        assert_eq!(driver.read(read.writable[0].0, 512), [3; 512], "read before the change");
        assert_eq!(fs::read(first.path()).unwrap()[5 * 512], 5, "the old image is left alone");
        assert_eq!(fs::read(second.path()).unwrap()[5 * 512..6 * 512], [0xee; 512]);
        assert_eq!(driver.config(0, 8), 8192_u64.to_le_bytes());
        assert_ne!(driver.get(VIRTIO_MMIO_CONFIG_GENERATION), before);
        assert_ne!(driver.take_interrupt() & CONFIG_CHANGE, 0);
        assert_eq!(carry_out(&mut driver, READ, 8191, &[], 512), (OK, vec![0xdd; 512]));
    }
}

#[test]
fn disk_keeps_its_image_if_the_new_one_is_none() {
    let image = image();
    let mut driver = Driver::start(device(&config(image.path(), EngineKind::Auto)), 0);
    let error = with_block(&driver, |block| block.change_image(Path::new("/none"))).unwrap_err();
    assert!(error.to_string().contains("cannot open the disk image /none"), "{error}");
    assert_eq!(driver.config(0, 8), 2048_u64.to_le_bytes());
    assert_eq!(carry_out(&mut driver, READ, 7, &[], 512), (OK, vec![7; 512]));
}

#[test]
fn limits_that_were_changed_hold_and_go_along_with_the_guest() {
    let image = image();
    let mut driver = Driver::start(device(&config(image.path(), EngineKind::Auto)), 0);
    let one = TokenBucketConfig { size: 1, one_time_burst: 0, refill_time: 1 << 40 };
    let change = RateLimiterConfig { bandwidth: None, ops: Some(one) };
    with_block(&driver, |block| block.update_limits(&change));
    let answered = |driver: &mut Driver| {
        driver.add(0, &[&header(GET_ID, 0)], &[20, 1]);
        driver.ring(0);
        driver.used(0).len()
    };
    assert_eq!(answered(&mut driver), 1);
    assert_eq!(answered(&mut driver), 0, "it waits for years");
    let mut next = driver.fail_over(device(&config(image.path(), EngineKind::Auto)));
    assert_eq!(next.used(0).len(), 1, "a full bucket lets the one through that waited");
    assert_eq!(answered(&mut next), 0);
}

#[test]
fn request_that_was_made_available_twice_is_in_flight_twice() {
    for engine in ENGINES {
        let image = image();
        let mut driver = Driver::start(device(&config(image.path(), engine)), 0);
        driver.mmio.slot().set_output(OutputPolicy::Hold);
        let head = driver.add(0, &[&header(WRITE, 0), &[0xaa; 512]], &[1]).head;
        driver.make_available(0, head);
        driver.ring(0);
        driver.mmio.slot().set_output(OutputPolicy::Pass);
        // Both are carried out, and the loop comes between their ends.
        driver.mmio.slot().attend();
        let mut done = 0;
        while done < 2 {
            driver.mmio.slot().ready(0);
            done += driver.used(0).len();
            let mut state = crate::virtio::VirtioState::default();
            driver.mmio.save(&mut state);
            let DeviceState::Block(state) = state.device else { panic!("{state:?}") };
            assert_eq!(state.in_flight, vec![head; 2 - done]);
        }
    }
}

#[test]
fn state_that_no_disk_has_is_refused() {
    let image = image();
    let driver = Driver::start(device(&config(image.path(), EngineKind::Auto)), 0);
    let mut mmio = driver.mmio;
    let mut state = crate::virtio::VirtioState::default();
    mmio.save(&mut state);
    state.device = DeviceState::Block(BlockState { in_flight: vec![0; 257], ..BlockState::default() });
    assert!(mmio.restore(&state).is_err());
    state.device = DeviceState::None;
    assert!(mmio.restore(&state).is_err());
}

// qemu-img comes with QEMU.
mod qemu {
    use super::*;

    /// An empty one of 1 MiB.
    fn qcow2_image(folder: &Path) -> PathBuf {
        let path = folder.join("disk.qcow2");
        let made =
            Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("1M").status();
        assert!(made.unwrap().success());
        path
    }

    #[test]
    fn successor_finds_in_a_qcow2_image_what_was_written_after_it_had_opened_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = qcow2_image(folder.path());
        let mut driver = Driver::start(device(&config(&path, EngineKind::Auto)), 0);
        let successor = device(&config(&path, EngineKind::Auto));
        for sector in [0, 300, 1000] {
            assert_eq!(carry_out(&mut driver, WRITE, sector, &[0x77; 512], 0).0, OK);
        }
        // It never gets to close the image, as in a process that is killed.
        std::mem::forget(driver.mmio.slot().clone());
        let mut next = driver.fail_over(successor);
        for sector in [0, 300, 1000] {
            assert_eq!(carry_out(&mut next, READ, sector, &[], 512), (OK, vec![0x77; 512]));
        }
    }

    #[test]
    fn qcow2_image_works_like_a_raw_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = qcow2_image(folder.path());
        let mut driver = Driver::start(device(&config(&path, EngineKind::Auto)), 0);
        assert_eq!(driver.config(0, 8), 2048_u64.to_le_bytes());
        assert_eq!(carry_out(&mut driver, WRITE, 5, &[0xcc; 1024], 0).0, OK);
        assert_eq!(carry_out(&mut driver, FLUSH, 0, &[], 0).0, OK);
        assert_eq!(carry_out(&mut driver, READ, 4, &[], 512), (OK, vec![0; 512]));
        assert_eq!(carry_out(&mut driver, READ, 6, &[], 512), (OK, vec![0xcc; 512]));
        assert_eq!(carry_out(&mut driver, DISCARD, 0, &span(0, 128, 0), 0).0, OK);
        drop(driver);
        let check = Command::new("qemu-img").args(["check", "-q"]).arg(&path).status().unwrap();
        assert!(check.success(), "qemu-img finds the image sound");
    }
}

#[test]
fn images_that_cannot_be_used_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let error = |path: &Path| Block::create(&config(path, EngineKind::Auto)).err().unwrap().to_string();
    assert!(error(&folder.path().join("none")).contains("cannot open the disk image"));
    assert!(error(folder.path()).contains("disk image"));
    let odd = folder.path().join("odd");
    fs::write(&odd, [0; 513]).unwrap();
    assert!(error(&odd).contains("513 bytes"));
}

#[test]
fn requests_are_counted_with_their_bytes_and_failures() {
    let image = image();
    let mut driver = Driver::start(device(&config(image.path(), EngineKind::Auto)), 0);
    let DeviceCounters::Block(counters) = driver.mmio.slot().counters().clone() else { panic!("no disk") };
    carry_out(&mut driver, WRITE, 8, &[7; 1024], 0);
    carry_out(&mut driver, READ, 0, &[], 512);
    carry_out(&mut driver, READ, 0, &[], 4096);
    carry_out(&mut driver, FLUSH, 0, &[], 0);
    carry_out(&mut driver, READ, 1 << 40, &[], 512);

    assert_eq!((counters.writes.get(), counters.written_bytes.get()), (1, 1024));
    assert_eq!((counters.reads.get(), counters.read_bytes.get()), (2, 4608));
    assert_eq!((counters.flushes.get(), counters.errors.get(), counters.limited.get()), (1, 1, 0));
}

#[test]
fn waiting_for_the_limiter_is_counted() {
    let image = image();
    let bucket = TokenBucketConfig { size: 1, one_time_burst: 0, refill_time: 60_000 };
    let limits = Some(RateLimiterConfig { ops: Some(bucket), ..RateLimiterConfig::default() });
    let disk = device(&BlockConfig { limits, ..config(image.path(), EngineKind::Auto) });
    let mut driver = Driver::start(disk, 0);
    let DeviceCounters::Block(counters) = driver.mmio.slot().counters().clone() else { panic!("no disk") };
    carry_out(&mut driver, READ, 0, &[], 512);
    driver.add(0, &[&header(READ, 0)], &[512, 1]);
    driver.ring(0);
    assert_eq!((counters.reads.get(), counters.limited.get() > 0), (1, true));
}
