//! From a bundle to a decision: everything that `run` and `create` settle before anything is made.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use nix::sched::CloneFlags;
use oci_spec::runtime::{LinuxMemory, LinuxNamespace, LinuxNamespaceType, LinuxResources, Spec};
use rustix::process::{Pid, geteuid};

use crate::config::Bundle;
use crate::cpuset::Cpuset;
use crate::cri::sandbox_resources;
use crate::host::{self, Cgroup};
use crate::limits;
use crate::limits::SANDBOX_OVERHEAD;
use crate::membership::{self, Membership, MembershipError};
use crate::network::PortForward;
use crate::process::terminal::WindowSize;
use crate::sandbox::image::{GuestImage, ImageError};
use crate::sandbox::plan::{Plan, PlanError, SharedNamespaces};
use crate::sandbox::size::{Limits, Size, SizeOptions, memory_limit};
use crate::settings::{Settings, SettingsError};
use crate::standin::{self, Namespaces};
use crate::state::{Id, Record, StateRoot};

/// Why nothing can be made of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// What it needs.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// What the guest boots.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// What an administrator has settled, or a container asks for.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// Whose sandbox it is to join.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// A namespace that is to be joined.
    #[error("linux.namespaces: cannot open {path}: {error}")]
    Namespace {
        /// Its file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// It is the host's.
    #[error("linux.namespaces: {0} is the host's network, which a guest cannot share")]
    HostNetwork(PathBuf),
    /// Only root may plug a guest into it.
    #[error(
        "linux.namespaces: a guest can be plugged into the network namespace {0} by root only; leave the path out for a network without interfaces"
    )]
    NeedsRoot(PathBuf),
    /// It has one already.
    #[error("--net=user: linux.namespaces has the network namespace {0} for the container; leave the path out")]
    TwoNetworks(PathBuf),
    /// The control group on the host.
    #[error(transparent)]
    Cgroup(io::Error),
    /// The stand-in.
    #[error("cannot make the container's stand-in process: {0}")]
    StandIn(io::Error),
}

/// What the command line says about a sandbox.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// RAM and vCPUs.
    pub size: SizeOptions,
    /// What an administrator has settled for all.
    pub settings: Settings,
    /// The guest's kernel.
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs.
    pub initrd: Option<PathBuf>,
    /// Copy the guest's console to standard error.
    pub console: bool,
    /// Whether systemd makes the control group; where nobody says so, its path tells.
    pub systemd_cgroup: Option<bool>,
    /// The guest has a network by passt, with these ports of the host.
    pub user_network: Option<Vec<PortForward>>,
}

impl Options {
    /// The same with the settings: what a container asks for, too. The command line overrules them.
    fn settle(&self, spec: &Spec) -> Result<(SizeOptions, GuestImage), LaunchError> {
        let settings = match spec.annotations() {
            Some(annotations) => &self.settings.with_annotations(annotations)?,
            None => &self.settings,
        };
        let kernel = self.kernel.clone().or_else(|| settings.kernel());
        let initrd = self.initrd.clone().or_else(|| settings.initrd());
        Ok((self.size.or(settings), GuestImage::find(kernel, initrd)?))
    }
}

/// A container that can be made, in a sandbox of its own or as one more of another.
#[derive(Debug)]
pub struct Launch {
    /// The container's id.
    pub id: Id,
    /// Its bundle.
    pub bundle: Bundle,
    /// What its sandbox needs.
    pub plan: Plan,
    /// The sandbox that it joins; nothing if it gets one of its own.
    pub pod: Option<Membership>,
    /// What the guest boots.
    pub image: GuestImage,
    /// Copy the guest's console to standard error.
    pub console: bool,
    /// The guest has a network by passt, with these ports of the host.
    pub user_network: Option<Vec<PortForward>>,
    /// Where its processes are on the host; nothing for an ordinary user, who may have no such group.
    pub cgroup: Option<Cgroup>,
}

/// The process on the host that an engine takes for the container's.
#[derive(Debug)]
pub struct StandIn {
    /// Itself.
    pub pid: Pid,
    /// Its link.
    pub link: OwnedFd,
    /// Its network namespace, which is to become the guest's network; none for an ordinary user's, who may not plug
    /// anything into one, and for a guest that has another network.
    pub netns: Option<OwnedFd>,
}

impl Launch {
    /// Warns about what is not honoured in the bundle, and plans.
    ///
    /// # Errors
    /// Any [`LaunchError`].
    pub fn plan(root: &StateRoot, id: Id, bundle: Bundle, options: Options) -> Result<Self, LaunchError> {
        for field in &bundle.unhonoured {
            log::warn!("{field}");
        }
        let pod = Membership::find(root, &bundle.spec)?;
        let sandbox = pod.as_ref().map(|pod| pod.peer.record.sandbox_pid);
        let shared = membership::shared_namespaces(root, &id, &bundle.spec, sandbox)?;
        let (size, image) = options.settle(&bundle.spec)?;
        let plan = Plan::new(&id, &bundle, size, &shared)?;
        if let Some(path) = options.user_network.as_ref().and_then(|_| network_of(&bundle.spec)?.path().clone()) {
            return Err(LaunchError::TwoNetworks(path));
        }
        let path = bundle.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup = match geteuid().is_root() {
            true => Cgroup::plan(path, options.systemd_cgroup, id.as_str()).map_err(LaunchError::Cgroup)?,
            false => None,
        };
        let cgroup = cgroup.filter(|cgroup| host::is_root_of_host() || is_usable(cgroup));
        warn_of_limits(&bundle, pod.is_some(), cgroup.is_some());
        let Options { console, user_network, .. } = options;
        Ok(Self { id, bundle, plan, pod, image, console, user_network, cgroup })
    }

    /// Plans a sandbox that is to be there before its first container; `spec` is a configuration without a process.
    ///
    /// # Errors
    /// Any [`LaunchError`].
    pub fn empty(id: Id, folder: &Path, spec: Spec, options: Options) -> Result<Self, LaunchError> {
        let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().as_deref());
        let cgroup = Cgroup::plan(path, options.systemd_cgroup, id.as_str()).map_err(LaunchError::Cgroup)?;
        let bundle =
            Bundle { path: folder.into(), rootfs: folder.into(), in_guest: None, spec, unhonoured: Vec::new() };
        let (size, image) = options.settle(&bundle.spec)?;
        let plan = Plan::new(&id, &bundle, size, &SharedNamespaces::new())?;
        Ok(Self { id, bundle, plan, pod: None, image, console: false, user_network: None, cgroup })
    }

    /// The same with its stand-in.
    #[must_use]
    pub fn recorded(&self, stand_in: Pid) -> Record {
        let mut record = self.record();
        record.pid = stand_in.as_raw_nonzero().get().unsigned_abs();
        record
    }

    /// What is written down about the container first.
    #[must_use]
    pub fn record(&self) -> Record {
        let mut record = record_of(&self.id, &self.bundle);
        record.cgroup = self.cgroup.clone();
        record
    }

    /// The size of a terminal that does not know its own.
    #[must_use]
    pub fn console_size(&self) -> WindowSize {
        let size = self.bundle.spec.process().as_ref().and_then(|process| process.console_size());
        let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        size.map(|size| WindowSize { rows: number(size.height()), columns: number(size.width()) }).unwrap_or_default()
    }

    /// Moves the calling process and the stand-in into the control group, and limits it: before there is a virtual
    /// machine, so that everything of it is in there.
    ///
    /// # Errors
    /// [`LaunchError::Cgroup`].
    pub fn enter_cgroup(&self, stand_in: u32) -> Result<(), LaunchError> {
        let Some(cgroup) = &self.cgroup else { return Ok(()) };
        let resources = sandbox_resources(&self.bundle.spec);
        let limits = host_limits(resources.as_deref(), &self.plan.size);
        let entered = cgroup.join(std::process::id()).and_then(|()| cgroup.join(stand_in));
        match entered.and_then(|()| cgroup.limit(&limits)) {
            // The user may have got a group, but not each controller.
            Err(error) if !host::is_root_of_host() => {
                log::warn!("{error}");
                Ok(())
            }
            entered => entered.map_err(LaunchError::Cgroup),
        }
    }

    /// Whether the sandbox' memory is limited in the control group.
    #[must_use]
    pub fn has_memory_limit(&self) -> bool {
        memory_limit(&self.bundle.spec).is_some()
    }

    /// What of the host the sandbox is held to when it enters the control group.
    #[must_use]
    pub fn cpuset(&self) -> Cpuset {
        sandbox_resources(&self.bundle.spec).map(|resources| Cpuset::of(&resources)).unwrap_or_default()
    }

    /// Moves the stand-in of a container in another's sandbox into its control group, where nothing else of it is: its
    /// limits hold in the guest.
    ///
    /// # Errors
    /// [`LaunchError::Cgroup`].
    pub fn enter_cgroup_as_member(&self, stand_in: u32) -> Result<(), LaunchError> {
        self.cgroup.as_ref().map_or(Ok(()), |cgroup| cgroup.join(stand_in)).map_err(LaunchError::Cgroup)
    }

    /// Forks the stand-in, which is in its namespaces when this returns.
    ///
    /// # Errors
    /// [`LaunchError::Namespace`] and [`LaunchError::StandIn`].
    pub fn start_stand_in(&self, terminal: Option<OwnedFd>) -> Result<StandIn, LaunchError> {
        let (ours, theirs) = crate::link::pair().map_err(LaunchError::StandIn)?;
        // An ordinary user's has no namespaces of its own: nothing but the guest keeps the container apart then.
        let (namespaces, view) = match geteuid().is_root() {
            true => (self.namespaces()?, Some(self.plan.view.clone())),
            false => (self.no_namespaces()?, None),
        };
        let id_maps = view.as_ref().map_or(Ok(Vec::new()), standin::View::id_maps).map_err(LaunchError::StandIn)?;
        let plan = standin::Plan { namespaces, view, id_maps, terminal };
        let pid = standin::start(plan, theirs).map_err(LaunchError::StandIn)?;
        standin::await_entry(&ours).map_err(LaunchError::StandIn)?;
        let netns = (geteuid().is_root() && self.user_network.is_none()).then(|| {
            let path = PathBuf::from(format!("/proc/{}/ns/net", pid.as_raw_nonzero()));
            host::open_namespace(&path).map_err(|error| LaunchError::Namespace { path, error })
        });
        Ok(StandIn { pid, link: ours, netns: netns.transpose()? })
    }

    fn no_namespaces(&self) -> Result<Namespaces, LaunchError> {
        match network_of(&self.bundle.spec).and_then(|network| network.path().as_ref()) {
            Some(path) => Err(LaunchError::NeedsRoot(path.clone())),
            None => Ok(Namespaces::default()),
        }
    }

    fn listed_namespaces(&self) -> &[LinuxNamespace] {
        namespaces_of(&self.bundle.spec)
    }

    fn namespaces(&self) -> Result<Namespaces, LaunchError> {
        let mut result = Namespaces { new: CloneFlags::CLONE_NEWNS, joined: Vec::new(), pid: false };
        for namespace in self.listed_namespaces() {
            let flag = match namespace.typ() {
                LinuxNamespaceType::Ipc => CloneFlags::CLONE_NEWIPC,
                LinuxNamespaceType::Uts => CloneFlags::CLONE_NEWUTS,
                LinuxNamespaceType::Network => CloneFlags::CLONE_NEWNET,
                LinuxNamespaceType::Cgroup => CloneFlags::CLONE_NEWCGROUP,
                // The stand-in is always the first process of its own, so that /proc shows nothing of the host.
                LinuxNamespaceType::Pid => {
                    result.pid = true;
                    continue;
                }
                // Its own file systems always; users and time of the host.
                LinuxNamespaceType::Mount | LinuxNamespaceType::User | LinuxNamespaceType::Time => continue,
            };
            match namespace.path() {
                Some(path) => {
                    let failed = |error| LaunchError::Namespace { path: path.clone(), error };
                    let joined = host::open_namespace(path).map_err(failed)?;
                    if flag == CloneFlags::CLONE_NEWNET && host::is_own_network(&joined).map_err(failed)? {
                        return Err(LaunchError::HostNetwork(path.clone()));
                    }
                    result.joined.push(joined);
                }
                None => result.new |= flag,
            }
        }
        Ok(result)
    }
}

fn namespaces_of(spec: &Spec) -> &[LinuxNamespace] {
    spec.linux().as_ref().and_then(|linux| linux.namespaces().as_deref()).unwrap_or_default()
}

fn network_of(spec: &Spec) -> Option<&LinuxNamespace> {
    namespaces_of(spec).iter().find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
}

/// What a bundle says that is written down about its container.
#[must_use]
pub fn record_of(id: &Id, bundle: &Bundle) -> Record {
    let mut record = Record::new(id, &bundle.path, &bundle.rootfs);
    record.annotations = bundle.spec.annotations().clone().unwrap_or_default();
    record.hooks = bundle.spec.hooks().clone();
    record
}

/// Whether a rootless engine's user has been given such a control group. Without it the sandbox stays where the engine
/// is, as with other runtimes.
fn is_usable(cgroup: &Cgroup) -> bool {
    let delegated = cgroup.is_delegated();
    delegated.inspect_err(|error| log::info!("the sandbox gets no control group on the host: {error}")).is_ok()
}

/// Warns of limits that hold on the host alone, where no control group of the container holds a virtual machine.
fn warn_of_limits(bundle: &Bundle, is_member: bool, has_cgroup: bool) {
    let Some(mut resources) = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().clone()) else { return };
    if is_member && has_cgroup {
        // The pod sees to these.
        Cpuset::take(&mut resources);
    }
    let reason = match (is_member, has_cgroup) {
        (true, _) => "the control group of the sandbox' first container holds the virtual machine",
        (false, false) => "without root, or without cgroup v2 on the host, the sandbox has no control group",
        (false, true) => return,
    };
    for field in limits::only_on_host(&resources) {
        log::warn!("config.json: linux.resources.{field} is not honoured: {reason}");
    }
}

/// What the sandbox as a whole is held to on the host: its CPUs and its share of their time, its I/O, and with a memory
/// limit the guest's RAM and what the sandbox needs besides. The container's own limits hold inside the guest.
fn host_limits(resources: Option<&LinuxResources>, size: &Size) -> LinuxResources {
    let Some(resources) = resources else { return LinuxResources::default() };
    let mut limits = limits::of_host(resources);
    if Limits::of(resources).memory.is_some() {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some((i64::from(size.memory_mib) << 20) + SANDBOX_OVERHEAD));
        limits.set_memory(Some(memory));
    }
    limits
}
