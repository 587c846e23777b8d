//! The keys that there are.

use std::path::Path;

use toml::Value;

use super::ANNOTATION;
use crate::sandbox::size::{DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MAXIMUM_VCPUS, MemorySize};

pub(super) const KERNEL: &str = "guest.kernel";
pub(super) const INITRD: &str = "guest.initrd";
pub(super) const MEMORY: &str = "guest.memory";
pub(super) const CPUS: &str = "guest.cpus";
pub(super) const HUGE_PAGES: &str = "guest.huge_pages";
pub(super) const ALLOWED: &str = "annotations.allowed";
pub(super) const DEBUG: &str = "log.debug";

/// A key of the configuration.
pub struct Key {
    /// Its table and its name, with a dot between them.
    pub name: &'static str,
    /// What it means.
    pub about: &'static str,
    /// Whether a container may ask for it by an annotation, if the administrator allows that.
    pub by_annotation: bool,
    /// Its value where nothing is said.
    pub default: fn() -> Option<Value>,
    /// What is wrong with a value.
    pub(super) check: fn(&Value) -> Result<(), String>,
}

/// All keys, by their tables.
pub static KEYS: [Key; 7] = [
    Key {
        name: KERNEL,
        about: "The guest's kernel: an ELF vmlinux or a bzImage; the installed guest image's if not set",
        by_annotation: true,
        default: || None,
        check: path,
    },
    Key {
        name: INITRD,
        about: "The guest's initramfs, with the agent in it; the installed guest image's if not set",
        by_annotation: true,
        default: || None,
        check: path,
    },
    Key {
        name: MEMORY,
        about: "Memory of a guest whose first container has no limit",
        by_annotation: true,
        default: || Some(Value::String(format!("{DEFAULT_MEMORY_MIB}M"))),
        check: |value| text(value)?.parse::<MemorySize>().map(drop).map_err(|error| error.to_string()),
    },
    Key {
        name: CPUS,
        about: "CPUs of a guest whose first container has no limit",
        by_annotation: true,
        default: || Some(Value::Integer(DEFAULT_VCPUS.into())),
        check: |value| match value.as_integer() {
            Some(count) if (1..=i64::from(MAXIMUM_VCPUS)).contains(&count) => Ok(()),
            _ => Err(format!("a number from 1 to {MAXIMUM_VCPUS} is wanted")),
        },
    },
    Key {
        name: HUGE_PAGES,
        about: "Memory of guests is of huge pages of 2 MiB, which the host must have set aside (vm.nr_hugepages); none comes back before the guest's end",
        by_annotation: true,
        default: || Some(Value::Boolean(false)),
        check: flag,
    },
    Key {
        name: ALLOWED,
        about: "Annotations by which containers may ask for what their pod's guest is like, as \"io.katavm.guest.memory\"",
        by_annotation: false,
        default: || Some(Value::Array(Vec::new())),
        check: annotations,
    },
    Key {
        name: DEBUG,
        about: "Tell more in the log",
        by_annotation: false,
        default: || Some(Value::Boolean(false)),
        check: flag,
    },
];

/// The key of a name; else one that is like it.
pub(super) fn find(name: &str) -> Result<&'static Key, Option<&'static str>> {
    KEYS.iter().find(|key| key.name == name).ok_or_else(|| similar(name))
}

fn similar(name: &str) -> Option<&'static str> {
    /// Letters that are wrong, at most.
    const WRONG: usize = 3;
    let distance = |key: &Key| strsim::damerau_levenshtein(key.name, name);
    KEYS.iter().min_by_key(|key| distance(key)).filter(|key| distance(key) <= WRONG).map(|key| key.name)
}

fn text(value: &Value) -> Result<&str, String> {
    value.as_str().ok_or_else(|| "a text in quotes is wanted".into())
}

fn flag(value: &Value) -> Result<(), String> {
    value.as_bool().map(drop).ok_or_else(|| "true or false is wanted".into())
}

fn path(value: &Value) -> Result<(), String> {
    if Path::new(text(value)?).is_absolute() { Ok(()) } else { Err("an absolute path is wanted".into()) }
}

fn annotations(value: &Value) -> Result<(), String> {
    let names = value.as_array().ok_or("a list of annotations is wanted")?;
    for name in names {
        let name = text(name)?;
        let Some(key) = name.strip_prefix(ANNOTATION) else {
            return Err(format!("{name:?} is none of katavm's annotations, which begin with {ANNOTATION}"));
        };
        match find(key) {
            Ok(key) if key.by_annotation => {}
            Ok(_) => return Err(format!("{name}: no container can be allowed to settle this")),
            Err(Some(similar)) => return Err(format!("there is no {name}: did you mean {ANNOTATION}{similar}?")),
            Err(None) => return Err(format!("there is no {name}")),
        }
    }
    Ok(())
}
