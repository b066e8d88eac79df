//! What the embedded guest says, checked.

use std::time::{Duration, Instant};

use resources::protocol::{ExpectedCounter, Line};

use super::{Output, PATIENCE};

/// What a guest has said, checked line by line.
pub struct Watch {
    pub output: Output,
    /// Bytes looked at.
    seen: usize,
    counters: Vec<ExpectedCounter>,
    /// Lines counted, and walks without a fault, of each vCPU.
    pub counts: Vec<u64>,
    pub walks: Vec<u64>,
}

impl Watch {
    pub fn new(output: Output, cpus: u8) -> Self {
        let counters = (0..u32::from(cpus)).map(|cpu| ExpectedCounter::new(cpu, 0)).collect();
        let none = vec![0; usize::from(cpus)];
        Self { output, seen: 0, counters, counts: none.clone(), walks: none }
    }

    /// Goes on with the output of a twin that was captured now.
    pub fn go_on(&mut self, output: Output) {
        let rest = self.output.now()[self.seen..].to_vec();
        self.output = output;
        self.output.bytes = rest;
        self.seen = 0;
    }

    /// Takes in the lines that are complete.
    pub fn look(&mut self) {
        let bytes = &self.output.now()[self.seen..];
        let Some(end) = bytes.iter().rposition(|&byte| byte == b'\n') else { return };
        let text = String::from_utf8(bytes[..=end].to_vec()).unwrap();
        self.seen += end + 1;
        for line in text.lines() {
            match Line::parse(line).unwrap_or_else(|| panic!("{line:?} is no line of the guest")) {
                Line::Count { cpu, n, sum } => {
                    let cpu = cpu as usize;
                    self.counts[cpu] += 1;
                    assert_eq!((n, sum), self.counters[cpu].advance(), "{line}");
                    assert_eq!(n, self.counts[cpu], "{line}");
                }
                Line::Verify { cpu, wrong, .. } => {
                    assert_eq!(wrong, 0, "{line}");
                    self.walks[cpu as usize] += 1;
                }
                Line::Ready { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Waits until every vCPU has counted and walked so often from now on.
    pub fn more(&mut self, counts: u64, walks: u64) {
        let end = Instant::now() + PATIENCE;
        let before = (self.counts.clone(), self.walks.clone());
        let reached = |now: &[u64], before: &[u64], more| now.iter().zip(before).all(|(n, m)| *n >= m + more);
        loop {
            self.look();
            if reached(&self.counts, &before.0, counts) && reached(&self.walks, &before.1, walks) {
                return;
            }
            assert!(
                Instant::now() < end,
                "counts {:?}, walks {:?}; before {before:?}",
                self.counts,
                self.walks
            );
            self.output.wait_more(Duration::from_millis(100));
        }
    }
}
