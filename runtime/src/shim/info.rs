//! `-info`: what this runtime can do, for containerd and its clients.

use std::time::Duration;

use anyhow::{Context as _, bail};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message as _, MessageField};

use super::input::{self, Input};
use crate::cli;

/// The runtime's name, as in configurations of containerd.
const NAME: &str = "io.containerd.katavm.v2";
/// The type of the description that the OCI runtime specification has for this (features.md), in JSON.
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";
/// How long the options may take to come.
const PATIENCE: Duration = Duration::from_secs(2);
/// The most that they may be.
const LONGEST: usize = 4 << 20;

/// Reads the runtime's options from standard input; gives the description, serialised.
///
/// # Errors
/// When standard input cannot be read or is no `Any`.
pub fn info() -> anyhow::Result<Vec<u8>> {
    let Input { bytes, whole } = input::read_stdin(LONGEST, PATIENCE).context("cannot read standard input")?;
    if !whole {
        bail!("standard input does not end: the options of the runtime, or nothing, are expected there");
    }
    Ok(describe(&bytes)?.write_to_bytes()?)
}

fn describe(options: &[u8]) -> anyhow::Result<RuntimeInfo> {
    let options = match options {
        [] => MessageField::none(),
        options => MessageField::some(Any::parse_from_bytes(options).context("standard input is no option message")?),
    };
    let features = serde_json::to_vec(&cli::described_features())?;
    let version = RuntimeVersion { version: env!("CARGO_PKG_VERSION").into(), ..Default::default() };
    Ok(RuntimeInfo {
        name: NAME.into(),
        version: MessageField::some(version),
        options,
        features: MessageField::some(Any { type_url: FEATURES.into(), value: features, ..Default::default() }),
        ..Default::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_the_command_line_says() {
        let info = describe(&[]).unwrap();
        assert_eq!((info.name.as_str(), info.version.version.as_str()), (NAME, env!("CARGO_PKG_VERSION")));
        assert!(info.options.is_none());
        let features: serde_json::Value = serde_json::from_slice(&info.features.value).unwrap();
        assert_eq!(features, cli::described_features());
        assert!(features["ociVersionMax"].is_string());
    }

    #[test]
    fn options_come_back_and_what_is_none_is_refused() {
        let options = Any { type_url: "runtimeoptions.v1.Options".into(), ..Default::default() };
        let info = describe(&options.write_to_bytes().unwrap()).unwrap();
        assert_eq!(info.options.type_url, options.type_url);
        assert!(describe(b"\xff").is_err());
    }
}
