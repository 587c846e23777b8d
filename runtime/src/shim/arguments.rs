//! The shim's command line: Go's style of options, with one dash or two, and an action after them.

use std::path::PathBuf;

use anyhow::{Context as _, bail};

/// What the shim is run for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Make a server for a container's pod, or find the one that is there.
    Start,
    /// Remove what a dead server has left of a container.
    Delete,
    /// Be the server.
    Serve,
    /// Print the version.
    Version,
    /// Describe the runtime.
    Info,
}

/// The command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// What to do.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container.
    pub id: String,
    /// containerd's socket.
    pub address: String,
    /// The container's bundle; given to `delete` only. `start` is run in it.
    pub bundle: Option<PathBuf>,
    /// containerd's program.
    pub publish_binary: Option<PathBuf>,
    /// Tell more in the log.
    pub debug: bool,
    /// The configuration that containerd's options of the runtime name; given to a server by `start`.
    pub config: Option<PathBuf>,
}

impl Arguments {
    /// Reads it.
    ///
    /// # Errors
    /// What is missing or unknown.
    pub fn parse(arguments: impl Iterator<Item = String>) -> anyhow::Result<Self> {
        let mut arguments = arguments.peekable();
        let mut parsed = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: None,
            publish_binary: None,
            debug: false,
            config: None,
        };
        while let Some(argument) = arguments.next() {
            let Some(option) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                parsed.action = match argument.as_str() {
                    "start" => Action::Start,
                    "delete" => Action::Delete,
                    other => bail!("unknown action {other:?}: one of start and delete, or none"),
                };
                continue;
            };
            let (name, given) = match option.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (option, None),
            };
            let mut value =
                || given.clone().or_else(|| arguments.next()).with_context(|| format!("-{name} wants a value"));
            match name {
                "namespace" => parsed.namespace = value()?,
                "id" => parsed.id = value()?,
                "address" => parsed.address = value()?,
                "bundle" => parsed.bundle = Some(value()?.into()),
                "publish-binary" => parsed.publish_binary = Some(value()?.into()),
                "config" => parsed.config = Some(value()?.into()),
                "socket" => drop(value()?),
                "debug" => parsed.debug = given.is_none_or(|given| given == "true"),
                // They need nothing else.
                "v" | "version" => return Ok(Self { action: Action::Version, ..parsed }),
                "info" => return Ok(Self { action: Action::Info, ..parsed }),
                other => bail!("unknown option -{other}"),
            }
        }
        for (name, value) in [("namespace", &parsed.namespace), ("id", &parsed.id)] {
            if value.is_empty() {
                bail!("-{name} is missing: this program is run by containerd");
            }
        }
        Ok(parsed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> anyhow::Result<Arguments> {
        Arguments::parse(line.split_ascii_whitespace().map(str::to_owned))
    }

    #[test]
    fn what_containerd_gives_is_understood() {
        let line = "-namespace k8s.io -address /run/c.sock -publish-binary /bin/containerd -id c1 -debug start";
        let start = parse(line).unwrap();
        assert_eq!((start.action, start.namespace.as_str(), start.id.as_str()), (Action::Start, "k8s.io", "c1"));
        assert!(start.debug && start.address == "/run/c.sock");
        assert_eq!(start.publish_binary, Some("/bin/containerd".into()));
        let delete = parse("--namespace=default -id=c1 -bundle /b delete").unwrap();
        assert_eq!((delete.action, delete.bundle), (Action::Delete, Some("/b".into())));
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-namespace n -id c1").unwrap().action, Action::Serve);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, words) in [
            ("start", "-namespace is missing"),
            ("-namespace n start", "-id is missing"),
            ("-namespace n -id", "-id wants a value"),
            ("-namespace n -id c go", "unknown action \"go\""),
            ("-colour red", "unknown option -colour"),
        ] {
            assert!(parse(line).unwrap_err().to_string().contains(words), "{line}");
        }
    }
}
