//! What a pod's sandbox is to be, from what the CRI plugin says of it (`runtime.v1.PodSandboxConfig`): a configuration
//! as a container's, without a process.
//!
//! Of that message a few fields matter here. They are looked up by their numbers: the rest of CRI's definitions, several
//! thousand lines, would be for nothing.

use std::collections::HashMap;

use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use oci_spec::runtime::Spec;
use protobuf::well_known_types::empty::Empty;
use protobuf::{Message as _, UnknownFields, UnknownValueRef};
use serde_json::{Value, json};

use super::shared::{Dns, Shared};

/// The message's type, in `CreateSandboxRequest.options`.
const TYPE: &str = "runtime.v1.PodSandboxConfig";
// Numbers of fields in k8s.io/cri-api, pkg/apis/runtime/v1/api.proto.
const HOSTNAME: u32 = 2;
const DNS: u32 = 4;
const DNS_SERVERS: u32 = 1;
const DNS_SEARCHES: u32 = 2;
const DNS_OPTIONS: u32 = 3;
const LINUX: u32 = 8;
const LINUX_CGROUP_PARENT: u32 = 1;
const LINUX_SECURITY_CONTEXT: u32 = 2;
const LINUX_SYSCTLS: u32 = 3;
const LINUX_RESOURCES: u32 = 5;
const SECURITY_NAMESPACE_OPTIONS: u32 = 1;
const NAMESPACE_NETWORK: u32 = 1;
const RESOURCES_CPU_PERIOD: u32 = 1;
const RESOURCES_CPU_QUOTA: u32 = 2;
const RESOURCES_CPU_SHARES: u32 = 3;
const RESOURCES_MEMORY_LIMIT: u32 = 4;
// Of an entry of a map (Protocol Buffers, "Encoding").
const MAP_KEY: u32 = 1;
const MAP_VALUE: u32 = 2;
/// `NamespaceMode.NODE`
const NODE: u64 = 2;

/// Why there can be no such sandbox.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The options cannot be read.
    #[error("the sandbox' options: {0}")]
    Options(#[from] protobuf::Error),
    /// The host's network.
    #[error("hostNetwork: the host's network cannot be shared with a guest that has a kernel of its own")]
    HostNetwork,
    /// It has a root file system.
    #[error("the sandbox has a root file system, which nothing in it could use: leave it out")]
    Rootfs,
    /// What was made of it is no configuration.
    #[error("the sandbox' configuration: {0}")]
    Spec(#[from] serde_json::Error),
}

/// What a sandbox is to be.
#[derive(Debug)]
pub struct SandboxConfig {
    /// As of a container without a process.
    pub spec: Spec,
    /// systemd makes its control group.
    pub systemd_cgroup: bool,
    /// What its containers get from it.
    pub shared: Shared,
}

/// Reads what was asked for.
///
/// # Errors
/// Any [`ConfigError`].
pub fn read(request: &CreateSandboxRequest) -> Result<SandboxConfig, ConfigError> {
    if !request.rootfs.is_empty() {
        return Err(ConfigError::Rootfs);
    }
    let options = request.options.as_ref().filter(|options| options.type_url.ends_with(TYPE));
    let config = Fields::of(options.map(|options| options.value.as_slice()))?;
    let linux = config.message(LINUX)?;
    let security = linux.message(LINUX_SECURITY_CONTEXT)?;
    if security.message(SECURITY_NAMESPACE_OPTIONS)?.number(NAMESPACE_NETWORK) == Some(NODE) {
        return Err(ConfigError::HostNetwork);
    }
    let mut network = json!({ "type": "network" });
    if !request.netns_path.is_empty() {
        network["path"] = request.netns_path.clone().into();
    }
    let mut spec = json!({
        "ociVersion": "1.2.0",
        "root": { "path": "" },
        "annotations": request.annotations.iter().collect::<HashMap<_, _>>(),
        "linux": {
            "namespaces": [network, { "type": "ipc" }, { "type": "uts" }, { "type": "pid" }],
            "resources": resources(&linux.message(LINUX_RESOURCES)?),
            "sysctl": linux.map(LINUX_SYSCTLS)?,
        },
    });
    let hostname = config.text(HOSTNAME).filter(|hostname| !hostname.is_empty());
    if let Some(hostname) = &hostname {
        spec["hostname"] = hostname.clone().into();
    }
    let dns = config.message(DNS)?;
    let dns =
        Dns { servers: dns.texts(DNS_SERVERS), searches: dns.texts(DNS_SEARCHES), options: dns.texts(DNS_OPTIONS) };
    let shared = Shared { hostname, dns };
    let parent = linux.text(LINUX_CGROUP_PARENT).filter(|parent| !parent.is_empty());
    let slice = parent.as_deref().and_then(|parent| parent.rsplit('/').next()).filter(|name| name.ends_with(".slice"));
    // As the CRI plugin has those of the containers.
    let path = match (&parent, slice) {
        (_, Some(slice)) => Some(format!("{slice}:cri-containerd:{}", request.sandbox_id)),
        (Some(parent), None) => Some(format!("{}/{}", parent.trim_end_matches('/'), request.sandbox_id)),
        (None, None) => None,
    };
    if let Some(path) = path {
        spec["linux"]["cgroupsPath"] = path.into();
    }
    Ok(SandboxConfig { spec: serde_json::from_value(spec)?, systemd_cgroup: slice.is_some(), shared })
}

/// The limits of the whole pod.
fn resources(said: &Fields) -> Value {
    let number = |field| said.number(field).filter(|number| *number > 0).map(u64::cast_signed);
    let mut resources = json!({});
    if let Some(limit) = number(RESOURCES_MEMORY_LIMIT) {
        resources["memory"] = json!({ "limit": limit });
    }
    for (name, field) in
        [("period", RESOURCES_CPU_PERIOD), ("quota", RESOURCES_CPU_QUOTA), ("shares", RESOURCES_CPU_SHARES)]
    {
        if let Some(number) = number(field) {
            resources["cpu"][name] = number.into();
        }
    }
    resources
}

/// A message by the numbers of its fields.
struct Fields(UnknownFields);

impl Fields {
    fn of(bytes: Option<&[u8]>) -> protobuf::Result<Self> {
        let message = Empty::parse_from_bytes(bytes.unwrap_or_default())?;
        Ok(Self(message.special_fields.unknown_fields().clone()))
    }

    fn message(&self, field: u32) -> protobuf::Result<Self> {
        Self::of(self.bytes(field))
    }

    fn bytes(&self, field: u32) -> Option<&[u8]> {
        match self.0.get(field) {
            Some(UnknownValueRef::LengthDelimited(bytes)) => Some(bytes),
            _ => None,
        }
    }

    fn text(&self, field: u32) -> Option<String> {
        self.bytes(field).map(text_of)
    }

    /// Of a field that may be there several times.
    fn all(&self, field: u32) -> impl Iterator<Item = &[u8]> {
        self.0.iter().filter_map(move |found| match found {
            (number, UnknownValueRef::LengthDelimited(bytes)) if number == field => Some(bytes),
            _ => None,
        })
    }

    fn texts(&self, field: u32) -> Vec<String> {
        self.all(field).map(text_of).collect()
    }

    fn map(&self, field: u32) -> protobuf::Result<HashMap<String, String>> {
        let entries = self.all(field).map(|entry| {
            let entry = Self::of(Some(entry))?;
            Ok((entry.text(MAP_KEY).unwrap_or_default(), entry.text(MAP_VALUE).unwrap_or_default()))
        });
        entries.collect()
    }

    fn number(&self, field: u32) -> Option<u64> {
        match self.0.get(field) {
            Some(UnknownValueRef::Varint(number)) => Some(number),
            _ => None,
        }
    }
}

fn text_of(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use protobuf::MessageField;
    use protobuf::well_known_types::any::Any;

    use super::*;

    /// A field that has bytes.
    fn bytes(number: u8, value: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(value.len()).unwrap()], value].concat()
    }

    fn request(config: Vec<u8>) -> CreateSandboxRequest {
        let options = Any { type_url: TYPE.into(), value: config, ..Default::default() };
        CreateSandboxRequest {
            sandbox_id: "pod".into(),
            options: MessageField::some(options),
            annotations: HashMap::from([("a".into(), "b".into())]),
            ..Default::default()
        }
    }

    fn spec(request: &CreateSandboxRequest) -> Value {
        serde_json::to_value(read(request).unwrap().spec).unwrap()
    }

    #[test]
    fn a_pod_is_read_as_a_configuration() {
        // 100000, 50000 and 256 MiB.
        let resources =
            [&[1 << 3, 0xa0, 0x8d, 6, 2 << 3, 0xd0, 0x86, 3, 4 << 3][..], &[0x80, 0x80, 0x80, 0x80, 1]].concat();
        let linux = [bytes(1, b"/kubepods/burstable"), bytes(5, &resources)].concat();
        let mut request = request([bytes(2, b"web"), bytes(8, &linux)].concat());
        request.netns_path = "/run/netns/x".into();
        let spec = spec(&request);
        assert_eq!(spec["hostname"], "web");
        assert_eq!(spec["annotations"], json!({"a": "b"}));
        assert_eq!(spec["linux"]["namespaces"][0], json!({"type": "network", "path": "/run/netns/x"}));
        assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/burstable/pod");
        assert_eq!(spec["linux"]["resources"]["memory"]["limit"], 256 << 20);
        assert_eq!(spec["linux"]["resources"]["cpu"]["quota"], 50_000);
        assert_eq!(spec["linux"]["resources"]["cpu"]["period"], 100_000);
    }

    #[test]
    fn systemds_groups_are_told_by_the_slice() {
        let linux = bytes(1, b"/kubepods.slice/kubepods-pod1.slice");
        let config = read(&request(bytes(8, &linux))).unwrap();
        assert!(config.systemd_cgroup);
        let spec = serde_json::to_value(config.spec).unwrap();
        assert_eq!(spec["linux"]["cgroupsPath"], "kubepods-pod1.slice:cri-containerd:pod");
    }

    #[test]
    fn what_containers_get_is_read() {
        let dns = [bytes(1, b"10.0.0.1"), bytes(1, b"::1"), bytes(2, b"a"), bytes(3, b"ndots:5")].concat();
        let linux = bytes(3, &[bytes(1, b"net.core.somaxconn"), bytes(2, b"7")].concat());
        let config = read(&request([bytes(2, b"web"), bytes(4, &dns), bytes(8, &linux)].concat())).unwrap();
        let shared = config.shared;
        assert_eq!(shared.hostname.as_deref(), Some("web"));
        assert_eq!(shared.dns.servers, ["10.0.0.1", "::1"]);
        assert_eq!((shared.dns.searches, shared.dns.options), (vec!["a".to_owned()], vec!["ndots:5".to_owned()]));
        let spec = serde_json::to_value(config.spec).unwrap();
        assert_eq!(spec["linux"]["sysctl"], json!({ "net.core.somaxconn": "7" }));
    }

    #[test]
    fn without_options_the_defaults_hold() {
        let request = CreateSandboxRequest { sandbox_id: "pod".into(), ..Default::default() };
        let spec = spec(&request);
        assert_eq!(spec["linux"]["namespaces"][0], json!({"type": "network"}));
        assert!(spec["linux"]["cgroupsPath"].is_null() && spec["hostname"].is_null());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let linux = bytes(2, &bytes(1, &[1 << 3, 2]));
        assert!(matches!(read(&request(bytes(8, &linux))), Err(ConfigError::HostNetwork)));
        assert!(matches!(read(&request(vec![0xff])), Err(ConfigError::Options(_))));
        let mut rootfs = request(Vec::new());
        rootfs.rootfs.push(Default::default());
        assert!(matches!(read(&rootfs), Err(ConfigError::Rootfs)));
    }
}
