//! What to run: the configuration file, in Firecracker's format with a `mirror` section.
//!
//! A file that Firecracker takes is taken here too, as far as it asks for what is there; what is not there yet is
//! refused by name, and a field that nobody knows is an error: a misspelt setting is never ignored.

use std::fs;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use thiserror::Error;
use vmm::CpuTemplate;

use cpu::CpuConfig;

pub mod cpu;
pub mod devices;
mod draft;
mod file;
mod locate;
mod machine;
pub mod metadata;
mod mirroring;
mod not_yet;
pub mod operator;

pub use draft::{BadValue, CpuSource, Draft, Section};
pub use file::Config;
pub use machine::{BootSource, HugePages, MachineSection, MachineUpdate};
pub use mirroring::{MirrorSection, MirrorUpdate, StandbyLost, Standbys};

/// Says `embedded:guest` instead of a kernel's path.
pub const EMBEDDED_GUEST: &str = "embedded:guest";

/// Most guest memory in MiB that a configuration may ask for: 1 TiB.
pub const MAX_MEM_MIB: u32 = 1 << 20;

/// Least guest memory in MiB.
pub const MIN_MEM_MIB: u32 = 2;

/// Most vCPUs.
pub const MAX_VCPUS: u8 = 32;

/// Longest configuration file that is read, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Why a configuration cannot be used.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration file {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file is not a configuration file by its size.
    #[error("the configuration file {path} has {bytes} bytes; at most {MAX_FILE} are read")]
    TooLarge {
        /// Which file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The text is no JSON, or has a field or value that is not known.
    #[error("{path}:{line}:{column}: {}{reason}", in_field(field))]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// The field, with the sections it is in; empty if none.
        field: String,
        /// What is wrong, and what to write instead.
        reason: String,
    },
    /// A value is out of its range.
    #[error("{path}: {field}: {reason}")]
    Value {
        /// Which file.
        path: PathBuf,
        /// The field, with the section it is in.
        field: &'static str,
        /// What is wrong, and what to write instead.
        reason: String,
    },
}

fn value_error(path: &Path) -> impl FnOnce((&'static str, String)) -> ConfigError + '_ {
    |(field, reason)| ConfigError::Value { path: path.into(), field, reason }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.into(), source };
    let bytes = fs::metadata(path).map_err(failed)?.len();
    if bytes > MAX_FILE {
        return Err(ConfigError::TooLarge { path: path.into(), bytes });
    }
    fs::read_to_string(path).map_err(failed)
}

fn from_json<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    serde_json::from_str(text).map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let text_of_error = error.to_string();
        let place = format!(" at line {line} column {column}");
        let reason = text_of_error.strip_suffix(&place).unwrap_or(&text_of_error).to_owned();
        let mut field = locate::field_at(text, line, column);
        if reason.starts_with("missing field") {
            // It is missing from the section, wherever the last of the fields that are there ends.
            field.truncate(field.rfind('.').unwrap_or(0));
        }
        ConfigError::Syntax { path: path.into(), line, column, field, reason }
    })
}

fn in_field(field: &str) -> String {
    if field.is_empty() { String::new() } else { format!("{field}: ") }
}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`]: the first thing that is wrong with it, and where.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::finish(path, Draft::load(path)?)
    }

    /// What `draft` comes to; errors name `path` as the place it is from.
    ///
    /// # Errors
    /// [`ConfigError`]: what is missing.
    pub fn finish(path: &Path, draft: Draft) -> Result<Self, ConfigError> {
        let template = draft.template()?;
        draft.finish(template).map_err(value_error(path))
    }
}

impl Draft {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// [`ConfigError`]: the first thing that is wrong with it, and where.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(path, &read(path)?)
    }

    /// Reads and checks `text`; errors name `path` as the place it is from.
    ///
    /// # Errors
    /// [`ConfigError`]: the first thing that is wrong with it, and where.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut draft: Self = from_json(path, text)?;
        draft.check().map_err(value_error(path))?;
        Ok(draft)
    }

    /// What the file of the CPU template holds, if there is one.
    ///
    /// # Errors
    /// [`ConfigError`]: what is wrong with it, and where.
    pub fn template(&self) -> Result<CpuTemplate, ConfigError> {
        let Some(CpuSource::File(path)) = &self.cpu_config else { return Ok(CpuTemplate::NONE) };
        let template: CpuConfig = from_json(path, &read(path)?)?;
        template.check().map_err(value_error(path))?;
        Ok(template.template())
    }
}

#[cfg(test)]
mod tests;
