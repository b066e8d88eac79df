//! What to run: the configuration file, in Firecracker's format with a `mirror` section.
//!
//! A file that Firecracker takes is taken here too, as far as it asks for what is there; what is not there yet is
//! refused by name, and a field that nobody knows is an error: a misspelt setting is never ignored.

use std::fs;
use std::path::{Path, PathBuf};

use mirror::primary::{Pacing, Settings};
use serde::de::DeserializeOwned;
use thiserror::Error;

use cpu::CpuConfig;

pub mod cpu;
pub mod devices;
mod file;
mod locate;
mod not_yet;

pub use file::{BootSource, Config, HugePages, MachineSection, MirrorSection};

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
        let mut config = Self::parse(path, &read(path)?)?;
        if let Some(path) = &config.cpu_config {
            let template: CpuConfig = from_json(path, &read(path)?)?;
            template.check().map_err(value_error(path))?;
            config.cpu_template = template.template();
        }
        Ok(config)
    }

    /// Reads and checks `text`; errors name `path` as the place it is from. The CPU template is not read.
    ///
    /// # Errors
    /// [`ConfigError`]: the first thing that is wrong with it, and where.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        let mut config: Self = from_json(path, text)?;
        config.check().map_err(value_error(path))?;
        Ok(config)
    }

    fn check(&mut self) -> Result<(), (&'static str, String)> {
        devices::order(&mut self.drives)?;
        devices::check_interfaces(&self.network_interfaces)?;
        self.vsock.as_ref().map_or(Ok(()), devices::Vsock::check)?;
        self.console.as_ref().map_or(Ok(()), devices::Console::check)?;
        let MachineSection { vcpu_count, mem_size_mib, smt, ref cpu_template, huge_pages, .. } = self.machine;
        if !(1..=MAX_VCPUS).contains(&vcpu_count) {
            let reason = format!("{vcpu_count} is out of range; give 1 to {MAX_VCPUS} vCPUs");
            return Err(("machine-config.vcpu_count", reason));
        }
        if !(MIN_MEM_MIB..=MAX_MEM_MIB).contains(&mem_size_mib) {
            let reason = format!("{mem_size_mib} is out of range; give {MIN_MEM_MIB} to {MAX_MEM_MIB} MiB");
            return Err(("machine-config.mem_size_mib", reason));
        }
        if huge_pages == HugePages::TwoMib && mem_size_mib % 2 != 0 {
            let reason = format!("{mem_size_mib} is odd; memory of 2 MiB pages needs an even number of MiB");
            return Err(("machine-config.mem_size_mib", reason));
        }
        if smt {
            let reason = "true is not supported yet; every vCPU is a core of its own, so leave it out".into();
            return Err(("machine-config.smt", reason));
        }
        if cpu_template.as_deref().is_some_and(|name| name != "None") {
            let reason = "there are no templates by name; give one of your own in cpu-config".into();
            return Err(("machine-config.cpu_template", reason));
        }
        if self.boot.kernel_image_path.is_empty() {
            let reason = format!("is empty; give the path of a kernel, or {EMBEDDED_GUEST:?}");
            return Err(("boot-source.kernel_image_path", reason));
        }
        self.mirror.as_ref().map_or(Ok(()), MirrorSection::check)
    }
}

impl MirrorSection {
    fn check(&self) -> Result<(), (&'static str, String)> {
        let positive = [
            ("mirror.interval_ms", self.interval_ms),
            ("mirror.min_interval_ms", self.min_interval_ms),
            ("mirror.pause_budget_ms", self.pause_budget_ms),
            ("mirror.heartbeat_ms", self.heartbeat_ms),
        ];
        if let Some((field, value)) = positive.into_iter().find(|(_, value)| !(1..=60_000).contains(value)) {
            return Err((field, format!("{value} is out of range; give 1 to 60000 ms")));
        }
        if self.min_interval_ms > self.interval_ms {
            let reason = format!(
                "{} is more than interval_ms, which is {}; give less, or raise interval_ms",
                self.min_interval_ms, self.interval_ms
            );
            return Err(("mirror.min_interval_ms", reason));
        }
        if !(1..=1000).contains(&self.heartbeat_misses) {
            let reason = format!("{} is out of range; give 1 to 1000", self.heartbeat_misses);
            return Err(("mirror.heartbeat_misses", reason));
        }
        if self.dirty_budget_pages == 0 {
            return Err(("mirror.dirty_budget_pages", "0 is out of range; give at least 1 page".into()));
        }
        if !(1..=65_536).contains(&self.staging_mib) {
            return Err((
                "mirror.staging_mib",
                format!("{} is out of range; give 1 to 65536 MiB", self.staging_mib),
            ));
        }
        Ok(())
    }

    /// The settings of the mirror.
    pub fn settings(&self) -> Settings {
        use std::time::Duration;
        Settings {
            heartbeat: Duration::from_millis(self.heartbeat_ms.into()),
            misses: self.heartbeat_misses,
            pacing: Pacing {
                interval: Duration::from_millis(self.interval_ms.into()),
                min_interval: Duration::from_millis(self.min_interval_ms.into()),
                pause_budget: Duration::from_millis(self.pause_budget_ms.into()),
                dirty_budget: self.dirty_budget_pages,
            },
            wait_for_space: self.wait_for_space,
            has_witness: self.witness.is_some(),
        }
    }

    /// Room for pages copied aside in a pause, in pages.
    pub fn staging_pages(&self) -> usize {
        self.staging_mib as usize * ((1 << 20) / mirror::memory::PAGE_SIZE)
    }
}

#[cfg(test)]
mod tests;
