//! All containers of the guest.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use katavm_protocol::agent::{CreateContainerRequest, CreateExecRequest, Exit, Stdio};
use oci_spec::runtime::{Process as ProcessSpec, Spec};

use super::directory::{Directory, check_id};
use super::launch::launch;
use super::process::Process;
use super::spec;
use crate::cgroup::{Cgroup, devices, oom};
use crate::error::Error;
use crate::events::Events;
use crate::helper::{CreateTask, ExecTask, Task};
use crate::reaper::{Birth, Ended, Reaper};
use crate::sandbox;
use crate::streams::Ends;
use crate::streams::Pipes;
use crate::streams::console::{ConsoleSocket, resize, set_owner};

/// The containers, the table of their processes' ends, and the events about them.
pub struct Containers {
    containers: Mutex<HashMap<String, Entry>>,
    /// The first process of the pid namespace that containers share where none of them is the pod's first.
    /// With whether it has ended, which nothing but the want of memory brings about.
    pause: tokio::sync::Mutex<Option<(i32, Arc<AtomicBool>)>>,
    /// Ends of processes.
    pub reaper: Arc<Reaper>,
    /// What happens.
    pub events: Arc<Events>,
}

/// An id is taken from the moment at which its container begins to be made.
enum Entry {
    BeingMade,
    Made(Arc<Container>),
}

struct Container {
    id: String,
    spec: Spec,
    cgroup: Cgroup,
    directory: Directory,
    /// By exec id; `None` while it is being made. The first process' is empty.
    processes: Mutex<HashMap<String, Option<Arc<Process>>>>,
    /// How many out-of-memory kills were told of.
    told_kills: Mutex<u64>,
}

/// Frees an id again unless what it was taken for was made.
struct Claim<F: FnMut()>(Option<F>);

impl<F: FnMut()> Claim<F> {
    fn keep(mut self) {
        self.0 = None;
    }
}

impl<F: FnMut()> Drop for Claim<F> {
    fn drop(&mut self) {
        if let Some(free) = &mut self.0 {
            free();
        }
    }
}

/// A process to be made, the container's first or a further one.
struct Plan<'a> {
    exec_id: &'a str,
    process: &'a ProcessSpec,
    stdio: &'a Stdio,
    console: Option<ConsoleSocket>,
    task: Task,
    /// Where the helper is told what to do.
    directory: &'a Path,
    /// Where the process waits to be started.
    notify: PathBuf,
}

impl Containers {
    /// None yet.
    pub fn new(reaper: Arc<Reaper>, events: Arc<Events>) -> Self {
        Self { containers: Mutex::default(), pause: tokio::sync::Mutex::default(), reaper, events }
    }

    /// Makes a container whose process waits to be started; its pid.
    ///
    /// # Errors
    /// Why it could not be made; nothing is left of it then.
    pub async fn create(&self, request: CreateContainerRequest) -> Result<u32, Error> {
        let id = request.container_id;
        check_id(&id)?;
        match self.lock().entry(id.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                return Err(Error::AlreadyExists(format!("container {id} exists")));
            }
            std::collections::hash_map::Entry::Vacant(entry) => drop(entry.insert(Entry::BeingMade)),
        }
        let claim = Claim(Some(|| drop(self.lock().remove(&id))));
        let cgroup = Cgroup::of(&id);
        let mut spec = spec::adapt(&request.spec, cgroup.path_in_tree())?;
        for (name, value) in spec::take_network_sysctls(&mut spec) {
            sandbox::set_sysctl(&name, &value)?;
        }
        request.tmpfs.iter().try_for_each(sandbox::make_tmpfs)?;
        sandbox::mount_shared_sources(&spec);
        let pause = if spec::joins_the_pods_pids(&spec) { Some(self.pause().await?) } else { None };
        let pid_of = |other: &str| match pause.filter(|_| other.is_empty()) {
            Some(pid) => Ok(pid),
            None => Ok(self.process(other, "")?.pid),
        };
        spec::join_namespaces(&mut spec, pid_of)?;
        let copy_up = spec::take_copy_ups(&mut spec);
        let directory = Directory::make(Path::new(super::DIR))
            .map_err(|error| Error::io(format_args!("cannot make the directory of {id}"), error))?;
        write_json(&directory.path().join("config.json"), &spec)?;
        let container = Arc::new(Container {
            id: id.clone(),
            spec,
            cgroup,
            directory,
            processes: Mutex::new(HashMap::from([(String::new(), None)])),
            told_kills: Mutex::default(),
        });
        let made = match prepare_cgroup(&container) {
            Ok(()) => self.make_init(&container, copy_up, &request.stdio.unwrap_or_default()).await,
            Err(error) => Err(error),
        };
        let pid = match made {
            Ok(pid) => pid,
            Err(error) => {
                // libcontainer tidies up after itself; this is for what it did not.
                sweep(&container.cgroup).await.unwrap_or_else(|error| crate::error!("{id}: {error}"));
                return Err(error);
            }
        };
        self.lock().insert(id.clone(), Entry::Made(Arc::clone(&container)));
        claim.keep();
        self.watch_oom(&container);
        Ok(pid)
    }

    /// The first process of the pid namespace that containers share, made when it is asked for.
    async fn pause(&self) -> Result<i32, Error> {
        let mut pause = self.pause.lock().await;
        if let Some((pid, ended)) = &*pause
            && !ended.load(Ordering::Acquire)
        {
            return Ok(*pid);
        }
        let directory = Directory::make(Path::new(super::DIR))
            .map_err(|error| Error::io("cannot make the directory of a first process", error))?;
        write_json(&directory.path().join("task.json"), &Task::Pause)?;
        let birth = self.reaper.birth();
        let pid = launch(&self.reaper, &birth, directory.path(), Task::Pause, Pipes::default()).await?;
        let ended = Arc::new(AtomicBool::new(false));
        *pause = Some((pid, Arc::clone(&ended)));
        self.reaper.await_end(&birth, pid, move |_| ended.store(true, Ordering::Release));
        Ok(pid)
    }

    async fn make_init(&self, container: &Arc<Container>, copy_up: Vec<PathBuf>, stdio: &Stdio) -> Result<u32, Error> {
        let directory = container.directory.path();
        let process = container.spec.process().clone().ok_or_else(|| Error::Invalid("no process".into()))?;
        let console = console_for(&process, directory)?;
        let console_path = console.as_ref().map(|console| console.path().to_owned());
        let task = CreateTask { id: container.id.clone(), console: console_path, copy_up };
        let notify = directory.join("state").join(&container.id);
        let task = Task::Create(task);
        self.make(container, Plan { exec_id: "", process: &process, stdio, console, task, directory, notify }).await
    }

    /// Makes a further process, which waits to be started; its pid.
    ///
    /// # Errors
    /// Why it could not be made; nothing is left of it then.
    pub async fn create_exec(&self, request: CreateExecRequest) -> Result<u32, Error> {
        let exec_id = request.exec_id;
        check_id(&exec_id)?;
        let container = self.container(&request.container_id)?;
        let mut process: ProcessSpec = serde_json::from_slice(&request.process)
            .map_err(|error| Error::Invalid(format!("the process: {error}")))?;
        spec::adapt_process(&mut process)?;
        let init = self.process(&container.id, "")?;
        if init.has_ended() || !init.was_started() {
            return Err(Error::State(format!("container {} is not running", container.id)));
        }
        match crate::lock(&container.processes).entry(exec_id.clone()) {
            std::collections::hash_map::Entry::Occupied(_) => {
                return Err(Error::AlreadyExists(format!("exec {exec_id} exists")));
            }
            std::collections::hash_map::Entry::Vacant(entry) => drop(entry.insert(None)),
        }
        let claim = Claim(Some(|| drop(crate::lock(&container.processes).remove(&exec_id))));
        let directory = Directory::make(container.directory.path())
            .map_err(|error| Error::io(format_args!("cannot make the directory of {exec_id}"), error))?;
        let console = console_for(&process, directory.path())?;
        let task = ExecTask {
            init: init.pid,
            cgroup: container.cgroup.path().to_owned(),
            console: console.as_ref().map(|c| c.path().to_owned()),
            process: process.clone(),
        };
        let stdio = request.stdio.unwrap_or_default();
        let plan = Plan {
            exec_id: &exec_id,
            process: &process,
            stdio: &stdio,
            console,
            task: Task::Exec(Box::new(task)),
            directory: directory.path(),
            notify: directory.path().to_owned(),
        };
        let pid = self.make(&container, plan).await?;
        claim.keep();
        self.process(&container.id, &exec_id)?.keep_directory(directory);
        Ok(pid)
    }

    async fn make(&self, container: &Arc<Container>, plan: Plan<'_>) -> Result<u32, Error> {
        let Plan { exec_id, process, stdio, console, task, directory, notify } = plan;
        let (uid, gid) = spec::owner(&container.spec, process);
        let no_pipes = Stdio { rows: stdio.rows, columns: stdio.columns, ..Default::default() };
        let wanted = if console.is_some() { &no_pipes } else { stdio };
        let (ends, pipes) = Ends::pipes(wanted, uid, gid).map_err(|error| Error::io("cannot make pipes", error))?;
        write_json(&directory.join("task.json"), &task)?;
        let birth = self.reaper.birth();
        let pid = launch(&self.reaper, &birth, directory, task, pipes).await?;
        let process = Process::new(pid, ends, notify);
        if let Some(console) = console {
            let attached = console.master().and_then(|master| {
                if stdio.rows != 0 && stdio.columns != 0 {
                    resize(&master, stdio.rows, stdio.columns)?;
                }
                set_owner(&master, uid)?;
                process.ends.set_terminal(master);
                Ok(())
            });
            if let Err(error) = attached {
                self.reaper.await_end(&birth, pid, |_| {});
                // One that has ended already needs no signal.
                let _ = self.reaper.signal(pid, libc::SIGKILL);
                return Err(Error::io("cannot set up the terminal", error));
            }
        }
        let process = Arc::new(process);
        crate::lock(&container.processes).insert(exec_id.to_owned(), Some(Arc::clone(&process)));
        self.await_end(&birth, container, exec_id, &process);
        u32::try_from(pid).map_err(|_| Error::Internal(format!("pid {pid}")))
    }

    fn await_end(&self, birth: &Birth<'_>, container: &Arc<Container>, exec_id: &str, process: &Arc<Process>) {
        let (events, exec_id) = (Arc::clone(&self.events), exec_id.to_owned());
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        let pid = process.pid;
        self.reaper.await_end(birth, pid, move |ended| container.process_ended(&exec_id, &process, ended, &events));
    }

    fn watch_oom(&self, container: &Arc<Container>) {
        let (events, id, cgroup) = (Arc::clone(&self.events), container.id.clone(), container.cgroup.clone());
        // What is left of the container goes when it is removed, whoever still watches.
        let container = Arc::downgrade(container);
        let tell = move |kills| container.upgrade().iter().for_each(|container| container.tell_kills(kills, &events));
        tokio::spawn(async move {
            if let Err(error) = oom::watch(cgroup, tell).await {
                crate::debug!("{id}: out-of-memory events cannot be watched: {error}");
            }
        });
    }

    /// A process by the id of its container and its exec id.
    ///
    /// # Errors
    /// There is none.
    pub fn process(&self, container_id: &str, exec_id: &str) -> Result<Arc<Process>, Error> {
        let container = self.container(container_id)?;
        let processes = crate::lock(&container.processes);
        let process = processes.get(exec_id).and_then(Option::as_ref);
        process.cloned().ok_or_else(|| Error::NotFound(format!("container {container_id} has no process {exec_id:?}")))
    }

    /// Forgets a further process that has ended; the host knows how.
    pub fn forget_exec(&self, container_id: &str, exec_id: &str) {
        if let Ok(container) = self.container(container_id) {
            drop(crate::lock(&container.processes).remove(exec_id));
        }
    }

    /// The cgroup of a container.
    ///
    /// # Errors
    /// There is no such container.
    pub fn cgroup(&self, container_id: &str) -> Result<Cgroup, Error> {
        Ok(self.container(container_id)?.cgroup.clone())
    }

    /// Kills what still runs in a container, and removes it.
    ///
    /// # Errors
    /// There is none, or its processes do not end.
    pub async fn remove(&self, container_id: &str) -> Result<(), Error> {
        let container = self.container(container_id)?;
        sweep(&container.cgroup).await?;
        let processes: Vec<_> = crate::lock(&container.processes).values().flatten().cloned().collect();
        for process in processes {
            process.wait().await;
        }
        self.lock().remove(container_id);
        Ok(())
    }

    /// Ends every process: SIGTERM to each first process, and after `grace` SIGKILL to all.
    pub async fn end_all(&self, grace: std::time::Duration) {
        let containers: Vec<_> = self.lock().values().filter_map(Entry::made).collect();
        let inits: Vec<_> = containers.iter().filter_map(|c| self.process(&c.id, "").ok()).collect();
        let running = inits.iter().filter(|init| init.was_started() && !init.has_ended());
        let asked: Vec<_> = running.filter(|init| init.signal(&self.reaper, libc::SIGTERM as u32).is_ok()).collect();
        let all = async {
            for init in asked {
                init.wait().await;
            }
        };
        let _ = tokio::time::timeout(grace, all).await;
        for container in containers {
            if let Err(error) = sweep(&container.cgroup).await {
                crate::error!("{}: {error}", container.id);
            }
        }
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.lock().get(id) {
            Some(Entry::Made(container)) => Ok(Arc::clone(container)),
            Some(Entry::BeingMade) => Err(Error::State(format!("container {id:?} is being made"))),
            None => Err(Error::NotFound(format!("there is no container {id:?}"))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Entry>> {
        crate::lock(&self.containers)
    }
}

impl Entry {
    fn made(&self) -> Option<Arc<Container>> {
        match self {
            Self::BeingMade => None,
            Self::Made(container) => Some(Arc::clone(container)),
        }
    }
}

impl Container {
    fn process_ended(&self, exec_id: &str, process: &Process, ended: Ended, events: &Events) {
        // With a pid namespace of its own the kernel has done this; without one nobody else will.
        if exec_id.is_empty()
            && let Err(error) = self.cgroup.kill()
        {
            crate::error!("{}: cannot kill what the container left behind: {error}", self.id);
        }
        let oom_kills = self.cgroup.oom_kills();
        self.tell_kills(oom_kills, events);
        let oom_killed = ended.status == 128 + libc::SIGKILL as u32 && oom_kills > 0;
        let exit = Exit { status: ended.status, at_ns: ended.at_ns, oom_killed, oom_kills, ..Default::default() };
        process.end(exit.clone());
        events.exit(&self.id, exec_id, exit);
    }
}

impl Container {
    /// Tells of each out-of-memory kill up to the `kills`-th, once.
    fn tell_kills(&self, kills: u64, events: &Events) {
        let mut told = crate::lock(&self.told_kills);
        while *told < kills {
            *told += 1;
            events.oom(&self.id, *told);
        }
    }
}

/// Makes the container's cgroup with its device rules, before any process can be in it.
fn prepare_cgroup(container: &Container) -> Result<(), Error> {
    let linux = container.spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    container.cgroup.make().map_err(|error| Error::io("cannot make the container's cgroup", error))?;
    devices::apply(&container.cgroup, rules).map_err(|error| Error::io("cannot apply the device rules", error))
}

/// Kills everything in a cgroup, waits for its end and removes it.
async fn sweep(cgroup: &Cgroup) -> Result<(), Error> {
    let cgroup = cgroup.clone();
    let swept = tokio::task::spawn_blocking(move || {
        cgroup.kill()?;
        cgroup.remove()
    });
    let swept = swept.await.map_err(|error| Error::Internal(error.to_string()))?;
    swept.map_err(|error| Error::io("cannot end the container's processes", error))
}

fn console_for(process: &ProcessSpec, directory: &Path) -> Result<Option<ConsoleSocket>, Error> {
    let console = process.terminal().unwrap_or_default().then(|| ConsoleSocket::listen(directory));
    console.transpose().map_err(|error| Error::io("cannot listen for the terminal", error))
}

fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<(), Error> {
    let json = serde_json::to_vec(value).map_err(|error| Error::Internal(format!("{}: {error}", path.display())))?;
    fs::write(path, json).map_err(|error| Error::io(format_args!("cannot write {}", path.display()), error))
}
