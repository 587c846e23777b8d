//! A pod's network, kept in step with the network namespace that it has on the host.

use std::convert::Infallible;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use katavm_protocol::agent::ConfigureNetworkRequest;
use katavm_vmm::Microvm;
use tokio::io::Interest;
use tokio::sync::watch;

use super::PodError;
use super::forward::{self, ForwardError};
use super::names;
use crate::descriptor::awaited;
use crate::network::{GuestNetwork, NetworkError};
use crate::sandbox::agent::Agent;
use crate::sandbox::vm::Dial;

/// How long news are gathered: a network plugin makes an interface, its addresses and its routes one after the other.
const GATHERED: Duration = Duration::from_millis(50);

/// The network of a pod whose guest runs.
pub struct Network {
    machine: Arc<Microvm>,
    /// Nothing once the pod has ended.
    guest: Arc<Mutex<Option<GuestNetwork>>>,
    /// What the agent knows; held throughout an update, so that they follow each other.
    told: tokio::sync::Mutex<ConfigureNetworkRequest>,
    /// Name servers in the namespace, as the agent knows them.
    name_servers: watch::Sender<Vec<Ipv4Addr>>,
    news: OwnedFd,
    netns: OwnedFd,
}

impl Network {
    /// Of the guest that was built with the devices of `guest`.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn new(machine: Arc<Microvm>, guest: GuestNetwork) -> Result<Self, NetworkError> {
        let news = guest.news().try_clone_to_owned().map_err(NetworkError::Socket)?;
        let netns = guest.netns().try_clone_to_owned().map_err(NetworkError::Socket)?;
        Ok(Self {
            machine,
            guest: Arc::new(Mutex::new(Some(guest))),
            told: Default::default(),
            name_servers: Default::default(),
            news,
            netns,
        })
    }

    /// Plugs what has come to the namespace and unplugs what has gone, and tells the agent what has changed.
    pub(super) async fn update(&self, agent: &Agent) -> Result<(), PodError> {
        let mut told = self.told.lock().await;
        let (guest, machine) = (Arc::clone(&self.guest), Arc::clone(&self.machine));
        let updated =
            tokio::task::spawn_blocking(move || lock(&guest).as_mut().map(|guest| guest.update(&machine)).transpose());
        let request = updated.await.map_err(|error| NetworkError::Socket(io::Error::other(error)))??;
        if let Some(request) = request.filter(|request| *request != *told) {
            agent.configure_network(&request).await?;
            let servers = request.name_servers.iter().filter_map(|ip| <[u8; 4]>::try_from(ip.as_slice()).ok());
            self.name_servers.send_replace(servers.map(Ipv4Addr::from).collect());
            *told = request;
        }
        Ok(())
    }

    /// Updates whenever there are news, for as long as they can be heard; why they cannot.
    pub(super) async fn follow(&self, agent: &Agent) -> io::Error {
        let heard = async {
            let news = awaited(self.news.try_clone()?, Interest::READABLE)?;
            loop {
                news.readable().await?.clear_ready();
                tokio::time::sleep(GATHERED).await;
                if let Err(error) = self.update(agent).await {
                    log::warn!("the guest's network is not as the host's: {error}");
                }
            }
        };
        let Err::<Infallible, io::Error>(error) = heard.await;
        error
    }

    /// Forwards connections that are made in the namespace to the guest, for as long as this is awaited.
    pub(super) async fn forward(&self, dial: Arc<dyn Dial>) -> Infallible {
        match self.netns.try_clone() {
            Ok(netns) => match forward::serve(netns, dial).await {
                // The end of the guest is others' to tell.
                error @ ForwardError::Ended(_) => log::debug!("{error}"),
                error => log::warn!("what connects to the guest from inside its network namespace is refused: {error}"),
            },
            Err(error) => {
                log::warn!("what connects to the guest from inside its network namespace is refused: {error}")
            }
        }
        std::future::pending().await
    }

    /// Has name servers in the namespace asked for the guest, for as long as this is awaited.
    pub(super) async fn resolve(&self, dial: Arc<dyn Dial>) -> Infallible {
        let error = match self.netns.try_clone() {
            Ok(netns) => names::serve(netns, self.name_servers.subscribe(), dial).await,
            Err(error) => error,
        };
        log::debug!("the guest's queries for names are answered no more: {error}");
        std::future::pending().await
    }

    /// Makes the namespace what it was; the guest has ended.
    pub(super) fn unplug(&self) {
        drop(lock(&self.guest).take());
    }
}

fn lock(guest: &Mutex<Option<GuestNetwork>>) -> MutexGuard<'_, Option<GuestNetwork>> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}
