//! The log that Firecracker's `logger` section asks for. Without one, messages go to stderr as they are
//! ([`events`](crate::events)).
//!
//! A line is `TIME [ID:THREAD:LEVEL:FILE:LINE] MESSAGE`, the time in UTC; level and place are there when they are asked for. Whoever
//! logs never waits for whoever reads: a line that finds no room is lost, and counted.

use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;
use thiserror::Error;
use time::OffsetDateTime;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::subscriber::Interest;
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry;

use crate::config::operator::{LogFormat, LogLevel, Logger};
use crate::sink::Sink;

/// The log cannot be written.
#[derive(Debug, Error)]
#[error("logger.log_path: cannot write to {path}: {source}; name a file or a FIFO")]
pub struct LogError {
    path: std::path::PathBuf,
    source: std::io::Error,
}

/// The log of this process.
static LOG: OnceLock<Option<Log>> = OnceLock::new();

/// Messages go to the log from now on, as `logger` says, under the name `id`.
///
/// # Errors
/// [`LogError`]; messages go where they went before then.
pub fn configure(logger: &Logger, id: &str) -> Result<(), LogError> {
    let settings = Settings::new(logger, id)?;
    let log = LOG.get_or_init(|| {
        let log = Log::default();
        // Somebody else's subscriber, in a test, leaves this one without messages.
        tracing::subscriber::set_global_default(registry().with(log.clone())).ok().map(|()| log)
    });
    if let Some(log) = log {
        log.set(settings);
    }
    Ok(())
}

/// Whether messages go to the log instead of stderr.
pub fn is_on() -> bool {
    LOG.get().is_some_and(|log| log.as_ref().is_some_and(|log| log.0.on.load(Ordering::Acquire)))
}

/// Lines that were lost because there was no room.
pub fn lines_lost() -> u64 {
    LOG.get().and_then(Option::as_ref).map_or(0, |log| log.0.lost.load(Ordering::Relaxed))
}

/// What of a process is logged, where, and how.
struct Settings {
    /// Stderr if there is none.
    sink: Option<Sink>,
    id: String,
    level: LevelFilter,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
    format: LogFormat,
}

impl Settings {
    fn new(logger: &Logger, id: &str) -> Result<Self, LogError> {
        let open = |path: &std::path::PathBuf| {
            Sink::open(path).map_err(|source| LogError { path: path.clone(), source })
        };
        let sink = logger.log_path.as_ref().map(open).transpose()?;
        let level = match logger.level.unwrap_or_default() {
            LogLevel::False => LevelFilter::OFF,
            LogLevel::Error => LevelFilter::ERROR,
            LogLevel::Warning => LevelFilter::WARN,
            LogLevel::Info => LevelFilter::INFO,
            LogLevel::Debug => LevelFilter::DEBUG,
            LogLevel::Trace => LevelFilter::TRACE,
        };
        Ok(Self {
            sink,
            id: id.to_owned(),
            level,
            show_level: logger.show_level.unwrap_or(false),
            show_origin: logger.show_log_origin.unwrap_or(false),
            module: logger.module.clone(),
            format: logger.format.unwrap_or_default(),
        })
    }

    fn wants(&self, metadata: &Metadata<'_>) -> bool {
        let module = self.module.as_deref().unwrap_or_default();
        *metadata.level() <= self.level && metadata.target().starts_with(module)
    }

    fn line(&self, metadata: &Metadata<'_>, message: &str, now: Duration) -> String {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("-");
        let (file, line) = (metadata.file().unwrap_or("unknown"), metadata.line().unwrap_or(0));
        if self.format == LogFormat::Json {
            return json!({
                "timestamp": timestamp(now),
                "id": self.id,
                "thread": thread,
                "level": metadata.level().as_str(),
                "module": metadata.target(),
                "origin": format!("{file}:{line}"),
                "message": message,
            })
            .to_string();
        }
        let mut out = format!("{} [{}:{thread}", timestamp(now), self.id);
        // Writing to a string does not fail.
        if self.show_level {
            let _ = write!(out, ":{}", metadata.level());
        }
        if self.show_origin {
            let _ = write!(out, ":{file}:{line}");
        }
        // One message, one line.
        let _ = write!(out, "] {}", message.trim_end().replace('\n', "\n    "));
        out
    }
}

#[derive(Clone, Default)]
struct Log(std::sync::Arc<Shared>);

#[derive(Default)]
struct Shared {
    settings: Mutex<Option<Settings>>,
    on: AtomicBool,
    lost: AtomicU64,
}

impl Log {
    fn set(&self, settings: Settings) {
        *self.0.settings.lock().unwrap_or_else(PoisonError::into_inner) = Some(settings);
        self.0.on.store(true, Ordering::Release);
    }

    fn write(&self, metadata: &Metadata<'_>, message: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut settings = self.0.settings.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(settings) = &mut *settings else { return };
        if !settings.wants(metadata) {
            return;
        }
        let line = settings.line(metadata, message, now);
        let written = match &mut settings.sink {
            Some(sink) => sink.write_line(line.into_bytes()).unwrap_or(false),
            None => writeln!(std::io::stderr(), "{line}").is_ok(),
        };
        if !written {
            self.0.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl<S: Subscriber> Layer<S> for Log {
    fn register_callsite(&self, _: &'static Metadata<'static>) -> Interest {
        // The level may be another later.
        Interest::sometimes()
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let settings = self.0.settings.lock().unwrap_or_else(PoisonError::into_inner);
        settings.as_ref().is_some_and(|settings| settings.wants(metadata))
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let mut message = Message::default();
        event.record(&mut message);
        self.write(event.metadata(), &message.0);
    }
}

/// What an event says: its message, and its fields behind it.
#[derive(Default)]
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = if field.name() == "message" {
            write!(self.0, "{value:?}")
        } else {
            write!(self.0, " {}={value:?}", field.name())
        };
    }
}

/// Logs what the mirror tells.
pub(crate) fn tell(level: Level, name: &str, text: &str) {
    // The level of a place in the program is fixed.
    match level {
        Level::ERROR => tracing::error!(target: "mirror", "{name}: {text}"),
        Level::WARN => tracing::warn!(target: "mirror", "{name}: {text}"),
        Level::INFO => tracing::info!(target: "mirror", "{name}: {text}"),
        Level::DEBUG => tracing::debug!(target: "mirror", "{name}: {text}"),
        Level::TRACE => tracing::trace!(target: "mirror", "{name}: {text}"),
    }
}

/// A time since 1970 in UTC, as ISO 8601 has it, with nanoseconds.
fn timestamp(since_1970: Duration) -> String {
    let then = OffsetDateTime::UNIX_EPOCH + since_1970;
    let (year, month, day) = then.to_calendar_date();
    let (hour, minute, second, nanos) = then.to_hms_nano();
    let month = u8::from(month);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What of `logged` is in a log of these settings.
    fn lines(logger: Logger, logged: impl FnOnce()) -> Vec<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let logger = Logger { log_path: Some(path.clone()), ..logger };
        let log = Log::default();
        log.set(Settings::new(&logger, "vm7").unwrap());
        tracing::subscriber::with_default(registry().with(log), logged);
        std::fs::read_to_string(path).unwrap().lines().map(str::to_owned).collect()
    }

    fn say() {
        tracing::error!("bad");
        tracing::warn!("so so");
        tracing::info!(target: "mirror", "well");
        tracing::debug!("inside");
    }

    /// What follows the time.
    fn after_time(line: &str) -> &str {
        let (time, rest) = line.split_once(' ').unwrap();
        assert_eq!(time.len(), "2026-01-01T00:00:00.000000000".len(), "{line}");
        rest
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        // By `date -u -d @N`.
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000000000"),
            (951_868_799, "2000-02-29T23:59:59.000000000"),
            (1_798_761_599, "2026-12-31T23:59:59.000000000"),
            (4_107_542_400, "2100-03-01T00:00:00.000000000"),
        ] {
            assert_eq!(timestamp(Duration::from_secs(seconds)), text);
        }
        assert!(timestamp(Duration::new(1, 42)).ends_with("01.000000042"));
    }

    #[test]
    fn lines_are_firecrackers_with_what_was_asked_for() {
        let plain = lines(Logger::default(), say);
        let thread = std::thread::current().name().unwrap().to_owned();
        assert_eq!(plain.len(), 3, "{plain:?}");
        assert_eq!(after_time(&plain[0]), format!("[vm7:{thread}] bad"));

        let all = Logger {
            level: Some(LogLevel::Debug),
            show_level: Some(true),
            show_log_origin: Some(true),
            ..Logger::default()
        };
        let all = lines(all, say);
        assert_eq!(all.len(), 4, "{all:?}");
        let debug = after_time(&all[3]);
        assert!(debug.starts_with(&format!("[vm7:{thread}:DEBUG:api/src/log.rs:")), "{debug}");
        assert!(debug.ends_with("] inside"), "{debug}");
    }

    #[test]
    fn level_and_module_choose() {
        let of_level = |level| lines(Logger { level: Some(level), ..Logger::default() }, say).len();
        assert_eq!(of_level(LogLevel::False), 0);
        assert_eq!(of_level(LogLevel::Error), 1);
        assert_eq!(of_level(LogLevel::Warning), 2);
        assert_eq!(of_level(LogLevel::Trace), 4);
        let module = lines(Logger { module: Some("mirror".into()), ..Logger::default() }, say);
        assert_eq!(module.len(), 1, "{module:?}");
        assert!(module[0].ends_with("] well"), "{module:?}");
    }

    #[test]
    fn json_lines_say_all() {
        let json = Logger { format: Some(LogFormat::Json), ..Logger::default() };
        let json = lines(json, || tracing::warn!("one\n\"two\""));
        let line: serde_json::Value = serde_json::from_str(&json[0]).unwrap();
        assert_eq!((&line["id"], &line["level"]), (&json!("vm7"), &json!("WARN")));
        assert_eq!(line["message"], "one\n\"two\"");
    }

    #[test]
    fn path_that_cannot_be_written_is_named() {
        let logger = Logger { log_path: Some("/nonexistent/log".into()), ..Logger::default() };
        let error = configure(&logger, "x").unwrap_err().to_string();
        assert!(error.contains("/nonexistent/log") && error.contains("FIFO"), "{error}");
        assert!(!is_on());
    }
}
