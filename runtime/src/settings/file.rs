//! The files: which there are, and the keys in one.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::{DEFAULT_FILE, DROP_INS, SettingsError};
use crate::host::system_message;

/// The files in the order in which they are read: a later one overrules those before it.
pub(super) fn list(file: Option<&Path>) -> Result<Vec<PathBuf>, SettingsError> {
    let main = file.unwrap_or(Path::new(DEFAULT_FILE));
    let mut files = Vec::new();
    if file.is_some() || main.exists() {
        files.push(main.to_owned());
    }
    let folder = main.parent().unwrap_or(Path::new("/")).join(DROP_INS);
    match fs::read_dir(&folder) {
        Ok(entries) => {
            let paths = entries.flatten().map(|entry| entry.path());
            let mut drop_ins: Vec<_> = paths.filter(|path| path.extension().is_some_and(|end| end == "toml")).collect();
            drop_ins.sort();
            files.extend(drop_ins);
        }
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {}
        Err(error) => return Err(SettingsError::Read { path: folder, reason: system_message(&error) }),
    }
    Ok(files)
}

/// The keys and values of a file.
pub(super) fn read(path: &Path) -> Result<Vec<(String, Value)>, SettingsError> {
    let failed = |reason| SettingsError::Read { path: path.into(), reason };
    let text = fs::read_to_string(path).map_err(|error| failed(system_message(&error)))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| SettingsError::Syntax {
        path: path.into(),
        reason: error.to_string().trim().replace('\n', " "),
    })?;
    let mut keys = Vec::new();
    for (name, value) in table {
        match value {
            Value::Table(keys_in) => {
                keys.extend(keys_in.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)))
            }
            value => keys.push((name, value)),
        }
    }
    Ok(keys)
}
