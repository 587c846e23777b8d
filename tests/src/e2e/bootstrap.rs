//! The shim as a containerd starts it, played by this program: what it is told on standard input, and what it answers.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, DeleteRequest, ShutdownRequest, StartRequest, WaitRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message as _;
use protobuf::well_known_types::any::Any;
use tokio::runtime::Runtime;

use super::leftovers::Traces;
use super::shell::script;
use super::{Context, Table, Verdict};

/// The table.
pub const CASES: Table = (
    "bootstrap",
    &[
        ("parameters_in_protobuf_are_answered_so_and_a_container_lives", parameters),
        ("other_standard_inputs_are_answered_by_the_address", other_inputs),
        ("the_runtime_describes_itself", info),
    ],
);

const SHIM: &str = "containerd-shim-katavm-v2";
/// The container, or the sandbox.
pub(super) const ID: &str = "c1";
const NAMESPACE: &str = "scripted";
/// How long `start` may take, emulated and on a busy machine: much less than forever.
const PATIENCE: Duration = Duration::from_secs(30);

/// A bundle of a container that ends with status 7.
pub(super) fn bundle(context: &Context) -> Result<PathBuf> {
    super::agent::whole_rootfs(context)?;
    script(
        context,
        "katavm spec; mkfifo log; mkdir s
         jq '.process.args = [\"sh\", \"-c\", \"exit 7\"] | .process.terminal = false' config.json >c; mv c config.json",
    )?;
    Ok(context.scratch().to_owned())
}

/// What `start` prints.
pub(super) fn start(bundle: &Path, stdin: Stdio) -> Result<Vec<u8>> {
    answer(&mut command(bundle, stdin).spawn().context("cannot run the shim")?)
}

fn command(bundle: &Path, stdin: Stdio) -> Command {
    let mut command = Command::new(SHIM);
    command
        .args(["-namespace", NAMESPACE, "-address", "/run/scripted.sock", "-publish-binary", "/bin/true", "-id", ID])
        .arg("start")
        .current_dir(bundle)
        .env_remove("TTRPC_ADDRESS")
        .stdin(stdin)
        .stdout(Stdio::piped());
    command
}

fn answer(shim: &mut std::process::Child) -> Result<Vec<u8>> {
    let started = Instant::now();
    let mut answer = Vec::new();
    // To its end, as containerd does: the server must have let go of it.
    std::io::Read::read_to_end(shim.stdout.as_mut().context("no standard output")?, &mut answer)?;
    ensure!(shim.wait()?.success(), "{}", String::from_utf8_lossy(&answer));
    ensure!(started.elapsed() < PATIENCE, "start took {:?}", started.elapsed());
    Ok(answer)
}

fn write_to(bundle: &Path, stdin: &[u8]) -> Result<Vec<u8>> {
    let mut shim = command(bundle, Stdio::piped()).spawn().context("cannot run the shim")?;
    shim.stdin.take().context("no standard input")?.write_all(stdin)?;
    answer(&mut shim)
}

/// A call that does not wait forever.
pub(super) fn soon() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(120))
}

fn parameters(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let bundle = bundle(context)?;
    let folder = bundle.join("s");
    let params = BootstrapParams {
        instance_id: ID.into(),
        namespace: NAMESPACE.into(),
        containerd_version: "v2.3.0".into(),
        socket_dir: folder.to_str().map(str::to_owned),
        ..Default::default()
    };
    let told = write_to(&bundle, &params.write_to_bytes()?)?;
    let result = BootstrapResult::parse_from_bytes(&told)?;
    ensure!((result.version, result.protocol.as_str()) == (3, "ttrpc"), "{result}");
    let socket = result.address.strip_prefix("unix://").map(PathBuf::from).context("no address")?;
    ensure!(socket.parent() == Some(&folder), "{}", socket.display());
    ensure!(write_to(&bundle, &params.write_to_bytes()?)? == told, "a second start gives another answer");
    Runtime::new()?.block_on(async {
        let task = TaskClient::new(Client::connect(&result.address).await?);
        let bundle = bundle.display().to_string();
        let create = CreateTaskRequest { id: ID.into(), bundle, ..Default::default() };
        let created = task.create(soon(), &create).await?;
        ensure!(created.pid > 0);
        let (id, exec_id) = (ID.to_owned(), String::new());
        task.start(soon(), &StartRequest { id: id.clone(), exec_id, ..Default::default() }).await?;
        let exit = task.wait(soon(), &WaitRequest { id: id.clone(), ..Default::default() }).await?;
        ensure!(exit.exit_status == 7, "{exit}");
        let deleted = task.delete(soon(), &DeleteRequest { id: id.clone(), ..Default::default() }).await?;
        ensure!((deleted.pid, deleted.exit_status) == (created.pid, 7), "{deleted}");
        task.shutdown(soon(), &ShutdownRequest { id, ..Default::default() }).await?;
        Ok(())
    })?;
    wait_until_gone(&socket)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

/// Waits for the end of the server.
pub(super) fn wait_until_gone(socket: &Path) -> Result<()> {
    let started = Instant::now();
    let server = || Command::new("pgrep").args(["-x", "katavm-(sandbox|standin|watcher)"]).output();
    while socket.exists() || !server()?.stdout.is_empty() {
        ensure!(started.elapsed() < PATIENCE, "the server is still there");
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

fn other_inputs(context: &Context) -> Result<Verdict> {
    let traces = Traces::of(Path::new("/nonexistent"));
    let bundle = bundle(context)?;
    let first = String::from_utf8(start(&bundle, Stdio::null())?)?;
    let socket = first.strip_prefix("unix:///run/containerd/s/").context(first.clone())?;
    let socket = Path::new("/run/containerd/s").join(socket);
    let options = Any { type_url: "containerd.runc.v1.Options".into(), value: vec![8, 1], ..Default::default() };
    let terminal = nix::pty::openpty(None, None)?;
    // A writer that never ends.
    let (reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"x")?;
    for (what, told) in [
        ("options", write_to(&bundle, &options.write_to_bytes()?)?),
        ("a terminal", start(&bundle, terminal.slave.into())?),
        ("an open pipe", start(&bundle, reader.into())?),
        ("a file", start(&bundle, File::open("/bin/busybox")?.into())?),
    ] {
        ensure!(told == first.as_bytes(), "{what}: {}", String::from_utf8_lossy(&told));
    }
    ensure!(fs::read_to_string(bundle.join("address"))? == first);
    Runtime::new()?.block_on(async {
        // Both names of the service are on the one socket.
        let client = Client::connect(&first).await?;
        for version in ["v2", "v3"] {
            let mut request = ttrpc::Request::new();
            request.service = format!("containerd.task.{version}.Task");
            request.method = "Connect".into();
            request.timeout_nano = i64::try_from(PATIENCE.as_nanos())?;
            request.payload = ConnectRequest { id: ID.into(), ..Default::default() }.write_to_bytes()?;
            let response = client.request(request).await?;
            ensure!(ConnectResponse::parse_from_bytes(&response.payload)?.shim_pid > 0, "{version}");
        }
        TaskClient::new(client).shutdown(soon(), &ShutdownRequest::default()).await?;
        Ok(())
    })?;
    wait_until_gone(&socket)?;
    traces.expect_nothing_of_katavm()?;
    Ok(Verdict::Passed)
}

fn info(_: &Context) -> Result<Verdict> {
    let said = Command::new(SHIM).arg("-info").stdin(Stdio::null()).output()?;
    ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    let info = RuntimeInfo::parse_from_bytes(&said.stdout)?;
    ensure!(info.name == "io.containerd.katavm.v2", "{info}");
    let features: serde_json::Value = serde_json::from_slice(&info.features.value)?;
    let printed: serde_json::Value = serde_json::from_slice(&Command::new("katavm").arg("features").output()?.stdout)?;
    ensure!(features == printed && features.is_object(), "{features}");
    let version = String::from_utf8(Command::new(SHIM).arg("-v").output()?.stdout)?;
    ensure!(version.contains(&info.version.version) && version.starts_with(SHIM), "{version}");
    Ok(Verdict::Passed)
}
