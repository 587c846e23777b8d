//! Acting on the host as the guest's caller, so that what is created belongs to it.

use log::error;
use rustix::fs::{Gid, Mode};
use rustix::io::Errno;
use rustix::process::{getgroups, umask};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups};

/// What the kernel takes from a thread whose file system uid is not 0 (`CAP_FS_SET`, capabilities(7)).
const FS_SET: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::LINUX_IMMUTABLE)
    .union(CapabilitySet::MAC_OVERRIDE);

/// Who asks, as far as it shows in a new file.
#[derive(Clone, Debug)]
pub struct Caller {
    /// File system user id.
    pub uid: u32,
    /// File system group id.
    pub gid: u32,
    /// The caller's other groups that count here.
    pub groups: Vec<u32>,
    /// The caller's umask; the host ignores it where a default ACL says otherwise.
    pub umask: u32,
}

/// Runs `act` with the ids, groups and umask of `caller`; the thread must be [prepared](super::thread::prepare).
///
/// A process that may not change its ids creates everything as itself. The guest kernel has checked the
/// caller's permissions already (`default_permissions`), so CAP_DAC_OVERRIDE stays; the other file
/// system capabilities go with uid 0, and with them their side effects (a set-group-id bit that the caller may not set).
///
/// # Errors
/// Those of `act`; EINVAL for ids that do not exist in the process's user namespace.
pub fn as_caller<T>(caller: &Caller, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    umask(Mode::from_bits_retain(caller.umask & 0o777));
    let own = (fsuid(u32::MAX), fsgid(u32::MAX));
    if own == (caller.uid, caller.gid) && caller.groups.is_empty() {
        return act();
    }
    let before = capabilities(None)?;
    if !before.effective.contains(CapabilitySet::SETUID | CapabilitySet::SETGID) {
        return act();
    }
    let _restore = Restore { own, groups: switch_groups(caller)?, before };
    fsgid(caller.gid);
    fsuid(caller.uid);
    // A refused change shows only in that the id is still the old one.
    if (fsuid(u32::MAX), fsgid(u32::MAX)) != (caller.uid, caller.gid) {
        return Err(Errno::INVAL);
    }
    if caller.uid != 0 {
        let kept = before.effective.difference(FS_SET) | before.effective & CapabilitySet::DAC_OVERRIDE;
        set_capabilities(None, CapabilitySets { effective: kept, ..before })?;
    }
    act()
}

/// Runs `act` without CAP_FSETID and with the group `gid`, so that the host clears set-id bits as it does for a caller in this
/// group who lacks that capability.
///
/// # Errors
/// Those of `act`.
pub fn without_fsetid<T>(gid: u32, act: impl FnOnce() -> Result<T, Errno>) -> Result<T, Errno> {
    let before = capabilities(None)?;
    if !before.effective.contains(CapabilitySet::FSETID) {
        return act();
    }
    let own = (fsuid(u32::MAX), fsgid(gid));
    let _restore = Restore { own, groups: None, before };
    set_capabilities(None, CapabilitySets { effective: before.effective.difference(CapabilitySet::FSETID), ..before })?;
    act()
}

fn switch_groups(caller: &Caller) -> Result<Option<Vec<Gid>>, Errno> {
    if caller.groups.is_empty() {
        return Ok(None);
    }
    if caller.groups.contains(&u32::MAX) {
        return Err(Errno::INVAL);
    }
    let old = getgroups()?;
    let new: Vec<Gid> = caller.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    set_thread_groups(&new)?;
    Ok(Some(old))
}

struct Restore {
    own: (u32, u32),
    groups: Option<Vec<Gid>>,
    before: CapabilitySets,
}

impl Drop for Restore {
    fn drop(&mut self) {
        fsuid(self.own.0);
        fsgid(self.own.1);
        if let Some(groups) = &self.groups
            && let Err(error) = set_thread_groups(groups)
        {
            error!("cannot take the server's own groups back: {error}");
        }
        drop(RestoreCapabilities(self.before));
    }
}

struct RestoreCapabilities(CapabilitySets);

impl Drop for RestoreCapabilities {
    fn drop(&mut self) {
        if let Err(error) = set_capabilities(None, self.0) {
            error!("cannot take the server's own capabilities back: {error}");
        }
    }
}

/// `setfsuid(2)`: returns the old id; an id that does not exist changes nothing.
fn fsuid(uid: u32) -> u32 {
    // SAFETY: takes a plain integer and changes nothing but an id of the calling thread.
    (unsafe { libc::setfsuid(uid) }).cast_unsigned()
}

/// `setfsgid(2)`, as [`fsuid`].
fn fsgid(gid: u32) -> u32 {
    // SAFETY: as in `fsuid`.
    (unsafe { libc::setfsgid(gid) }).cast_unsigned()
}
