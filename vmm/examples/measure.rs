//! scratch
#[path = "../tests/common/mod.rs"]
mod common;
use std::sync::Arc;
use std::time::{Duration, Instant};
use common::*;
use mirror::dirty::DirtySet;
use mirror::guest::{Guest, StandbyMachine};
use vmm::*;

fn pct(mut v: Vec<Duration>) -> String {
    v.sort();
    format!("p50 {:?} p90 {:?} p99 {:?} max {:?}", v[v.len()/2], v[v.len()*9/10], v[v.len()*99/100], v[v.len()-1])
}
fn rss() -> String {
    let s = std::fs::read_to_string("/proc/self/status").unwrap();
    s.lines().filter(|l| l.starts_with("VmRSS")||l.starts_with("RssAnon")||l.starts_with("RssFile")||l.starts_with("RssShmem")).collect::<Vec<_>>().join(" | ")
}
fn main() {
    let t0 = Instant::now();
    for n in [1u8, 2, 4, 8] {
        let config = MachineConfig { vcpu_count: n, mem_size_mib: 512, huge_pages: false, track_dirty_pages: std::env::var("TRACK").is_ok() };
        let (console, mut output) = console();
        let a = Instant::now();
        let mut m = Machine::create(&config, Arc::clone(&console)).unwrap();
        let b = Instant::now();
        m.load(&boot(elf(&Code::counter().0, true))).unwrap();
        let c = Instant::now();
        m.start();
        output.wait_for(1);
        println!("n={n} create {:?} load {:?} start-to-first-output {:?} rss {}", b - a, c - b, c.elapsed(), rss());
        if n == 1 { println!("process main to first output {:?}", t0.elapsed()); }
        let a = Instant::now();
        m.start_tracking().unwrap();
        println!("  start_tracking {:?}", a.elapsed());
        let mut set = DirtySet::new(m.layout().pages());
        let (mut kick, mut cap, mut enc, mut harvest, mut total, mut res) = (vec![], vec![], vec![], vec![], vec![], vec![]);
        let mut out = Vec::new();
        for _ in 0..1000 {
            std::thread::sleep(Duration::from_micros(500));
            let a = Instant::now();
            m.pause().unwrap();
            let b = Instant::now();
            set.clear();
            m.harvest(&mut set).unwrap();
            let c = Instant::now();
            m.capture().unwrap();
            let d = Instant::now();
            m.resume().unwrap();
            let e = Instant::now();
            out.clear();
            m.encode_captured(&mut out).unwrap();
            enc.push(e.elapsed());
            kick.push(b - a); harvest.push(c - b); cap.push(d - c); res.push(e - d); total.push(e - a);
        }
        println!("  kick {}\n  harvest {}\n  capture {}\n  resume {}\n  total {}\n  encode {} bytes {}", pct(kick), pct(harvest), pct(cap), pct(res), pct(total), pct(enc), out.len());
        m.pause().unwrap(); m.capture().unwrap(); out.clear(); m.encode_captured(&mut out).unwrap();
        let mut set = DirtySet::new(m.layout().pages());
        m.populated(&mut set).unwrap();
        let a = Instant::now();
        let (console2, mut output2) = common::console();
        let mut s = StandbyHost::new(console2);
        let ram = s.allocate(&m.describe(), m.layout()).unwrap();
        let b = Instant::now();
        let (from, to) = (mirror::memory::PageMemory::new(Arc::clone(m.ram())).unwrap(), mirror::memory::PageMemory::new(ram).unwrap());
        let mut page = vec![0; 4096];
        for p in set.iter() { from.read(p, &mut page).unwrap(); to.write(p, &page).unwrap(); }
        let c = Instant::now();
        s.activate(&out).unwrap();
        let d = Instant::now();
        output2.wait_for(1);
        println!("  standby allocate {:?} activate {:?} activate-to-output {:?}", b - a, d - c, c.elapsed());
        let a = Instant::now();
        drop(s); drop(m);
        println!("  drop {:?}", a.elapsed());
    }
}
