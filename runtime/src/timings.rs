//! When the steps of a run happened (`--timings`).

use std::fmt::Write;

use katavm_vmm::now;
use serde_json::{Map, Value, json};

/// Moments in nanoseconds of CLOCK_BOOTTIME, in the order of their noting.
#[derive(Debug)]
pub struct Timings {
    start: u64,
    marks: Vec<(&'static str, u64)>,
    facts: Vec<(&'static str, Value)>,
}

/// The process was made; what all others are counted from.
pub const PROCESS_START: &str = "process_start";
/// `main` began.
pub const MAIN: &str = "main";
/// KVM_CREATE_VM returned.
pub const VM_CREATED: &str = "vm_created";
/// The first vCPU was about to enter the guest.
pub const FIRST_RUN: &str = "first_kvm_run";
/// The guest's kernel began to count its time: shortly after its entry.
pub const GUEST_CLOCK: &str = "guest_clock_start";
/// The agent's `main` began.
pub const AGENT_MAIN: &str = "agent_main";
/// The agent said that it is ready.
pub const AGENT_READY: &str = "agent_ready";
/// The agent had made the container.
pub const CREATED: &str = "container_created";
/// The container's process was let go.
pub const RUNNING: &str = "container_running";
/// The container's process had ended.
pub const EXITED: &str = "container_exited";
/// The virtual machine had ended.
pub const VM_ENDED: &str = "vm_ended";

impl Timings {
    /// Counts from when this process was made, and notes `main` as now.
    #[must_use]
    pub fn start() -> Self {
        let main = now();
        // The kernel tells it in hundredths of a second, rounded down.
        let start = crate::host::start_time_ns().map_or(main, |start| start.min(main));
        Self { start, marks: vec![(PROCESS_START, start), (MAIN, main)], facts: Vec::new() }
    }

    /// Notes that a step has happened now.
    pub fn mark(&mut self, step: &'static str) {
        self.mark_at(step, now());
    }

    /// Notes when a step has happened; 0 is never.
    pub fn mark_at(&mut self, step: &'static str, at: u64) {
        if at != 0 {
            self.marks.push((step, at));
        }
    }

    /// Notes something that is no moment.
    pub fn fact(&mut self, name: &'static str, value: impl Into<Value>) {
        self.facts.push((name, value.into()));
    }

    /// One line of JSON: `NAME_ns` from the start of the process on, and the facts.
    #[must_use]
    pub fn to_json(&self) -> String {
        let moments = self.sorted().into_iter().map(|(step, at)| (format!("{step}_ns"), json!(at)));
        let facts = self.facts.iter().map(|(name, value)| ((*name).to_owned(), value.clone()));
        let all: Map<String, Value> = moments.chain(facts).collect();
        json!({ "timings": all }).to_string()
    }

    /// A table for people: milliseconds from the start of the process on, and since the line above.
    #[must_use]
    pub fn to_table(&self) -> String {
        let mut table = format!("{:<20} {:>10} {:>10}\n", "step", "ms", "+ms");
        let mut last = 0;
        for (step, at) in self.sorted() {
            let (total, more) = (milliseconds(at), milliseconds(at - last));
            // Writing to a String cannot fail.
            let _ = writeln!(table, "{:<20} {total:>10.3} {more:>10.3}", step.replace('_', " "));
            last = at;
        }
        for (name, value) in &self.facts {
            let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let _ = writeln!(table, "{:<20} {value:>10}", name.replace('_', " "));
        }
        table
    }

    fn sorted(&self) -> Vec<(&'static str, u64)> {
        let mut marks: Vec<_> = self.marks.iter().map(|(step, at)| (*step, at.saturating_sub(self.start))).collect();
        marks.sort_by_key(|(_, at)| *at);
        marks
    }
}

#[expect(clippy::cast_precision_loss, reason = "for people to read")]
fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings() -> Timings {
        let mut timings = Timings { start: 1_000_000, marks: vec![(PROCESS_START, 1_000_000)], facts: Vec::new() };
        timings.mark_at(AGENT_READY, 5_500_000);
        timings.mark_at(FIRST_RUN, 3_000_000);
        timings.mark_at(EXITED, 0);
        timings.fact("kvm_exits", 12);
        timings.fact("guest_kernel", "6.12");
        timings
    }

    #[test]
    fn json_counts_from_the_start_in_nanoseconds() {
        let value: Value = serde_json::from_str(&timings().to_json()).unwrap();
        let expected = json!({ "timings": {
            "process_start_ns": 0, "first_kvm_run_ns": 2_000_000, "agent_ready_ns": 4_500_000,
            "kvm_exits": 12, "guest_kernel": "6.12",
        }});
        assert_eq!(value, expected);
    }

    #[test]
    fn the_table_is_in_the_order_of_time() {
        let table = timings().to_table();
        let lines: Vec<_> = table.lines().map(|line| line.split_ascii_whitespace().collect::<Vec<_>>()).collect();
        assert_eq!(lines[2], ["first", "kvm", "run", "2.000", "2.000"]);
        assert_eq!(lines[3], ["agent", "ready", "4.500", "2.500"]);
        assert_eq!(lines[4], ["kvm", "exits", "12"]);
        assert_eq!(lines[5], ["guest", "kernel", "6.12"]);
    }

    #[test]
    fn the_process_starts_before_main() {
        let timings = Timings::start();
        assert!(timings.marks[0].1 <= timings.marks[1].1);
    }
}
