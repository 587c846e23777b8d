//! The network of one guest, from its boot to its end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use katavm_devices::net::Net;
use katavm_protocol::agent::ConfigureNetworkRequest;
use katavm_vmm::Microvm;

use super::{Interface, NetworkError, Plugged, Scan, Watch, device, own, pairs_for, plug, slot};

/// Interfaces that may come once the guest is built, beside those that are there then: a machine cannot be given
/// devices, but what has no interface yet costs the guest nothing.
const SPARE: usize = 3;
/// How long the sandbox that had the namespace before may take to let go of it.
const HANDOVER: Duration = Duration::from_secs(5);

/// A network namespace of the host, and the guest's devices that stand for its interfaces.
pub struct GuestNetwork {
    netns: OwnedFd,
    watch: Watch,
    ports: Vec<Port>,
    /// Pairs of queues of each.
    pairs: u16,
    /// The ports that the namespace's own connections were from, before they were told from the guest's.
    own_ports: Option<String>,
}

/// A network device of the guest; its index is that of the virtual machine.
struct Port {
    mac: [u8; 6],
    plugged: Option<Plugged>,
}

impl GuestNetwork {
    /// Plugs all interfaces that are there into devices for a guest of so many vCPUs that is to be built with them, in
    /// this order.
    ///
    /// # Errors
    /// Any [`NetworkError`]; the namespace is as it was then.
    pub fn new(netns: OwnedFd, vcpus: u8) -> Result<(Self, Vec<Net>), NetworkError> {
        // Before the scan: nothing is missed after it.
        let watch = Watch::new(&netns)?;
        let scan = free(&netns)?;
        let mut network = Self { netns, watch, ports: Vec::new(), pairs: pairs_for(vcpus), own_ports: None };
        let nets = network.fill(&scan)?;
        Ok((network, nets))
    }

    fn fill(&mut self, scan: &Scan) -> Result<Vec<Net>, NetworkError> {
        let mut nets = Vec::new();
        for interface in scan.interfaces.iter().filter(|interface| is_pluggable(interface)) {
            let mut net = device(interface, self.pairs)?;
            let plugged = plug(&self.netns, interface, self.pairs)?;
            let taps = plugged.taps();
            self.ports.push(Port { mac: net.mac(), plugged: Some(plugged) });
            net.attach_queues(taps?).map_err(NetworkError::Socket)?;
            nets.push(net);
        }
        self.share(scan);
        for _ in 0..SPARE {
            let net = slot(self.pairs)?;
            self.ports.push(Port { mac: net.mac(), plugged: None });
            nets.push(net);
        }
        Ok(nets)
    }

    /// Plugs what has come, unplugs what is gone, and returns what the agent must be told.
    ///
    /// # Errors
    /// Any [`NetworkError`]; what has not been plugged then is tried again the next time.
    pub fn update(&mut self, machine: &Microvm) -> Result<ConfigureNetworkRequest, NetworkError> {
        self.watch.take_news()?;
        let scan = Scan::of(&self.netns)?;
        for (index, port) in self.ports.iter_mut().enumerate() {
            if let Some(plugged) = port.plugged.take_if(|plugged| scan.interface(plugged.interface()).is_none()) {
                machine.detach_net(index)?;
                plugged.unplug()?;
            }
        }
        for interface in scan.interfaces.iter().filter(|interface| is_pluggable(interface)) {
            if self.is_plugged(interface) {
                continue;
            }
            match self.ports.iter_mut().enumerate().find(|(_, port)| port.plugged.is_none()) {
                Some((index, port)) => {
                    let plugged = plug(&self.netns, interface, self.pairs)?;
                    let taps = plugged.taps();
                    port.plugged = Some(plugged);
                    machine.attach_net(index, taps?)?;
                }
                None => log::warn!(
                    "the guest has no device for the interface {}: a running one can be given {SPARE}",
                    interface.name
                ),
            }
        }
        for (index, port) in self.ports.iter().enumerate() {
            let interface = port.plugged.as_ref().and_then(|plugged| scan.interface(plugged.interface()));
            if let Some(interface) = interface {
                machine.set_net_link(index, interface.carrier)?;
            }
        }
        self.share(&scan);
        let pairs: Vec<_> = self.ports.iter().filter_map(Port::pair).collect();
        Ok(scan.request(&pairs))
    }

    /// Has an engine's name server in the namespace hear the answers of those that it asks itself.
    fn share(&mut self, scan: &Scan) {
        if scan.name_servers.is_empty() {
            return;
        }
        let own = self.own_ports.is_none().then(|| own::take_ports(&self.netns)).transpose();
        let shared = own.and_then(|before| {
            self.own_ports = self.own_ports.take().or(before);
            self.ports.iter_mut().filter_map(|port| port.plugged.as_mut()).try_for_each(Plugged::share)
        });
        if let Err(error) = shared {
            log::warn!("the engine's name server in the network namespace cannot ask others: {error}");
        }
    }

    fn is_plugged(&self, interface: &Interface) -> bool {
        self.ports.iter().any(|port| port.pair().is_some_and(|(index, _)| index == interface.index))
    }

    /// The namespace.
    #[must_use]
    pub fn netns(&self) -> BorrowedFd<'_> {
        self.netns.as_fd()
    }

    /// Readable when an [`update`](Self::update) is due.
    #[must_use]
    pub fn news(&self) -> BorrowedFd<'_> {
        self.watch.as_fd()
    }
}

impl Drop for GuestNetwork {
    /// Makes the namespace what it was. The guest must have ended: a tap stays with its device.
    fn drop(&mut self) {
        if let Some(before) = self.own_ports.take()
            && let Err(error) = own::give_ports_back(&self.netns, &before)
        {
            log::warn!("{error}");
        }
        for plugged in self.ports.drain(..).filter_map(|port| port.plugged) {
            if let Err(error) = plugged.unplug() {
                log::warn!("{error}");
            }
        }
    }
}

impl Port {
    /// The interface that is plugged in and the device that stands for it.
    fn pair(&self) -> Option<(u32, [u8; 6])> {
        self.plugged.as_ref().map(|plugged| (plugged.interface(), self.mac))
    }
}

/// What a namespace of the host has for a guest; tunnels that every namespace gets from the kernel are no such thing.
fn is_pluggable(interface: &Interface) -> bool {
    if interface.mac.is_none() && interface.up {
        log::warn!("{}", NetworkError::NoEthernet(interface.name.clone()));
    }
    interface.mac.is_some()
}

/// Scans the namespace once no other sandbox has it.
fn free(netns: &OwnedFd) -> Result<Scan, NetworkError> {
    let start = Instant::now();
    loop {
        let scan = Scan::of(netns)?;
        if !scan.in_use {
            return Ok(scan);
        }
        if start.elapsed() > HANDOVER {
            return Err(NetworkError::InUse);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}
