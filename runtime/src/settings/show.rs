//! The settings as a file with the same effect, with where each comes from.

use std::fmt;

use super::{KEYS, Settings};

impl fmt::Display for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = "";
        for key in &KEYS {
            let (table, name) = key.name.split_once('.').unwrap_or(("", key.name));
            if table != last {
                writeln!(f, "{}[{table}]", if last.is_empty() { "" } else { "\n" })?;
                last = table;
            }
            writeln!(f, "# {}", key.about)?;
            let given = self.given.get(key.name).map(|(value, origin)| (value.clone(), origin.to_string()));
            match given.or_else(|| (key.default)().map(|value| (value, "default".to_owned()))) {
                // Texts, numbers and lists of them are written in TOML as in JSON.
                Some((value, origin)) => {
                    let value = serde_json::to_string(&value).map_err(|_| fmt::Error)?;
                    writeln!(f, "{name} = {value}  # {origin}")?;
                }
                None => writeln!(f, "# {name} = \"...\"  # not set")?,
            }
        }
        Ok(())
    }
}
