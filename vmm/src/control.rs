//! Pausing and stopping threads without losing a wake-up.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// What all threads of a group shall do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// Work.
    Run,
    /// Park until the goal changes.
    Pause,
    /// Return.
    Stop,
}

struct State {
    goal: Goal,
    /// Threads that have not returned.
    threads: usize,
    /// Those of them that are parked.
    parked: usize,
}

/// The goal of a group of threads, and who has reached it.
#[derive(Clone)]
pub struct Control(Arc<(Mutex<State>, Condvar)>);

impl Control {
    /// A group that starts out with `goal`.
    pub fn new(goal: Goal) -> Self {
        Self(Arc::new((Mutex::new(State { goal, threads: 0, parked: 0 }), Condvar::new())))
    }

    /// A thread joins the group; it leaves when the guard is dropped, also by a panic.
    pub fn join(&self) -> Membership {
        self.lock().threads += 1;
        Membership(self.clone())
    }

    /// Sets the goal. The caller then kicks the threads out of whatever blocks them.
    pub fn set(&self, goal: Goal) {
        self.lock().goal = goal;
        self.0.1.notify_all();
    }

    /// What the goal is now.
    pub fn goal(&self) -> Goal {
        self.lock().goal
    }

    /// Waits until every thread is parked or gone.
    pub fn wait_parked(&self) {
        let mut state = self.lock();
        while state.parked < state.threads && state.goal == Goal::Pause {
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Parks the calling thread while the goal is to pause.
    pub fn park(&self) {
        let mut state = self.lock();
        state.parked += 1;
        self.0.1.notify_all();
        while state.goal == Goal::Pause {
            state = self.0.1.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A thread's place in a group.
pub struct Membership(Control);

impl Drop for Membership {
    fn drop(&mut self) {
        self.0.lock().threads -= 1;
        self.0.0.1.notify_all();
    }
}
