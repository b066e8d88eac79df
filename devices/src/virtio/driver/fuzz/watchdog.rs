//! Ends the process if a case takes for ever, and says which.

use std::collections::BTreeMap;
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::input::Operation;

/// Longest time for a case, on a machine with other things to do.
const LIMIT: Duration = Duration::from_mins(2);

static CASES: Mutex<BTreeMap<Instant, String>> = Mutex::new(BTreeMap::new());
static WATCHER: Once = Once::new();

/// While it lives its case is watched.
pub(super) struct Guard(Instant);

/// Watches over a case.
pub(super) fn watch(operations: &[Operation]) -> Guard {
    WATCHER.call_once(|| {
        // As Rust's own main function does, which a fuzz target does not have: writing to nobody is an error, no more.
        // SAFETY: no handler, so nothing that could run at a bad time.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        thread::spawn(look);
    });
    let mut cases = CASES.lock().unwrap_or_else(PoisonError::into_inner);
    let mut now = Instant::now();
    while cases.contains_key(&now) {
        now += Duration::from_nanos(1);
    }
    cases.insert(now, format!("{operations:?}"));
    Guard(now)
}

impl Drop for Guard {
    fn drop(&mut self) {
        CASES.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

fn look() {
    loop {
        thread::sleep(Duration::from_secs(1));
        let cases = CASES.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((begin, case)) = cases.first_key_value()
            && begin.elapsed() > LIMIT
        {
            eprintln!("a case does not end: {case}");
            std::process::abort();
        }
    }
}
