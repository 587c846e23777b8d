//! Running cases and telling how they went.

use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use super::context::Group;
use super::{Case, Context, Verdict, limit};

/// Runs the cases whose `group::name` contains one of `filters` (all, if there are none); true if none failed. This program
/// ends when one takes longer than `limit`.
///
/// # Errors
/// When the suite itself cannot be set up or print.
pub fn run(cases: &[Case], filters: &[String], limit: Duration, out: &mut impl Write) -> Result<bool> {
    let (mut passed, mut failed, mut skipped) = (0, Vec::new(), 0);
    let mut group = ("", Rc::default());
    for case in cases {
        let name = case.full_name();
        if !case.is_wanted(filters) {
            continue;
        }
        if group.0 != case.group {
            group = (case.group, Rc::new(Group::default()));
        }
        let context = Context::in_group(&name, Rc::clone(&group.1), limit)?;
        let _limit = limit::watch(&name, limit)?;
        let start = Instant::now();
        let verdict = catch_unwind(AssertUnwindSafe(|| (case.check)(&context)))
            .unwrap_or_else(|panic| Err(anyhow!("panicked: {}", panic_text(&panic))));
        let time = start.elapsed().as_secs_f32();
        match verdict {
            Ok(Verdict::Passed) => {
                passed += 1;
                writeln!(out, "test {name} ... ok ({time:.1} s)")?;
            }
            Ok(Verdict::Skipped(why)) => {
                skipped += 1;
                writeln!(out, "test {name} ... SKIPPED: {why}")?;
            }
            Err(error) => {
                let kept = context.keep(&format!("{error:#}\n"))?;
                writeln!(out, "test {name} ... FAILED ({time:.1} s)\n{error:#}\n(kept in {})", kept.display())?;
                failed.push(name);
            }
        }
    }
    if !failed.is_empty() {
        writeln!(out, "failed: {}", failed.join(", "))?;
    }
    writeln!(out, "{passed} passed, {} failed, {skipped} skipped", failed.len())?;
    Ok(failed.is_empty() && passed > 0)
}

fn panic_text(panic: &Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()
}
