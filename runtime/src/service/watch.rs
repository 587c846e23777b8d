//! What happens to a container, told to one who watches it until it has ended.

use std::io;
use std::sync::Arc;

use crate::link::{Greeting, Link, ToWatcher};
use crate::pod::{Pod, PodError, Watched};

/// Tells `watcher` until the container has ended or the watcher has gone.
///
/// # Errors
/// Those of the link.
pub async fn tell(pod: &Arc<Pod>, id: &str, watcher: &Link) -> io::Result<()> {
    let watched = match pod.watch(id).await {
        Ok(watched) => watched,
        Err(error) => return refuse(watcher, &error).await,
    };
    watcher.send(&ToWatcher::Heard).await?;
    tokio::select! {
        told = follow(watched, watcher) => told,
        // It says nothing more.
        gone = watcher.receive::<Greeting>() => gone.map(drop),
    }
}

async fn refuse(watcher: &Link, error: &PodError) -> io::Result<()> {
    watcher.send(&ToWatcher::Refused(error.to_string())).await
}

async fn follow(mut watched: Watched, watcher: &Link) -> io::Result<()> {
    loop {
        let news = watched.next().await;
        for _ in 0..news.kills {
            watcher.send(&ToWatcher::OutOfMemory).await?;
        }
        if news.ended {
            return watcher.send(&ToWatcher::Exited).await;
        }
    }
}
