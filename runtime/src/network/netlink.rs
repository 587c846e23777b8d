//! A conversation with the kernel about one network namespace.

use std::os::fd::AsFd;

use rtnetlink::Handle;

use super::NetworkError;
use crate::host::in_network_namespace;

/// Names what was tried in an error of the kernel.
pub fn failed(what: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> NetworkError {
    let what = what.into();
    move |error| NetworkError::Netlink { what, error }
}

/// The number of the kernel's error, if that is what it is.
pub fn errno(error: &rtnetlink::Error) -> Option<i32> {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.code.map(|code| code.get().saturating_neg()),
        _ => None,
    }
}

/// Runs `work` in the namespace, with a netlink connection of its own and everything on one thread.
pub fn converse<T: Send>(
    netns: impl AsFd,
    work: impl AsyncFnOnce(Handle) -> Result<T, NetworkError> + Send,
) -> Result<T, NetworkError> {
    let inside = || {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_io().build().map_err(NetworkError::Socket)?;
        runtime.block_on(async {
            let (connection, handle, _) = rtnetlink::new_connection().map_err(NetworkError::Socket)?;
            // It ends when the last handle is gone, or with the runtime.
            tokio::spawn(connection);
            work(handle).await
        })
    };
    in_network_namespace(netns, inside).map_err(NetworkError::Enter)?
}
