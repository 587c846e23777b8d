//! Tells the host where the guest's sockets listen, on a connection that the host has made.
//!
//! The host asks for each message when it has done what the one before says. So however fast sockets come and go, one
//! message is under way at most, and it says what is true then.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use katavm_protocol::agent::Listeners;
use katavm_protocol::frame;
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::names::Names;
use crate::network::listeners::Changes;
use crate::transport::Incoming;

/// Serves the listeners port for as long as the guest lives; of the network that this process is in, and the processes
/// of a control group.
pub async fn serve(incoming: Incoming, cgroup: PathBuf, names: Arc<Names>) {
    loop {
        let mut connection = incoming.next().await;
        if let Err(error) = tell(&mut connection, &cgroup, &names).await {
            crate::debug!("the host is not told where sockets listen any more: {error}");
            // It may be gone.
            let _ = frame::send(&mut connection, &Listeners { error: error.to_string(), ..Default::default() }).await;
        }
    }
}

async fn tell(connection: &mut UnixStream, cgroup: &Path, names: &Names) -> io::Result<()> {
    let mut changes = Changes::new(cgroup)?;
    loop {
        connection.read_u8().await?;
        let mut listeners = tokio::select! {
            listeners = changes.next() => listeners?,
            // It has nothing to say before it has its answer.
            _ = connection.read_u8() => return Err(io::ErrorKind::ConnectionAborted.into()),
        };
        let own = names.addresses().await;
        // The agent's own, which are the host's in truth.
        listeners.retain(|listener| !own.iter().any(|ip| ip.octets() == *listener.ip));
        frame::send(connection, &Listeners { listeners, ..Default::default() }).await?;
    }
}
