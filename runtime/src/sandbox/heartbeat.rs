//! The heartbeat: whether the guest is still there, and whether its clock is right.

use std::time::Duration;

use tokio::time::timeout;

use super::agent::{Agent, AgentError};
use super::{Sandbox, SandboxError};
use crate::host::{ClockChanges, now_ns};

/// The heartbeat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// How often the agent is asked whether it is there.
    pub every: Duration,
    /// How long it may take to answer: a container that takes all CPUs slows it down, and is in its right.
    pub patience: Duration,
}

impl Default for Beat {
    fn default() -> Self {
        Self { every: Duration::from_secs(10), patience: Duration::from_secs(30) }
    }
}

impl Sandbox {
    /// Keeps the guest's clock right, until the agent has not answered for too long although the machine runs, or can answer
    /// no more.
    pub async fn heartbeat_lost(&self, agent: &Agent) -> SandboxError {
        let Beat { every, patience } = self.beat;
        let mut changes = match ClockChanges::new() {
            Ok(changes) => changes,
            Err(error) => return SandboxError::Resource(error),
        };
        loop {
            // At once when the host's time was set, or the host was suspended.
            let _ = timeout(every, changes.next()).await;
            let asked = now_ns();
            let answer = match agent.check(patience).await {
                // Once more: a host that was itself suspended finds its clocks ahead of the guest's answer.
                Err(AgentError::Silent) => agent.check(patience).await,
                answer => answer,
            };
            let kept = match answer {
                Ok(guests) => match offset(asked, guests, now_ns()) {
                    Some(offset) => agent.adjust_clock(offset).await,
                    None => Ok(()),
                },
                Err(error) => Err(error),
            };
            match kept {
                Ok(()) => {}
                Err(AgentError::Refused { reason, .. }) => log::warn!("the guest's clock: {reason}"),
                Err(AgentError::Silent) => return SandboxError::Hangs { console: self.machine.console_tail() },
                Err(error) => return error.into(),
            }
        }
    }
}

/// What a clock is to be put forward by that showed `guests` at some moment between `asked` and `answered` (nanoseconds);
/// nothing if it may be right.
fn offset(asked: u64, guests: u64, answered: u64) -> Option<i64> {
    // The host's own was put back meanwhile: the next beat will tell.
    let took = answered.checked_sub(asked)?;
    if (asked..=answered).contains(&guests) {
        return None;
    }
    let offset = i128::from(asked + took / 2) - i128::from(guests);
    Some(i64::try_from(offset).unwrap_or(if offset < 0 { i64::MIN } else { i64::MAX }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_is_put_right_by_what_is_known_of_it() {
        for (asked, guests, answered, expected) in [
            (100, 100, 120, None),
            (100, 113, 120, None),
            (100, 120, 120, None),
            (100, 99, 120, Some(11)),
            (100, 121, 120, Some(-11)),
            (100, 0, 120, Some(110)),
            (100, 100, 100, None),
            // The host's clock was put back, or far forward, between.
            (100, 100, 50, None),
            (100, 100, 1_000_000, None),
            // What a hostile guest says is its own loss.
            (100, u64::MAX, 120, Some(i64::MIN)),
            (u64::MAX, 0, u64::MAX, Some(i64::MAX)),
        ] {
            assert_eq!(offset(asked, guests, answered), expected, "{asked} {guests} {answered}");
        }
    }
}
