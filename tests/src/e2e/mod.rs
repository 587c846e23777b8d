//! The end-to-end suite: tables of cases, run one after another in one boot of the lab.
//!
//! Every case proves that a guest ran: by KVM's own count of exits and by words of the guest's kernel.
//! What a failed case left (console, logs) is kept under `$KATAVM_OUT/e2e/<case>`.

mod agent;
mod beside;
mod block_root;
mod boot;
mod bootstrap;
mod clock;
mod containerd;
mod context;
pub(crate) mod cri;
mod crio;
mod disk;
mod docker;
mod failing;
mod files;
mod grow;
mod guest;
mod hostile;
mod idmap;
mod layers;
mod leftovers;
mod limit;
mod limits;
mod manifest;
mod memory;
mod network;
mod oci;
mod plug;
mod podman;
mod posix;
mod process;
mod races;
mod rebuild;
mod report;
mod rootless;
mod run;
mod sandbox_api;
mod shell;
mod shim;
mod snapshot;
mod survive;
mod systemd;
mod traffic;
mod user;
mod vsock;

use anyhow::Result;
use clap::ValueEnum;

pub use context::{CASE_LIMIT, Context};
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

impl Case {
    /// As it is told and chosen.
    #[must_use]
    pub fn full_name(&self) -> String {
        format!("{}::{}", self.group, self.name)
    }

    /// Whether one of `filters` is in its name; without filters all are wanted.
    #[must_use]
    pub fn is_wanted(&self, filters: &[String]) -> bool {
        let name = self.full_name();
        filters.is_empty() || filters.iter().any(|filter| name.contains(filter))
    }
}

/// Cases are run in five boots of the lab, which may run beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Boot {
    /// katavm by itself.
    Plain,
    /// katavm under engines and beside other runtimes.
    Engines,
    /// katavm's shim under containerd.
    Containerd,
    /// Pods as a kubelet has containerd run them.
    Cri,
    /// What takes systemd as PID 1.
    Systemd,
}

/// The cases of a boot in the order in which they run; `long` ones as well, if they are wanted.
#[must_use]
pub fn cases(boot: Boot, long: bool) -> Vec<Case> {
    let tables: &[&[Table]] = match boot {
        Boot::Plain if long => &[
            FIRST,
            &[
                failing::LONG,
                files::LONG,
                hostile::LONG,
                survive::LONG,
                memory::LONG,
                plug::LONG,
                posix::LONG,
                traffic::LONG,
                vsock::LONG,
            ],
            &run::LONG_TABLES,
            &run::TABLES,
            LAST,
        ],
        Boot::Plain => &[FIRST, &run::TABLES, LAST],
        Boot::Engines => &[ENGINES],
        Boot::Containerd if long => &[&[shim::LONG, block_root::LONG], &containerd::LONG, CONTAINERD],
        Boot::Containerd => &[CONTAINERD],
        Boot::Cri => &[&[cri::CASES, cri::SANDBOXER]],
        Boot::Systemd => &[&[systemd::CASES]],
    };
    tables.iter().copied().flatten().flat_map(rows).collect()
}

const FIRST: &[Table] = &[
    boot::CASES,
    agent::CASES,
    files::CASES,
    races::CASES,
    disk::CASES,
    plug::CASES,
    snapshot::CASES,
    network::CASES,
    traffic::CASES,
];
const LAST: &[Table] = &[
    oci::CASES,
    limits::CASES,
    memory::CASES,
    grow::CASES,
    clock::CASES,
    idmap::CASES,
    failing::CASES,
    hostile::CASES,
    survive::CASES,
    user::CASES,
];
const ENGINES: &[Table] = &[podman::CASES, rootless::CASES, docker::CASES, crio::CASES, beside::CASES];
const CONTAINERD: &[Table] = &[
    bootstrap::CASES,
    sandbox_api::CASES,
    containerd::BEFORE,
    containerd::OWN,
    containerd::AFTER,
    block_root::CASES,
    block_root::OWN,
    layers::CASES,
    shim::CASES,
];

fn rows((group, rows): &'static Table) -> impl Iterator<Item = Case> {
    rows.iter().map(move |(name, check)| Case { group, name, check: *check })
}

/// A group of cases: its name and its rows.
type Table = (&'static str, &'static [Row]);

/// A row of a table: the case's name and its check.
type Row = (&'static str, fn(&Context) -> Result<Verdict>);
