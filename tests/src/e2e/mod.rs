//! The end-to-end suite: tables of cases, run one after another in one boot of the lab.
//!
//! Every case proves that a guest ran: by KVM's own count of exits and by words of the guest's kernel.
//! What a failed case left (console, logs) is kept under `$KATAVM_OUT/e2e/<case>`.

mod agent;
mod beside;
mod boot;
mod context;
mod docker;
mod failing;
mod guest;
mod hostile;
mod leftovers;
mod limits;
mod manifest;
mod network;
mod oci;
mod podman;
mod process;
mod rebuild;
mod report;
mod run;
mod shell;
mod snapshot;
mod survive;
mod user;

use anyhow::Result;

pub use context::Context;
pub use guest::Guest;
pub use rebuild::enter;
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

/// All cases in the order in which they run; `long` ones as well, if they are wanted.
#[must_use]
pub fn cases(long: bool) -> Vec<Case> {
    let first: &[Table] = &[boot::CASES, agent::CASES, snapshot::CASES, network::CASES];
    let last: &[Table] = &[
        oci::CASES,
        limits::CASES,
        podman::CASES,
        docker::CASES,
        beside::CASES,
        failing::CASES,
        hostile::CASES,
        survive::CASES,
        user::CASES,
    ];
    let long: &[Table] = if long { &[failing::LONG, hostile::LONG, survive::LONG, run::LONG_TABLES[0]] } else { &[] };
    let tables = first.iter().chain(long).chain(&run::TABLES).chain(last);
    let cases = tables.flat_map(|(group, rows)| rows.iter().map(move |(name, check)| (group, name, check)));
    cases.map(|(group, name, check)| Case { group, name, check: *check }).collect()
}

/// A group of cases: its name and its rows.
type Table = (&'static str, &'static [Row]);

/// A row of a table: the case's name and its check.
type Row = (&'static str, fn(&Context) -> Result<Verdict>);
