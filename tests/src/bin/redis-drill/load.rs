//! Clients of the guest's Redis that write down every request and its answer.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, BufReader, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use mirror::report::monotonic_us;
use redis::{Client, Commands, Connection, RedisError};
use understudy::history::{self, Operation, What};

/// Connections at a time, each with a register of its own; they share the counters.
const CONNECTIONS: u32 = 6;
const COUNTERS: u32 = 2;
/// How long an answer is waited for. More than the service may take to be back: a request that is under way survives.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long each key is tried to be read in the end.
const LAST_READS: Duration = Duration::from_mins(1);
/// Between two requests of a client: virtual hosts are slow, and have other things to do, too.
const BREATH: Duration = Duration::from_millis(20);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(200);

struct Load<'a> {
    client: Client,
    prefix: &'a str,
    history: File,
    keys: Mutex<BTreeSet<String>>,
    values: AtomicU64,
    over: AtomicBool,
}

/// Asks until the file `stop` is there. Fails if a key cannot be read in the end.
pub(crate) fn load(address: &str, prefix: &str, history: &Path, stop: &Path) -> io::Result<bool> {
    let load = &Load::new(address, prefix, history)?;
    thread::scope(|scope| {
        let clients: Vec<_> = (0..CONNECTIONS).map(|number| scope.spawn(move || load.ask(number))).collect();
        while !stop.exists() {
            thread::sleep(PAUSE / 4);
        }
        load.over.store(true, Ordering::Relaxed);
        clients.into_iter().try_for_each(|client| client.join().expect("clients do not panic"))
    })?;
    load.read_all()
}

/// Reads all keys of `history` from the Redis at `address`, which may take its time to start, and writes that to `reads`.
pub(crate) fn recovered(address: &str, history: &Path, reads: &Path) -> io::Result<bool> {
    let load = Load::new(address, "", reads)?;
    let history = history::read(BufReader::new(File::open(history)?)).map_err(io::Error::other)?;
    let keys = history.into_iter().filter_map(|operation| match operation.what {
        What::Set { key, .. } | What::Get { key, .. } | What::Incr { key, .. } => Some(key),
        _ => None,
    });
    load.keys.lock().unwrap_or_else(PoisonError::into_inner).extend(keys);
    load.read_all()
}

/// Whether a request that was sent after `since_us` has been answered.
pub(crate) fn answered(history: &Path, since_us: u64) -> io::Result<bool> {
    let history = history::read(BufReader::new(File::open(history)?)).map_err(io::Error::other)?;
    Ok(history.iter().any(|operation| operation.start_us > since_us && operation.end_us.is_some()))
}

impl<'a> Load<'a> {
    fn new(address: &str, prefix: &'a str, history: &Path) -> io::Result<Self> {
        Ok(Self {
            client: Client::open(format!("redis://{address}/")).map_err(io::Error::other)?,
            prefix,
            history: File::options().create(true).append(true).open(history)?,
            keys: Mutex::default(),
            values: AtomicU64::new(1),
            over: AtomicBool::new(false),
        })
    }

    /// One client: writes its register, reads those of others, counts.
    fn ask(&self, number: u32) -> io::Result<()> {
        let mut line: Option<Connection> = None;
        let mut generation = 0;
        for step in number.. {
            if self.over.load(Ordering::Relaxed) {
                break;
            }
            let Some(connection) = &mut line else {
                line = self.connect();
                continue;
            };
            let register = format!("{}register/{number}/{generation}", self.prefix);
            let neighbour = format!("{}register/{}/0", self.prefix, (number + step) % CONNECTIONS);
            let counter = format!("{}counter/{}", self.prefix, step % COUNTERS);
            let what = match step % 4 {
                0 => What::Set { key: register.clone(), value: self.values.fetch_add(1, Ordering::Relaxed) },
                1 => What::Get { key: neighbour, value: None },
                2 => What::Incr { key: counter, value: None },
                _ => What::Get { key: counter, value: None },
            };
            let written = matches!(what, What::Set { .. });
            if let Err(error) = self.carry_out(number, connection, what)? {
                // Whatever became of the write: the register is not written again, and only read.
                generation += u32::from(written);
                let lost = What::Lost { reason: error.to_string() };
                let now_us = monotonic_us();
                self.note(&Operation { connection: number, start_us: now_us, end_us: None, what: lost })?;
                line = None;
            }
            thread::sleep(BREATH);
        }
        Ok(())
    }

    fn connect(&self) -> Option<Connection> {
        let connected = self.client.get_connection_with_timeout(PATIENCE).and_then(|connection| {
            connection.set_read_timeout(Some(PATIENCE))?;
            connection.set_write_timeout(Some(PATIENCE))?;
            Ok(connection)
        });
        if connected.is_err() {
            thread::sleep(PAUSE);
        }
        connected.ok()
    }

    /// Asks one thing and writes down what came of it; gives the error if nothing did.
    fn carry_out(
        &self,
        number: u32,
        connection: &mut Connection,
        mut what: What,
    ) -> io::Result<Result<(), RedisError>> {
        if let What::Set { key, .. } | What::Get { key, .. } | What::Incr { key, .. } = &what {
            self.keys.lock().unwrap_or_else(PoisonError::into_inner).insert(key.clone());
        }
        let start_us = monotonic_us();
        let outcome = match &mut what {
            What::Set { key, value } => connection.set::<_, _, ()>(key.as_str(), *value),
            What::Get { key, value } => connection.get(key.as_str()).map(|got| *value = got),
            What::Incr { key, value } => connection.incr(key.as_str(), 1).map(|got| *value = Some(got)),
            _ => Ok(()),
        };
        let end_us = outcome.is_ok().then(monotonic_us);
        self.note(&Operation { connection: number, start_us, end_us, what })?;
        Ok(outcome)
    }

    /// Reads each key once more, so that nothing that was acknowledged can be missing unseen.
    fn read_all(&self) -> io::Result<bool> {
        let deadline = Instant::now() + LAST_READS;
        let keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut line: Option<Connection> = None;
        for key in keys {
            loop {
                if Instant::now() > deadline {
                    return Ok(false);
                }
                let Some(connection) = &mut line else {
                    line = self.connect();
                    continue;
                };
                let what = What::Get { key: key.clone(), value: None };
                match self.carry_out(CONNECTIONS, connection, what)? {
                    Ok(()) => break,
                    Err(_) => line = None,
                }
            }
        }
        Ok(true)
    }

    /// One write a line: a line is never torn.
    fn note(&self, operation: &Operation) -> io::Result<()> {
        let mut line = Vec::new();
        history::write(std::slice::from_ref(operation), &mut line)?;
        (&self.history).write_all(&line)
    }
}
