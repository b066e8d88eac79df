//! Whoever watches the output from outside.

/// The stream as it was seen, merged by position.
#[derive(Default)]
pub struct Outside {
    seen: Vec<u8>,
    /// Bytes that came twice.
    pub repeated: u64,
}

impl Outside {
    /// Position after the last byte seen.
    pub fn end(&self) -> u64 {
        self.seen.len() as u64
    }

    /// Sees `bytes` at `start`.
    ///
    /// # Errors
    /// They leave a gap, or contradict what was seen at their position before.
    pub fn see(&mut self, start: u64, bytes: &[u8]) -> Result<(), String> {
        let Some(over) = self.end().checked_sub(start) else {
            return Err(format!("output from {start} leaves a gap after {}", self.end()));
        };
        let (old, new) = bytes.split_at((over as usize).min(bytes.len()));
        self.agrees(start, old)?;
        self.repeated += old.len() as u64;
        self.seen.extend(new);
        Ok(())
    }

    /// Whether `bytes`, known to be at `start`, are what was seen there, as far as anything was seen.
    ///
    /// # Errors
    /// The contradiction.
    pub fn agrees(&self, start: u64, bytes: &[u8]) -> Result<(), String> {
        let seen = self.seen.get(start as usize..).unwrap_or_default();
        match seen.iter().zip(bytes).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => Err(format!(
                "at position {} was seen {:?}, now it is {:?}",
                start + at as u64,
                String::from_utf8_lossy(&seen[at.saturating_sub(8)..seen.len().min(at + 8)]),
                String::from_utf8_lossy(&bytes[at.saturating_sub(8)..bytes.len().min(at + 8)])
            )),
        }
    }
}
