//! Disks as subjects.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use tempfile::TempDir;

use super::input::Input;
use super::{Driver, Subject};
use crate::virtio::block::{Block, BlockConfig, CacheType, EngineKind, ImageFormat, Replication};
use crate::virtio::{DeviceState, VirtioDevice};

/// Sectors of the disk.
const SECTORS: u64 = 256;

/// A disk on an image of its own.
pub struct BlockSubject {
    config: BlockConfig,
    /// The image is in it.
    _folder: TempDir,
}

impl BlockSubject {
    /// A disk on a raw image.
    pub fn raw(engine: EngineKind) -> Self {
        Self::new(engine, ImageFormat::Raw, |path| {
            fs::File::create(path).unwrap().set_len(SECTORS * 512).unwrap();
        })
    }

    /// A disk on a qcow2 image, which qemu-img makes.
    pub fn qcow2() -> Self {
        // One for all: a process takes longer than a case.
        static EMPTY: OnceLock<Vec<u8>> = OnceLock::new();
        let empty = EMPTY.get_or_init(|| {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("image");
            let size = (SECTORS * 512).to_string();
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"]).arg(&path).arg(size);
            assert!(command.status().unwrap().success());
            fs::read(path).unwrap()
        });
        Self::new(EngineKind::Threads, ImageFormat::Qcow2, |path| fs::write(path, empty).unwrap())
    }

    fn new(engine: EngineKind, format: ImageFormat, create: impl Fn(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        create(&path);
        let config = BlockConfig {
            id: "a disk".into(),
            path,
            format,
            read_only: false,
            root: false,
            cache: CacheType::Writeback,
            engine,
            limits: None,
            replication: Replication::default(),
        };
        Self { config, _folder: folder }
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// Has one request served, and returns its status and data.
fn serve(driver: &mut Driver, kind: u32, sector: u64, data: &[u8], room: usize) -> (u8, Vec<u8>) {
    let request = driver.add(0, &[&header(kind, sector), data], &[room, 1]);
    driver.ring(0);
    let mut used = driver.used(0);
    while used.is_empty() {
        driver.mmio.slot().drain();
        driver.mmio.slot().ready(0);
        used = driver.used(0);
    }
    assert_eq!(used[0].0, request.head);
    (driver.read(request.writable[1].0, 1)[0], driver.read(request.writable[0].0, room))
}

impl Subject for BlockSubject {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Block::create(&self.config).unwrap())
    }

    fn request(&mut self, _queue: usize, choices: &mut Input<'_>) -> (Vec<Vec<u8>>, Vec<usize>) {
        let (kind, sector) = (choices.byte() % 16, u64::from(choices.byte()));
        let len = 512 * usize::from(choices.byte() % 17).min((SECTORS - sector) as usize);
        let span =
            [&sector.to_le_bytes()[..], &(len as u32 / 512).to_le_bytes(), &[choices.byte() & 1, 0, 0, 0]];
        match kind {
            0..=4 => (vec![header(0, sector)], vec![len, 1]),
            5..=9 => (vec![header(1, sector), vec![choices.byte(); len]], vec![1]),
            10 | 11 => (vec![header(4, 0)], vec![1]),
            12 => (vec![header(8, 0)], vec![20, 1]),
            13 | 14 => (vec![header(13, 0), span.concat()], vec![1]),
            _ => (vec![header(11, 0), [&span[..2].concat()[..], &[0; 4]].concat()], vec![1]),
        }
    }

    fn in_flight(&self, state: &DeviceState, _queue: usize) -> usize {
        let DeviceState::Block(state) = state else { panic!("another device's state: {state:?}") };
        state.in_flight.len()
    }

    fn seen(&mut self) -> Vec<u8> {
        // A flush of a qcow2 image writes tables that belong to writes before it.
        if self.config.format == ImageFormat::Raw { fs::read(&self.config.path).unwrap() } else { Vec::new() }
    }

    fn prove(&mut self, driver: &mut Driver) {
        let data: Vec<u8> = (0..1024_u32).map(|at| (at % 253) as u8).collect();
        assert_eq!(serve(driver, 1, SECTORS - 2, &data, 0).0, 0);
        assert_eq!(serve(driver, 4, 0, &[], 0).0, 0);
        assert_eq!(serve(driver, 0, SECTORS - 2, &[], 1024), (0, data));
        assert_eq!(serve(driver, 0, SECTORS, &[], 512).0, 1);
    }
}
