//! The page cache of containers that are at rest goes back to the kernel, and by the balloon's reports to the host.
//!
//! What is read by virtio-fs is in the host's page cache as well: to read it again costs little, while what the guest
//! keeps of it the host has twice. Free memory alone is reported by the balloon; files in memory are not free.
//!
//! The policy: what containers have of files in memory beyond [`KEPT`] is cold once nothing was added to it for [`REST`].
//! Then an eighth of it, at least [`LEAST`], is reclaimed every [`PERIOD`]. Where files come back that were reclaimed (the
//! kernel counts them), the containers were not at rest, and are left alone for [`PENALTY`].

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use super::CONTAINERS;

/// How often it looks.
const PERIOD: Duration = Duration::from_secs(2);
/// How often it looks where there is nothing to reclaim.
const LONG_PERIOD: Duration = Duration::from_secs(10);
/// How long nothing was added to what is cold.
const REST: Duration = Duration::from_secs(10);
/// How long containers are left alone that want back what was reclaimed.
const PENALTY: Duration = Duration::from_secs(120);
/// So much is left in memory, in bytes.
const KEPT: u64 = 16 << 20;
/// The least that is reclaimed at once, in bytes: fewer, larger steps make larger free blocks.
const LEAST: u64 = 32 << 20;
/// What may grow and is at rest still, in bytes a look: programs at rest write a log now and then.
const NOISE: u64 = 256 << 10;
/// Pages that may come back after a step.
const MOST_REFAULTS: u64 = 256;

/// What the kernel counts of a group (`memory.stat`, Documentation/admin-guide/cgroup-v2.rst).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Bytes of files in memory that are of no tmpfs, and what the kernel remembers of names.
    files: u64,
    /// Pages that were reclaimed and read again, since the group is there.
    refaults: u64,
}

impl Counts {
    fn of(stat: &str) -> Self {
        let number = |name: &str| {
            let value = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
            value.unwrap_or(0)
        };
        let files = number("active_file") + number("inactive_file") + number("slab_reclaimable");
        Self { files, refaults: number("workingset_refault_file") }
    }
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing, for so long.
    Wait(Duration),
    /// So many bytes are reclaimed.
    Reclaim(u64),
}

/// What was seen so far.
#[derive(Clone, Copy, Debug, Default)]
struct Policy {
    last: Counts,
    /// How long containers are at rest.
    at_rest: Duration,
    /// How long they are left alone still.
    left_alone: Duration,
    /// Something was reclaimed at the last look.
    has_reclaimed: bool,
}

impl Policy {
    /// What to do, `passed` after the last look.
    fn look(&mut self, now: Counts, passed: Duration) -> Step {
        let grown = now.files.saturating_sub(self.last.files);
        let refaults = now.refaults.saturating_sub(self.last.refaults);
        let is_wanted_back = self.has_reclaimed && refaults > MOST_REFAULTS;
        self.last = now;
        self.has_reclaimed = false;
        self.left_alone = if is_wanted_back { PENALTY } else { self.left_alone.saturating_sub(passed) };
        self.at_rest = if grown > NOISE { Duration::ZERO } else { self.at_rest + passed };
        let cold = now.files.saturating_sub(KEPT);
        if cold == 0 {
            return Step::Wait(LONG_PERIOD);
        }
        if !self.left_alone.is_zero() || self.at_rest < REST {
            return Step::Wait(PERIOD);
        }
        self.has_reclaimed = true;
        Step::Reclaim(cold.min((now.files / 8).max(LEAST)))
    }
}

/// Reclaims what is cold, for as long as the guest lives.
pub async fn watch() {
    let group = Path::new(CONTAINERS);
    let (mut policy, mut pause) = (Policy::default(), LONG_PERIOD);
    loop {
        tokio::time::sleep(pause).await;
        let Ok(stat) = fs::read_to_string(group.join("memory.stat")) else { return };
        pause = match policy.look(Counts::of(&stat), pause) {
            Step::Wait(pause) => pause,
            Step::Reclaim(bytes) => {
                // The kernel does it before it answers.
                let _ = tokio::task::spawn_blocking(move || reclaim(group, bytes)).await;
                PERIOD
            }
        };
    }
}

fn reclaim(group: &Path, bytes: u64) {
    let reclaimed = fs::write(group.join("memory.reclaim"), bytes.to_string());
    // EAGAIN: less than that could be.
    if let Err(error) = reclaimed
        && error.kind() != io::ErrorKind::WouldBlock
    {
        crate::debug!("cannot reclaim {bytes} bytes: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn counts(mib: u64, refaults: u64) -> Counts {
        Counts { files: mib * MIB, refaults }
    }

    #[test]
    fn counts_are_read() {
        let stat = "anon 1\nfile 2\nactive_file 3\ninactive_file 40\nslab_reclaimable 500\nworkingset_refault_file 7\n";
        assert_eq!(Counts::of(stat), Counts { files: 543, refaults: 7 });
        assert_eq!(Counts::of(""), Counts::default());
    }

    #[test]
    fn containers_at_rest_give_back_what_they_have_of_files() {
        let mut policy = Policy::default();
        let mut files = 1024;
        assert_eq!(policy.look(counts(files, 0), PERIOD), Step::Wait(PERIOD));
        let mut looks = 0;
        while files > KEPT / MIB {
            looks += 1;
            if let Step::Reclaim(bytes) = policy.look(counts(files, 0), PERIOD) {
                assert!((LEAST..=256 * MIB).contains(&bytes) || bytes == files * MIB - KEPT);
                files -= bytes / MIB;
            }
        }
        // Below a minute for 1 GiB.
        assert!(looks * PERIOD.as_secs() < 60, "{looks}");
        assert_eq!(policy.look(counts(files, 0), PERIOD), Step::Wait(LONG_PERIOD));
    }

    #[test]
    fn containers_that_read_are_left_alone() {
        let mut policy = Policy::default();
        for round in 1..100 {
            assert_eq!(policy.look(counts(100 + round, 0), PERIOD), Step::Wait(PERIOD), "{round}");
        }
    }

    #[test]
    fn what_is_wanted_back_stays_for_a_while() {
        let mut policy = Policy::default();
        policy.look(counts(500, 0), PERIOD);
        while policy.look(counts(500, 0), PERIOD) == Step::Wait(PERIOD) {}
        let mut waited = Duration::ZERO;
        // As much has come back as was taken.
        while policy.look(counts(500, 10_000), PERIOD) == Step::Wait(PERIOD) {
            waited += PERIOD;
        }
        assert_eq!(waited, PENALTY);
    }
}
