//! The Sandbox API, asked as a containerd with `sandboxer = "shim"` asks.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{CreateTaskRequest, DeleteRequest, ShutdownRequest, StartRequest, WaitRequest};
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, PlatformRequest, SandboxMetricsRequest, SandboxStatusRequest,
    ShutdownSandboxRequest, StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use protobuf::MessageField;
use protobuf::well_known_types::any::Any;
use tokio::runtime::Runtime;

use super::bootstrap::{ID as POD, bundle, soon, start, wait_until_gone};
use super::leftovers::Traces;
use super::shell::script;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "sandbox_api",
    &[
        ("a_sandbox_is_there_before_its_containers_and_after_them", life),
        ("one_that_is_never_started_goes", never_started),
        ("a_killed_server_leaves_nothing", killed),
    ],
);

/// `PodSandboxConfig { hostname: "web" }`
const CONFIG: &[u8] = b"\x12\x03web";

fn life(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let folder = bundle(context)?;
    let address = String::from_utf8(start(&folder, Stdio::null())?)?;
    let runtime = Runtime::new()?;
    let client = runtime.block_on(Client::connect(&address))?;
    let (sandbox, task) = (SandboxClient::new(client.clone()), TaskClient::new(client));
    let pid = runtime.block_on(async {
        create(&sandbox, &folder).await?;
        ensure!(create(&sandbox, &folder).await.is_err(), "it was made twice");
        ensure!(state(&sandbox).await? == "SANDBOX_NOTREADY");
        let early = CreateTaskRequest { id: "c0".into(), bundle: folder.display().to_string(), ..Default::default() };
        let refused = task.create(soon(), &early).await.err().context("a container before the sandbox")?;
        ensure!(refused.to_string().contains("the sandbox is not started"), "{refused}");
        let started = sandbox
            .start_sandbox(soon(), &StartSandboxRequest { sandbox_id: POD.into(), ..Default::default() })
            .await?;
        ensure!(state(&sandbox).await? == "SANDBOX_READY");
        sandbox.ping_sandbox(soon(), &PingRequest { sandbox_id: POD.into(), ..Default::default() }).await?;
        let platform = PlatformRequest { sandbox_id: POD.into(), ..Default::default() };
        let platform = sandbox.platform(soon(), &platform).await?.platform;
        ensure!((platform.os.as_str(), platform.architecture.as_str()) == ("linux", "amd64"));
        Ok(started.pid)
    })?;
    for id in ["m1", "m2"] {
        // As the CRI plugin configures a pod's containers.
        script(
            context,
            &format!(
                "mkdir {id} {id}/rootfs; cp -a rootfs/. {id}/rootfs; jq '.process.args = [\"sh\", \"-c\", \"echo $(hostname) $(uname -r); exit 7\"]
                     | .linux.namespaces |= map(if .type | IN(\"ipc\", \"uts\", \"network\") then .path = \"/proc/{pid}/ns/\" + (if .type == \"network\" then \"net\" else .type end) else . end)' \
                     config.json >{id}/config.json"
            ),
        )?;
    }
    runtime.block_on(async {
        for id in ["m1", "m2"] {
            let bundle = folder.join(id);
            let log = bundle.join("log");
            let create = CreateTaskRequest {
                id: id.into(),
                bundle: bundle.display().to_string(),
                stdout: format!("file://{}", log.display()),
                ..Default::default()
            };
            task.create(soon(), &create).await?;
            task.start(soon(), &StartRequest { id: id.into(), ..Default::default() }).await?;
            let exit = task.wait(soon(), &WaitRequest { id: id.into(), ..Default::default() }).await?;
            ensure!(exit.exit_status == 7, "{exit}");
            let said = fs::read_to_string(&log)?;
            ensure!(said == format!("web {}\n", context.kernel_release()?), "{said:?}");
            let metrics = SandboxMetricsRequest { sandbox_id: POD.into(), ..Default::default() };
            let metrics = sandbox.sandbox_metrics(soon(), &metrics).await?.metrics;
            ensure!(metrics.data.type_url == "io.containerd.cgroups.v2.Metrics", "{}", metrics.data.type_url);
        }
        for id in ["m1", "m2"] {
            task.delete(soon(), &DeleteRequest { id: id.into(), ..Default::default() }).await?;
            task.shutdown(soon(), &ShutdownRequest { id: id.into(), ..Default::default() }).await?;
        }
        ensure!(state(&sandbox).await? == "SANDBOX_READY", "it went with its last container");
        let wait = WaitSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
        let stop = StopSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
        let (exit, stopped) = tokio::join!(sandbox.wait_sandbox(soon(), &wait), sandbox.stop_sandbox(soon(), &stop));
        stopped?;
        ensure!(exit?.exit_status == 0);
        ensure!(state(&sandbox).await? == "SANDBOX_NOTREADY");
        shut_down(&sandbox).await
    })?;
    wait_until_gone(Path::new(address.trim_start_matches("unix://")))?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn never_started(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let folder = bundle(context)?;
    // containerd has none for a sandbox.
    fs::remove_file(folder.join("config.json"))?;
    let address = String::from_utf8(start(&folder, Stdio::null())?)?;
    Runtime::new()?.block_on(async {
        let sandbox = SandboxClient::new(Client::connect(&address).await?);
        create(&sandbox, &folder).await?;
        let stop = StopSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
        sandbox.stop_sandbox(soon(), &stop).await?;
        shut_down(&sandbox).await
    })?;
    wait_until_gone(Path::new(address.trim_start_matches("unix://")))?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn killed(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let folder = bundle(context)?;
    let address = String::from_utf8(start(&folder, Stdio::null())?)?;
    Runtime::new()?.block_on(async {
        let sandbox = SandboxClient::new(Client::connect(&address).await?);
        create(&sandbox, &folder).await?;
        sandbox.start_sandbox(soon(), &StartSandboxRequest { sandbox_id: POD.into(), ..Default::default() }).await?;
        Ok::<_, anyhow::Error>(())
    })?;
    // As containerd does when the connection breaks.
    script(
        context,
        "pkill -KILL -x katavm-sandbox; until [ -z \"$(pgrep -x 'katavm-(sandbox|standin|watcher)')\" ]; do sleep 0.1; done
         containerd-shim-katavm-v2 -namespace scripted -address /run/scripted.sock -id c1 -bundle $PWD delete >deleted",
    )?;
    ensure!(!Path::new(address.trim_start_matches("unix://")).exists(), "{address} is still there");
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

async fn create(sandbox: &SandboxClient, folder: &Path) -> Result<()> {
    let options = Any { type_url: "runtime.v1.PodSandboxConfig".into(), value: CONFIG.into(), ..Default::default() };
    let request = CreateSandboxRequest {
        sandbox_id: POD.into(),
        bundle_path: folder.display().to_string(),
        options: MessageField::some(options),
        ..Default::default()
    };
    sandbox.create_sandbox(soon(), &request).await?;
    Ok(())
}

async fn state(sandbox: &SandboxClient) -> Result<String> {
    let request = SandboxStatusRequest { sandbox_id: POD.into(), ..Default::default() };
    Ok(sandbox.sandbox_status(soon(), &request).await?.state)
}

async fn shut_down(sandbox: &SandboxClient) -> Result<()> {
    let request = ShutdownSandboxRequest { sandbox_id: POD.into(), ..Default::default() };
    sandbox.shutdown_sandbox(soon(), &request).await?;
    Ok(())
}
