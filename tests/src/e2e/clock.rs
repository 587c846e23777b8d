//! The guest's time of day, which follows the host's.

use anyhow::Result;
use serde_json::json;

use super::agent::whole_rootfs;
use super::context::is_lab;
use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table =
    ("clock", &[("time_follows_the_hosts", followed), ("what_a_container_made_of_it_is_put_right", meddled_with)]);

/// What the scripts have in common: by how many seconds the guest is ahead.
const WORDS: &str = r#"
    ahead() { echo $(($(katavm exec c1 date +%s </dev/null) - $(date +%s))); }
    right() { local by=$(ahead); [ $by -ge -2 ] && [ $by -le 2 ]; }
    until_right() { for i in $(seq 60); do if right; then return; fi; sleep 0.5; done; echo "ahead by $(ahead) s" >&2; exit 1; }
"#;

fn followed(context: &Context) -> Result<Verdict> {
    if !is_lab() {
        return Ok(Verdict::Skipped("it sets the host's clock, and this is no lab".into()));
    }
    whole_rootfs(context)?;
    bundle(context, &["sleep", "100000"], |_| ())?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        &format!(
            "{WORDS}
             katavm run -d --log log c1 </dev/null >out 2>&1; until_right; echo right
             shift=0; trap 'date -s @$(($(date +%s) - shift)) >p' EXIT
             for by in 7200 -3600; do
                 date -s @$(($(date +%s) + by)) >p; shift=$((shift + by)); until_right; echo right after $by
             done
             cat log >&2; katavm delete --force c1"
        ),
    )?;
    expect(&output, &["right", "right after 7200", "right after -3600"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}

fn meddled_with(context: &Context) -> Result<Verdict> {
    whole_rootfs(context)?;
    bundle(context, &["sleep", "100000"], |config| {
        for kind in ["bounding", "effective", "permitted"] {
            let set = config["process"]["capabilities"][kind].as_array_mut().expect("the bundle has capabilities");
            set.push(json!("CAP_SYS_TIME"));
        }
    })?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        &format!(
            "{WORDS}
             katavm run -d --log log c1 </dev/null >out 2>&1
             katavm exec c1 date -s @1000000000 </dev/null >p; until_right; echo right
             cat log >&2; katavm delete --force c1"
        ),
    )?;
    expect(&output, &["right"])?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
