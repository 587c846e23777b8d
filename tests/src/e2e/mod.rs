//! The end-to-end suite: tables of cases, run one after another in one boot of the lab.
//!
//! Every case proves that a guest ran: by KVM's own count of exits and by words of the guest's kernel.
//! What a failed case left (console, logs) is kept under `$KATAVM_OUT/e2e/<case>`.

mod agent;
mod boot;
mod context;
mod guest;
mod network;
mod report;
mod run;
mod snapshot;

use anyhow::Result;

pub use context::Context;
pub use guest::Guest;
pub use report::run;

/// What a case that did not fail says.
pub enum Verdict {
    /// It held.
    Passed,
    /// The machine lacks something; why.
    Skipped(String),
}

/// One thing that must hold.
pub struct Case {
    /// The table that it is in.
    pub group: &'static str,
    /// Its name, unique in the group.
    pub name: &'static str,
    /// Tries it.
    pub check: fn(&Context) -> Result<Verdict>,
}

/// All cases in the order in which they run.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (group, rows) in [boot::CASES, agent::CASES, run::CASES, network::CASES, snapshot::CASES] {
        cases.extend(rows.iter().map(|(name, check)| Case { group, name, check: *check }));
    }
    cases
}

/// A row of a table: the case's name and its check.
type Row = (&'static str, fn(&Context) -> Result<Verdict>);
