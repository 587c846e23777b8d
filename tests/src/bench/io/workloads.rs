//! What is done to a disk.

/// One kind of load.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Its name in the output.
    pub name: &'static str,
    /// Writes, else reads.
    pub writes: bool,
    /// At random places, else one after the other.
    pub random: bool,
    /// Bytes of a request.
    pub len: usize,
    /// Requests at a time.
    pub depth: usize,
    /// Requests in all.
    pub count: usize,
}

const fn of(name: &'static str, writes: bool, random: bool, len: usize, depth: usize, count: usize) -> Workload {
    Workload { name, writes, random, len, depth, count }
}

const K4: usize = 4 << 10;
const M1: usize = 1 << 20;

/// All of them, in the order in which a guest goes through them.
pub const WORKLOADS: [Workload; 12] = [
    of("randread_4k_1", false, true, K4, 1, 128),
    of("randread_4k_32", false, true, K4, 32, 512),
    of("randwrite_4k_1", true, true, K4, 1, 128),
    of("randwrite_4k_32", true, true, K4, 32, 512),
    of("read_4k_1", false, false, K4, 1, 128),
    of("read_4k_32", false, false, K4, 32, 512),
    of("write_4k_1", true, false, K4, 1, 128),
    of("write_4k_32", true, false, K4, 32, 512),
    of("read_1m_1", false, false, M1, 1, 8),
    of("read_1m_32", false, false, M1, 32, 64),
    of("write_1m_1", true, false, M1, 1, 8),
    of("write_1m_32", true, false, M1, 32, 64),
];

/// Bytes of the disk.
pub const DISK: usize = 128 * M1;

/// CPUID leaf by which a guest marks the beginning of the first workload, with the leaf after for its end, and so on.
pub const MARKS: u32 = 0x4b41_0100;

/// The leaf by which it tells that all of them are done.
pub const DONE: u32 = MARKS + 2 * WORKLOADS.len() as u32;

/// The leaves of a workload's beginning and end.
#[must_use]
pub fn marks(index: usize) -> (u32, u32) {
    let begin = MARKS + 2 * index as u32;
    (begin, begin + 1)
}
