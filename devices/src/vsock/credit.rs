//! Credit of one connection (virtio 1.3, 5.10.6.3): free-running counters of 32 bits, compared by their differences.

use serde::{Deserialize, Serialize};

/// Bytes of one connection that the device takes before the host end has read them (`buf_alloc`).
///
/// The size Linux gives its own sockets: four packets of the largest size, so that one can be filled
/// while another is on its way, and little enough that every connection may use it up.
pub(super) const BUF_ALLOC: u32 = 256 * 1024;

/// What the guest does not know yet is told at the latest when it is this much, in bytes.
const UPDATE_STEP: u32 = BUF_ALLOC / 4;

/// The counters of both directions.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Credit {
    /// Bytes that the guest has sent.
    received: u32,
    /// Bytes of these that the host end has taken (our `fwd_cnt`).
    forwarded: u32,
    /// `forwarded` as the guest was told last.
    announced: u32,
    /// Bytes that were sent to the guest.
    sent: u32,
    /// The guest's `buf_alloc`.
    peer_alloc: u32,
    /// The guest's `fwd_cnt`.
    peer_forwarded: u32,
}

/// The guest sent more than it was allowed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Exceeded;

impl Credit {
    /// Takes note of `len` bytes from the guest.
    pub fn admit(&mut self, len: u32) -> Result<(), Exceeded> {
        let in_flight = self.received.wrapping_sub(self.announced);
        let used = in_flight.checked_add(len).ok_or(Exceeded)?;
        if used > BUF_ALLOC {
            return Err(Exceeded);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Bytes admitted and not yet forwarded; at most [`BUF_ALLOC`].
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// The host end has taken `len` of the bytes held.
    pub fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len.min(self.held()));
    }

    /// Whether the guest should hear of freed space by a packet of its own.
    pub fn wants_update(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= UPDATE_STEP
    }

    /// `buf_alloc` and `fwd_cnt` for a header that goes to the guest now.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (BUF_ALLOC, self.forwarded)
    }

    /// `buf_alloc` and `fwd_cnt` of a header from the guest.
    ///
    /// A count that is older than the last one, or ahead of what was sent, is left out of account:
    /// Linux puts packets of two threads into its queue in either order, so an old one is no offence.
    pub fn peer(&mut self, alloc: u32, forwarded: u32) {
        self.peer_alloc = alloc;
        let step = forwarded.wrapping_sub(self.peer_forwarded);
        if step <= self.sent.wrapping_sub(self.peer_forwarded) {
            self.peer_forwarded = forwarded;
        }
    }

    /// Bytes that may be sent to the guest now.
    pub fn available(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Takes note of `len` bytes sent to the guest.
    pub fn spend(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Whether counters from a snapshot can be true.
    pub fn is_consistent(&self) -> bool {
        let in_flight = self.received.wrapping_sub(self.announced);
        self.held() <= in_flight && in_flight <= BUF_ALLOC
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_may_fill_the_buffer_and_not_one_byte_more() {
        let mut credit = Credit::default();
        assert_eq!(credit.admit(BUF_ALLOC), Ok(()));
        assert_eq!(credit.admit(1), Err(Exceeded));
        assert_eq!(credit.admit(u32::MAX), Err(Exceeded));
        credit.forward(10);
        assert_eq!(credit.admit(1), Err(Exceeded), "space that was not announced is not the guest's yet");
        credit.announce();
        assert_eq!(credit.admit(10), Ok(()));
        assert_eq!(credit.admit(1), Err(Exceeded));
    }

    #[test]
    fn counts_of_the_guest_that_cannot_be_true_change_nothing() {
        let mut credit = Credit::default();
        credit.peer(1000, 0);
        credit.spend(600);
        credit.peer(1000, 500);
        assert_eq!(credit.available(), 900);
        credit.peer(1000, 400);
        assert_eq!(credit.available(), 900, "backwards");
        credit.peer(1000, 601);
        assert_eq!(credit.available(), 900, "ahead of what was sent");
        credit.peer(50, 500);
        assert_eq!(credit.available(), 0, "a shrunken buffer");
    }

    #[derive(Clone, Debug)]
    enum Step {
        Admit(u32),
        Forward(u32),
        Announce,
        Spend(u32),
        Peer(u32, u32),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            (0..BUF_ALLOC + 2).prop_map(Step::Admit),
            (0..BUF_ALLOC + 2).prop_map(Step::Forward),
            Just(Step::Announce),
            (0..=u32::MAX).prop_map(Step::Spend),
            (0..=u32::MAX, 0..=u32::MAX).prop_map(|(alloc, ratio)| Step::Peer(alloc, ratio)),
        ]
    }

    proptest! {
        /// The same rules in 64 bits, where nothing wraps; the counters start just below the wrap.
        #[test]
        fn wrapping_counters_agree_with_counters_that_do_not_wrap(start: u32, steps in proptest::collection::vec(step(), 1..200)) {
            let mut credit = Credit { received: start, forwarded: start, announced: start, sent: start, peer_alloc: 0, peer_forwarded: start };
            let base = u64::from(start);
            let (mut received, mut forwarded, mut announced, mut sent, mut alloc, mut peer) = (base, base, base, base, 0_u64, base);
            for step in steps {
                match step {
                    Step::Admit(len) => {
                        let fits = received - announced + u64::from(len) <= u64::from(BUF_ALLOC);
                        prop_assert_eq!(credit.admit(len).is_ok(), fits);
                        received += if fits { u64::from(len) } else { 0 };
                    }
                    Step::Forward(len) => {
                        credit.forward(len);
                        forwarded += u64::from(len).min(received - forwarded);
                    }
                    Step::Announce => {
                        prop_assert_eq!(credit.announce(), (BUF_ALLOC, forwarded as u32));
                        announced = forwarded;
                    }
                    Step::Spend(len) => {
                        let len = len.min(credit.available());
                        credit.spend(len);
                        sent += u64::from(len);
                    }
                    Step::Peer(new_alloc, ratio) => {
                        // Some true count between the last one and all that was sent.
                        peer += (sent - peer) * u64::from(ratio) / u64::from(u32::MAX);
                        alloc = u64::from(new_alloc);
                        credit.peer(new_alloc, peer as u32);
                    }
                }
                prop_assert_eq!(u64::from(credit.held()), received - forwarded);
                prop_assert_eq!(u64::from(credit.available()), alloc.saturating_sub(sent - peer));
                prop_assert_eq!(credit.wants_update(), forwarded - announced >= u64::from(BUF_ALLOC / 4));
                prop_assert!(credit.is_consistent());
                prop_assert!(credit.held() <= BUF_ALLOC);
            }
        }
    }
}
