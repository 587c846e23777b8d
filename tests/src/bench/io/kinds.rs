//! What is measured: kinds of devices, and what is done with each.

use super::exchange::Exchange;
use super::worker::disk::Requests;
use super::worker::files::Files;

/// One kind of device. A guest has one of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// virtio-blk.
    Disk,
    /// virtio-net, on a tap.
    Network,
    /// virtio-fs.
    Files,
    /// virtio-vsock.
    Vsock,
}

/// One kind of load.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in the output.
    pub name: &'static str,
    /// How many requests, round trips, MiB or files it is made of: what one of them costs is printed.
    pub count: usize,
    /// What is done.
    pub work: Work,
}

/// What a guest does.
#[derive(Clone, Copy, Debug)]
pub enum Work {
    /// Requests of a disk.
    Requests(Requests),
    /// Talking with the host by connections.
    Exchange(Exchange),
    /// System calls on shared files.
    Files(Files),
}

impl Kind {
    /// All of them, in the order in which they are measured.
    pub const ALL: [Self; 4] = [Self::Disk, Self::Network, Self::Files, Self::Vsock];

    /// The name in the output and on the guest's command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Network => "network",
            Self::Files => "files",
            Self::Vsock => "vsock",
        }
    }

    /// The kind of that name.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What is done with it, in the order in which a guest goes through them.
    #[must_use]
    pub fn workloads(self) -> &'static [Workload] {
        match self {
            Self::Disk => &DISK,
            Self::Network => &NETWORK,
            Self::Files => &FILES,
            Self::Vsock => &VSOCK,
        }
    }
}

/// CPUID leaf by which a guest tells that all workloads are done.
pub const DONE: u32 = 0x4b41_00ff;
/// The leaf for the beginning of the first workload, with the leaf after for its end, and so on.
const MARKS: u32 = DONE + 1;

/// The leaves of a workload's beginning and end.
#[must_use]
pub fn marks(index: usize) -> (u32, u32) {
    let begin = MARKS + 2 * index as u32;
    (begin, begin + 1)
}

const fn requests(name: &'static str, writes: bool, random: bool, len: usize, depth: usize, count: usize) -> Workload {
    Workload { name, count, work: Work::Requests(Requests { writes, random, len, depth }) }
}

const fn exchange(name: &'static str, count: usize, work: Exchange) -> Workload {
    Workload { name, count, work: Work::Exchange(work) }
}

const fn files(name: &'static str, count: usize, work: Files) -> Workload {
    Workload { name, count, work: Work::Files(work) }
}

const K4: usize = 4 << 10;
const M1: usize = 1 << 20;

const DISK: [Workload; 12] = [
    requests("randread_4k_1", false, true, K4, 1, 128),
    requests("randread_4k_32", false, true, K4, 32, 512),
    requests("randwrite_4k_1", true, true, K4, 1, 128),
    requests("randwrite_4k_32", true, true, K4, 32, 512),
    requests("read_4k_1", false, false, K4, 1, 128),
    requests("read_4k_32", false, false, K4, 32, 512),
    requests("write_4k_1", true, false, K4, 1, 128),
    requests("write_4k_32", true, false, K4, 32, 512),
    requests("read_1m_1", false, false, M1, 1, 8),
    requests("read_1m_32", false, false, M1, 32, 64),
    requests("write_1m_1", true, false, M1, 1, 8),
    requests("write_1m_32", true, false, M1, 32, 64),
];

const NETWORK: [Workload; 5] = [
    exchange("round_trip", 128, Exchange::RoundTrips),
    exchange("send_1m_1", 16, Exchange::Sends { streams: 1 }),
    exchange("send_1m_8", 16, Exchange::Sends { streams: 8 }),
    exchange("receive_1m_1", 16, Exchange::Receives { streams: 1 }),
    exchange("receive_1m_8", 16, Exchange::Receives { streams: 8 }),
];

const VSOCK: [Workload; 5] = NETWORK;

const FILES: [Workload; 9] = [
    files("stat", 512, Files::Look),
    files("statx_birth", 512, Files::LookAtBirth),
    files("read_4k", 512, Files::Read),
    files("open_again", 256, Files::OpenAgain),
    files("list", 512, Files::List),
    files("create_4k", 128, Files::Create),
    files("remove", 128, Files::Remove),
    files("read_1m", 32, Files::ReadLarge),
    files("write_1m", 16, Files::WriteLarge),
];
