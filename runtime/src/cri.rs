//! What containerd's CRI plugin says about a pod, in annotations of its containers.

use std::borrow::Cow;

use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources, Spec};

/// `sandbox` for the first container of a pod, `container` for the others.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// The least share of CPU time that the kernel knows. The kubelet gives it to what has asked for none.
const LEAST_SHARES: u64 = 2;

/// The sum of what a pod's containers may use, as the first container's annotations have it (the kubelet tells it since
/// Kubernetes 1.23).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sum {
    CpuQuota,
    CpuPeriod,
    CpuShares,
    Memory,
}

impl Sum {
    const fn annotation(self) -> &'static str {
        match self {
            Self::CpuQuota => "io.kubernetes.cri.sandbox-cpu-quota",
            Self::CpuPeriod => "io.kubernetes.cri.sandbox-cpu-period",
            Self::CpuShares => "io.kubernetes.cri.sandbox-cpu-shares",
            Self::Memory => "io.kubernetes.cri.sandbox-memory",
        }
    }

    /// Nothing where there is no limit: then the annotation is missing or 0.
    fn of<N: std::str::FromStr + PartialOrd + Default>(self, spec: &Spec) -> Option<N> {
        let text = spec.annotations().as_ref()?.get(self.annotation())?;
        text.parse().ok().filter(|number| *number > N::default())
    }
}

/// Whether this is the first container of a pod, which only holds it together.
#[must_use]
pub fn is_sandbox(spec: &Spec) -> bool {
    let annotations = spec.annotations().as_ref();
    annotations.and_then(|annotations| annotations.get(CONTAINER_TYPE)).is_some_and(|kind| kind == "sandbox")
}

/// What the sandbox of a container may use: of a pod the sum of all its containers', as the first one's own limits say
/// nothing about the others; of any other container its own.
#[must_use]
pub fn sandbox_resources(spec: &Spec) -> Option<Cow<'_, LinuxResources>> {
    if !is_sandbox(spec) {
        return spec.linux().as_ref()?.resources().as_ref().map(Cow::Borrowed);
    }
    let (mut resources, mut cpu, mut memory) = (LinuxResources::default(), LinuxCpu::default(), LinuxMemory::default());
    let shares = Sum::CpuShares.of(spec).filter(|shares| *shares > LEAST_SHARES);
    cpu.set_quota(Sum::CpuQuota.of(spec)).set_period(Sum::CpuPeriod.of(spec)).set_shares(shares);
    memory.set_limit(Sum::Memory.of(spec));
    resources.set_cpu(Some(cpu)).set_memory(Some(memory));
    Some(Cow::Owned(resources))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn resources(annotations: Value) -> Option<LinuxResources> {
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.2.0", "annotations": annotations,
            "linux": { "resources": { "cpu": { "shares": 2 }, "memory": { "limit": 7 } } },
        }))
        .unwrap();
        sandbox_resources(&spec).map(Cow::into_owned)
    }

    fn from(json: Value) -> Option<LinuxResources> {
        Some(serde_json::from_value(json).unwrap())
    }

    #[test]
    fn a_pods_size_is_that_of_all_its_containers() {
        let pod = resources(json!({
            CONTAINER_TYPE: "sandbox", "io.kubernetes.cri.sandbox-memory": "1048576",
            "io.kubernetes.cri.sandbox-cpu-quota": "150000", "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-shares": "1536",
        }));
        let cpu = json!({ "quota": 150_000, "period": 100_000, "shares": 1536 });
        assert_eq!(pod, from(json!({ "cpu": cpu, "memory": { "limit": 1 << 20 } })));
    }

    #[test]
    fn a_pod_without_limits_is_not_held_to_its_first_containers() {
        let none = from(json!({ "cpu": {}, "memory": {} }));
        assert_eq!(resources(json!({ CONTAINER_TYPE: "sandbox" })), none);
        let zeros = json!({
            CONTAINER_TYPE: "sandbox", "io.kubernetes.cri.sandbox-memory": "0",
            "io.kubernetes.cri.sandbox-cpu-quota": "-1", "io.kubernetes.cri.sandbox-cpu-shares": "2",
        });
        assert_eq!(resources(zeros), none);
    }

    #[test]
    fn other_containers_have_their_own() {
        let own = from(json!({ "cpu": { "shares": 2 }, "memory": { "limit": 7 } }));
        let sum = json!({ CONTAINER_TYPE: "container", "io.kubernetes.cri.sandbox-memory": "1048576" });
        assert_eq!(resources(sum), own);
        assert_eq!(resources(json!({})), own);
    }
}
