//! The sections that say where messages, metrics and the serial port's output go. Names and types are Firecracker's.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::devices::TokenBucket;

/// Where messages go, and which.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO, which is appended to; without it stderr.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub log_path: Option<PathBuf>,
    /// The least important messages that are wanted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether each message says its level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether each message says where in the program it comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only messages of this module.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    /// How messages are written; not Firecracker's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub format: Option<LogFormat>,
}

impl Logger {
    /// This, and what it leaves out as `before` has it.
    #[must_use]
    pub fn over(self, before: Option<Self>) -> Self {
        let before = before.unwrap_or_default();
        Self {
            log_path: self.log_path.or(before.log_path),
            level: self.level.or(before.level),
            show_level: self.show_level.or(before.show_level),
            show_log_origin: self.show_log_origin.or(before.show_log_origin),
            module: self.module.or(before.module),
            format: self.format.or(before.format),
        }
    }
}

/// How messages are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum LogFormat {
    /// As Firecracker does.
    #[default]
    Text,
    /// A JSON object a line.
    Json,
}

/// How important a message is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum LogLevel {
    /// No messages at all.
    #[serde(alias = "Off", alias = "OFF")]
    False,
    /// Something is lost.
    #[serde(alias = "ERROR")]
    Error,
    /// Something is not as it should be.
    #[serde(alias = "WARN", alias = "Warn", alias = "WARNING")]
    Warning,
    /// What happens.
    #[default]
    #[serde(alias = "INFO")]
    Info,
    /// What is behind that.
    #[serde(alias = "DEBUG")]
    Debug,
    /// Everything.
    #[serde(alias = "TRACE")]
    Trace,
}

/// Where metrics go: a line of JSON each minute, and whenever they are flushed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or FIFO, which is appended to.
    #[schema(value_type = String)]
    pub metrics_path: PathBuf,
    /// Whether each line says whose it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emit_id: Option<bool>,
    /// What each line says besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub properties: Option<serde_json::Map<String, serde_json::Value>>,
}

/// Where the serial port's output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or FIFO, which is appended to; without it stdout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub serial_out_path: Option<PathBuf>,
    /// Limits; not to be had.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}
