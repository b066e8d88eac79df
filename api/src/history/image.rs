//! Whether a disk's image holds what its guest said that it had stored.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use resources::protocol::{BLOCK_BYTES, read_block};
use thiserror::Error;

use super::{Operation, Violations, What};

/// What a key begins with that is a block of the disk.
pub const BLOCK: &str = "block/";

/// An image cannot be read.
#[derive(Debug, Error)]
#[error("cannot read the disk image {path}: {source}")]
pub struct ImageError {
    path: PathBuf,
    source: std::io::Error,
}

/// What was found.
#[derive(Debug, Default)]
pub struct ImageFindings {
    /// Blocks that were looked at: those with an acknowledged store.
    pub blocks: u64,
    /// What cannot be.
    pub violations: Violations,
}

/// The key of block `number`.
pub fn block_key(number: u64) -> String {
    format!("{BLOCK}{number}")
}

/// What may be in a block.
#[derive(Default)]
struct Expected {
    acknowledged: Option<(u64, u64)>,
    /// Values without an answer, with their starts.
    unanswered: Vec<(u64, u64)>,
}

impl Expected {
    fn allows(&self, value: u64) -> bool {
        let Some((start_us, acknowledged)) = self.acknowledged else { return true };
        let later = |(other_us, other): &(u64, u64)| *other_us >= start_us && *other == value;
        value == acknowledged || self.unanswered.iter().any(later)
    }
}

/// Compares the raw image at `path`, which no guest writes to any more, with all stores in `history`: each block must hold
/// whole the last store that was acknowledged, or a later one.
///
/// # Errors
/// [`ImageError`]
pub fn check(history: &[Operation], path: &Path) -> Result<ImageFindings, ImageError> {
    let failed = |source| ImageError { path: path.into(), source };
    let image = File::open(path).map_err(failed)?;
    let mut findings = ImageFindings::default();
    for (number, expected) in expectations(history) {
        let Some((_, acknowledged)) = expected.acknowledged else { continue };
        findings.blocks += 1;
        let mut bytes = [0; BLOCK_BYTES];
        image.read_exact_at(&mut bytes, number * BLOCK_BYTES as u64).map_err(failed)?;
        match read_block(&bytes, number) {
            Some(value) if expected.allows(value) => {}
            Some(value) => findings.violations.add(format_args!(
                "block {number} of the image holds {value}, but {acknowledged} was acknowledged"
            )),
            None => findings.violations.add(format_args!(
                "block {number} of the image is not whole, but {acknowledged} was acknowledged"
            )),
        }
    }
    Ok(findings)
}

fn expectations(history: &[Operation]) -> BTreeMap<u64, Expected> {
    let mut blocks: BTreeMap<u64, Expected> = BTreeMap::new();
    for operation in history {
        let What::Set { key, value } = &operation.what else { continue };
        let Some(number) = key.strip_prefix(BLOCK).and_then(|number| number.parse().ok()) else { continue };
        let expected = blocks.entry(number).or_default();
        let store = (operation.start_us, *value);
        if operation.end_us.is_none() {
            expected.unanswered.push(store);
        } else if expected.acknowledged.is_none_or(|last| last < store) {
            expected.acknowledged = Some(store);
        }
    }
    blocks
}
