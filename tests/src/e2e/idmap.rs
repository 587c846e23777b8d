//! Identity-mapped mounts, beside crun: the same bundle says the same, and leaves the same files.

use std::fs;

use anyhow::Result;
use serde_json::json;

use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = ("idmap", &[("files_of_a_mapped_mount_are_others", mapped)]);

fn mapped(context: &Context) -> Result<Verdict> {
    let look = "stat -c '%u:%g' /mapped/f /mapped/below/g /all/below/g /own/f; cat /mapped/f; echo x >/mapped/new; stat -c '%u:%g' /mapped/new";
    let folder = bundle(context, &["sh", "-c", look], |config| {
        let map = json!([{ "containerID": 1000, "hostID": 0, "size": 500 }, { "containerID": 3000, "hostID": 4000, "size": 1 }]);
        let source = context.scratch().join("files");
        let mount = |destination: &str, option: &str| {
            json!({ "destination": destination, "type": "bind", "source": source, "options": ["rbind", option],
                    "uidMappings": map, "gidMappings": map })
        };
        let mounts = [
            mount("/mapped", "idmap"),
            mount("/all", "ridmap"),
            json!({ "destination": "/own", "type": "bind", "source": source, "options": ["rbind"] }),
        ];
        config["mounts"].as_array_mut().into_iter().for_each(|all| all.extend(mounts.clone()));
    })?;
    fs::create_dir_all(folder.join("files/below"))?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "echo mine >files/f; chown 1000:3000 files/f; mount -t tmpfs below files/below; trap 'umount files/below' EXIT
         touch files/below/g; chown 1007:1008 files/below/g; chown 1000:1000 files
         crun run c1 >crun; stat -c %u:%g files/new >>crun; rm files/new
         katavm run --id c1 . >katavm; stat -c %u:%g files/new >>katavm; rm files/new; cmp crun katavm; cat katavm
         katavm create --pid-file pid c2 </dev/null >out 2>&1; stat -c %u:%g /proc/$(cat pid)/root/mapped/f; katavm delete --force c2
         jq '.mounts[2].type = \"tmpfs\" | .mounts[2].options = [\"idmap\"]' config.json >new; mv new config.json
         katavm run --id c3 . 2>&1 | grep -o 'mounts.2.: cannot be identity-mapped.*'",
    )?;
    let refused = "mounts[2]: cannot be identity-mapped (uidMappings, gidMappings, idmap, ridmap): it is no directory or \
                   file of the host that is bind-mounted";
    let lines = ["0:4000", "1007:1008", "7:8", "1000:3000", "mine", "0:0", "1000:1000", "0:4000", refused];
    expect(&output, &lines)?;

    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
