//! What the agent knows of the guest's listening sockets, and its name servers, by BPF programs of a control group that
//! the test has to itself. Takes root, and a control group of version 2 to make one in.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use katavm_agent::names::Names;
use katavm_agent::network::listeners::Changes;
use katavm_agent::transport::Listener;
use katavm_protocol::agent::{Answer, Query};
use katavm_protocol::frame;

/// A control group that this process is in until this is dropped.
struct Group {
    before: PathBuf,
    path: PathBuf,
}

impl Group {
    fn new() -> Result<Self, String> {
        let said = |error: io::Error| format!("no control group can be made: {error}");
        let mounts = fs::read_to_string("/proc/mounts").map_err(said)?;
        let version_2 = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
        let root =
            version_2.and_then(|line| line.split(' ').nth(1)).ok_or("there are no control groups of version 2")?;
        let own = fs::read_to_string("/proc/self/cgroup").map_err(said)?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).ok_or("this process is in no such group")?;
        let path = Path::new(root).join(format!("katavm-test-{}", std::process::id()));
        fs::create_dir(&path).map_err(said)?;
        let group = Self { before: Path::new(root).join(own), path };
        fs::write(group.path.join("cgroup.procs"), std::process::id().to_string()).map_err(said)?;
        Ok(group)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = fs::write(self.before.join("cgroup.procs"), std::process::id().to_string());
        let _ = fs::remove_dir(&self.path);
    }
}

/// One test after the other: the group is the process'.
#[test]
fn a_control_groups_sockets() {
    let group = match Group::new() {
        Ok(group) => group,
        Err(why) => {
            // Past the harness' capture, so that it is seen.
            let _ = writeln!(io::stderr(), "SKIPPED a_control_groups_sockets: {why}");
            return;
        }
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(listeners(&group.path));
    runtime.block_on(names(&group.path));
}

async fn next(changes: &mut Changes, what: impl Fn(&[(Vec<u8>, u32, bool)]) -> bool) {
    let found = async {
        loop {
            let all = changes.next().await.unwrap();
            let all: Vec<_> = all.into_iter().map(|one| (one.ip, one.port, one.v6_only)).collect();
            if what(&all) {
                return;
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.expect("it is told");
}

async fn listeners(cgroup: &Path) {
    let mut changes = match Changes::new(cgroup) {
        Ok(changes) => changes,
        Err(error) => {
            let _ = writeln!(io::stderr(), "SKIPPED listeners: {error}");
            return;
        }
    };
    changes.next().await.unwrap();
    let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = u32::from(v4.local_addr().unwrap().port());
    let here = (vec![127, 0, 0, 1], port, false);
    next(&mut changes, |all| all.contains(&here)).await;
    // Connections are no news.
    let connection = TcpStream::connect(v4.local_addr().unwrap()).unwrap();
    drop((v4.accept().unwrap(), connection));
    assert!(tokio::time::timeout(Duration::from_millis(600), changes.next()).await.is_err());
    if let Ok(v6) = TcpListener::bind("[::]:0") {
        let port = u32::from(v6.local_addr().unwrap().port());
        next(&mut changes, |all| all.contains(&(vec![0; 16], port, false))).await;
    }
    drop(v4);
    next(&mut changes, |all| !all.contains(&here)).await;
}

async fn names(cgroup: &Path) {
    const SERVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 111);
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("names");
    let listener = Listener::from(UnixListener::bind(&socket).unwrap());
    let names = Names::new(listener.incoming().unwrap(), cgroup.to_owned());
    assert!(names.set(&[vec![10, 0, 0, 1]]).await.is_err());
    names.set(&[SERVER.octets().to_vec()]).await.unwrap();
    if names.addresses().await.is_empty() {
        let _ = writeln!(io::stderr(), "SKIPPED names: this kernel lacks what they take");
        return;
    }
    let mut host = tokio::net::UnixStream::connect(&socket).await.unwrap();
    let answering = tokio::spawn(async move {
        while let Ok(query) = frame::receive::<Query>(&mut host).await {
            assert_eq!(query.server, SERVER.octets());
            let how: &[u8] = if query.tcp { b"tcp " } else { b"udp " };
            let answer = Answer { id: query.id, message: [how, &query.message].concat(), ..Default::default() };
            frame::send(&mut host, &answer).await.unwrap();
        }
    });
    let asking = tokio::task::spawn_blocking(|| {
        let patience = Some(Duration::from_secs(30));
        let mut answer = [0; 64];
        for connected in [false, true] {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(patience).unwrap();
            if connected {
                socket.connect((SERVER, 53)).unwrap();
                socket.send(b"who").unwrap();
            } else {
                socket.send_to(b"who", (SERVER, 53)).unwrap();
            }
            let (len, from) = socket.recv_from(&mut answer).unwrap();
            assert_eq!((&answer[..len], from), (&b"udp who"[..], (SERVER, 53).into()));
        }
        let mut stream = TcpStream::connect((SERVER, 53)).unwrap();
        assert_eq!(stream.peer_addr().unwrap(), (SERVER, 53).into());
        stream.set_read_timeout(patience).unwrap();
        for _ in 0..2 {
            stream.write_all(b"\0\x03who").unwrap();
            let mut whole = [0; 9];
            stream.read_exact(&mut whole).unwrap();
            assert_eq!(&whole, b"\0\x07tcp who");
        }
    });
    asking.await.unwrap();
    names.set(&[]).await.unwrap();
    let gone = UdpSocket::bind("0.0.0.0:0").unwrap();
    gone.connect((SERVER, 53)).unwrap();
    gone.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    gone.send(b"who").unwrap();
    assert_eq!(gone.recv(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    answering.abort();
}
