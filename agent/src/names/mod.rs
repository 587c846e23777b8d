//! Name servers of the host at loopback addresses of the guest: Docker's, which is at 127.0.0.11.
//!
//! The agent answers at a port that the kernel chooses, and programs of the control group of all processes put that one
//! in the place of port 53 (`redirect`): so a name server of a container can have port 53 all the same. The host does
//! the asking: it has connected to the names port.

mod host;
mod redirect;
mod server;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::error::Error;
use crate::transport::Incoming;
use host::Host;
use server::Server;

/// Servers at a time.
const MOST: usize = 8;

/// The servers that there are.
pub struct Names {
    cgroup: PathBuf,
    host: Arc<Host>,
    servers: Mutex<BTreeMap<Ipv4Addr, Server>>,
}

impl Names {
    /// None, for the processes of a control group, and a host that may connect to `incoming`. Must be called on a tokio
    /// runtime.
    pub fn new(incoming: Incoming, cgroup: PathBuf) -> Self {
        let (host, queries) = Host::new();
        let host = Arc::new(host);
        tokio::spawn(host::serve(incoming, Arc::clone(&host), queries));
        Self { cgroup, host, servers: Mutex::default() }
    }

    /// Has servers at these addresses, and at no others. One that cannot be had, as in a kernel without BPF, is logged:
    /// the guest does without it.
    ///
    /// # Errors
    /// What is no loopback address, and too many of them.
    pub async fn set(&self, addresses: &[Vec<u8>]) -> Result<(), Error> {
        let address = |bytes: &Vec<u8>| {
            let address = <[u8; 4]>::try_from(bytes.as_slice()).map(Ipv4Addr::from).ok();
            let address = address.filter(Ipv4Addr::is_loopback);
            address.ok_or_else(|| Error::Invalid(format!("{bytes:?} is no loopback address")))
        };
        let wanted = addresses.iter().map(address).collect::<Result<Vec<_>, _>>()?;
        if wanted.len() > MOST {
            return Err(Error::Invalid(format!("{} name servers, {MOST} at most", wanted.len())));
        }
        let mut servers = self.servers.lock().await;
        servers.retain(|address, _| wanted.contains(address));
        for address in wanted {
            if let Entry::Vacant(place) = servers.entry(address) {
                match Server::start(&self.cgroup, address, Arc::clone(&self.host)).await {
                    Ok(server) => drop(place.insert(server)),
                    Err(error) => crate::error!("there is no name server at {address}: {error}"),
                }
            }
        }
        Ok(())
    }

    /// Where there are servers.
    pub async fn addresses(&self) -> Vec<Ipv4Addr> {
        self.servers.lock().await.keys().copied().collect()
    }
}
