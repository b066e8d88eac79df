//! Seeding throughput, as a share of a raw loopback copy in the same run.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use mirror::primary::Settings;
use mirror::report::Report;
use serde::Serialize;
use tests::pair::Pair;
use vmm::MachineConfig;

use crate::figures::median;

/// Guest memory in MiB; most of it filled with random content.
const MEM_MIB: u32 = 512;
const RUNS: usize = 5;

/// Throughputs in MB/s (10^6 bytes of guest memory a second), medians.
#[derive(Debug, Serialize)]
// The figures are named as they are reported.
#[allow(clippy::struct_field_names)]
pub(crate) struct Seed {
    runs: usize,
    mem_mib: u32,
    seed_mb_s: f64,
    raw_loopback_mb_s: f64,
    share_of_raw: f64,
}

pub(crate) fn measure() -> Seed {
    let (mut seeds, mut raws) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let (pages, micros) = seed_once();
        seeds.push((pages * 4096) as f64 / micros as f64);
        raws.push(raw_copy(pages as usize * 4096));
    }
    let (seed_mb_s, raw_loopback_mb_s) = (median(&mut seeds), median(&mut raws));
    Seed {
        runs: RUNS,
        mem_mib: MEM_MIB,
        seed_mb_s,
        raw_loopback_mb_s,
        share_of_raw: seed_mb_s / raw_loopback_mb_s,
    }
}

/// Pages of the first round, and how long it took in microseconds up to the standby's answer.
fn seed_once() -> (u64, u64) {
    let config = MachineConfig::new(1, MEM_MIB);
    // The fill is done before the mirror begins; then the guest stands nearly idle.
    let cmdline = "workload=dirty dirty.rate=1 dirty.content=random";
    let pair = Pair::start_when(&config, cmdline, "tcp:127.0.0.1:0", Settings::default(), |screen| {
        screen.contains("ready cpu=0")
    });
    let figures = first_round(&pair.seeding);
    pair.end();
    figures
}

fn first_round(seeding: &[Report]) -> (u64, u64) {
    seeding
        .iter()
        .find_map(|report| match report {
            Report::RoundDone { round: 1, pages, micros, .. } => Some((*pages, *micros)),
            _ => None,
        })
        .expect("a pair in lockstep has had a first round")
}

/// MB/s of a copy of `bytes` over a TCP loopback connection, from one buffer of that size to another that has been
/// touched before: what memory and link can do together.
fn raw_copy(bytes: usize) -> f64 {
    const CHUNK: usize = 1 << 20;
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("an address");
    let (source, mut destination) = (vec![0x5a_u8; bytes], vec![0xa5_u8; bytes]);
    let sender = thread::spawn(move || {
        let mut stream = TcpStream::connect(address).expect("a connection");
        for chunk in source.chunks(CHUNK) {
            stream.write_all(chunk).expect("the reader reads");
        }
        stream.read_exact(&mut [0]).expect("the reader answers");
    });
    let (mut stream, _) = listener.accept().expect("a connection");
    let began = Instant::now();
    for chunk in destination.chunks_mut(CHUNK) {
        stream.read_exact(chunk).expect("the sender sends");
    }
    stream.write_all(&[1]).expect("the sender waits");
    let micros = began.elapsed().as_micros();
    sender.join().expect("the sender ends");
    bytes as f64 / micros as f64
}
