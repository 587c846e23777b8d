//! What containerd says to `start` on its standard input, and the form of the answer that it takes.
//!
//! Up to 2.2 it writes options of the runtime, or nothing. From 2.3 on it writes a `BootstrapParams`
//! (`containerd.runtime.bootstrap.v1`), which says what the command line says and more, and takes a `BootstrapResult`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel};
use protobuf::well_known_types::any::Any;
use protobuf::{Enum as _, Message as _};
use serde_json::json;

use super::arguments::Arguments;
use super::options::config_path;
use super::{containerd, input};

/// How long containerd may take to write it; it has it at hand.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most that it may be.
const LONGEST: usize = 4 << 20;
/// The version of the Task API that is offered to who can use it: with it, a pod's further containers need no `start`.
const TASK_API: i32 = 3;
/// The first major version of containerd that can.
const SINCE: u32 = 2;

/// How containerd has asked.
#[derive(Debug, Default, PartialEq)]
pub struct Bootstrap {
    params: Option<BootstrapParams>,
    /// The runtime's, from containerd's configuration.
    options: Vec<Any>,
}

impl Bootstrap {
    /// Reads standard input.
    #[must_use]
    pub fn read(arguments: &Arguments) -> Self {
        match input::read_stdin(LONGEST, PATIENCE) {
            Ok(input) if input.whole => Self::recognise(&input.bytes, arguments),
            Ok(_) => Self::default(),
            Err(error) => {
                log::warn!("standard input: {error}");
                Self::default()
            }
        }
    }

    /// Tells parameters from options, which may look alike: parameters repeat what the command line says.
    fn recognise(bytes: &[u8], arguments: &Arguments) -> Self {
        let params = BootstrapParams::parse_from_bytes(bytes).ok();
        let repeats =
            |params: &BootstrapParams| params.instance_id == arguments.id && params.namespace == arguments.namespace;
        match params.filter(repeats) {
            Some(params) => {
                let options = params.extensions.iter().filter_map(|extension| extension.value.as_ref().cloned());
                Self { options: options.collect(), params: Some(params) }
            }
            None => Self { params: None, options: Any::parse_from_bytes(bytes).into_iter().collect() },
        }
    }

    /// The configuration file that the runtime's options name (`ConfigPath`).
    #[must_use]
    pub fn config_path(&self) -> Option<PathBuf> {
        self.options.iter().find_map(|options| config_path(Some(options)))
    }

    /// Where the server's socket is to be.
    #[must_use]
    pub fn socket_dir(&self) -> Option<PathBuf> {
        self.params.as_ref()?.socket_dir.as_deref().filter(|folder| !folder.is_empty()).map(PathBuf::from)
    }

    /// Whether the log is to tell more.
    #[must_use]
    pub fn debug(&self) -> bool {
        let level = self.params.as_ref().map(|params| params.log_level.value());
        level.is_some_and(|level| level <= LogLevel::LOG_LEVEL_DEBUG.value())
    }

    /// The socket for events.
    #[must_use]
    pub fn ttrpc_address(&self) -> Option<&str> {
        let address = self.params.as_ref()?.containerd_ttrpc_address.as_str();
        Some(address.strip_prefix("unix://").unwrap_or(address)).filter(|address| !address.is_empty())
    }

    /// The answer: where the server is. What is remembered of containerd is in `folder`.
    ///
    /// # Errors
    /// That it cannot be encoded.
    pub fn answer(&self, address: &str, arguments: &Arguments, folder: &Path) -> anyhow::Result<Vec<u8>> {
        if self.params.is_some() {
            let (address, protocol) = (address.to_owned(), "ttrpc".to_owned());
            let result = BootstrapResult { version: TASK_API, address, protocol, ..Default::default() };
            return result.write_to_bytes().context("cannot encode the answer");
        }
        let program = arguments.publish_binary.as_deref();
        let version = program.and_then(|program| containerd::major_version(program, folder));
        Ok(legacy(address, version))
    }
}

/// The answer without parameters: all versions take the address alone, for version 2 of the Task API.
fn legacy(address: &str, containerd: Option<u32>) -> Vec<u8> {
    match containerd {
        Some(major) if major >= SINCE => {
            json!({ "version": TASK_API, "address": address, "protocol": "ttrpc" }).to_string().into_bytes()
        }
        _ => address.as_bytes().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::bootstrap_api::Extension;
    use protobuf::{EnumOrUnknown, MessageField};

    use super::*;

    fn arguments() -> Arguments {
        let words = ["-namespace", "n", "-id", "c1", "start"];
        Arguments::parse(words.into_iter().map(str::to_owned)).unwrap()
    }

    fn params() -> BootstrapParams {
        BootstrapParams {
            instance_id: "c1".into(),
            namespace: "n".into(),
            log_level: EnumOrUnknown::new(LogLevel::LOG_LEVEL_TRACE),
            containerd_ttrpc_address: "unix:///run/c.sock.ttrpc".into(),
            socket_dir: Some("/run/s".into()),
            ..Default::default()
        }
    }

    #[test]
    fn parameters_are_followed_and_answered_in_kind() {
        let bootstrap = Bootstrap::recognise(&params().write_to_bytes().unwrap(), &arguments());
        assert_eq!(bootstrap.socket_dir().unwrap(), Path::new("/run/s"));
        assert_eq!(bootstrap.ttrpc_address(), Some("/run/c.sock.ttrpc"));
        assert!(bootstrap.debug());
        let answer = bootstrap.answer("unix:///a", &arguments(), Path::new("/nowhere")).unwrap();
        let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((result.version, result.address.as_str(), result.protocol.as_str()), (3, "unix:///a", "ttrpc"));
    }

    #[test]
    fn parameters_without_the_optional_ones_leave_the_defaults() {
        let params = BootstrapParams { instance_id: "c1".into(), namespace: "n".into(), ..Default::default() };
        let bootstrap = Bootstrap::recognise(&params.write_to_bytes().unwrap(), &arguments());
        assert_eq!((bootstrap.socket_dir(), bootstrap.ttrpc_address(), bootstrap.debug()), (None, None, false));
        assert!(bootstrap.params.is_some());
    }

    #[test]
    fn whatever_else_is_there_is_not_taken_for_parameters() {
        let options = Any { type_url: "containerd.runc.v1.Options".into(), value: b"n".into(), ..Default::default() };
        let other = BootstrapParams { instance_id: "c2".into(), ..params() };
        let whole = params().write_to_bytes().unwrap();
        let cut = whole.get(..whole.len() - 1).unwrap();
        for bytes in [&[][..], b"\xff\xff", cut, &options.write_to_bytes().unwrap(), &other.write_to_bytes().unwrap()] {
            let bootstrap = Bootstrap::recognise(bytes, &arguments());
            assert_eq!((&bootstrap.params, bootstrap.config_path()), (&None, None), "{bytes:?}");
            assert_eq!(bootstrap.answer("unix:///a", &arguments(), Path::new("/nowhere")).unwrap(), b"unix:///a");
        }
    }

    #[test]
    fn the_configuration_is_named_in_either_form() {
        let options =
            Any { type_url: "runtimeoptions.v1.Options".into(), value: b"\x12\x02/c".into(), ..Default::default() };
        let extension = Extension { value: MessageField::some(options.clone()), ..Default::default() };
        let params = BootstrapParams { extensions: vec![extension], ..params() };
        for bytes in [options.write_to_bytes().unwrap(), params.write_to_bytes().unwrap()] {
            assert_eq!(Bootstrap::recognise(&bytes, &arguments()).config_path(), Some("/c".into()));
        }
    }

    #[test]
    fn only_those_who_read_it_get_json() {
        assert_eq!(legacy("unix:///a", Some(1)), b"unix:///a");
        assert_eq!(legacy("unix:///a", None), b"unix:///a");
        let answer: serde_json::Value = serde_json::from_slice(&legacy("unix:///a", Some(2))).unwrap();
        assert_eq!(answer, json!({"version": 3, "address": "unix:///a", "protocol": "ttrpc"}));
    }
}
