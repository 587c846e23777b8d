//! How large a sandbox is: guest RAM and vCPUs from what the container may use (`docs/architecture.md`, "Size").

use std::fmt;
use std::str::FromStr;

use oci_spec::runtime::{LinuxResources, Spec};

use crate::cri::sandbox_resources;
use crate::settings::Settings;

/// Bytes.
pub const MIB: u64 = 1 << 20;

/// Guest RAM in MiB where neither the bundle nor the command line says how much.
pub const DEFAULT_MEMORY_MIB: u32 = 512;
/// The least guest RAM in MiB with which kernel, agent and a small container work.
pub const MINIMUM_MEMORY_MIB: u32 = 96;
/// Guest RAM in MiB for the kernel, the agent and the initramfs, which no container can use.
pub const GUEST_OVERHEAD_MIB: u64 = 80;
/// One part in so many of the guest's RAM describes the rest (`struct page`: 64 bytes per 4 KiB).
pub const PAGE_TABLE_SHARE: u64 = 64;
/// The size of a huge page.
const HUGE_PAGE_MIB: u64 = 2;
/// vCPUs where neither the bundle nor the command line says how many.
pub const DEFAULT_VCPUS: u8 = 1;
/// What a sandbox may grow to in vCPUs, if its host has as many and it does not begin with more than half of them. Each that
/// there may be costs a guest 180 KiB; 32 of them make its boot a third longer.
const USUAL_MOST_VCPUS: u8 = 8;
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
    /// Memory is of huge pages of 2 MiB.
    pub huge_pages: bool,
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
            huge_pages: self.huge_pages || settings.huge_pages(),
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
        let limits = sandbox_resources(spec).map(|resources| Limits::of(&resources)).unwrap_or_default();
        let limit = limits.memory;
        let memory = options.memory.or(options.default_memory.filter(|_| limit.is_none()));
        let mib = memory.map_or_else(|| memory_for(limit), |size| size.mib);
        if mib < MINIMUM_MEMORY_MIB.into() {
            return Err(SizeError::TooSmall(mib));
        }
        let unit = if options.huge_pages { HUGE_PAGE_MIB } else { 1 };
        let whole = mib.checked_next_multiple_of(unit).and_then(|mib| u32::try_from(mib).ok());
        let memory_mib = whole.ok_or(SizeError::TooLarge(mib))?;
        let limit = limits.cpu;
        let cpus = options.cpus.or(options.default_cpus.filter(|_| limit.is_none()));
        let vcpus = match cpus {
            Some(count) => u8::try_from(count).ok().filter(|count| (1..=MAXIMUM_VCPUS).contains(count)),
            None => Some(vcpus_for(limit)),
        };
        let vcpus = vcpus.ok_or(SizeError::Cpus(cpus.unwrap_or_default()))?;
        Ok(Self { memory_mib, vcpus })
    }

    /// For several containers at once. One without a limit may use what there is: nothing is taken away from it.
    #[must_use]
    pub fn for_all(containers: impl Iterator<Item = Limits>, current: Self) -> Self {
        let (mut bytes, mut thousandths) = (0_u64, 0_u64);
        let mut floor = Self { memory_mib: 0, vcpus: 0 };
        for Limits { memory, cpu } in containers {
            match memory {
                Some(memory) => bytes = bytes.saturating_add(memory),
                None => floor.memory_mib = current.memory_mib,
            }
            match cpu {
                Some((quota, period)) => {
                    thousandths = thousandths.saturating_add(quota.saturating_mul(1000) / period.max(1));
                }
                None => floor.vcpus = current.vcpus,
            }
        }
        let memory_mib = u32::try_from(memory_for(Some(bytes))).unwrap_or(u32::MAX);
        Self { memory_mib, vcpus: vcpus_for(Some((thousandths, 1000))) }.larger(floor)
    }

    /// As much of each as either has.
    #[must_use]
    pub fn larger(self, other: Self) -> Self {
        Self { memory_mib: self.memory_mib.max(other.memory_mib), vcpus: self.vcpus.max(other.vcpus) }
    }

    /// As much of each as both have.
    #[must_use]
    pub fn smaller(self, other: Self) -> Self {
        Self { memory_mib: self.memory_mib.min(other.memory_mib), vcpus: self.vcpus.min(other.vcpus) }
    }

    /// What the host has: all of its memory, and the CPUs that this process may run on.
    fn of_host() -> Self {
        let system = rustix::system::sysinfo();
        let mib = system.totalram.saturating_mul(system.mem_unit.into()) / MIB;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { memory_mib: u32::try_from(mib).unwrap_or(u32::MAX), vcpus: u8::try_from(cpus).unwrap_or(u8::MAX) }
    }

    /// What a sandbox may grow to from this: all that its host has, unless somebody said beside the bundle how much it is
    /// to be.
    #[must_use]
    pub fn most(self, options: SizeOptions) -> Self {
        let Self { memory_mib, vcpus } = Self::of_host();
        let memory_mib = if options.memory.is_some() { self.memory_mib } else { memory_mib };
        let most = USUAL_MOST_VCPUS.max(self.vcpus.saturating_mul(2)).min(MAXIMUM_VCPUS);
        let vcpus = if options.cpus.is_some() { self.vcpus } else { vcpus.min(most) };
        Self { memory_mib, vcpus }.larger(self)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} MiB of memory and {} CPUs", self.memory_mib, self.vcpus)
    }
}

/// What of a container's limits, or of its pod's, the size of a sandbox depends on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of memory.
    pub memory: Option<u64>,
    /// CPU time: quota and period, microseconds.
    pub cpu: Option<(u64, u64)>,
}

impl Limits {
    /// Those of `resources`.
    #[must_use]
    pub fn of(resources: &LinuxResources) -> Self {
        Self::default().updated(resources)
    }

    /// These, where `resources` says nothing else.
    #[must_use]
    pub fn updated(mut self, resources: &LinuxResources) -> Self {
        // 0 and -1 mean that there is none.
        let limit = |number: i64| u64::try_from(number).ok().filter(|limit| *limit > 0);
        if let Some(memory) = resources.memory().as_ref().and_then(|memory| memory.limit()) {
            self.memory = limit(memory);
        }
        if let Some(cpu) = resources.cpu() {
            let period = cpu.period().filter(|period| *period > 0).or(self.cpu.map(|(_, period)| period));
            let quota = match cpu.quota() {
                Some(quota) => limit(quota),
                None => self.cpu.map(|(quota, _)| quota),
            };
            self.cpu = quota.map(|quota| (quota, period.unwrap_or(DEFAULT_PERIOD)));
        }
        self
    }
}

/// The kernel's default period of CPU time, microseconds.
const DEFAULT_PERIOD: u64 = 100_000;

/// The memory limit in bytes of the container, or of its pod.
pub fn memory_limit(spec: &Spec) -> Option<u64> {
    Limits::of(&*sandbox_resources(spec)?).memory
}

/// So much RAM that the container's own limit bites before the guest runs dry.
fn memory_for(limit: Option<u64>) -> u64 {
    let Some(limit) = limit else { return DEFAULT_MEMORY_MIB.into() };
    let limit = limit.div_ceil(MIB);
    let pages = limit.div_ceil(PAGE_TABLE_SHARE - 1);
    limit.saturating_add(pages).saturating_add(GUEST_OVERHEAD_MIB).max(MINIMUM_MEMORY_MIB.into())
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
    fn huge_pages_are_whole() {
        let options = SizeOptions { huge_pages: true, memory: "301M".parse().ok(), ..Default::default() };
        assert_eq!(Size::plan(&spec(json!({})), options).unwrap().memory_mib, 302);
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
    fn what_was_said_beside_the_bundle_stays() {
        let size = Size { memory_mib: 300, vcpus: 1 };
        let host = Size::of_host();
        let memory = Some("300M".parse().unwrap());
        let most = |memory, cpus| size.most(options(memory, cpus));
        assert_eq!(most(None, None), Size { vcpus: host.vcpus.min(8), ..host }.larger(size));
        assert_eq!(most(memory, None).memory_mib, 300);
        assert_eq!(most(memory, Some(1)), size);
        let large = Size { memory_mib: u32::MAX, vcpus: 32 };
        assert_eq!(large.most(SizeOptions::default()), large);
    }

    #[test]
    fn updates_change_what_they_name() {
        let resources = |json| serde_json::from_value::<LinuxResources>(json).unwrap();
        let limits = Limits::of(&resources(json!({ "memory": { "limit": 7 }, "cpu": { "quota": 5, "period": 9 } })));
        assert_eq!(limits, Limits { memory: Some(7), cpu: Some((5, 9)) });
        let updates = [
            (json!({}), limits),
            (json!({ "memory": { "reservation": 1 }, "cpu": { "shares": 2 } }), limits),
            (json!({ "cpu": { "quota": 6 } }), Limits { cpu: Some((6, 9)), ..limits }),
            (json!({ "cpu": { "period": 6 } }), Limits { cpu: Some((5, 6)), ..limits }),
            (json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 } }), Limits::default()),
        ];
        for (update, expected) in updates {
            assert_eq!(limits.updated(&resources(update.clone())), expected, "{update}");
        }
    }

    #[test]
    fn several_containers_need_the_sum() {
        let current = Size { memory_mib: 700, vcpus: 2 };
        let limits = |mib: u64, quota| Limits { memory: Some(mib << 20), cpu: Some((quota, 100_000)) };
        let sum = |all: &[Limits]| Size::for_all(all.iter().copied(), current);
        assert_eq!(sum(&[]), Size { memory_mib: MINIMUM_MEMORY_MIB, vcpus: 1 });
        let both = [limits(500, 150_000), limits(524, 160_000)];
        assert_eq!(sum(&both), Size { memory_mib: 1024 + 17 + 80, vcpus: 4 });
        let unlimited = Limits { cpu: None, ..limits(500, 0) };
        assert_eq!(sum(&[unlimited, limits(524, 90_000)]), Size { memory_mib: 1024 + 17 + 80, vcpus: 2 });
        assert_eq!(sum(&[Limits::default(), limits(1024, 900_000)]), Size { memory_mib: 1024 + 17 + 80, vcpus: 9 });
        assert_eq!(sum(&[Limits::default()]), current);
        assert_eq!(sum(&[limits(u64::MAX >> 20, u64::MAX)]), Size { memory_mib: u32::MAX, vcpus: 32 });
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
