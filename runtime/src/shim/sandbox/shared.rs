//! What every container of a pod gets from it. With the Sandbox API this is the sandbox' business: the CRI plugin makes
//! these files for its own sandboxes only.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};

use crate::host;

/// Where the shared memory of the pod is in its folder, and where containers have it.
const SHARED_MEMORY: (&str, &str) = ("shm", "/dev/shm");
/// How large it may become (tmpfs(5)), as the CRI plugin has it.
const SHARED_MEMORY_OPTIONS: &str = "mode=1777,size=65536k";
const RESOLV_CONF: (&str, &str) = ("resolv.conf", "/etc/resolv.conf");
const HOSTS: (&str, &str) = ("hosts", "/etc/hosts");
const HOSTNAME: (&str, &str) = ("hostname", "/etc/hostname");

/// How names are looked up (`runtime.v1.DNSConfig`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dns {
    /// Addresses.
    pub servers: Vec<String>,
    /// Domains.
    pub searches: Vec<String>,
    /// resolv.conf(5) has them.
    pub options: Vec<String>,
}

/// What a pod says of all its containers.
#[derive(Clone, Debug, Default)]
pub struct Shared {
    /// Its name; that of the host where there is none.
    pub hostname: Option<String>,
    /// As of the host where it says nothing.
    pub dns: Dns,
}

/// The same with its files.
#[derive(Clone, Debug)]
pub struct SharedFiles {
    folder: PathBuf,
}

impl Shared {
    /// Makes the files in the pod's `folder`, and mounts there: in the mount namespace of this process, with which that goes.
    ///
    /// # Errors
    /// What cannot be written, or mounted.
    pub fn make(&self, folder: &Path) -> io::Result<SharedFiles> {
        let named = |(name, _): (&str, &str)| folder.join(name);
        fs::create_dir_all(named(SHARED_MEMORY))?;
        let options = SHARED_MEMORY_OPTIONS.split(',').chain(["nosuid", "nodev", "noexec"]).map(Into::into);
        host::mount("tmpfs", "shm", &options.collect::<Vec<_>>(), &named(SHARED_MEMORY))?;
        let hostname = match &self.hostname {
            Some(hostname) => format!("{hostname}\n"),
            None => fs::read_to_string("/proc/sys/kernel/hostname")?,
        };
        fs::write(named(HOSTNAME), hostname)?;
        fs::write(named(HOSTS), of_host(HOSTS.1)?)?;
        let resolv_conf = match self.dns.lines() {
            lines if lines.is_empty() => of_host(RESOLV_CONF.1)?,
            lines => lines.into_bytes(),
        };
        fs::write(named(RESOLV_CONF), resolv_conf)?;
        Ok(SharedFiles { folder: folder.into() })
    }
}

/// A file that not every host has.
fn of_host(path: &str) -> io::Result<Vec<u8>> {
    match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read,
    }
}

impl Dns {
    /// As resolv.conf(5) has them; empty when there is nothing to say.
    fn lines(&self) -> String {
        let joined = |word: &str, values: &[String]| match values {
            [] => String::new(),
            values => format!("{word} {}\n", values.join(" ")),
        };
        let servers: String = self.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        joined("search", &self.searches) + &servers + &joined("options", &self.options)
    }
}

impl SharedFiles {
    /// Gives a container what it has nothing of its own for.
    pub fn give(&self, spec: &mut Spec) {
        let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or_default();
        let mut mounts = spec.mounts().clone().unwrap_or_default();
        // That is the one that every container has: a private one.
        mounts.retain(|mount| {
            mount.destination() != Path::new(SHARED_MEMORY.1) || mount.typ().as_deref() == Some("bind")
        });
        for (name, destination) in [HOSTNAME, HOSTS, RESOLV_CONF, SHARED_MEMORY] {
            if mounts.iter().any(|mount| mount.destination() == Path::new(destination)) {
                continue;
            }
            let access = if read_only && name != SHARED_MEMORY.0 { "ro" } else { "rw" };
            let mut mount = Mount::default();
            mount.set_destination(destination.into());
            mount.set_typ(Some("bind".into()));
            mount.set_source(Some(self.folder.join(name)));
            mount.set_options(Some(["rbind", "rprivate", access].map(Into::into).into()));
            mounts.push(mount);
        }
        spec.set_mounts(Some(mounts));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn given(spec: Value) -> Value {
        let files = SharedFiles { folder: "/pod".into() };
        let mut spec = serde_json::from_value(spec).unwrap();
        files.give(&mut spec);
        serde_json::to_value(spec).unwrap()
    }

    #[test]
    fn a_container_gets_what_it_lacks() {
        let own = json!({ "destination": "/etc/hosts", "type": "bind", "source": "/own", "options": ["rbind"] });
        let shm = json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm" });
        let spec = given(json!({ "ociVersion": "1.2.0", "root": { "path": "rootfs", "readonly": true },
            "mounts": [own, shm] }));
        let has = |n: usize| {
            let mount = &spec["mounts"][n];
            (mount["destination"].as_str(), mount["source"].as_str(), mount["options"][2].as_str())
        };
        assert_eq!(has(0), (Some("/etc/hosts"), Some("/own"), None));
        assert_eq!(has(1), (Some("/etc/hostname"), Some("/pod/hostname"), Some("ro")));
        assert_eq!(has(2), (Some("/etc/resolv.conf"), Some("/pod/resolv.conf"), Some("ro")));
        assert_eq!(has(3), (Some("/dev/shm"), Some("/pod/shm"), Some("rw")));
        assert_eq!(spec["mounts"].as_array().unwrap().len(), 4);
    }

    #[test]
    fn names_are_looked_up_as_the_pod_says() {
        let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let dns =
            Dns { servers: texts(&["10.0.0.1", "::1"]), searches: texts(&["a", "b.c"]), options: texts(&["ndots:5"]) };
        assert_eq!(dns.lines(), "search a b.c\nnameserver 10.0.0.1\nnameserver ::1\noptions ndots:5\n");
        assert_eq!(Dns::default().lines(), "");
    }
}
