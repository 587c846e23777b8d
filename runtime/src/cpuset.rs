//! The host's CPUs and memory nodes that containers are held to.

use std::path::Path;
use std::{fs, io};

use oci_spec::runtime::{LinuxCpu, LinuxResources};

/// The root of cgroup v2.
const ROOT: &str = "/sys/fs/cgroup";

/// Lists of CPUs and of memory nodes, as `linux.resources.cpu` and cpuset(7) have them: `0-2,7`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cpuset {
    cpus: Option<String>,
    mems: Option<String>,
}

impl Cpuset {
    /// That of `resources`.
    #[must_use]
    pub fn of(resources: &LinuxResources) -> Self {
        Self::take(&mut resources.clone())
    }

    /// Takes it out of `resources`.
    pub fn take(resources: &mut LinuxResources) -> Self {
        let Some(cpu) = resources.cpu_mut() else { return Self::default() };
        let given = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
        let taken = Self { cpus: given(cpu.cpus()), mems: given(cpu.mems()) };
        cpu.set_cpus(None).set_mems(None);
        taken
    }

    /// Whether it leaves all to the host.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// This one, where `change` names nothing else.
    #[must_use]
    pub fn updated(self, change: Self) -> Self {
        Self { cpus: change.cpus.or(self.cpus), mems: change.mems.or(self.mems) }
    }

    /// What any of them names. Lists may overlap.
    #[must_use]
    pub fn union(all: impl Iterator<Item = Self>) -> Self {
        let joined = |one: Option<String>, other: Option<String>| match (one, other) {
            (Some(one), Some(other)) => Some(format!("{one},{other}")),
            (one, other) => one.or(other),
        };
        all.fold(Self::default(), |union, set| Self {
            cpus: joined(union.cpus, set.cpus),
            mems: joined(union.mems, set.mems),
        })
    }

    /// All that the host has (`cpuset.cpus.effective` and `cpuset.mems.effective` of its root).
    ///
    /// # Errors
    /// Without cgroup v2.
    pub fn of_host() -> io::Result<Self> {
        let list = |name: &str| Ok::<_, io::Error>(fs::read_to_string(Path::new(ROOT).join(name))?.trim().to_owned());
        Ok(Self { cpus: Some(list("cpuset.cpus.effective")?), mems: Some(list("cpuset.mems.effective")?) })
    }

    /// As limits of a control group that has been held to `before`: a list that is not named any more becomes that of `all`,
    /// as a group with processes takes no empty one.
    #[must_use]
    pub fn instead_of(&self, before: &Self, all: &Self) -> LinuxResources {
        let (mut resources, mut cpu) = (LinuxResources::default(), LinuxCpu::default());
        let list = |now: &Option<String>, before: &Option<String>, all: &Option<String>| {
            now.clone().or_else(|| before.as_ref().and(all.clone()))
        };
        cpu.set_cpus(list(&self.cpus, &before.cpus, &all.cpus)).set_mems(list(&self.mems, &before.mems, &all.mems));
        resources.set_cpu(Some(cpu));
        resources
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn resources(cpu: Value) -> LinuxResources {
        serde_json::from_value(json!({ "cpu": cpu })).unwrap()
    }

    fn set(cpus: &str) -> Cpuset {
        Cpuset::of(&resources(json!({ "cpus": cpus })))
    }

    #[test]
    fn it_is_taken_out() {
        let mut both = resources(json!({ "cpus": "0-1", "mems": "0", "shares": 7 }));
        let none = Cpuset::default();
        assert_eq!(
            Cpuset::take(&mut both).instead_of(&none, &set("0-9")),
            resources(json!({ "cpus": "0-1", "mems": "0" }))
        );
        assert_eq!(both, resources(json!({ "shares": 7 })));
        assert!(set("").is_empty() && Cpuset::of(&LinuxResources::default()).is_empty());
    }

    #[test]
    fn what_is_not_named_stays() {
        assert_eq!(set("3").updated(Cpuset::default()), set("3"));
        assert_eq!(set("3").updated(set("1")), set("1"));
    }

    #[test]
    fn what_is_named_no_more_becomes_all() {
        let all = set("0-9");
        assert_eq!(Cpuset::default().instead_of(&set("3"), &all), resources(json!({ "cpus": "0-9" })));
        assert_eq!(set("1").instead_of(&set("3"), &all), resources(json!({ "cpus": "1" })));
    }

    #[test]
    fn a_union_has_what_any_names() {
        assert_eq!(Cpuset::union([set("3"), Cpuset::default(), set("0-1")].into_iter()), set("3,0-1"));
        assert!(Cpuset::union(std::iter::empty()).is_empty());
    }
}
