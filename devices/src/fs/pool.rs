//! The request queue, which several threads attend to: one of them at a time takes requests, and serves what it takes.
//!
//! As long as requests are soon done, one thread takes and serves them all, and the others sleep: no lock is fought for and
//! nobody is woken. But a request may wait for long on the host: for a slow disk, for the server of a network file system,
//! for another process to let go of its lease on a file (fcntl(2), F_SETLEASE). When one has taken longer than [`PATIENCE`],
//! another thread goes on with those that came after it. Whoever was late gives back what it has and sleeps.

use std::mem;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use log::error;

use super::FsShare;
use crate::memory::GuestMemory;
use crate::rate::Timer;
use crate::virtio::ReadyQueues;
use crate::virtio::queue::{Chain, QueueSet, QueueState};

/// So many requests may wait on the host at once; those that come then wait for one of them.
pub(super) const THREADS: usize = 4;
/// How long a request may take until another thread goes on. It is noticed after at most twice as long.
const PATIENCE: Duration = Duration::from_millis(5);
/// Requests that one turn takes, so that a VMM that wants to stop gets its turn.
const REQUESTS_PER_TURN: usize = 64;

/// The request queue and who is at it.
pub(super) struct Pool {
    share: FsShare,
    state: Mutex<State>,
    /// Rings when it is time to see whether the requests get on.
    alarm: Timer,
    /// Nothing is under way any more.
    at_rest: Condvar,
}

struct State {
    /// The request queue alone.
    queue: QueueSet,
    /// The turn of the thread that takes requests.
    taker: Option<u64>,
    turns: u64,
    /// Requests taken so far.
    taken: u64,
    /// What `taken` was when the alarm was set, which is to ring.
    watched: Option<u64>,
    /// Requests that were taken and are not done.
    under_way: usize,
    /// Somebody waits until that is 0.
    awaited: bool,
}

impl Pool {
    /// The pool of `queue`, which is the request queue alone.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn new(share: FsShare, queue: QueueSet) -> std::io::Result<Arc<Self>> {
        let state = State { queue, taker: None, turns: 0, taken: 0, watched: None, under_way: 0, awaited: false };
        let (state, alarm) = (Mutex::new(state), Timer::new()?);
        Ok(Arc::new(Self { share, state, alarm, at_rest: Condvar::new() }))
    }

    /// A driver is there.
    pub fn start(&self, ready: ReadyQueues) {
        self.lock().queue.activate(ready);
    }

    /// No driver is there, and no request of the last one is under way: its memory may be others' after this.
    pub fn stop(&self) {
        let mut state = self.lock();
        state.queue.deactivate();
        state.awaited = true;
        let rest = self.at_rest.wait_while(state, |state| state.under_way > 0);
        rest.unwrap_or_else(PoisonError::into_inner).awaited = false;
    }

    /// The state of the queue, if it is in use. No request may be under way.
    pub fn save(&self) -> Option<Vec<QueueState>> {
        self.lock().queue.save()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There are requests.
    fn kicked(&self) {
        let state = self.lock();
        // Who takes requests at the moment sees these as well, or is found to be late.
        if state.queue.take_kick(0) && state.taker.is_none() {
            self.take_turn(state);
        }
    }

    /// It is time to see whether requests get on.
    fn rung(&self) {
        if !self.alarm.has_rung() {
            // Another thread was quicker.
            return;
        }
        let mut state = self.lock();
        let watched = state.watched.take();
        if state.taker.is_none() {
            return;
        }
        if watched == Some(state.taken) {
            self.take_turn(state);
        } else {
            self.watch(&mut state);
        }
    }

    fn watch(&self, state: &mut State) {
        if state.watched.is_none() {
            match self.alarm.arm(PATIENCE) {
                Ok(()) => state.watched = Some(state.taken),
                Err(error) => error!("nobody will see whether a shared file is slow: {error}"),
            }
        }
    }

    /// Takes and serves requests until there are no more, or another thread does.
    fn take_turn<'s>(&'s self, mut state: MutexGuard<'s, State>) {
        let turn = state.begin();
        for _ in 0..REQUESTS_PER_TURN {
            let Some((chain, memory)) = state.take() else {
                if state.queue.enable_kicks(0) {
                    continue;
                }
                state.taker = None;
                return;
            };
            self.watch(&mut state);
            let under_way = UnderWay(self);
            drop(state);
            let written = self.share.handle(chain.reader(&memory), chain.writer(&memory));
            state = under_way.done();
            state.queue.add_used(0, chain.head(), written);
            state.queue.notify(0);
            if state.taker != Some(turn) {
                return;
            }
        }
        state.taker = None;
        state.queue.kick(0);
    }
}

impl State {
    /// Has the calling thread take requests from now on; gives the name of its turn.
    fn begin(&mut self) -> u64 {
        self.queue.fail_with_others();
        self.turns += 1;
        self.taker = Some(self.turns);
        self.queue.disable_kicks(0);
        self.turns
    }

    fn take(&mut self) -> Option<(Chain, GuestMemory)> {
        let memory = self.queue.memory()?;
        let chain = self.queue.pop(0)?;
        self.taken += 1;
        self.under_way += 1;
        Some((chain, memory))
    }

    fn end(&mut self, at_rest: &Condvar) {
        self.under_way -= 1;
        if self.under_way == 0 && self.awaited {
            at_rest.notify_all();
        }
    }
}

/// A request that is under way, until it is done or its thread panics.
struct UnderWay<'p>(&'p Pool);

impl<'p> UnderWay<'p> {
    fn done(self) -> MutexGuard<'p, State> {
        let pool = self.0;
        mem::forget(self);
        let mut state = pool.lock();
        state.end(&pool.at_rest);
        state
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.lock().end(&self.0.at_rest);
    }
}

/// The event loop's tag of the alarm; the request queue has 0.
const ALARM: u32 = 1;

/// One thread's place in a pool.
pub(super) struct Attendant(pub Arc<Pool>);

impl MutEventSubscriber for Attendant {
    fn init(&mut self, ops: &mut EventOps) {
        let state = self.0.lock();
        // Of those that sleep one is enough.
        let one = EventSet::IN | EventSet::EXCLUSIVE;
        let kicks = state.queue.kicks().iter().map(|kick| Events::with_data(kick, 0, one));
        for events in kicks.chain([Events::with_data(&self.0.alarm, ALARM, one)]) {
            if let Err(error) = ops.add(events) {
                error!("cannot watch the requests for shared files: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        if events.data() == ALARM { self.0.rung() } else { self.0.kicked() }
    }
}
