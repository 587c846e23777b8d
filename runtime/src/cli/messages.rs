//! Where messages go: to a file alone if there is one, else to standard error.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Context;
use log::{Level, LevelFilter, Log, Metadata, Record};

use super::arguments::{Global, LogFormat};

/// Sends messages to where the command line wants them.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(global: &Global) -> anyhow::Result<()> {
    let file = global.log.as_deref().map(open).transpose()?;
    log_to(file, global.log_format, global.level());
    Ok(())
}

/// Sends messages to a file, or where there is none to standard error.
pub fn log_to(file: Option<File>, format: LogFormat, level: LevelFilter) {
    log::set_max_level(level);
    // Fails only if it was done before: then messages already go where they should.
    let _ = log::set_boxed_logger(Box::new(Logger { file, format, level }));
}

/// Tells of the failure that ends katavm: the user sees it whatever the log level, and a log file has it as well.
pub fn error(text: &str) {
    // Nobody reads a closed standard error.
    let _ = writeln!(std::io::stderr(), "katavm: {text}");
    let logger = log::logger();
    if logger.enabled(&Metadata::builder().level(Level::Error).target(FILE_ONLY).build()) {
        logger.log(&Record::builder().level(Level::Error).target(FILE_ONLY).args(format_args!("{text}")).build());
    }
}

/// Target of records that standard error has already.
const FILE_ONLY: &str = "katavm::file";

fn open(path: &Path) -> anyhow::Result<File> {
    let file = File::options().create(true).append(true).open(path);
    file.with_context(|| format!("cannot open the log file {}", path.display()))
}

struct Logger {
    file: Option<File>,
    format: LogFormat,
    level: LevelFilter,
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= self.level && (self.file.is_some() || metadata.target() != FILE_ONLY)
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let message = record.args().to_string();
        // One write per line, so that lines of several processes do not mix; a full disk is no reason to stop.
        let _ = match &self.file {
            Some(file) => {
                let line = file_line(self.format, record.level(), &message, SystemTime::now());
                (&*file).write_all(line.as_bytes())
            }
            None => {
                let line = format!("katavm: {}: {message}\n", level_name(record.level()));
                std::io::stderr().write_all(line.as_bytes())
            }
        };
    }

    fn flush(&self) {}
}

/// As runc's logger calls them.
fn level_name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

fn file_line(format: LogFormat, level: Level, message: &str, now: SystemTime) -> String {
    let (level, time) = (level_name(level), rfc3339(now));
    // A JSON string is also a quoted string for people.
    let message = serde_json::Value::from(message);
    match format {
        LogFormat::Text => format!("time=\"{time}\" level={level} msg={message}\n"),
        LogFormat::Json => format!("{{\"level\":\"{level}\",\"msg\":{message},\"time\":\"{time}\"}}\n"),
    }
}

/// UTC, to the second.
fn rfc3339(time: SystemTime) -> String {
    date(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()) + "Z"
}

/// UTC, to the nanosecond, from nanoseconds since the epoch.
pub fn rfc3339_ns(time: u64) -> String {
    const SECOND: u64 = 1_000_000_000;
    format!("{}.{:09}Z", date(time / SECOND), time % SECOND)
}

fn date(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // The Gregorian calendar in eras of 400 years (146097 days) that begin on 1 March, so that leap days come last.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_709_251_199, "2024-02-29T23:59:59Z"),
            (1_763_949_033, "2025-11-24T01:50:33Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn lines_are_those_of_runc() {
        let line = |format| file_line(format, Level::Warn, "a \"b\"\nc", UNIX_EPOCH);
        assert_eq!(line(LogFormat::Text), "time=\"1970-01-01T00:00:00Z\" level=warning msg=\"a \\\"b\\\"\\nc\"\n");
        let json: serde_json::Value = serde_json::from_str(&line(LogFormat::Json)).unwrap();
        assert_eq!(json["level"], "warning");
        assert_eq!(json["msg"], "a \"b\"\nc");
    }

    #[test]
    fn with_a_file_messages_go_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let logger = Logger { file: Some(open(&path).unwrap()), format: LogFormat::Json, level: LevelFilter::Warn };
        logger.log(&Record::builder().level(Level::Warn).args(format_args!("one")).build());
        logger.log(&Record::builder().level(Level::Info).args(format_args!("two")).build());
        logger.log(&Record::builder().level(Level::Error).target(FILE_ONLY).args(format_args!("three")).build());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains("one") && !text.contains("two") && text.contains("three"), "{text}");
        assert_eq!(text.lines().count(), 2);
        assert!(open(&dir.path().join("no/log")).is_err());
    }
}
