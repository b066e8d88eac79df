//! Huge pages of the host, reserved for a test and given back after it. Tests that need them are in a module `huge`.

use std::fs::{self, File};

use rustix::fs::{FlockOperation, flock};

const RESERVED: &str = "/proc/sys/vm/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

/// Reserved huge pages. One test at a time has some.
pub(crate) struct Pool {
    before: u64,
    _turn: File,
}

impl Pool {
    /// Waits for its turn, and lets exactly `pages` huge pages be free.
    pub(crate) fn of(pages: u64) -> Self {
        let turn = File::open(RESERVED).unwrap();
        flock(&turn, FlockOperation::LockExclusive).unwrap();
        let pool = Self { before: number(RESERVED), _turn: turn };
        let in_use = pool.before - number(FREE);
        fs::write(RESERVED, (in_use + pages).to_string()).expect("only root may reserve huge pages");
        assert_eq!(number(FREE), pages, "the host has no more memory in pieces of 2 MiB");
        pool
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // As it was, as far as the kernel can.
        let _ = fs::write(RESERVED, self.before.to_string());
    }
}

fn number(path: &str) -> u64 {
    fs::read_to_string(path).unwrap().trim().parse().unwrap()
}
