//! Attributes: GETATTR, SETATTR, STATX.

use std::os::fd::OwnedFd;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Statx, StatxTimestamp, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;
use rustix::path::DecInt;

use super::credentials::without_fsetid;
use super::held::Held;
use super::init::Session;
use super::inode::Node;
use super::request::{Request, put};
use super::wire::{self, Attr, AttrOut, InitFlags, ROOT_ID, SetattrIn, SetattrValid, StatxIn, StatxOut, SxTime};
use super::{Server, lookup, root};
use crate::virtio::queue::Buffers;

/// The attributes of `node` as the guest gets them.
pub fn of(node: &Node, stat: &Statx, session: Option<Session>) -> Attr {
    let submount = node.is_submount && session.is_some_and(|session| session.has(InitFlags::SUBMOUNTS));
    Attr {
        ino: inode_number(node, stat),
        size: stat.stx_size,
        blocks: stat.stx_blocks,
        // Times before 1970 travel as two's complement.
        atime: stat.stx_atime.tv_sec.cast_unsigned(),
        mtime: stat.stx_mtime.tv_sec.cast_unsigned(),
        ctime: stat.stx_ctime.tv_sec.cast_unsigned(),
        atimensec: stat.stx_atime.tv_nsec,
        mtimensec: stat.stx_mtime.tv_nsec,
        ctimensec: stat.stx_ctime.tv_nsec,
        mode: stat.stx_mode.into(),
        nlink: stat.stx_nlink,
        uid: stat.stx_uid,
        gid: stat.stx_gid,
        rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
        blksize: stat.stx_blksize,
        flags: if submount { wire::ATTR_SUBMOUNT } else { 0 },
    }
}

/// The inode number that the guest is shown.
fn inode_number(node: &Node, stat: &Statx) -> u64 {
    if node.is_export_root && node.kind != FileType::Directory {
        root::FIRST_FILE_INODE + node.export.id
    } else {
        stat.stx_ino
    }
}

/// A device number as FUSE has it (`new_encode_dev` of the kernel).
fn encode_device(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// The inverse of [`encode_device`].
pub fn decode_device(device: u32) -> u64 {
    rustix::fs::makedev((device & 0xf_ff00) >> 8, device & 0xff | (device >> 12) & 0xf_ff00)
}

fn sx_time(time: StatxTimestamp) -> SxTime {
    SxTime { tv_sec: time.tv_sec, tv_nsec: time.tv_nsec, reserved: 0 }
}

fn timestamp(set: bool, now: bool, sec: u64, nsec: u32) -> Result<Timespec, Errno> {
    if !set {
        return Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT });
    }
    if now {
        return Ok(Timespec { tv_sec: 0, tv_nsec: UTIME_NOW });
    }
    // Larger ones have meanings of their own in utimensat(2).
    if nsec >= 1_000_000_000 {
        return Err(Errno::INVAL);
    }
    Ok(Timespec { tv_sec: sec.cast_signed(), tv_nsec: nsec.into() })
}

impl Server {
    pub(super) fn getattr(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        // Which handle it came by does not matter: a node's own descriptor holds deleted files too.
        if request.header.nodeid == ROOT_ID {
            let cache = root::CACHE;
            return put(out, &AttrOut { attr_valid: cache.as_secs(), attr: root::attr(), ..AttrOut::default() });
        }
        let node = self.node(request.header.nodeid)?;
        self.reply_attr(&node, out)
    }

    fn reply_attr(&self, node: &Held, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let stat = lookup::stat(node)?;
        node.tell(&stat);
        let cache = node.export.options.cache;
        let attr = of(node, &stat, self.session());
        put(out, &AttrOut { attr_valid: cache.as_secs(), attr_valid_nsec: cache.subsec_nanos(), dummy: 0, attr })
    }

    pub(super) fn statx(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let _which: StatxIn = request.read()?;
        if request.header.nodeid == ROOT_ID {
            // Has no time of birth; the basic fields come by GETATTR as well.
            let attr = root::attr();
            let mask = rustix::fs::StatxFlags::BASIC_STATS.bits();
            let (mode, nlink, ino, blksize) = ((attr.mode & 0xffff) as u16, attr.nlink, attr.ino, attr.blksize);
            let attr_valid = root::CACHE.as_secs();
            return put(out, &StatxOut { attr_valid, mask, mode, nlink, ino, blksize, ..StatxOut::default() });
        }
        let node = self.node(request.header.nodeid)?;
        let stat = lookup::stat(&node)?;
        node.tell(&stat);
        let cache = node.export.options.cache;
        let reply = StatxOut {
            attr_valid: cache.as_secs(),
            attr_valid_nsec: cache.subsec_nanos(),
            mask: stat.stx_mask,
            blksize: stat.stx_blksize,
            attributes: stat.stx_attributes.bits(),
            attributes_mask: stat.stx_attributes_mask.bits(),
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            mode: stat.stx_mode,
            ino: inode_number(&node, &stat),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime: sx_time(stat.stx_atime),
            btime: sx_time(stat.stx_btime),
            ctime: sx_time(stat.stx_ctime),
            mtime: sx_time(stat.stx_mtime),
            rdev_major: stat.stx_rdev_major,
            rdev_minor: stat.stx_rdev_minor,
            ..StatxOut::default()
        };
        put(out, &reply)
    }

    pub(super) fn setattr(&self, request: &mut Request<'_>, out: &mut Buffers<'_>) -> Result<(), Errno> {
        let set: SetattrIn = request.read()?;
        let valid = SetattrValid::from_bits_truncate(set.valid);
        let node = self.node(request.header.nodeid)?;
        node.writable()?;
        let (uid, gid) = (request.header.uid, request.header.gid);
        if is_of_nothing(valid) && (uid == 0 || uid == node_owner(&node)?) {
            // What is left of a chown(2) to nobody else, by who may: with FUSE_HANDLE_KILLPRIV_V2 the guest leaves it to its
            // server to clear set-id bits, and has nothing else to say. It says the same before fallocate(2), of any caller.
            let clear = || rustix::fs::chownat(&node, c"", None, None, AtFlags::EMPTY_PATH);
            if uid == 0 { clear()? } else { without_fsetid(gid, clear)? }
        }
        // The owner first: a change of it clears set-id bits, which a new mode may set again.
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then(|| id(set.uid)).transpose()?.map(Uid::from_raw);
            let gid = valid.contains(SetattrValid::GID).then(|| id(set.gid)).transpose()?.map(Gid::from_raw);
            rustix::fs::chownat(&node, c"", uid, gid, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_bits_retain(set.mode & 0o7777);
            rustix::fs::chmodat(self.proc_fds()?, DecInt::from_fd(&node), mode, AtFlags::empty())?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let truncate = || self.truncate(&node, valid.contains(SetattrValid::FH).then_some(set.fh), set.size);
            if valid.contains(SetattrValid::KILL_SUIDGID) { without_fsetid(gid, truncate)? } else { truncate()? }
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let (atime, mtime) = (valid.contains(SetattrValid::ATIME), valid.contains(SetattrValid::MTIME));
            let times = Timestamps {
                last_access: timestamp(atime, valid.contains(SetattrValid::ATIME_NOW), set.atime, set.atimensec)?,
                last_modification: timestamp(mtime, valid.contains(SetattrValid::MTIME_NOW), set.mtime, set.mtimensec)?,
            };
            rustix::fs::utimensat(&node, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        self.reply_attr(&node, out)
    }

    fn truncate(&self, node: &Held, fh: Option<u64>, size: u64) -> Result<(), Errno> {
        if let Some(fh) = fh
            && let Ok(handle) = self.handles.get(fh, node.id)
            && handle.is_writable()
        {
            return rustix::fs::ftruncate(&handle.file, size);
        }
        let file: OwnedFd = self.open_regular(node, OFlags::WRONLY)?;
        rustix::fs::ftruncate(file, size)
    }
}

fn node_owner(node: &Held) -> Result<u32, Errno> {
    Ok(lookup::stat(node)?.stx_uid)
}

/// Whether a request says nothing of what is to change.
fn is_of_nothing(valid: SetattrValid) -> bool {
    (valid - SetattrValid::FH - SetattrValid::LOCK_OWNER).is_empty()
}

/// An id that exists: -1 means "no change" to the host.
fn id(id: u32) -> Result<u32, Errno> {
    if id == u32::MAX { Err(Errno::INVAL) } else { Ok(id) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_come_back() {
        for (major, minor) in [(0, 0), (1, 3), (8, 255), (8, 256), (0xfff, 0xf_ffff)] {
            let device = decode_device(encode_device(major, minor));
            assert_eq!((rustix::fs::major(device), rustix::fs::minor(device)), (major, minor));
        }
    }
}
