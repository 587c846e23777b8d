//! What an administrator settles for every sandbox: one TOML file with drop-ins, and what containers may ask for
//! themselves by annotations. Each value knows where it comes from.

mod annotations;
mod file;
mod keys;
mod show;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::{Path, PathBuf};

use toml::Value;

use crate::sandbox::size::MemorySize;
pub use keys::{KEYS, Key};

/// The file that is read where none is named. It need not be there.
pub const DEFAULT_FILE: &str = "/etc/katavm/config.toml";
/// The folder beside the file whose `.toml` files are read after it, by their names.
pub const DROP_INS: &str = "config.d";
/// What annotations that are settings begin with; the key follows.
pub const ANNOTATION: &str = "io.katavm.";

/// Where a value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A file.
    File(PathBuf),
    /// A container's annotation.
    Annotation(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Annotation(name) => write!(f, "annotation {name}"),
        }
    }
}

/// Why the settings cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// A file cannot be read.
    #[error("cannot read the configuration {path}: {reason}")]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// A file is no TOML.
    #[error("the configuration {path} is no TOML: {reason}")]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and what.
        reason: String,
    },
    /// There is no such key.
    #[error("{origin}: there is no key {key}{}", suggestion(.similar.as_deref()))]
    Unknown {
        /// Where it stands.
        origin: Origin,
        /// The key.
        key: String,
        /// One that was perhaps meant.
        similar: Option<String>,
    },
    /// A value makes no sense.
    #[error("{origin}: {key}: {reason}")]
    Value {
        /// Where it stands.
        origin: Origin,
        /// The key.
        key: String,
        /// What would make sense.
        reason: String,
    },
    /// A container asks for what the administrator has not allowed.
    #[error(
        "annotation {0} is not allowed: add it to annotations.allowed in {DEFAULT_FILE}, or remove it from the container"
    )]
    NotAllowed(String),
}

fn suggestion(similar: Option<&str>) -> String {
    similar.map_or_else(|| ": katavm config show lists all".into(), |key| format!(": did you mean {key}?"))
}

/// All values that were given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// By key.
    given: BTreeMap<&'static str, (Value, Origin)>,
}

impl Settings {
    /// Those of `file` and its drop-ins; without one, of [`DEFAULT_FILE`] if that is there.
    ///
    /// # Errors
    /// Any [`SettingsError`].
    pub fn load(file: Option<&Path>) -> Result<Self, SettingsError> {
        let mut settings = Self::default();
        for path in file::list(file)? {
            for (key, value) in file::read(&path)? {
                settings.set(&key, value, Origin::File(path.clone()))?;
            }
        }
        Ok(settings)
    }

    /// The same with what a container asks for by its annotations.
    ///
    /// # Errors
    /// Any [`SettingsError`].
    pub fn with_annotations(&self, annotations: &HashMap<String, String>) -> Result<Self, SettingsError> {
        annotations::apply(self, annotations)
    }

    fn set(&mut self, name: &str, value: Value, origin: Origin) -> Result<(), SettingsError> {
        let key = keys::find(name).map_err(|similar| SettingsError::Unknown {
            origin: origin.clone(),
            key: name.into(),
            similar: similar.map(str::to_owned),
        })?;
        if let Err(reason) = (key.check)(&value) {
            return Err(SettingsError::Value { origin, key: name.into(), reason });
        }
        self.given.insert(key.name, (value, origin));
        Ok(())
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.given.get(key).map(|(value, _)| value)
    }

    /// The guest's kernel.
    #[must_use]
    pub fn kernel(&self) -> Option<PathBuf> {
        self.value(keys::KERNEL)?.as_str().map(PathBuf::from)
    }

    /// The guest's initramfs.
    #[must_use]
    pub fn initrd(&self) -> Option<PathBuf> {
        self.value(keys::INITRD)?.as_str().map(PathBuf::from)
    }

    /// Memory of a guest.
    #[must_use]
    pub fn memory(&self) -> Asked<MemorySize> {
        self.asked(keys::MEMORY, |value| value.as_str()?.parse().ok())
    }

    /// vCPUs of a guest.
    #[must_use]
    pub fn cpus(&self) -> Asked<u32> {
        self.asked(keys::CPUS, |value| u32::try_from(value.as_integer()?).ok())
    }

    /// Whether memory of a guest is of huge pages.
    #[must_use]
    pub fn huge_pages(&self) -> bool {
        self.flag(keys::HUGE_PAGES)
    }

    /// Whether the log tells more.
    #[must_use]
    pub fn debug(&self) -> bool {
        self.flag(keys::DEBUG)
    }

    fn flag(&self, key: &str) -> bool {
        self.value(key).and_then(Value::as_bool).unwrap_or_default()
    }

    fn asked<T>(&self, key: &str, read: impl Fn(&Value) -> Option<T>) -> Asked<T> {
        match self.given.get(key) {
            Some((value, Origin::Annotation(_))) => Asked { by_container: read(value), otherwise: None },
            Some((value, Origin::File(_))) => Asked { by_container: None, otherwise: read(value) },
            None => Asked { by_container: None, otherwise: None },
        }
    }

    fn allows(&self, annotation: &str) -> bool {
        let allowed = self.value(keys::ALLOWED).and_then(Value::as_array);
        allowed.is_some_and(|names| names.iter().any(|name| name.as_str() == Some(annotation)))
    }
}

/// A value of which a container's own limits may say something, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked<T> {
    /// What the container asks for by an annotation: whatever its limits are.
    pub by_container: Option<T>,
    /// For containers without a limit.
    pub otherwise: Option<T>,
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn load(files: &[(&str, &str)]) -> Result<Settings, String> {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(DROP_INS)).unwrap();
        for (name, text) in files {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let path = folder.path().join("config.toml");
        Settings::load(Some(&path)).map_err(|error| error.to_string().replace(folder.path().to_str().unwrap(), "DIR"))
    }

    #[test]
    fn drop_ins_follow_the_file_by_their_names() {
        let settings = load(&[
            ("config.toml", "[guest]\nmemory = \"1G\"\ncpus = 2\n"),
            ("config.d/20.toml", "guest.cpus = 4\n"),
            ("config.d/10.toml", "guest.cpus = 3\nlog.debug = true\n"),
            ("config.d/30.txt", "nonsense"),
        ])
        .unwrap();
        assert_eq!(settings.cpus(), Asked { by_container: None, otherwise: Some(4) });
        assert_eq!(settings.memory().otherwise.unwrap().to_string(), "1024M");
        assert!(settings.debug() && settings.kernel().is_none());
    }

    #[test]
    fn what_is_wrong_is_named_with_where_it_stands() {
        for (text, words) in [
            ("[guest]\nmemmory = \"1G\"", "DIR/config.toml: there is no key guest.memmory: did you mean guest.memory?"),
            ("colour = 1", "DIR/config.toml: there is no key colour: katavm config show lists all"),
            ("[guest]\nmemory = \"huge\"", "DIR/config.toml: guest.memory: write MiB as 512 or 512M, GiB as 1G"),
            ("[guest]\nmemory = 512", "DIR/config.toml: guest.memory: a text in quotes is wanted"),
            ("[guest]\ncpus = 1000", "DIR/config.toml: guest.cpus: a number from 1 to 32 is wanted"),
            ("[guest]\nkernel = \"vmlinux\"", "DIR/config.toml: guest.kernel: an absolute path is wanted"),
            ("log.debug = \"yes\"", "DIR/config.toml: log.debug: true or false is wanted"),
            ("annotations.allowed = [\"io.katavm.guest.cpu\"]", "did you mean io.katavm.guest.cpus?"),
            ("guest = 3", "DIR/config.toml: there is no key guest"),
            ("[guest", "the configuration DIR/config.toml is no TOML: "),
        ] {
            let error = load(&[("config.toml", text)]).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        assert!(load(&[]).unwrap_err().starts_with("cannot read the configuration DIR/config.toml: "));
    }

    #[test]
    fn containers_ask_for_what_is_allowed() {
        let annotations = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
        };
        let text =
            "guest.memory = \"1G\"\nannotations.allowed = [\"io.katavm.guest.memory\", \"io.katavm.guest.cpus\"]";
        let settings = load(&[("config.toml", text)]).unwrap();
        let asked = [("io.katavm.guest.memory", "2G"), ("io.katavm.guest.cpus", "3"), ("other", "x")];
        let asked = settings.with_annotations(&annotations(&asked)).unwrap();
        assert_eq!(asked.memory().by_container.unwrap().to_string(), "2048M");
        assert_eq!(asked.cpus(), Asked { by_container: Some(3), otherwise: None });
        for (name, value, words) in [
            ("io.katavm.guest.kernel", "/k", "annotation io.katavm.guest.kernel is not allowed"),
            ("io.katavm.guest.cpus", "many", "annotation io.katavm.guest.cpus: guest.cpus: a number from 1 to 32"),
            ("io.katavm.guest.memori", "1G", "there is no key guest.memori: did you mean guest.memory?"),
            ("io.katavm.annotations.allowed", "x", "annotation io.katavm.annotations.allowed is not allowed"),
        ] {
            let error = settings.with_annotations(&annotations(&[(name, value)])).unwrap_err().to_string();
            assert!(error.contains(words), "{name}: {error}");
        }
    }

    #[test]
    fn what_is_shown_can_be_read_again() {
        let settings =
            load(&[("config.toml", "guest.memory = \"1G\"\nannotations.allowed = [\"io.katavm.guest.cpus\"]")]);
        let shown = settings.unwrap().to_string();
        assert!(shown.contains("memory = \"1G\"  # "), "{shown}");
        assert!(shown.contains("cpus = 1  # default"), "{shown}");
        let again = load(&[("config.toml", &shown)]).unwrap();
        assert_eq!(again.memory().otherwise.unwrap().to_string(), "1024M");
        assert!(again.allows("io.katavm.guest.cpus"));
        // Nothing but comments where there is no default.
        assert!(shown.contains("# kernel = "), "{shown}");
    }
}
