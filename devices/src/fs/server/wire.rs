//! The FUSE messages as they lie in guest memory (`linux/fuse.h`, protocol 7.41).
//!
//! Field names are the header's. All of it is in the guest's byte order, which on x86 is the host's.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Protocol version that the server speaks.
pub const KERNEL_VERSION: u32 = 7;
/// The newest minor version that the server knows.
pub const KERNEL_MINOR_VERSION: u32 = 41;
/// The oldest minor version that has virtio-fs (Linux 5.4).
pub const OLDEST_MINOR_VERSION: u32 = 31;
/// The node id of the root.
pub const ROOT_ID: u64 = 1;

macro_rules! messages {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $kind:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
        #[repr(C)]
        #[allow(missing_docs)]
        pub struct $name { $(pub $field: $kind),* }
    )*};
}

messages! {
    /// Start of every request.
    InHeader {
        len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32,
        total_extlen: u16, padding: u16,
    }
    /// Start of every reply.
    OutHeader { len: u32, error: i32, unique: u64 }
    /// What `stat` shows of a file.
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// Reply of everything that makes the guest know a node.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64,
        entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
    }
    /// Reply of GETATTR and SETATTR.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    /// INIT up to protocol 7.35; the guest sends more after it with `INIT_EXT`.
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    /// The rest of INIT with `INIT_EXT`.
    InitInExt { flags2: u32, unused: [u32; 11] }
    /// Reply of INIT.
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32,
        max_background: u16, congestion_threshold: u16, max_write: u32, time_gran: u32,
        max_pages: u16, map_alignment: u16, flags2: u32, unused: [u32; 7],
    }
    /// FORGET.
    ForgetIn { nlookup: u64 }
    /// Start of BATCH_FORGET.
    BatchForgetIn { count: u32, dummy: u32 }
    /// One node of BATCH_FORGET.
    ForgetOne { nodeid: u64, nlookup: u64 }
    /// SETATTR.
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64,
        atimensec: u32, mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// MKNOD.
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32 }
    /// MKDIR.
    MkdirIn { mode: u32, umask: u32 }
    /// RENAME.
    RenameIn { newdir: u64 }
    /// RENAME2.
    Rename2In { newdir: u64, flags: u32, padding: u32 }
    /// LINK.
    LinkIn { oldnodeid: u64 }
    /// OPEN and OPENDIR.
    OpenIn { flags: u32, open_flags: u32 }
    /// CREATE and TMPFILE.
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    /// Reply of OPEN and OPENDIR, second half of the reply of CREATE and TMPFILE.
    OpenOut { fh: u64, open_flags: u32, padding: u32 }
    /// RELEASE and RELEASEDIR.
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// FLUSH.
    FlushIn { fh: u64, unused: u32, padding: u32, lock_owner: u64 }
    /// READ, READDIR and READDIRPLUS.
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// WRITE; the data follow.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// Reply of WRITE and COPY_FILE_RANGE.
    WriteOut { size: u32, padding: u32 }
    /// Reply of STATFS.
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64,
        bsize: u32, namelen: u32, frsize: u32, padding: u32, spare: [u32; 6],
    }
    /// FSYNC and FSYNCDIR.
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32 }
    /// SETXATTR without `SETXATTR_EXT`.
    SetxattrIn { size: u32, flags: u32 }
    /// The rest of SETXATTR with `SETXATTR_EXT`.
    SetxattrInExt { setxattr_flags: u32, padding: u32 }
    /// GETXATTR and LISTXATTR; the reply too, when only the size was asked for.
    GetxattrIn { size: u32, padding: u32 }
    /// FALLOCATE.
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    /// LSEEK.
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 }
    /// Reply of LSEEK.
    LseekOut { offset: u64 }
    /// COPY_FILE_RANGE.
    CopyFileRangeIn {
        fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64,
    }
    /// One entry of READDIR; the name follows, padded to 8 bytes.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32 }
    /// STATX.
    StatxIn { getattr_flags: u32, reserved: u32, fh: u64, sx_flags: u32, sx_mask: u32 }
    /// A time of STATX.
    SxTime { tv_sec: i64, tv_nsec: u32, reserved: i32 }
    /// Reply of STATX.
    StatxOut {
        attr_valid: u64, attr_valid_nsec: u32, flags: u32, spare: [u64; 2],
        mask: u32, blksize: u32, attributes: u64, nlink: u32, uid: u32, gid: u32, mode: u16, spare0: u16,
        ino: u64, size: u64, blocks: u64, attributes_mask: u64,
        atime: SxTime, btime: SxTime, ctime: SxTime, mtime: SxTime,
        rdev_major: u32, rdev_minor: u32, dev_major: u32, dev_minor: u32, spare2: [u64; 14],
    }
    /// Start of an extension at the end of a request.
    ExtHeader { size: u32, kind: u32 }
}

/// Size of [`InHeader`] in bytes.
pub const IN_HEADER: usize = size_of::<InHeader>();
/// Size of [`OutHeader`] in bytes.
pub const OUT_HEADER: usize = size_of::<OutHeader>();

bitflags::bitflags! {
    /// `FUSE_*` flags of INIT; from bit 32 on they travel in `flags2`.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    #[allow(missing_docs)]
    pub struct InitFlags: u64 {
        const ASYNC_READ = 1 << 0;
        const ATOMIC_O_TRUNC = 1 << 3;
        const BIG_WRITES = 1 << 5;
        const DONT_MASK = 1 << 6;
        const AUTO_INVAL_DATA = 1 << 12;
        const DO_READDIRPLUS = 1 << 13;
        const READDIRPLUS_AUTO = 1 << 14;
        const ASYNC_DIO = 1 << 15;
        const PARALLEL_DIROPS = 1 << 18;
        const POSIX_ACL = 1 << 20;
        const MAX_PAGES = 1 << 22;
        const CACHE_SYMLINKS = 1 << 23;
        const SUBMOUNTS = 1 << 27;
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        const SETXATTR_EXT = 1 << 29;
        const INIT_EXT = 1 << 30;
        const CREATE_SUPP_GROUP = 1 << 34;
    }

    /// `FATTR_*`: which fields of [`SetattrIn`] count.
    #[derive(Clone, Copy, Debug)]
    #[allow(missing_docs)]
    pub struct SetattrValid: u32 {
        const MODE = 1 << 0;
        const UID = 1 << 1;
        const GID = 1 << 2;
        const SIZE = 1 << 3;
        const ATIME = 1 << 4;
        const MTIME = 1 << 5;
        const FH = 1 << 6;
        const ATIME_NOW = 1 << 7;
        const MTIME_NOW = 1 << 8;
        const LOCK_OWNER = 1 << 9;
        const CTIME = 1 << 10;
        const KILL_SUIDGID = 1 << 11;
    }
}

/// `FUSE_ATTR_SUBMOUNT` of [`Attr::flags`].
pub const ATTR_SUBMOUNT: u32 = 1;
/// `FUSE_OPEN_KILL_SUIDGID` of [`OpenIn::open_flags`].
pub const OPEN_KILL_SUIDGID: u32 = 1;
/// `FUSE_WRITE_CACHE` of [`WriteIn::write_flags`]: pages of a mapping, not a `write` call.
pub const WRITE_CACHE: u32 = 1;
/// `FUSE_WRITE_KILL_SUIDGID` of [`WriteIn::write_flags`].
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_FSYNC_FDATASYNC` of [`FsyncIn::fsync_flags`].
pub const FSYNC_FDATASYNC: u32 = 1;
/// `FUSE_SETXATTR_ACL_KILL_SGID` of [`SetxattrInExt::setxattr_flags`].
pub const SETXATTR_ACL_KILL_SGID: u32 = 1;
/// `FOPEN_KEEP_CACHE` of [`OpenOut::open_flags`].
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_NOFLUSH` of [`OpenOut::open_flags`].
pub const FOPEN_NOFLUSH: u32 = 1 << 5;
/// `FUSE_EXT_GROUPS` of [`ExtHeader::kind`].
pub const EXT_GROUPS: u32 = 32;

/// `enum fuse_opcode`, as far as the server answers them with more than ENOSYS.
#[allow(missing_docs)]
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const FLUSH: u32 = 25;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const IOCTL: u32 = 39;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
    pub const STATX: u32 = 52;
}
