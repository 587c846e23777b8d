//! A network namespace of the host becomes the network of a guest.
//!
//! [`Scan::of`] tells what is in the namespace. [`plug`] makes a tap in it and redirects everything between an
//! interface and that tap, both ways, by traffic control: the addresses stay on the interface, where engines look
//! for them, and the guest gets the same ones ([`Scan::request`]). [`Watch`] tells when to scan again.
//! [`GuestNetwork`] does all of that for one guest.
//!
//! [`UserNetwork`] is the other kind: it takes no namespace, and no right on the host.

mod guest;
mod listen;
mod model;
mod names;
mod netlink;
mod own;
mod plug;
mod request;
mod scan;
mod slot;
mod user;
mod watch;

pub use guest::GuestNetwork;
pub use listen::{Listening, listen_in};
pub use model::{Address, Hop, Interface, Neighbour, Route, Rule, Scan};
pub use names::{name_server, name_server_by_tcp};
pub use plug::{Plugged, plug};
pub use slot::{device, pairs_for, random_mac, slot};
pub use user::{PortForward, UserNetwork, UserNetworkError};
pub use watch::Watch;

use std::io;

use katavm_devices::net::{NetError, TapError};
use katavm_vmm::MicrovmError;

/// Why a network namespace cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// It cannot be entered.
    #[error("cannot enter the network namespace: {0}")]
    Enter(#[source] io::Error),
    /// Reading or changing it failed.
    #[error("cannot {what}: {error}")]
    Netlink {
        /// What was tried.
        what: String,
        /// What the kernel said.
        error: rtnetlink::Error,
    },
    /// A netlink socket or a thread's runtime.
    #[error("cannot speak to the kernel about the network: {0}")]
    Socket(#[source] io::Error),
    /// Nobody answers.
    #[error("cannot ask the name server: {0}")]
    NameServer(#[source] io::Error),
    /// The ports of the namespace's own connections.
    #[error("cannot change net.ipv4.ip_local_port_range of the network namespace: {0}")]
    Ports(#[source] io::Error),
    /// No tap.
    #[error("cannot make a tap interface (the module tun and CAP_NET_ADMIN are needed): {0}")]
    Tap(io::Error),
    /// The interface has no Ethernet frames.
    #[error("the interface {0} does not carry Ethernet frames and cannot be plugged into a guest")]
    NoEthernet(String),
    /// It is plugged into another guest.
    #[error("the network namespace is in use by another sandbox: two guests cannot have the same addresses")]
    InUse,
    /// A device of the guest.
    #[error("cannot make the guest's network device: {0}")]
    Device(#[from] NetError),
    /// A tap's settings.
    #[error(transparent)]
    TapSettings(#[from] TapError),
    /// The virtual machine.
    #[error(transparent)]
    Machine(#[from] MicrovmError),
    /// It went away meanwhile.
    #[error("the interface {0} is gone")]
    Gone(String),
}
