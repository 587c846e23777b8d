//! What came of a helper: lines of JSON, the first of which counts; lines of a log give it a cause where it has none.
//!
//! The file is open from the start, because the processes that the helper makes can no longer reach it by name, and it
//! is the one that knows the true cause which speaks first.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The outcome.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// The process was made and waits to be started.
    Made {
        /// Its pid in the guest's first pid namespace.
        pid: i32,
    },
    /// It was not made.
    Failed {
        /// Why.
        error: Error,
    },
    /// libcontainer said so on the way; no outcome.
    Logged(String),
}

static FILE: OnceLock<File> = OnceLock::new();

/// Opens the report of `directory`.
///
/// # Errors
/// Those of open(2).
pub fn open(directory: &Path) -> Result<(), Error> {
    let path = directory.join("report");
    let file = OpenOptions::new().create_new(true).append(true).open(&path);
    let file = file.map_err(|error| Error::io(path.display(), error))?;
    // A second open in one helper would be a mistake here, and the first file serves as well.
    let _ = FILE.set(file);
    Ok(())
}

/// Appends a line.
pub fn write(report: &Report) {
    let Some(mut file) = FILE.get() else { return };
    if let Ok(mut line) = serde_json::to_vec(report) {
        line.push(b'\n');
        // A report that cannot be written is missed by its reader, who says so.
        let _ = file.write_all(&line);
    }
}

impl Report {
    /// The report of an ended helper: its outcome.
    ///
    /// # Errors
    /// Those of the file; `InvalidData` when it holds no outcome.
    pub fn read(directory: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(directory.join("report"))?;
        let lines: Vec<Self> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let mut logged = None;
        let mut outcome = None;
        for line in lines {
            match line {
                Self::Logged(text) => logged = logged.or(Some(text)),
                other => outcome = outcome.or(Some(other)),
            }
        }
        match (outcome, logged) {
            (Some(Self::Failed { error: Error::Internal(error) }), Some(cause)) => {
                Ok(Self::Failed { error: Error::Internal(format!("{error}: {cause}")) })
            }
            (Some(outcome), _) => Ok(outcome),
            (None, _) => Err(io::Error::new(io::ErrorKind::InvalidData, "no outcome")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_counts() {
        let directory = tempfile::tempdir().unwrap();
        open(directory.path()).unwrap();
        write(&Report::Logged("on the way".into()));
        write(&Report::Failed { error: Error::NotFound("exec: \"foo\"".into()) });
        write(&Report::Failed { error: Error::Internal("something vague".into()) });
        let Report::Failed { error } = Report::read(directory.path()).unwrap() else { panic!() };
        assert!(matches!(error, Error::NotFound(text) if text == "exec: \"foo\""));
        assert!(Report::read(Path::new("/nonexistent")).is_err());
    }
}
