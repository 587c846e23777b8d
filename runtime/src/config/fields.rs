//! Every field of config.json and what becomes of it. `docs/oci-fields.md` is this table in words; a test compares them.

/// What becomes of a field, and how in a few words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// What is in it has rows of its own.
    Parts,
    /// The guest does it.
    Guest(&'static str),
    /// The host does it.
    Host(&'static str),
    /// Both have a part in it.
    Both(&'static str),
    /// It asks for nothing.
    Nothing(&'static str),
    /// It has no effect, and whoever gives it is warned.
    Ignored(&'static str),
    /// A container with it is not made.
    Refused(&'static str),
}
use Fate::{Both, Guest, Host, Ignored, Nothing, Parts, Refused};

const CGROUP_V1: &str = "the guest has cgroup v2 only, which has no such setting";
const NO_LSM: &str = "the guest's kernel has no such security module; the virtual machine is the boundary";
const HOST_NODES: &str = "it names memory nodes of the host; the guest has its own";
const NO_RESCTRL: &str = "the guest's CPUs have no resource control";
const OTHER_SYSTEM: &str = "not for Linux containers";

const MAPPING: &str = "mapping of the container's user namespace, in the guest";
const CAPABILITIES: &str = "set of the process in the guest";
const SCHEDULER: &str = "scheduling of the first process among those of the guest";
const IO_PRIORITY: &str = "priority of the first process among those of the guest";
const HOOK: &str = "run on the host";
const WEIGHT: &str = "io.weight of the sandbox' control group";
const THROTTLE: &str = "io.max of the sandbox' control group";
const SECCOMP: &str = "filter of the container's processes, by libseccomp";

/// Fields by their path; `[]` stands for each element of an array.
#[rustfmt::skip]
pub const TABLE: &[(&str, Fate)] = &[
    ("ociVersion", Host("must be 1.x; another is refused")),
    ("root", Parts),
    ("root.path", Both("shared with the guest by virtio-fs; a file system on a block device or in an image that containerd names instead is a disk of the guest")),
    ("root.readonly", Guest("read-only for the container; the agent still makes mount points that are missing in it")),
    ("hostname", Guest("of the container's UTS namespace, without which it is refused, and of the guest")),
    ("domainname", Guest("of the container's UTS namespace, without which it is refused")),
    ("annotations", Host("told by `state` and to hooks; CRI-O's name the sandbox to join, those of containerd's CRI say how large a pod is; no other means anything to katavm")),
    ("process", Parts),
    ("process.terminal", Both("a pseudo terminal in the guest, whose bytes go to the one on the host")),
    ("process.consoleSize", Parts),
    ("process.consoleSize.height", Guest("rows of a terminal that does not know its own size")),
    ("process.consoleSize.width", Guest("columns of a terminal that does not know its own size")),
    ("process.user", Parts),
    ("process.user.uid", Guest("user of the process")),
    ("process.user.gid", Guest("group of the process")),
    ("process.user.umask", Guest("umask of the process")),
    ("process.user.additionalGids", Guest("further groups of the process")),
    ("process.user.username", Ignored(OTHER_SYSTEM)),
    ("process.args", Guest("the program is looked for in the container's PATH; an empty list is refused")),
    ("process.commandLine", Ignored(OTHER_SYSTEM)),
    ("process.env", Guest("environment of the process; HOME is added where it is missing")),
    ("process.cwd", Guest("made where it is missing; a relative path is refused")),
    ("process.capabilities", Parts),
    ("process.capabilities.bounding", Guest(CAPABILITIES)),
    ("process.capabilities.effective", Guest(CAPABILITIES)),
    ("process.capabilities.inheritable", Guest(CAPABILITIES)),
    ("process.capabilities.permitted", Guest(CAPABILITIES)),
    ("process.capabilities.ambient", Guest(CAPABILITIES)),
    ("process.rlimits", Parts),
    ("process.rlimits[].type", Guest("which limit of the process")),
    ("process.rlimits[].soft", Guest("setrlimit(2)")),
    ("process.rlimits[].hard", Guest("setrlimit(2)")),
    ("process.noNewPrivileges", Guest("prctl(2) of the process")),
    ("process.oomScoreAdj", Guest("of the process, among those of the guest")),
    ("process.ioPriority", Parts),
    ("process.ioPriority.class", Guest(IO_PRIORITY)),
    ("process.ioPriority.priority", Guest(IO_PRIORITY)),
    ("process.scheduler", Parts),
    ("process.scheduler.policy", Guest(SCHEDULER)),
    ("process.scheduler.nice", Guest(SCHEDULER)),
    ("process.scheduler.priority", Guest(SCHEDULER)),
    ("process.scheduler.flags", Guest(SCHEDULER)),
    ("process.scheduler.runtime", Guest(SCHEDULER)),
    ("process.scheduler.deadline", Guest(SCHEDULER)),
    ("process.scheduler.period", Guest(SCHEDULER)),
    ("process.apparmorProfile", Ignored(NO_LSM)),
    ("process.selinuxLabel", Ignored(NO_LSM)),
    ("process.execCPUAffinity", Ignored("further processes run on all CPUs of the guest")),
    ("mounts", Parts),
    ("mounts[].destination", Guest("made where it is missing; a relative path is refused")),
    ("mounts[].type", Both("a bind mount is shared with the guest by virtio-fs; ext2, ext3, ext4 and erofs on a block device or in an image file of the host are disks of the guest; any other file system is one of the guest's kernel")),
    ("mounts[].source", Both(
        "of a bind mount: a folder or a file of the host; for /dev/null, zero, full, random, urandom and tty the guest's own; \
         for /dev/shm an empty tmpfs becomes one of the guest; \
         a block device becomes one of the guest; a socket, a named pipe or another device is refused")),
    ("mounts[].options", Both(
        "in the guest, and `ro` on the host as well; `tmpcopyup` is done in the guest; `idmap` and `ridmap` are ignored, with a warning")),
    ("mounts[].uidMappings", Host("the directory or file is mounted with this map, where its file system can; other kinds of mounts are refused")),
    ("mounts[].gidMappings", Host("likewise")),
    ("hooks", Parts),
    ("hooks.prestart", Host("run before the virtual machine boots")),
    ("hooks.createRuntime", Host("run before the virtual machine boots")),
    ("hooks.createContainer", Host("run before the virtual machine boots, in the namespaces of the stand-in")),
    ("hooks.startContainer", Guest("run in the container, before the process")),
    ("hooks.poststart", Host(HOOK)),
    ("hooks.poststop", Host(HOOK)),
    ("linux", Parts),
    ("linux.devices", Parts),
    ("linux.devices[].type", Guest("of the device node")),
    ("linux.devices[].path", Guest("made in the container; one that the guest's kernel has no driver for cannot be opened")),
    ("linux.devices[].major", Guest("of the device node")),
    ("linux.devices[].minor", Guest("of the device node")),
    ("linux.devices[].fileMode", Guest("of the device node")),
    ("linux.devices[].uid", Guest("of the device node")),
    ("linux.devices[].gid", Guest("of the device node")),
    ("linux.uidMappings", Parts),
    ("linux.uidMappings[].containerID", Guest(MAPPING)),
    ("linux.uidMappings[].hostID", Guest(MAPPING)),
    ("linux.uidMappings[].size", Guest(MAPPING)),
    ("linux.gidMappings", Parts),
    ("linux.gidMappings[].containerID", Guest(MAPPING)),
    ("linux.gidMappings[].hostID", Guest(MAPPING)),
    ("linux.gidMappings[].size", Guest(MAPPING)),
    ("linux.sysctl", Guest("`net.*` of the guest's network, which is the container's; the others of its IPC and UTS namespaces; one that no namespace has is refused")),
    ("linux.cgroupsPath", Host("the sandbox process and the stand-in are in this control group; without root it has no effect")),
    ("linux.namespaces", Parts),
    ("linux.namespaces[].type", Both(
        "new ones in the guest, and of those that the host shows in the stand-in; without a network namespace it is refused: a guest \
         cannot share the host's network")),
    ("linux.namespaces[].path", Both(
        "network: the namespace becomes the guest's network, the host's is refused; ipc, uts, pid: that of a container of the same \
         sandbox; any other is ignored, with a warning, and the container gets one of its own")),
    ("linux.resources", Parts),
    ("linux.resources.devices", Parts),
    ("linux.resources.devices[].allow", Guest("BPF program of the container's control group")),
    ("linux.resources.devices[].type", Guest("the same")),
    ("linux.resources.devices[].major", Guest("the same")),
    ("linux.resources.devices[].minor", Guest("the same")),
    ("linux.resources.devices[].access", Guest("the same")),
    ("linux.resources.memory", Parts),
    ("linux.resources.memory.limit", Both("memory.max in the guest; the guest's RAM follows it, and memory.max on the host is that and 128 MiB")),
    ("linux.resources.memory.reservation", Guest("memory.low")),
    ("linux.resources.memory.swap", Guest("memory.swap.max; the guest has no swap space")),
    ("linux.resources.memory.kernel", Ignored(CGROUP_V1)),
    ("linux.resources.memory.kernelTCP", Ignored(CGROUP_V1)),
    ("linux.resources.memory.swappiness", Ignored(CGROUP_V1)),
    ("linux.resources.memory.disableOOMKiller", Ignored(CGROUP_V1)),
    ("linux.resources.memory.useHierarchy", Nothing("cgroup v2 is always hierarchical")),
    ("linux.resources.memory.checkBeforeUpdate", Nothing("there is no use to compare with when a container is made; `update` does not look at it")),
    ("linux.resources.cpu", Parts),
    ("linux.resources.cpu.shares", Both("cpu.weight in the guest, and of the sandbox' control group")),
    ("linux.resources.cpu.quota", Guest("cpu.max; with the period it says how many CPUs the guest has")),
    ("linux.resources.cpu.period", Guest("cpu.max")),
    ("linux.resources.cpu.burst", Guest("cpu.max.burst")),
    ("linux.resources.cpu.idle", Guest("cpu.idle")),
    ("linux.resources.cpu.realtimeRuntime", Ignored(CGROUP_V1)),
    ("linux.resources.cpu.realtimePeriod", Ignored(CGROUP_V1)),
    ("linux.resources.cpu.cpus", Host("cpuset.cpus of the sandbox' control group: the guest's CPUs run on these")),
    ("linux.resources.cpu.mems", Host("cpuset.mems of the sandbox' control group: the guest's RAM is in these nodes")),
    ("linux.resources.pids", Parts),
    ("linux.resources.pids.limit", Guest("pids.max")),
    ("linux.resources.blockIO", Parts),
    ("linux.resources.blockIO.weight", Host(WEIGHT)),
    ("linux.resources.blockIO.leafWeight", Ignored(CGROUP_V1)),
    ("linux.resources.blockIO.weightDevice", Parts),
    ("linux.resources.blockIO.weightDevice[].major", Host("io.bfq.weight of the sandbox' control group")),
    ("linux.resources.blockIO.weightDevice[].minor", Host("the same")),
    ("linux.resources.blockIO.weightDevice[].weight", Host("the same")),
    ("linux.resources.blockIO.weightDevice[].leafWeight", Ignored(CGROUP_V1)),
    ("linux.resources.blockIO.throttleReadBpsDevice", Host(THROTTLE)),
    ("linux.resources.blockIO.throttleWriteBpsDevice", Host(THROTTLE)),
    ("linux.resources.blockIO.throttleReadIOPSDevice", Host(THROTTLE)),
    ("linux.resources.blockIO.throttleWriteIOPSDevice", Host(THROTTLE)),
    ("linux.resources.hugepageLimits", Parts),
    ("linux.resources.hugepageLimits[].pageSize", Guest("hugetlb.SIZE.max")),
    ("linux.resources.hugepageLimits[].limit", Guest("hugetlb.SIZE.max")),
    ("linux.resources.network", Parts),
    ("linux.resources.network.classID", Ignored(CGROUP_V1)),
    ("linux.resources.network.priorities", Ignored(CGROUP_V1)),
    ("linux.resources.rdma", Ignored("the guest has no RDMA device")),
    ("linux.resources.unified", Both("`cpuset.*` and `io.*` of the sandbox' control group, all others in the guest")),
    ("linux.seccomp", Parts),
    ("linux.seccomp.defaultAction", Guest(SECCOMP)),
    ("linux.seccomp.defaultErrnoRet", Guest(SECCOMP)),
    ("linux.seccomp.architectures", Guest(SECCOMP)),
    ("linux.seccomp.flags", Guest(SECCOMP)),
    ("linux.seccomp.listenerPath", Refused("a listener on the host cannot serve the system calls of a guest")),
    ("linux.seccomp.listenerMetadata", Nothing("it is for a listener, and there is none")),
    ("linux.seccomp.syscalls", Parts),
    ("linux.seccomp.syscalls[].names", Guest(SECCOMP)),
    ("linux.seccomp.syscalls[].action", Guest("the same; SCMP_ACT_NOTIFY is refused")),
    ("linux.seccomp.syscalls[].errnoRet", Guest(SECCOMP)),
    ("linux.seccomp.syscalls[].args", Guest(SECCOMP)),
    ("linux.rootfsPropagation", Guest("propagation of the root mount")),
    ("linux.maskedPaths", Guest("covered by /dev/null or an empty tmpfs")),
    ("linux.readonlyPaths", Guest("mounted over themselves read-only")),
    ("linux.mountLabel", Ignored(NO_LSM)),
    ("linux.intelRdt", Parts),
    ("linux.intelRdt.closID", Ignored(NO_RESCTRL)),
    ("linux.intelRdt.schemata", Ignored(NO_RESCTRL)),
    ("linux.intelRdt.l3CacheSchema", Ignored(NO_RESCTRL)),
    ("linux.intelRdt.memBwSchema", Ignored(NO_RESCTRL)),
    ("linux.intelRdt.enableCMT", Ignored(NO_RESCTRL)),
    ("linux.intelRdt.enableMBM", Ignored(NO_RESCTRL)),
    ("linux.intelRdt.enableMonitoring", Ignored(NO_RESCTRL)),
    ("linux.memoryPolicy", Ignored(HOST_NODES)),
    ("linux.personality", Parts),
    ("linux.personality.domain", Guest("execution domain of the process")),
    ("linux.personality.flags", Ignored("no flag is supported")),
    ("linux.timeOffsets", Guest("of the container's time namespace, without which it is refused")),
    ("linux.netDevices", Ignored("a device of the host cannot be moved into a guest")),
    ("vm", Ignored("katavm brings its own virtual machine; --kernel and --initrd choose what it boots")),
    ("windows", Ignored(OTHER_SYSTEM)),
    ("solaris", Ignored(OTHER_SYSTEM)),
    ("zos", Ignored(OTHER_SYSTEM)),
    ("freebsd", Ignored(OTHER_SYSTEM)),
];

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// Set, the table in `docs` is written instead of compared.
    const WRITE: &str = "KATAVM_WRITE_DOCS";

    const HEAD: &str = "\
# What becomes of each field of config.json

Runtime specification 1.2 for Linux, and what later versions have added. This is `runtime/src/config/fields.rs` in words; a test compares them, and
`KATAVM_WRITE_DOCS=1 cargo test -p katavm-runtime fields` writes it. What is done in the guest is done by its own kernel. A field that is not in here is
ignored, with a warning that names it.

In a sandbox that another container was made with, what the host does with `linux.resources` has no effect: that one's control group holds the virtual machine.

| field | where | what |
|---|---|---|
";

    fn row(field: &str, fate: Fate) -> Option<String> {
        let (place, words) = match fate {
            Parts => return None,
            Guest(words) => ("guest", words),
            Host(words) => ("host", words),
            Both(words) => ("guest and host", words),
            Nothing(words) => ("nothing to do", words),
            Ignored(words) => ("ignored, with a warning", words),
            Refused(words) => ("refused", words),
        };
        Some(format!("| `{field}` | {place} | {words} |\n"))
    }

    #[test]
    fn the_documentation_is_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/oci-fields.md");
        let rows: String = TABLE.iter().filter_map(|(field, fate)| row(field, *fate)).collect();
        let text = format!("{HEAD}{rows}");
        if std::env::var_os(WRITE).is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let written = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            written == text,
            "docs/oci-fields.md is not what runtime/src/config/fields.rs says: {WRITE}=1 cargo test -p katavm-runtime fields"
        );
    }

    #[test]
    fn no_row_is_there_twice_or_out_of_reach() {
        for (index, (field, _)) in TABLE.iter().enumerate() {
            assert!(TABLE.iter().skip(index + 1).all(|(other, _)| other != field), "{field} is there twice");
            if let Some((parent, _)) = field.rsplit_once('.') {
                let parent = parent.trim_end_matches("[]");
                let row = TABLE.iter().find(|(known, _)| *known == parent);
                assert!(matches!(row, Some((_, Parts))), "{field} is never reached");
            }
        }
    }
}
