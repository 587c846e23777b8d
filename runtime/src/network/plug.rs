//! Plugging: a tap, and traffic control that redirects everything between it and an interface.

use std::os::fd::{AsFd, OwnedFd};

use futures::TryStreamExt;
use katavm_devices::net::{Tap, TapError};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use rtnetlink::{Handle, LinkUnspec};

use super::NetworkError;
use super::model::Interface;
use super::netlink::{converse, errno, failed};
use super::own;
use crate::host::make_tap;

/// The largest MTU that a tap takes.
const TAP_MTU_MAX: u32 = 65535 - 14;
/// What taps are called, before a number.
pub const TAP_PREFIX: &str = "katavm";
/// Our filters' priority, by which they are found again.
const PRIORITY: u16 = 0x63;
/// ETH_P_ALL as filters have it.
const ALL_PROTOCOLS: u16 = 3u16.to_be();
/// Where filters of incoming packets are, on a qdisc of the kind `ingress` as of the kind `clsact`.
const INGRESS: TcHandle = TcHandle { major: 0xffff, minor: TcHandle::MIN_INGRESS };

/// An interface that a tap stands for.
#[derive(Debug)]
pub struct Plugged {
    netns: OwnedFd,
    interface: u32,
    name: String,
    queues: Vec<OwnedFd>,
    tap_index: u32,
    redirection: Redirection,
    /// The namespace has its own answers.
    shared: bool,
}

/// What was added to the interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Redirection {
    /// The qdisc, with the filter in it.
    Qdisc,
    /// The filter in a qdisc that somebody else had made.
    Filter,
}

/// Makes a tap of so many queues in the namespace, and redirects all packets between it and `interface`, both ways. Addresses stay
/// where they are. What an earlier sandbox left on the interface when it was killed is replaced.
///
/// # Errors
/// Any [`NetworkError`]; the namespace is as it was then.
pub fn plug(netns: impl AsFd, interface: &Interface, queues: u16) -> Result<Plugged, NetworkError> {
    let name = interface.name.clone();
    if interface.mac.is_none() {
        return Err(NetworkError::NoEthernet(name));
    }
    let index = interface.index;
    let netns = netns.as_fd().try_clone_to_owned().map_err(NetworkError::Enter)?;
    let (queues, tap_index, redirection) = converse(&netns, async |handle| {
        // Closing them on the way out takes it away again, with all that is on it.
        let (queues, tap_name) = make_tap(&format!("{TAP_PREFIX}%d"), queues).map_err(NetworkError::Tap)?;
        let tap_index = index_of(&handle, &tap_name).await?;
        let up = LinkUnspec::new_with_index(tap_index).mtu(interface.mtu.min(TAP_MTU_MAX)).up().build();
        handle.link().set(up).execute().await.map_err(failed(format!("set up {tap_name}")))?;
        redirect(&handle, tap_index, index, &name).await?;
        let redirection = redirect(&handle, index, tap_index, &name).await?;
        Ok((queues, tap_index, redirection))
    })?;
    Ok(Plugged { netns, interface: index, name, queues, tap_index, redirection, shared: false })
}

impl Plugged {
    /// The number of the interface in its namespace.
    #[must_use]
    pub fn interface(&self) -> u32 {
        self.interface
    }

    /// The tap's queues for a network device of the guest. They can be asked for again, for a device that is restored;
    /// each has one reader at a time.
    ///
    /// # Errors
    /// When no descriptors are left.
    pub fn taps(&self) -> Result<Vec<Tap>, TapError> {
        self.queues.iter().map(|queue| Tap::new(queue.try_clone().map_err(TapError::SetUp)?)).collect()
    }

    /// Leaves to the namespace from now on what answers its own questions: see [`own`].
    ///
    /// # Errors
    /// When the kernel refuses the filters; what the guest gets is the same then.
    pub fn share(&mut self) -> Result<(), NetworkError> {
        if self.shared {
            return Ok(());
        }
        let (index, tap) = (number(self.interface), self.tap_index);
        converse(&self.netns, async |handle| {
            let added = own::add(&handle, index, tap).await;
            if added.is_err() {
                // The error is the one before.
                let _ = remove_own(&handle, self.interface).await;
            }
            added.map_err(failed(format!("share {} (cls_u32, act_mirred)", self.name)))
        })?;
        self.shared = true;
        Ok(())
    }

    /// Makes the namespace what it was: the redirection goes, and with its last descriptor the tap. Detach the
    /// guest's device before. A namespace or an interface that is gone already is no error.
    ///
    /// # Errors
    /// Any other [`NetworkError`].
    pub fn unplug(self) -> Result<(), NetworkError> {
        let Self { netns, interface, name, queues, redirection, .. } = self;
        converse(&netns, async |handle| {
            drop(queues);
            let removed = match redirection {
                Redirection::Qdisc => remove_qdisc(&handle, interface).await,
                Redirection::Filter => remove_filter(&handle, interface).await,
            };
            match removed {
                Err(error) if is_gone(&error) => Ok(()),
                done => done.map_err(failed(format!("take the redirection off {name}"))),
            }
        })
    }
}

/// No such interface, qdisc or filter.
fn is_gone(error: &rtnetlink::Error) -> bool {
    matches!(errno(error), Some(libc::ENODEV | libc::ENOENT | libc::EINVAL))
}

async fn index_of(handle: &Handle, name: &str) -> Result<u32, NetworkError> {
    let link = handle.link().get().match_name(name).execute().try_next().await;
    let link = link.map_err(failed(format!("find {name}")))?;
    link.map(|link| link.header.index).ok_or_else(|| NetworkError::Gone(name.to_owned()))
}

/// What comes in by interface `from` goes out by interface `to`.
async fn redirect(handle: &Handle, from: u32, to: u32, name: &str) -> Result<Redirection, NetworkError> {
    let added = handle.qdisc().add(number(from)).ingress().execute().await;
    let redirection = match added {
        Ok(()) => Redirection::Qdisc,
        Err(error) if errno(&error) == Some(libc::EEXIST) => take_over(handle, from, name).await?,
        Err(error) => return Err(failed(format!("redirect {name} (sch_ingress)"))(error)),
    };
    let filter = handle.traffic_filter(number(from)).add().ingress().priority(PRIORITY).protocol(ALL_PROTOCOLS);
    let filter = filter.redirect(to).map_err(failed("put a filter together"))?;
    if let Err(error) = filter.execute().await {
        if redirection == Redirection::Qdisc {
            // The error is the one before.
            let _ = remove_qdisc(handle, from).await;
        }
        return Err(failed(format!("redirect {name} (cls_u32, act_mirred)"))(error));
    }
    Ok(redirection)
}

/// There is a qdisc: with nothing but our filters in it, it was left by a sandbox that was killed.
async fn take_over(handle: &Handle, index: u32, name: &str) -> Result<Redirection, NetworkError> {
    let listed = handle.traffic_filter(number(index)).get().ingress().execute().try_collect::<Vec<_>>().await;
    let filters = listed.map_err(failed(format!("list the filters of {name}")))?;
    let ours = filters.iter().filter(|filter| is_ours(filter)).count();
    if ours > 0 {
        remove_filter(handle, index).await.map_err(failed(format!("take an old redirection off {name}")))?;
    }
    Ok(if ours > 0 && ours == filters.len() { Redirection::Qdisc } else { Redirection::Filter })
}

fn is_ours(filter: &TcMessage) -> bool {
    let priority = (filter.header.info >> 16) as u16;
    priority == PRIORITY || own::PLACES.iter().any(|(own, _)| *own == priority)
}

async fn remove_qdisc(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    let mut request = handle.qdisc().del(number(index));
    let message = request.message_mut();
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle { major: 0xffff, minor: 0 };
    message.attributes.push(TcAttribute::Kind("ingress".into()));
    request.execute().await
}

/// All of our filters.
async fn remove_filter(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    remove_own(handle, index).await?;
    remove_at(handle, index, PRIORITY, ALL_PROTOCOLS).await
}

async fn remove_own(handle: &Handle, index: u32) -> Result<(), rtnetlink::Error> {
    for (priority, protocol) in own::PLACES {
        match remove_at(handle, index, priority, protocol.to_be()).await {
            Err(error) if !own::are_missing(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

async fn remove_at(handle: &Handle, index: u32, priority: u16, protocol: u16) -> Result<(), rtnetlink::Error> {
    let mut message = TcMessage::with_index(number(index));
    message.header.parent = INGRESS;
    message.header.info = u32::from(priority) << 16 | u32::from(protocol);
    let mut request = NetlinkMessage::from(RouteNetlinkMessage::DelTrafficFilter(message));
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    let mut handle = handle.clone();
    let mut answers = handle.request(request)?;
    while let Some(answer) = futures::StreamExt::next(&mut answers).await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// Interface numbers are positive; only the messages of traffic control have them signed.
fn number(index: u32) -> i32 {
    index.cast_signed()
}
