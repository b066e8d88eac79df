//! What clients do while a drill lasts: counters, registers, blocks and streams, all at once.

use std::collections::BTreeSet;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use mirror::report::monotonic_us;

use super::client::{Client, Gone, Stored};
use crate::history::{Operation, What};

/// Counters that two clients share, and one that a client has for itself.
const SHARED: u64 = 1;
const OWN: u64 = 2;
/// Registers, each set by one client and read by others.
const SET: [u64; 2] = [8, 9];
/// Bytes of a download.
const DOWNLOAD: u64 = 64 << 10;
/// Time between two downloads, and between two connections that are made anew.
const BREATH: Duration = Duration::from_millis(20);

/// What all clients share.
struct Shared {
    address: SocketAddr,
    blocks: u64,
    stop: AtomicBool,
    answered: AtomicU64,
    numbers: AtomicU32,
    open: Mutex<Vec<TcpStream>>,
}

/// Clients at work.
pub(super) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Vec<Operation>>>,
}

/// What a client does, again and again.
type Work = fn(&Shared, &mut Client, u64) -> Result<(), Gone>;

impl Load {
    /// Starts the clients of the service at `address`, which use the first `blocks` blocks of its disk.
    ///
    /// # Errors
    /// A thread cannot be started.
    pub(super) fn start(address: SocketAddr, blocks: u64) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            address,
            blocks,
            stop: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            numbers: AtomicU32::new(1),
            open: Mutex::default(),
        });
        let mut load = Self { shared, threads: Vec::new() };
        let works: [Work; 7] = [count_shared, count_shared, count_own, set_first, set_second, read, download];
        for work in works {
            load.spawn(move |shared| shared.repeat(work))?;
        }
        load.spawn(store)?;
        load.spawn(connect_anew)?;
        Ok(load)
    }

    fn spawn(&mut self, work: impl FnOnce(&Shared) -> Vec<Operation> + Send + 'static) -> io::Result<()> {
        let shared = Arc::clone(&self.shared);
        self.threads.push(thread::Builder::new().name("client".into()).spawn(move || work(&shared))?);
        Ok(())
    }

    /// Requests that were answered so far.
    pub(super) fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Lets the clients come to their end, reads all that they wrote once more, and returns the whole history. Without
    /// `patience` nothing is waited for any more.
    pub(super) fn finish(self, patience: bool) -> Vec<Operation> {
        self.shared.stop.store(true, Ordering::Relaxed);
        if !patience {
            for open in self.shared.open.lock().unwrap_or_else(PoisonError::into_inner).iter() {
                // It may be closed.
                let _ = open.shutdown(Shutdown::Both);
            }
        }
        let mut history: Vec<Operation> = Vec::new();
        for thread in self.threads {
            // A client that panicked has said so, and its history is missing: its keys are not read.
            history.extend(thread.join().unwrap_or_default());
        }
        if patience {
            let read = self.shared.read_all(&history);
            history.extend(read);
        }
        history.sort_by_key(|operation| operation.start_us);
        history
    }
}

impl Shared {
    fn wanted(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    fn connect(&self) -> Result<Client, Vec<Operation>> {
        let connected = Client::connect(self.address, &self.numbers, || self.wanted());
        let connected = connected.and_then(|client| Ok((client.handle()?, client)));
        match connected {
            Ok((handle, client)) => {
                self.open.lock().unwrap_or_else(PoisonError::into_inner).push(handle);
                Ok(client)
            }
            Err(_) if !self.wanted() => Err(Vec::new()),
            Err(error) => {
                let now_us = monotonic_us();
                let what = What::Lost { reason: format!("cannot connect: {error}") };
                Err(vec![Operation { connection: 0, start_us: now_us, end_us: Some(now_us), what }])
            }
        }
    }

    /// Does `work` on one connection until the end; it is given how often it was done before.
    fn repeat(&self, work: Work) -> Vec<Operation> {
        let mut client = match self.connect() {
            Ok(client) => client,
            Err(history) => return history,
        };
        for turn in 0.. {
            if !self.wanted() || work(self, &mut client, turn).is_err() {
                break;
            }
            self.answered.fetch_add(1, Ordering::Relaxed);
        }
        client.into_history()
    }

    /// Reads every key of `history` that was written.
    fn read_all(&self, history: &[Operation]) -> Vec<Operation> {
        let written = history.iter().filter_map(|operation| match &operation.what {
            What::Set { key, .. } | What::Incr { key, .. } => Some(key.as_str()),
            _ => None,
        });
        let keys: BTreeSet<&str> = written.collect();
        let Ok(mut client) = Client::connect(self.address, &self.numbers, || true) else { return Vec::new() };
        for key in keys {
            let read = match key.strip_prefix(crate::history::image::BLOCK) {
                Some(block) => block.parse().map(|block| client.load(block)),
                None => key.parse().map(|register| client.get(register).map(drop)),
            };
            if !matches!(read, Ok(Ok(()))) {
                break;
            }
        }
        client.into_history()
    }
}

fn count_shared(_: &Shared, client: &mut Client, turn: u64) -> Result<(), Gone> {
    if turn % 8 == 7 { client.get(SHARED).map(drop) } else { client.increment(SHARED).map(drop) }
}

fn count_own(_: &Shared, client: &mut Client, _: u64) -> Result<(), Gone> {
    client.increment(OWN).map(drop)
}

fn set_first(_: &Shared, client: &mut Client, turn: u64) -> Result<(), Gone> {
    client.set(SET[0], turn + 1)
}

fn set_second(_: &Shared, client: &mut Client, turn: u64) -> Result<(), Gone> {
    client.set(SET[1], turn + 1)
}

fn read(_: &Shared, client: &mut Client, turn: u64) -> Result<(), Gone> {
    const KEYS: [u64; 4] = [SET[0], SET[1], SHARED, OWN];
    client.get(KEYS[turn as usize % KEYS.len()]).map(drop)
}

fn download(_: &Shared, client: &mut Client, _: u64) -> Result<(), Gone> {
    thread::sleep(BREATH);
    client.download(DOWNLOAD)
}

/// Stores block by block, and leaves one alone of which it is not known what it holds.
fn store(shared: &Shared) -> Vec<Operation> {
    let mut client = match shared.connect() {
        Ok(client) => client,
        Err(history) => return history,
    };
    let mut unknown = BTreeSet::new();
    for value in 1.. {
        let block = value % shared.blocks;
        if !shared.wanted() || unknown.len() as u64 == shared.blocks {
            break;
        }
        if unknown.contains(&block) {
            continue;
        }
        match client.store(block, value) {
            Ok(Stored::Yes) => {
                shared.answered.fetch_add(1, Ordering::Relaxed);
            }
            Ok(Stored::Perhaps) => {
                unknown.insert(block);
            }
            Err(Gone) => break,
        }
    }
    client.into_history()
}

/// Makes a connection, asks once, closes it, and so on: the service must take new ones, too.
fn connect_anew(shared: &Shared) -> Vec<Operation> {
    let mut history = Vec::new();
    while shared.wanted() {
        let connected = Client::connect(shared.address, &shared.numbers, || shared.wanted());
        if let Ok(mut client) = connected {
            let _ = client.get(SHARED);
            history.extend(client.into_history());
        }
        thread::sleep(BREATH);
    }
    history
}
