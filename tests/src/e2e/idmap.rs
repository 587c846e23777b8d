//! Identity-mapped mounts and user namespaces, beside crun: the same bundle says the same, and leaves the same files.

use std::fs;

use anyhow::Result;
use serde_json::json;

use super::leftovers::Traces;
use super::run::bundle;
use super::shell::{expect, script};
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "idmap",
    &[("files_of_a_mapped_mount_are_others", mapped), ("a_container_has_a_user_namespace_of_its_own", user_namespace)],
);

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

fn user_namespace(context: &Context) -> Result<Verdict> {
    let look = "tr -s ' ' </proc/self/uid_map; id -u; touch /new; stat -c %u:%g /new /; \
                mount -t tmpfs none /tmp && echo mounted; mknod /x c 1 3 2>/dev/null || echo no device; exec sleep ${1:-0}";
    bundle(context, &["sh", "-c", look], |config| {
        let map =
            json!([{ "containerID": 0, "hostID": 1000, "size": 500 }, { "containerID": 500, "hostID": 0, "size": 1 }]);
        let linux = &mut config["linux"];
        linux["namespaces"].as_array_mut().into_iter().for_each(|all| all.push(json!({ "type": "user" })));
        (linux["uidMappings"], linux["gidMappings"]) = (map.clone(), map);
        let all: Vec<_> = ["CAP_SYS_ADMIN", "CAP_MKNOD"].into();
        for set in ["bounding", "effective", "permitted"] {
            let set = config["process"]["capabilities"][set].as_array_mut();
            set.into_iter().for_each(|set| set.extend(all.iter().map(|name| json!(name))));
        }
    })?;
    let traces = Traces::of(context.scratch());
    let output = script(
        context,
        "chmod 711 .; chown -R 1000:1000 rootfs
         crun run c1 >crun; stat -c %u:%g rootfs/new >>crun; rm rootfs/new
         katavm run --id c1 . >katavm; stat -c %u:%g rootfs/new >>katavm; rm rootfs/new; cmp crun katavm; cat katavm
         jq '.process.args += [\"sh\", \"1000\"]' config.json >new; mv new config.json
         katavm run -d c2 </dev/null >out 2>&1; katavm exec c2 sh -c 'id -u; stat -c %u /proc/1'; katavm exec --user 500:7 c2 sh -c 'id -u; id -g'
         katavm delete --force c2",
    )?;
    let lines =
        [" 0 1000 500", " 500 0 1", "0", "0:0", "0:0", "mounted", "no device", "1000:1000", "0", "0", "500", "7"];
    expect(&output, &lines)?;
    traces.expect_nothing_new()?;
    Ok(Verdict::Passed)
}
