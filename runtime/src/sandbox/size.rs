//! How large a sandbox is: guest RAM and vCPUs from what the container may use (`docs/architecture.md`, "Size").

use std::fmt;
use std::str::FromStr;

use oci_spec::runtime::Spec;

use crate::cri::sandbox_resources;
use crate::settings::Settings;

const MIB: u64 = 1 << 20;

/// Guest RAM in MiB where neither the bundle nor the command line says how much.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// The least guest RAM in MiB with which kernel, agent and a small container work.
pub const MINIMUM_MEMORY_MIB: u32 = 96;
/// Guest RAM in MiB for the kernel, the agent and the initramfs, which no container can use.
pub const GUEST_OVERHEAD_MIB: u64 = 80;
/// One part in so many of the guest's RAM describes the rest (`struct page`: 64 bytes per 4 KiB).
pub const PAGE_TABLE_SHARE: u64 = 64;
/// vCPUs where neither the bundle nor the command line says how many.
pub const DEFAULT_VCPUS: u8 = 1;
/// The most vCPUs of a microVM.
pub const MAXIMUM_VCPUS: u8 = 32;

/// Why a sandbox cannot have the size that was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not enough to boot.
    #[error("memory too small: {0} MiB, at least {MINIMUM_MEMORY_MIB} MiB are needed")]
    TooSmall(u64),
    /// More than a microVM can have.
    #[error("memory too large: {0} MiB")]
    TooLarge(u64),
    /// No vCPU, or too many.
    #[error("{0} CPUs: it must be 1 to {MAXIMUM_VCPUS}")]
    Cpus(u32),
}

/// An amount of memory as a person writes it: `512` and `512M` are MiB, `1G` is GiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    mib: u64,
}

/// Why a text is no amount of memory.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write MiB as 512 or 512M, GiB as 1G")]
pub struct MemorySizeError;

impl FromStr for MemorySize {
    type Err = MemorySizeError;

    fn from_str(text: &str) -> Result<Self, MemorySizeError> {
        let text = text.trim();
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (digits, unit) = text.split_at(end);
        let number: u64 = digits.parse().map_err(|_| MemorySizeError)?;
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mb" | "mib" => 1,
            "g" | "gb" | "gib" => 1024,
            "t" | "tb" | "tib" => 1024 * 1024,
            _ => return Err(MemorySizeError),
        };
        number.checked_mul(factor).map(|mib| Self { mib }).ok_or(MemorySizeError)
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}M", self.mib)
    }
}

/// What is said about the size beside the bundle.
#[derive(Clone, Copy, Debug, Default)]
pub struct SizeOptions {
    /// Memory, whatever the bundle's limit is.
    pub memory: Option<MemorySize>,
    /// vCPUs, whatever the bundle's limit is.
    pub cpus: Option<u32>,
    /// Memory without a limit.
    pub default_memory: Option<MemorySize>,
    /// vCPUs without a limit.
    pub default_cpus: Option<u32>,
}

impl SizeOptions {
    /// The same, where it says nothing with what the settings say.
    #[must_use]
    pub fn or(self, settings: &Settings) -> Self {
        let (memory, cpus) = (settings.memory(), settings.cpus());
        Self {
            memory: self.memory.or(memory.by_container),
            cpus: self.cpus.or(cpus.by_container),
            default_memory: self.default_memory.or(memory.otherwise),
            default_cpus: self.default_cpus.or(cpus.otherwise),
        }
    }
}

/// The size of a sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Guest RAM in MiB.
    pub memory_mib: u32,
    /// vCPUs.
    pub vcpus: u8,
}

impl Size {
    /// From the bundle's limits, and what is said beside it.
    ///
    /// # Errors
    /// Any [`SizeError`].
    pub fn plan(spec: &Spec, options: SizeOptions) -> Result<Self, SizeError> {
        let limit = memory_limit(spec);
        let memory = options.memory.or(options.default_memory.filter(|_| limit.is_none()));
        let mib = memory.map_or_else(|| memory_for(limit), |size| size.mib);
        if mib < MINIMUM_MEMORY_MIB.into() {
            return Err(SizeError::TooSmall(mib));
        }
        let memory_mib = u32::try_from(mib).map_err(|_| SizeError::TooLarge(mib))?;
        let limit = cpu_limit(spec);
        let cpus = options.cpus.or(options.default_cpus.filter(|_| limit.is_none()));
        let vcpus = match cpus {
            Some(count) => u8::try_from(count).ok().filter(|count| (1..=MAXIMUM_VCPUS).contains(count)),
            None => Some(vcpus_for(limit)),
        };
        let vcpus = vcpus.ok_or(SizeError::Cpus(cpus.unwrap_or_default()))?;
        Ok(Self { memory_mib, vcpus })
    }
}

/// The memory limit in bytes of the container, or of its pod.
pub fn memory_limit(spec: &Spec) -> Option<u64> {
    let memory = sandbox_resources(spec)?.memory().as_ref()?.limit()?;
    // 0 and -1 mean that there is none.
    u64::try_from(memory).ok().filter(|limit| *limit > 0)
}

/// So much RAM that the container's own limit bites before the guest runs dry.
fn memory_for(limit: Option<u64>) -> u64 {
    let Some(limit) = limit else { return DEFAULT_MEMORY_MIB.into() };
    let limit = limit.div_ceil(MIB);
    let pages = limit.div_ceil(PAGE_TABLE_SHARE - 1);
    limit.saturating_add(pages).saturating_add(GUEST_OVERHEAD_MIB).max(MINIMUM_MEMORY_MIB.into())
}

/// The CPU time of the container, or of its pod, in quota and period, microseconds.
fn cpu_limit(spec: &Spec) -> Option<(u64, u64)> {
    let resources = sandbox_resources(spec)?;
    let cpu = resources.cpu().as_ref()?;
    let quota = u64::try_from(cpu.quota()?).ok().filter(|quota| *quota > 0)?;
    // The kernel's default period.
    Some((quota, cpu.period().filter(|period| *period > 0).unwrap_or(100_000)))
}

fn vcpus_for(limit: Option<(u64, u64)>) -> u8 {
    let Some((quota, period)) = limit else { return DEFAULT_VCPUS };
    u8::try_from(quota.div_ceil(period)).unwrap_or(MAXIMUM_VCPUS).clamp(1, MAXIMUM_VCPUS)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn spec(resources: Value) -> Spec {
        serde_json::from_value(json!({ "ociVersion": "1.2.0", "linux": { "resources": resources } })).unwrap()
    }

    fn plan(resources: Value) -> Size {
        Size::plan(&spec(resources), SizeOptions::default()).unwrap()
    }

    #[test]
    fn memory_sizes_are_read_as_people_write_them() {
        for (text, mib) in
            [("512", 512), ("512M", 512), ("512MiB", 512), (" 1G ", 1024), ("2gb", 2048), ("1T", 1 << 20)]
        {
            assert_eq!(text.parse(), Ok(MemorySize { mib }), "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "512K", "1x", "99999999999999999999", "18446744073709551615G"] {
            assert_eq!(text.parse::<MemorySize>(), Err(MemorySizeError), "{text}");
        }
    }

    fn options(memory: Option<MemorySize>, cpus: Option<u32>) -> SizeOptions {
        SizeOptions { memory, cpus, ..Default::default() }
    }

    #[test]
    fn other_defaults_hold_where_there_are_no_limits() {
        let options = SizeOptions { default_memory: "1G".parse().ok(), default_cpus: Some(3), ..Default::default() };
        let planned = |resources| Size::plan(&spec(resources), options).unwrap();
        assert_eq!(planned(json!({})), Size { memory_mib: 1024, vcpus: 3 });
        let limits = json!({ "memory": { "limit": 256 << 20 }, "cpu": { "quota": 200_000, "period": 100_000 } });
        assert_eq!(planned(limits.clone()), plan(limits));
    }

    #[test]
    fn without_limits_there_are_defaults() {
        assert_eq!(plan(json!({})), Size { memory_mib: 512, vcpus: 1 });
        assert_eq!(plan(json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1, "period": 100 } })).memory_mib, 512);
    }

    #[test]
    fn the_guest_is_larger_than_the_containers_limit() {
        assert_eq!(plan(json!({ "memory": { "limit": 1 << 30 } })).memory_mib, 1024 + 17 + 80);
        assert_eq!(plan(json!({ "memory": { "limit": 1 } })).memory_mib, MINIMUM_MEMORY_MIB);
    }

    #[test]
    fn fractions_of_cpus_are_rounded_up() {
        for (quota, period, vcpus) in
            [(50_000, 100_000, 1), (100_000, 100_000, 1), (250_000, 100_000, 3), (1_u64 << 40, 1_u64, 32)]
        {
            assert_eq!(plan(json!({ "cpu": { "quota": quota, "period": period } })).vcpus, vcpus, "{quota}");
        }
        assert_eq!(plan(json!({ "cpu": { "quota": 200_000 } })).vcpus, 2);
    }

    #[test]
    fn the_command_line_overrules_and_is_checked() {
        let spec = spec(json!({ "memory": { "limit": 1 << 30 } }));
        let memory = |text: &str| Some(text.parse().unwrap());
        assert_eq!(Size::plan(&spec, options(memory("200M"), Some(4))), Ok(Size { memory_mib: 200, vcpus: 4 }));
        assert_eq!(Size::plan(&spec, options(memory("10"), None)), Err(SizeError::TooSmall(10)));
        assert!(matches!(Size::plan(&spec, options(memory("9999999T"), None)), Err(SizeError::TooLarge(_))));
        for cpus in [0, 33, 256, 257] {
            assert_eq!(Size::plan(&spec, options(None, Some(cpus))), Err(SizeError::Cpus(cpus)));
        }
    }
}
