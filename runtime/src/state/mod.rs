//! What is known on disk about sandboxes: a directory per id below the state root, and who still lives.
//!
//! A sandbox process holds a lock (flock(2)) on its directory's `lock` file for as long as it lives: the lock,
//! never a pid, tells whether an id is in use. All making and removing of directories happens under the
//! root's own lock, so that nobody removes the directory that somebody else has just made.

mod id;
mod journal;
mod record;
mod root;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::host;
pub use id::{Id, IdError};
pub use journal::Journal;
pub use record::{Record, Status};
pub use root::default_root;

const LOCK: &str = "lock";
const RECORD: &str = "state.json";

/// Why the state could not be kept.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Somebody lives under this id.
    #[error("container with id {0} is already in use")]
    InUse(Id),
    /// Somebody has made it, and it was not deleted.
    #[error("container with id {0} exists already: delete it first")]
    Exists(Id),
    /// There is no such container.
    #[error("container {0} does not exist")]
    Unknown(Id),
    /// The root is not ours alone.
    #[error(
        "the state directory {0} belongs to somebody else or may be written by others: give another one with --root"
    )]
    Unsafe(PathBuf),
    /// There is none, and none can be made.
    #[error("cannot make the state directory {path}: {reason}; give another one with --root")]
    Root {
        /// The directory, or one above it.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// The system refused.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    move |error| StateError::Io { what, path: path.into(), error }
}

/// The directory that holds a directory for each sandbox.
#[derive(Clone, Debug)]
pub struct StateRoot {
    path: PathBuf,
}

impl StateRoot {
    /// Opens `path`, making it (mode 0700) where it is missing.
    ///
    /// # Errors
    /// When it cannot be made, or others could write in it.
    pub fn open(path: PathBuf) -> Result<Self, StateError> {
        // The watcher leaves the current directory.
        let path = std::path::absolute(&path).map_err(failed("find", &path))?;
        root::make(&path)?;
        Ok(Self { path })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Takes an id for this process; what a dead process left under it is removed first.
    ///
    /// # Errors
    /// [`StateError::InUse`] when a living process has it.
    pub fn claim(&self, id: &Id) -> Result<StateDir, StateError> {
        let _guard = self.lock()?;
        let path = self.path.join(id.as_str());
        if path.symlink_metadata().is_ok() {
            match held_lock(&path) {
                Held::ByLiving => return Err(StateError::InUse(id.clone())),
                Held::ByNobody(_) if is_kept(&path) => return Err(StateError::Exists(id.clone())),
                Held::ByNobody(_) => remove_dir(&path)?,
            }
        }
        fs::create_dir(&path).map_err(failed("make", &path))?;
        let lock_path = path.join(LOCK);
        let lock = File::create_new(&lock_path).map_err(failed("make", &lock_path))?;
        lock.try_lock().map_err(io::Error::from).map_err(failed("lock", &lock_path))?;
        Ok(StateDir { root: self.clone(), path, lock, kept: false })
    }

    /// The container of an id, as it is now.
    ///
    /// # Errors
    /// [`StateError::Unknown`], or that the record cannot be read.
    pub fn find(&self, id: &Id) -> Result<Found, StateError> {
        let path = self.path.join(id.as_str());
        let record = path.join(RECORD);
        // Not under the root's lock: a container that is just being made or removed is one that is not there.
        let mut found = match Record::read(&record) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StateError::Unknown(id.clone())),
            Err(error) => return Err(failed("read", &record)(error)),
        };
        let alive = matches!(held_lock(&path), Held::ByLiving);
        if !alive {
            found.status = Status::Stopped;
        }
        Ok(Found { path, record: found, alive })
    }

    /// All containers, by their ids.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn list(&self) -> Result<Vec<Found>, StateError> {
        let entries = fs::read_dir(&self.path).map_err(failed("read", &self.path))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut ids: Vec<Id> = names.filter_map(|name| name.parse().ok()).collect();
        ids.sort();
        Ok(ids.iter().filter_map(|id| self.find(id).ok()).collect())
    }

    /// Whether other containers live in the sandbox of this one.
    ///
    /// # Errors
    /// When the root cannot be read.
    pub fn has_peers(&self, of: &Found) -> Result<bool, StateError> {
        let is_peer = |other: &Found| {
            other.alive && other.record.id != of.record.id && other.record.sandbox_pid == of.record.sandbox_pid
        };
        Ok(self.list()?.iter().any(is_peer))
    }

    /// Waits for the end of the sandbox process of a container, and removes what is kept of it. Not there: no error.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn remove(&self, id: &Id) -> Result<(), StateError> {
        let path = self.path.join(id.as_str());
        if let Ok(lock) = File::open(path.join(LOCK)) {
            lock.lock().map_err(failed("lock", &path))?;
            let _guard = self.lock()?;
            let same = File::open(path.join(LOCK)).and_then(|now| Ok(key_of(&now)? == key_of(&lock)?));
            if same.unwrap_or(false) {
                remove_dir(&path)?;
            }
        }
        Ok(())
    }

    /// Removes what dead processes left behind; the ids of it.
    ///
    /// # Errors
    /// When the root cannot be read. What cannot be removed is passed over with a warning.
    pub fn sweep(&self) -> Result<Vec<Id>, StateError> {
        let stale = |guard: &File| -> io::Result<Vec<Id>> {
            let _held = guard;
            let mut swept = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                let entry = entry?;
                if !entry.file_type()?.is_dir() {
                    continue;
                }
                // That of a sandbox whose first container was deleted has a name that is no id.
                let id = entry.file_name().to_str().and_then(|name| name.parse::<Id>().ok());
                if let Held::ByNobody(_lock) = held_lock(&entry.path())
                    && !is_kept(&entry.path())
                {
                    match remove_dir(&entry.path()) {
                        Ok(()) => swept.extend(id),
                        Err(error) => log::warn!("{error}"),
                    }
                }
            }
            Ok(swept)
        };
        let guard = self.lock()?;
        stale(&guard).map_err(failed("read", &self.path))
    }

    /// Serialises everything that makes or removes directories.
    fn lock(&self) -> Result<File, StateError> {
        let path = self.path.join(".lock");
        let open = || {
            let file = File::options().create(true).append(true).open(&path)?;
            file.lock()?;
            Ok(file)
        };
        open().map_err(failed("lock", &path))
    }
}

/// A container that was found by its id.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its directory.
    pub path: PathBuf,
    /// What is known about it.
    pub record: Record,
    /// Whether its sandbox process lives.
    pub alive: bool,
}

/// The directory of a container whose sandbox lives. Dropping it removes it, unless it is to be kept.
#[derive(Debug)]
pub struct StateDir {
    root: StateRoot,
    path: PathBuf,
    lock: File,
    kept: bool,
}

impl StateDir {
    /// Takes over what another process has claimed and disowns: the directory, and the lock that both hold meanwhile.
    #[must_use]
    pub fn adopt(path: PathBuf, lock: File) -> Self {
        let root = StateRoot { path: path.parent().unwrap_or(&path).to_owned() };
        Self { root, path, lock, kept: false }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The directory that it is in.
    #[must_use]
    pub fn root(&self) -> &StateRoot {
        &self.root
    }

    /// What tells that its container lives.
    #[must_use]
    pub fn lock(&self) -> &File {
        &self.lock
    }

    /// Reads the record.
    ///
    /// # Errors
    /// When there is none.
    pub fn read(&self) -> Result<Record, StateError> {
        let path = self.path.join(RECORD);
        Record::read(&path).map_err(failed("read", &path))
    }

    /// Writes the record, whole or not at all.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&mut self, record: &Record) -> Result<(), StateError> {
        let path = self.path.join(RECORD);
        record.write(&path).map_err(failed("write", &path))?;
        self.kept = record.kept;
        Ok(())
    }

    /// Gives the id free while the sandbox goes on without the container: what is kept for the sandbox goes with that.
    ///
    /// # Errors
    /// When it cannot be renamed.
    pub fn retire(&mut self) -> Result<(), StateError> {
        let _guard = self.root.lock()?;
        let id = self.path.file_name().unwrap_or_default().to_string_lossy();
        let retired = self.root.path.join(format!(".{id}.{}", std::process::id()));
        fs::rename(&self.path, &retired).map_err(failed("rename", &self.path))?;
        self.path = retired;
        Ok(())
    }

    /// Lets go of it without removing it, and of this process' share of the lock: another process has both.
    pub fn disown(mut self) {
        self.kept = true;
    }

    /// Removes it, unless somebody else has: then the id may have been given to another one since.
    fn remove(&self) -> Result<(), StateError> {
        let _guard = self.root.lock()?;
        let ours = key_of(&self.lock).map_err(failed("look at", &self.path))?;
        match File::open(self.path.join(LOCK)).and_then(|lock| key_of(&lock)) {
            Ok(key) if key == ours => remove_dir(&self.path),
            _ => Ok(()),
        }
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // Removed while it is still locked, so that nobody takes it for a dead one's in between.
        if !self.kept
            && let Err(error) = self.remove()
        {
            log::warn!("{error}");
        }
    }
}

enum Held {
    ByLiving,
    /// With the lock, if there is such a file.
    ByNobody(Option<File>),
}

fn held_lock(directory: &Path) -> Held {
    match File::open(directory.join(LOCK)) {
        Ok(lock) => match lock.try_lock() {
            Ok(()) => Held::ByNobody(Some(lock)),
            Err(_) => Held::ByLiving,
        },
        // Under the root's lock: no living process is just about to make it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Held::ByNobody(None),
        Err(_) => Held::ByLiving,
    }
}

/// Whether the container of a directory was made to stay until it is deleted.
fn is_kept(directory: &Path) -> bool {
    Record::read(&directory.join(RECORD)).is_ok_and(|record| record.kept)
}

fn key_of(file: &File) -> io::Result<(u64, u64)> {
    Ok(host::identity(&file.metadata()?))
}

/// Removes a directory, and the control group that its record names: nobody is left in there.
fn remove_dir(path: &Path) -> Result<(), StateError> {
    let cgroup = Record::read(&path.join(RECORD)).ok().and_then(|record| record.cgroup);
    if let Some(Err(error)) = cgroup.map(|cgroup| cgroup.remove()) {
        log::warn!("{error}");
    }
    fs::remove_dir_all(path).map_err(failed("remove", path))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn root() -> (tempfile::TempDir, StateRoot) {
        let dir = tempfile::tempdir().unwrap();
        let root = StateRoot::open(dir.path().join("root")).unwrap();
        (dir, root)
    }

    fn id(text: &str) -> Id {
        text.parse().unwrap()
    }

    /// Another process that holds the lock of `directory` until it is killed.
    fn holder(directory: &Path) -> std::process::Child {
        let mut child = Command::new("flock")
            .args(["--exclusive", "--no-fork"])
            .arg(directory.join(LOCK))
            .args(["sh", "-c", "echo held; exec sleep 1000"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0; 5];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        child
    }

    #[test]
    fn an_id_is_taken_once_and_free_again_after() {
        let (_dir, root) = root();
        let first = root.claim(&id("a")).unwrap();
        assert!(matches!(root.claim(&id("a")), Err(StateError::InUse(_))));
        root.claim(&id("b")).unwrap();
        drop(first);
        assert!(!root.path().join("a").exists());
        root.claim(&id("a")).unwrap();
    }

    #[test]
    fn only_what_the_dead_left_is_swept() {
        let (_dir, root) = root();
        for name in ["dead", "alive", "half"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        for name in ["dead", "alive"] {
            fs::write(root.path().join(name).join(LOCK), "").unwrap();
        }
        let mut other = holder(&root.path().join("alive"));
        let mut swept = root.sweep().unwrap();
        swept.sort();
        assert_eq!(swept, [id("dead"), id("half")]);
        assert!(matches!(root.claim(&id("alive")), Err(StateError::InUse(_))));
        other.kill().unwrap();
        other.wait().unwrap();
        assert_eq!(root.sweep().unwrap(), [id("alive")]);
        assert!(!root.path().join("alive").exists());
    }

    #[test]
    fn an_id_is_free_again_when_its_directory_is_retired() {
        let (_dir, root) = root();
        let mut first = root.claim(&id("a")).unwrap();
        fs::write(first.path().join("socket"), "").unwrap();
        first.retire().unwrap();
        let second = root.claim(&id("a")).unwrap();
        let retired = first.path().to_owned();
        assert!(retired.join("socket").exists() && root.list().unwrap().is_empty());
        assert_eq!(root.sweep().unwrap(), []);
        assert!(retired.exists());
        drop(first);
        assert!(!retired.exists() && second.path().exists());
        // What a dead one has left.
        fs::create_dir(&retired).unwrap();
        root.sweep().unwrap();
        assert!(!retired.exists());
    }

    #[test]
    fn a_directory_that_is_another_ones_by_now_is_left_alone() {
        let (_dir, root) = root();
        let first = root.claim(&id("a")).unwrap();
        // Nothing of katavm does that while the lock is held.
        fs::remove_dir_all(first.path()).unwrap();
        let second = root.claim(&id("a")).unwrap();
        drop(first);
        assert!(second.path().exists());
        let path = second.path().to_owned();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn the_record_is_replaced_whole() {
        let (_dir, root) = root();
        let mut state = root.claim(&id("a")).unwrap();
        let mut record = Record::new(&id("a"), Path::new("/bundle"), Path::new("/bundle/rootfs"));
        state.write(&record).unwrap();
        record.status = Status::Running;
        state.write(&record).unwrap();
        let text = fs::read_to_string(state.path().join(RECORD)).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), record);
        assert_eq!(fs::read_dir(state.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_container_that_is_kept_stays_until_it_is_deleted() {
        let (_dir, root) = root();
        let mut state = root.claim(&id("a")).unwrap();
        let mut record = Record::new(&id("a"), Path::new("/bundle"), Path::new("/bundle/rootfs"));
        (record.kept, record.status) = (true, Status::Running);
        state.write(&record).unwrap();
        assert!(root.find(&id("a")).unwrap().alive);
        drop(state);
        assert_eq!(root.sweep().unwrap(), []);
        let found = root.find(&id("a")).unwrap();
        assert_eq!((found.alive, found.record.status), (false, Status::Stopped));
        assert!(matches!(root.claim(&id("a")), Err(StateError::Exists(_))));
        assert_eq!(root.list().unwrap().len(), 1);
        root.remove(&id("a")).unwrap();
        root.remove(&id("a")).unwrap();
        assert!(matches!(root.find(&id("a")), Err(StateError::Unknown(_))));
    }
}
