//! The agent as a whole: what runs, in which order.

use std::io;
use std::sync::Arc;

use katavm_protocol::agent::Ready;
use katavm_protocol::agent_ttrpc::create_agent;
use katavm_protocol::reset::RESET_UNUSABLE_KERNEL;
use katavm_protocol::{frame, ports};
use nix::time::{ClockId, clock_gettime};
use tokio::signal::unix::{SignalKind, signal};

use crate::boot::{self, Cmdline};
use crate::cgroup;
use crate::container::Containers;
use crate::end::{end_vm, install_panic_hook, print_on_console};
use crate::error::Error;
use crate::events::Events;
use crate::forward;
use crate::listening;
use crate::names::Names;
use crate::reaper::{Reaper, ignore_sigpipe};
use crate::service::Service;
use crate::streams;
use crate::transport::{Listener, Transport};

/// The whole life of PID 1.
pub fn run() -> ! {
    let main_ns = boottime_ns();
    install_panic_hook();
    ignore_sigpipe();
    let error = match boot::prepare() {
        Ok(cmdline) => match serve(&cmdline, main_ns) {
            Ok(never) => match never {},
            Err(error) => error,
        },
        Err(error) => error,
    };
    print_on_console(&error.to_string());
    end_vm(RESET_UNUSABLE_KERNEL)
}

fn serve(cmdline: &Cmdline, main_ns: u64) -> Result<std::convert::Infallible, Error> {
    let transport = cmdline.transport;
    let rpc = listen(transport, ports::RPC)?;
    let stream = listen(transport, ports::STREAM)?;
    let forwarded = listen(transport, ports::FORWARD)?;
    let names = listen(transport, ports::NAMES)?;
    let listeners = listen(transport, ports::LISTENERS)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| Error::io("cannot start the runtime (CONFIG_EPOLL, CONFIG_EVENTFD)", error))?;
    runtime.block_on(async {
        let reaper = Arc::new(Reaper::default());
        let containers = Arc::new(Containers::new(Arc::clone(&reaper), Arc::new(Events::default())));
        let streams = streams::serve(stream, Arc::clone(&containers));
        streams.map_err(|error| Error::io("cannot serve the stream port", error))?;
        let failed = |what: &'static str| move |error: io::Error| Error::io(what, error);
        let mut children = signal(SignalKind::child()).map_err(failed("cannot wait for SIGCHLD"))?;
        tokio::spawn(forward::serve(forwarded.incoming().map_err(failed("cannot serve the forward port"))?));
        let names = names.incoming().map_err(failed("cannot serve the names port"))?;
        let names = Arc::new(Names::new(names, cgroup::ROOT.into()));
        let listeners = listeners.incoming().map_err(failed("cannot serve the listeners port"))?;
        tokio::spawn(listening::serve(listeners, cgroup::ROOT.into(), Arc::clone(&names)));
        let listener = accepting(rpc).map_err(failed("cannot serve the rpc port"))?;
        let mut server = ttrpc::r#async::Server::new()
            .add_listener(listener)
            .register_service(create_agent(Arc::new(Service::new(containers, names))));
        server.start().await.map_err(|error| Error::Internal(format!("cannot serve the rpc port: {error}")))?;
        say_ready(transport, main_ns);
        tokio::spawn(cgroup::idle::watch());
        loop {
            reaper.reap();
            children.recv().await;
        }
    })
}

fn listen(transport: Transport, port: u32) -> Result<Listener, Error> {
    transport.listen(port).map_err(|error| match error.raw_os_error() {
        Some(libc::EAFNOSUPPORT) => Error::Internal("the kernel lacks CONFIG_VIRTIO_VSOCKETS".into()),
        _ => Error::io(format_args!("cannot listen on port {port}"), error),
    })
}

/// The connections of the rpc port as ttrpc wants them.
fn accepting(listener: Listener) -> io::Result<ttrpc::r#async::transport::Listener> {
    let connections = futures::stream::unfold(listener.incoming()?, |incoming| async {
        let connection = incoming.accept().await;
        Some((connection, incoming))
    });
    Ok(ttrpc::r#async::transport::Listener::new(connections))
}

/// Tells the host, once; one that does not listen finds out by calling.
fn say_ready(transport: Transport, agent_main_ns: u64) {
    let ready = Ready {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kernel_release: kernel_release(),
        agent_main_ns,
        ready_ns: boottime_ns(),
        ..Default::default()
    };
    let said = transport.dial_host(ports::READY).and_then(|mut host| frame::write(&mut host, &ready));
    if let Err(error) = said {
        crate::debug!("the host does not listen for the agent: {error}");
    }
}

/// `uname -r`.
pub fn kernel_release() -> String {
    nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned()).unwrap_or_default()
}

fn boottime_ns() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).map(std::time::Duration::from).unwrap_or_default();
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}
