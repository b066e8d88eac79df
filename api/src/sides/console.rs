//! The judge of a failover: looks at what came out of both consoles, and takes nothing on anybody's word.
//!
//! The guest's console is one stream of bytes with positions. The standby says at which position it goes on; so what
//! an observer saw is the primary's bytes up to there, then the standby's. Where both wrote, they must have written the
//! same. In that stream each vCPU counts 1, 2, 3 …, each time with a sum over its state that is recomputed here, and walks
//! its memory comparing every page with what it must hold.

use std::fmt;

use resources::protocol::{ExpectedCounter, Line, Params};
use serde::Serialize;

use super::lines::{ConsoleLine, console_lines};

/// Longest gap in a count over which the sum is still followed; beyond it the vCPU's sums are no longer checked.
const MAX_GAP: u64 = 1 << 20;

/// Most problems that are told in words; all are counted.
const MAX_PROBLEMS: usize = 20;

/// Which completed walk after the failover is the first that *began* after it. The standby may first write what the
/// primary's last epochs produced and nobody saw, and the end of a walk may be in that; the walk that ends next began
/// before the failover; the one after that is wholly new. (Walks are longer than what is held back.)
const WHOLE_WALK: u32 = 3;

/// What came out.
#[derive(Clone, Copy, Debug)]
pub struct Consoles<'a> {
    /// Everything that the primary wrote.
    pub primary: &'a [u8],
    /// Everything that the standby wrote.
    pub standby: &'a [u8],
    /// Position at which the standby says that it goes on; `None` if it never ran the guest.
    pub output_start: Option<u64>,
}

/// What was found. An output is a `count` line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Findings {
    /// Outputs of the primary.
    pub outputs_before: u64,
    /// Outputs of the standby.
    pub outputs_after: u64,
    /// Outputs that both wrote: seen twice, and identical.
    pub outputs_repeated: u64,
    /// Outputs that are missing.
    pub outputs_lost: u64,
    /// Outputs that contradict what was seen before them, or what the guest must have computed.
    pub outputs_regressed: u64,
    /// Pages that the guest compared, in walks that began after the failover: one walk of each vCPU.
    pub pages_verified: u64,
    /// Pages that did not hold what they must, in any walk.
    pub pages_wrong: u64,
    /// Whether every vCPU has counted and finished a whole walk after the failover.
    #[serde(skip)]
    pub complete: bool,
    /// vCPUs that have finished a whole walk after the failover.
    #[serde(skip)]
    pub vcpus_verified: u32,
    /// Whether every vCPU has said that its memory is filled.
    #[serde(skip)]
    pub ready: bool,
    /// The exit code, if the guest has ended.
    #[serde(skip)]
    pub exit_code: Option<u8>,
    /// What is wrong, in words; empty if all is well.
    pub problems: Vec<String>,
}

impl Findings {
    /// Whether nothing is lost, regressed or wrong.
    pub fn is_clean(&self) -> bool {
        (self.outputs_lost, self.outputs_regressed, self.pages_wrong) == (0, 0, 0) && self.problems.is_empty()
    }

    fn problem(&mut self, text: impl fmt::Display) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(text.to_string());
        }
    }

    fn lost(&mut self, outputs: u64, text: impl fmt::Display) {
        self.outputs_lost = self.outputs_lost.saturating_add(outputs);
        self.problem(text);
    }

    fn regressed(&mut self, text: impl fmt::Display) {
        self.outputs_regressed += 1;
        self.problem(text);
    }
}

/// Judges `consoles` of a guest that was started with `params`. `only_workload`: nothing else writes to the console, so
/// that any line which is not the workload's is damage.
pub fn check(params: &Params, only_workload: bool, consoles: &Consoles) -> Findings {
    let mut judge = Judge {
        findings: Findings::default(),
        vcpus: (0..params.cpus).map(|cpu| Vcpu::new(cpu, params.seed)).collect(),
    };
    judge.findings.outputs_before = console_lines(consoles.primary).filter(is_output).count() as u64;
    let (stream, boundary) = judge.join(consoles);
    for found in console_lines(&stream) {
        let after = consoles.output_start.is_some() && found.end > boundary;
        if let Some(line) = found.line {
            judge.line(&line, after);
        } else if only_workload {
            judge.findings.regressed(format_args!("a line ending at byte {} is damaged", found.end));
        }
    }
    judge.finish(params)
}

fn is_output(found: &ConsoleLine) -> bool {
    matches!(found.line, Some(Line::Count { .. }))
}

struct Judge {
    findings: Findings,
    vcpus: Vec<Vcpu>,
}

/// What is known of a vCPU from its lines so far.
struct Vcpu {
    counter: Box<ExpectedCounter>,
    /// The last count.
    n: u64,
    /// Whether the sum can still be followed.
    followed: bool,
    /// Outputs after the failover.
    outputs_after: u64,
    /// Pages of its share, once it has said so.
    share: Option<u64>,
    /// The last completed walk.
    walk: u64,
    /// Pages that the walk which is not complete yet found wrong.
    wrong: u64,
    /// Walks completed after the failover.
    walks_after: u32,
    /// Pages of the first walk that began after it.
    verified: Option<u64>,
}

impl Vcpu {
    fn new(cpu: u32, seed: u64) -> Self {
        Self {
            counter: Box::new(ExpectedCounter::new(cpu, seed)),
            n: 0,
            followed: true,
            outputs_after: 0,
            share: None,
            walk: 0,
            wrong: 0,
            walks_after: 0,
            verified: None,
        }
    }
}

impl Judge {
    /// The stream as an observer saw it, and the index in it where the standby took over.
    fn join(&mut self, consoles: &Consoles) -> (Vec<u8>, usize) {
        let Consoles { primary, standby, output_start } = *consoles;
        let mut stream = primary.to_vec();
        let Some(start) = output_start else {
            if !standby.is_empty() {
                self.findings.regressed(format_args!(
                    "the standby wrote {} bytes although it did not take over",
                    standby.len()
                ));
            }
            return (stream, primary.len());
        };
        let Some(overlap) = usize::try_from(start).ok().and_then(|start| primary.get(start..)) else {
            let hole = start - primary.len() as u64;
            self.findings.lost(
                1,
                format_args!("{hole} bytes are missing between the primary's output and the standby's"),
            );
            // Half a line must not be completed by a half that does not belong to it.
            stream.push(b'\n');
            stream.extend_from_slice(standby);
            return (stream, primary.len() + 1);
        };
        let start = start as usize;
        if let Some(at) = overlap.iter().zip(standby).position(|(ours, theirs)| ours != theirs) {
            self.findings.regressed(format_args!(
                "the standby contradicts what the primary had shown at byte {}",
                start + at
            ));
        } else {
            let both = start + 1..=start + overlap.len().min(standby.len());
            self.findings.outputs_repeated = console_lines(primary)
                .filter(|found| is_output(found) && both.contains(&found.end))
                .count() as u64;
        }
        stream.truncate(start);
        stream.extend_from_slice(standby);
        (stream, start)
    }

    fn line(&mut self, line: &Line, after: bool) {
        match *line {
            Line::Ready { cpu, cpus, pages } => self.ready(cpu, pages / u64::from(cpus.max(1))),
            Line::Count { cpu, n, sum } => self.count(cpu, n, sum, after),
            Line::Verify { cpu, pass, pages, wrong, .. } => self.verify(cpu, pass, pages, wrong, after),
            Line::Wrong { cpu, page, want, found } => {
                self.findings.problem(format_args!(
                    "vCPU {cpu} found page {page} to be of generation {found} where {want} must be"
                ));
                if let Some(vcpu) = self.vcpu(cpu) {
                    vcpu.wrong += 1;
                }
            }
            Line::Exit { code } => self.findings.exit_code = Some(code),
            Line::Error { key } => {
                self.findings.problem(format_args!("the guest refused its parameter {}", key.name()));
            }
            Line::Panic { vector, rip, .. } => {
                self.findings.regressed(format_args!("the guest panicked: exception {vector} at {rip:#x}"));
            }
        }
    }

    fn vcpu(&mut self, cpu: u32) -> Option<&mut Vcpu> {
        if self.vcpus.get(cpu as usize).is_none() {
            self.findings.regressed(format_args!("a line is of vCPU {cpu}, which the guest does not have"));
        }
        self.vcpus.get_mut(cpu as usize)
    }

    fn ready(&mut self, cpu: u32, share: u64) {
        let Some(vcpu) = self.vcpu(cpu) else { return };
        if vcpu.share.replace(share).is_some() {
            self.findings.regressed(format_args!("vCPU {cpu} has started anew"));
        }
    }

    fn count(&mut self, cpu: u32, n: u64, sum: u64, after: bool) {
        self.findings.outputs_after += u64::from(after);
        let Some(vcpu) = self.vcpu(cpu) else { return };
        vcpu.outputs_after += u64::from(after);
        let last = vcpu.n;
        if n <= last {
            self.findings.regressed(format_args!("vCPU {cpu} counted {n} after {last}"));
            return;
        }
        let gap = n - last - 1;
        vcpu.n = n;
        vcpu.followed &= gap <= MAX_GAP;
        let expected = vcpu.followed.then(|| {
            for _ in 0..gap {
                vcpu.counter.advance();
            }
            vcpu.counter.advance().1
        });
        if gap > 0 {
            self.findings.lost(gap, format_args!("vCPU {cpu} counted {n} after {last}: {gap} are missing"));
        }
        if expected.is_some_and(|expected| expected != sum) {
            self.findings.regressed(format_args!("vCPU {cpu} has a wrong sum at count {n}"));
        }
    }

    fn verify(&mut self, cpu: u32, pass: u64, pages: u64, wrong: u64, after: bool) {
        self.findings.pages_wrong = self.findings.pages_wrong.saturating_add(wrong);
        let Some(vcpu) = self.vcpu(cpu) else { return };
        vcpu.wrong = 0;
        vcpu.walks_after += u32::from(after);
        if vcpu.walks_after == WHOLE_WALK {
            vcpu.verified.get_or_insert(pages);
        }
        let (last, share) = (vcpu.walk, vcpu.share);
        vcpu.walk = pass.max(last);
        if pass <= last {
            self.findings.regressed(format_args!("vCPU {cpu} finished walk {pass} after walk {last}"));
        } else if pass > last + 1 {
            let missing = pass - last - 1;
            self.findings
                .lost(missing, format_args!("{missing} walks of vCPU {cpu} are missing after walk {last}"));
        }
        if share.is_some_and(|share| share != pages) {
            self.findings.regressed(format_args!("vCPU {cpu} checked {pages} pages, not all of its share"));
        }
        if wrong > 0 {
            self.findings.problem(format_args!("vCPU {cpu} found {wrong} pages wrong in walk {pass}"));
        }
    }

    fn finish(mut self, params: &Params) -> Findings {
        let findings = &mut self.findings;
        for vcpu in &self.vcpus {
            findings.pages_wrong = findings.pages_wrong.saturating_add(vcpu.wrong);
            findings.pages_verified = findings.pages_verified.saturating_add(vcpu.verified.unwrap_or(0));
            findings.vcpus_verified += u32::from(vcpu.verified.is_some());
        }
        findings.complete = self.vcpus.iter().all(|vcpu| {
            (!params.count || vcpu.outputs_after > 0) && (!params.verify || vcpu.verified.is_some())
        });
        findings.ready = self.vcpus.iter().all(|vcpu| vcpu.share.is_some());
        if let Some(code) = findings.exit_code.filter(|code| *code != 0) {
            findings.problem(format_args!("the guest ended with exit code {code}"));
        }
        self.findings
    }
}

#[cfg(test)]
mod tests;
