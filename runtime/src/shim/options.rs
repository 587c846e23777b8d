//! Options of the runtime, as containerd passes them on from its configuration.

use std::path::PathBuf;

use protobuf::CodedInputStream;
use protobuf::rt::WireType;
use protobuf::well_known_types::any::Any;

/// The type for runtimes that containerd knows nothing more of (`containerd.runtimeoptions.v1.Options`), and its older
/// name.
const TYPES: [&str; 2] = ["runtimeoptions.v1.Options", "containerd.runtimeoptions.v1.Options"];
/// The number of its field `config_path`.
const CONFIG_PATH: u32 = 2;

/// The configuration file that options name (`ConfigPath`).
#[must_use]
pub fn config_path(options: Option<&Any>) -> Option<PathBuf> {
    let options = options.filter(|options| TYPES.contains(&options.type_url.as_str()))?;
    let mut fields = CodedInputStream::from_bytes(&options.value);
    let mut path = None;
    while let Ok(Some(tag)) = fields.read_raw_tag_or_eof() {
        let (number, wire_type) = (tag >> 3, WireType::new(tag & 7)?);
        if number == CONFIG_PATH && wire_type == WireType::LengthDelimited {
            path = fields.read_string().ok();
        } else {
            fields.skip_field(wire_type).ok()?;
        }
    }
    path.filter(|path| !path.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_is_found_among_the_options() {
        // 1: "x", 2: "/etc/k.toml", 3: bytes
        let value = b"\x0a\x01x\x12\x0b/etc/k.toml\x1a\x02ab".to_vec();
        let any = |type_url: &str, value: Vec<u8>| Some(Any { type_url: type_url.into(), value, ..Default::default() });
        for name in TYPES {
            assert_eq!(config_path(any(name, value.clone()).as_ref()), Some("/etc/k.toml".into()));
        }
        assert_eq!(config_path(any("containerd.runc.v1.Options", value).as_ref()), None);
        assert_eq!(config_path(any(TYPES[0], b"\x12\xff".to_vec()).as_ref()), None);
        assert_eq!(config_path(None), None);
    }
}
