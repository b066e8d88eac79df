//! The embedded witness: a small JSON file on storage that both sides share.
//!
//! A lock file beside it serialises claims (`flock`, which Linux carries to other hosts over NFS); the record is replaced by rename after a sync, so that a power loss leaves the old record or the new one.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{Claim, Record, Witness, WitnessError, decide};
use crate::ids::{Guid, Term};

/// How long a claim waits for the lock. Whoever holds it needs a few milliseconds, unless it hangs.
const LOCK_PATIENCE: Duration = Duration::from_millis(500);

/// Time between two tries for the lock: `flock` has no wait with a limit.
const LOCK_RETRY: Duration = Duration::from_millis(2);

/// Longest record that is read, in bytes.
const MAX_RECORD: u64 = 64 << 10;

/// A witness in a file.
#[derive(Clone, Debug)]
pub struct FileWitness {
    path: PathBuf,
}

impl FileWitness {
    /// The witness at `path`. The file need not exist: the first claim makes it.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn beside(&self, suffix: &str) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(suffix);
        name.into()
    }

    /// Takes the lock; closing the file gives it back.
    fn lock(&self) -> Result<File, WitnessError> {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(self.beside(".lock"))
            .map_err(|source| self.storage("open its lock file", source))?;
        let since = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if since.elapsed() < LOCK_PATIENCE => {
                    std::thread::sleep(LOCK_RETRY);
                }
                Err(TryLockError::WouldBlock) => {
                    let waited_ms = since.elapsed().as_millis();
                    return Err(WitnessError::Locked { witness: self.name(), waited_ms });
                }
                Err(TryLockError::Error(source)) => return Err(self.storage("lock it", source)),
            }
        }
    }

    fn load(&self) -> Result<Option<Record>, WitnessError> {
        let bytes = match fs::metadata(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(self.storage("read it", source)),
            Ok(meta) if meta.len() > MAX_RECORD || !meta.is_file() => {
                return Err(self.damaged(format!("{} bytes, or not a file", meta.len())));
            }
            Ok(_) => fs::read(&self.path).map_err(|source| self.storage("read it", source))?,
        };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|error| self.damaged(error.to_string()))?;
        Ok(Some(Record { revision: record.term.0, ..record }))
    }

    /// The record, which must be of `guid`.
    fn load_of(&self, guid: Guid) -> Result<Option<Record>, WitnessError> {
        match self.load()? {
            Some(Record { guid: theirs, term, owner, .. }) if theirs != guid => {
                Err(WitnessError::OtherGuest { witness: self.name(), theirs, ours: guid, term, owner })
            }
            record => Ok(record),
        }
    }

    fn store(&self, record: &Record) -> io::Result<()> {
        let fresh = self.beside(".new");
        let mut file = File::create(&fresh)?;
        file.write_all(serde_json::to_string_pretty(record)?.as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn storage(&self, action: &'static str, source: io::Error) -> WitnessError {
        WitnessError::Storage { witness: self.name(), action, source }
    }

    fn damaged(&self, reason: String) -> WitnessError {
        WitnessError::Damaged { witness: self.name(), reason }
    }
}

impl Witness for FileWitness {
    fn claim(&self, guid: Guid, expected: Term, owner: &str) -> Result<Claim, WitnessError> {
        let _lock = self.lock()?;
        let current = self.load_of(guid)?;
        let (claim, record) = decide(current.as_ref(), guid, expected, owner);
        if let Some(record) = record {
            self.store(&record).map_err(|source| self.storage("store a new term in it", source))?;
        }
        Ok(claim)
    }

    fn read(&self, guid: Guid) -> Result<Option<Record>, WitnessError> {
        self.load_of(guid)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const GUEST: Guid = Guid::from_u128(1);

    fn witness() -> (tempfile::TempDir, FileWitness) {
        let folder = tempfile::tempdir().unwrap();
        let witness = FileWitness::new(folder.path().join("witness"));
        (folder, witness)
    }

    #[test]
    fn of_many_claimants_of_one_term_exactly_one_wins() {
        let (_folder, witness) = witness();
        witness.claim(GUEST, Term(0), "first").unwrap();
        let claims: Vec<_> = (0..8)
            .map(|number| {
                let witness = witness.clone();
                thread::spawn(move || witness.claim(GUEST, Term(1), &format!("side {number}")).unwrap())
            })
            .map(|thread| thread.join().unwrap())
            .collect();
        let granted = claims.iter().filter(|claim| **claim == Claim::Granted(Term(2))).count();
        assert_eq!(granted, 1, "{claims:?}");
    }

    #[test]
    fn witness_of_another_guest_is_refused() {
        let (_folder, witness) = witness();
        witness.claim(GUEST, Term(0), "a").unwrap();
        let error = witness.claim(Guid::from_u128(2), Term(0), "b").unwrap_err();
        assert!(matches!(error, WitnessError::OtherGuest { term: Term(1), .. }), "{error}");
        let error = witness.read(Guid::from_u128(2)).unwrap_err();
        assert!(matches!(error, WitnessError::OtherGuest { .. }), "{error}");
    }

    #[test]
    fn damaged_record_is_an_error_and_is_kept() {
        let (_folder, witness) = witness();
        fs::write(witness.path(), "{\"guid\":").unwrap();
        let error = witness.claim(GUEST, Term(0), "a").unwrap_err();
        assert!(matches!(error, WitnessError::Damaged { .. }), "{error}");
        assert_eq!(fs::read(witness.path()).unwrap(), b"{\"guid\":");
    }

    #[test]
    fn lock_held_by_a_hung_process_is_named() {
        let (_folder, witness) = witness();
        let _held = witness.lock().unwrap();
        let error = witness.claim(GUEST, Term(0), "a").unwrap_err();
        assert!(matches!(error, WitnessError::Locked { .. }), "{error}");
    }

    #[test]
    fn storage_that_is_gone_is_an_error() {
        let witness = FileWitness::new("/nonexistent/folder/witness");
        assert!(matches!(witness.claim(GUEST, Term(0), "a"), Err(WitnessError::Storage { .. })));
    }
}
