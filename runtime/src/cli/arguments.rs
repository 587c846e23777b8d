//! What the command line looks like.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::network::PortForward;
use crate::sandbox::size::{DEFAULT_MEMORY_MIB, DEFAULT_VCPUS, MINIMUM_MEMORY_MIB, MemorySize};
use crate::state::Id;

/// Runs containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "katavm", version, max_term_width = 100)]
pub struct Arguments {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all commands.
#[derive(Debug, Args)]
pub struct Global {
    /// Folder for the state of running containers [default: /run/katavm, or $XDG_RUNTIME_DIR/katavm for a user who is not root]
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// The configuration; files in config.d beside it are read as well [default: /etc/katavm/config.toml, if it is there]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Write warnings and other messages to this file, and nowhere else
    #[arg(long, global = true, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// How the lines of --log look
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// What to tell of: error, warn, info, debug or trace
    #[arg(long, global = true, default_value = "warn", value_name = "LEVEL", value_parser = level)]
    pub log_level: log::LevelFilter,
    /// The same as --log-level debug
    #[arg(long, global = true)]
    pub debug: bool,
    /// linux.cgroupsPath is SLICE:PREFIX:NAME, and systemd makes the control group
    #[arg(long, global = true)]
    pub systemd_cgroup: bool,
    /// Accepted for the sake of engines: whether katavm runs without root is found out, not told
    #[arg(id = "global-rootless", long = "rootless", value_name = "true|false|auto", hide = true)]
    pub rootless: Option<String>,
}

impl Global {
    /// What is told of.
    pub fn level(&self) -> log::LevelFilter {
        if self.debug { self.log_level.max(log::LevelFilter::Debug) } else { self.log_level }
    }
}

/// runc's names for levels as well: engines pass them on.
fn level(text: &str) -> Result<log::LevelFilter, String> {
    match text {
        "warning" => Ok(log::LevelFilter::Warn),
        "fatal" | "panic" => Ok(log::LevelFilter::Error),
        other => other.parse().map_err(|_| "one of error, warn, info, debug, trace".to_owned()),
    }
}

/// How the lines of a log file look: those of runc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// time="..." level=warning msg="..."
    Text,
    /// One JSON object per line
    Json,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run the container of a bundle, with its streams and signals, and end with its exit code
    Run(Run),
    /// Make a container whose process waits to be started
    Create(Create),
    /// Start the process of a container that was created
    Start(ContainerId),
    /// Print the state of a container as JSON
    State(ContainerId),
    /// List the containers
    List(List),
    /// List the processes of a container, as its guest counts them
    Ps(Ps),
    /// Run a further process in a running container
    Exec(Exec),
    /// Send a signal to a container's process
    Kill(Kill),
    /// Remove a container and everything that belongs to it
    Delete(Delete),
    /// Freeze all processes of a container
    Pause(ContainerId),
    /// Let the processes of a frozen container go on
    Resume(ContainerId),
    /// Change a container's limits
    Update(Box<Update>),
    /// Print statistics of a container and its out-of-memory kills as JSON lines
    Events(Events),
    /// Write a config.json to start from
    Spec(Spec),
    /// Print what this runtime can do as JSON
    Features,
    /// Find out whether this host can run guests, and say what to do if not
    Check(Check),
    /// Remove what killed sandboxes have left behind
    Gc,
    /// Look at the configuration
    #[command(subcommand)]
    Config(Config),
}

/// What to do with the configuration.
#[derive(Debug, Subcommand)]
pub enum Config {
    /// Print it as it is in effect, and where each value comes from
    Show,
}

/// The one argument of commands that need nothing else.
#[derive(Debug, Args)]
pub struct ContainerId {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
}

/// What the virtual machine is like.
#[derive(Debug, Args)]
pub struct Machine {
    #[arg(long, value_name = "N", help = format!("CPUs of the guest [default: from the bundle's CPU limit, else {DEFAULT_VCPUS}]"))]
    pub cpus: Option<u32>,
    #[arg(long, value_name = "SIZE", help = format!(
        "Memory of the guest: 512, 512M, 1G; at least {MINIMUM_MEMORY_MIB}M [default: from the bundle's memory limit, else {DEFAULT_MEMORY_MIB}M]"))]
    pub memory: Option<MemorySize>,
    /// The guest's kernel: an ELF vmlinux or a bzImage [default: the installed guest image's]
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The guest's initramfs, with the agent in it [default: the installed guest image's]
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
}

/// What `create` and `run` have in common with runc.
#[derive(Debug, Args)]
pub struct Front {
    /// The folder that holds config.json and the root file system [default: the current one]
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// Send the terminal's master to this unix socket
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Write the pid of the process that stands for the container on the host to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Accepted: the guest's initramfs root never keeps a container from pivoting
    #[arg(long, hide = true)]
    pub no_pivot: bool,
    /// Accepted: a guest has keyrings of its own
    #[arg(long, hide = true)]
    pub no_new_keyring: bool,
    /// Accepted: katavm is no subreaper
    #[arg(long, hide = true)]
    pub no_subreaper: bool,
    /// Refused unless 0: descriptors of the host mean nothing in a guest
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    pub preserve_fds: u32,
}

/// Options of `create`.
#[derive(Debug, Args)]
pub struct Create {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    #[command(flatten)]
    pub front: Front,
    #[command(flatten)]
    pub machine: Machine,
}

/// Options of `run`.
#[derive(Debug, Args)]
pub struct Run {
    /// A bundle (the folder that holds config.json and the root file system); or, with --bundle or where there is no
    /// such folder, the container's name
    #[arg(value_name = "BUNDLE|CONTAINER")]
    pub target: PathBuf,
    /// The container's name [default: a random one]
    #[arg(long, value_name = "ID")]
    pub id: Option<Id>,
    /// Do not wait for the container's end; it stays until it is deleted
    #[arg(long, short)]
    pub detach: bool,
    /// Do not delete the container after its end
    #[arg(long)]
    pub keep: bool,
    #[command(flatten)]
    pub front: Front,
    #[command(flatten)]
    pub machine: Machine,
    /// Another network than that of the bundle's network namespace
    #[arg(long = "net", value_enum, value_name = "NETWORK")]
    pub network: Option<Network>,
    /// With --net=user: have this port of the host lead to one of the guest
    #[arg(long, short, value_name = "[IP:]HOST:GUEST[/udp]", requires = "network")]
    pub publish: Vec<PortForward>,
    /// Copy the guest's console to standard error
    #[arg(long)]
    pub console: bool,
    /// Tell on standard error, at the end, when the steps happened
    #[arg(long, value_enum, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub timings: Option<TimingsFormat>,
}

/// A network that takes no namespace of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// By the program passt, without any right: the guest reaches what the user reaches
    User,
}

/// Options of `list`.
#[derive(Debug, Args)]
pub struct List {
    /// How the list looks
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Print ids only
    #[arg(long, short)]
    pub quiet: bool,
}

/// Options of `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    /// How the list looks: a table, or the pids as JSON
    #[arg(long, short, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Options of ps(1), which are not looked at: the processes are the guest's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub options: Vec<String>,
}

/// How a list is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Options of `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub command: Vec<String>,
    /// Read the process from this file: the `process` object of the runtime specification
    #[arg(long, short, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Give the process a terminal
    #[arg(long, short)]
    pub tty: bool,
    /// User as UID or UID:GID
    #[arg(long, short, value_name = "UID[:GID]", value_parser = user)]
    pub user: Option<(u32, Option<u32>)>,
    /// Further groups
    #[arg(long, short = 'g', value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// Working folder
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Set an environment variable
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// Add a capability to all sets
    #[arg(long, short, value_name = "CAPABILITY")]
    pub cap: Vec<String>,
    /// Forbid gaining privileges
    #[arg(long)]
    pub no_new_privs: bool,
    /// Accepted: the guest has no such security module
    #[arg(long, value_name = "PROFILE", hide = true)]
    pub apparmor: Option<String>,
    /// Accepted: the guest has no such security module
    #[arg(long, value_name = "LABEL", hide = true)]
    pub process_label: Option<String>,
    /// Do not wait for the process' end
    #[arg(long, short)]
    pub detach: bool,
    /// Write the pid of the process that stands for it on the host to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Send the terminal's master to this unix socket
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// Refused unless 0: descriptors of the host mean nothing in a guest
    #[arg(long, value_name = "N", default_value_t = 0, hide = true)]
    pub preserve_fds: u32,
    /// Exec in a paused container is refused all the same
    #[arg(long, hide = true)]
    pub ignore_paused: bool,
}

fn user(text: &str) -> Result<(u32, Option<u32>), String> {
    let number = |text: &str| text.parse().map_err(|_| format!("{text:?} is no number: give UID or UID:GID"));
    match text.split_once(':') {
        Some((uid, gid)) => Ok((number(uid)?, Some(number(gid)?))),
        None => Ok((number(text)?, None)),
    }
}

/// Options of `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    /// By name or number
    #[arg(default_value = "SIGTERM", value_parser = signal_number)]
    pub signal: i32,
    /// Send it to all processes of the container
    #[arg(long, short)]
    pub all: bool,
}

/// A signal by its number or its name, with or without `SIG`.
fn signal_number(text: &str) -> Result<i32, String> {
    let unknown = || format!("unknown signal {text:?}");
    if let Ok(number) = text.parse::<i32>() {
        return if (1..=64).contains(&number) { Ok(number) } else { Err(unknown()) };
    }
    let name = text.to_ascii_uppercase();
    let name = if name.starts_with("SIG") { name } else { format!("SIG{name}") };
    if let Some(offset) = name.strip_prefix("SIGRTMIN+").and_then(|n| n.parse::<i32>().ok()) {
        return Some(libc::SIGRTMIN() + offset).filter(|n| *n <= libc::SIGRTMAX()).ok_or_else(unknown);
    }
    if let Some(offset) = name.strip_prefix("SIGRTMAX-").and_then(|n| n.parse::<i32>().ok()) {
        return Some(libc::SIGRTMAX() - offset).filter(|n| *n >= libc::SIGRTMIN()).ok_or_else(unknown);
    }
    name.parse::<nix::sys::signal::Signal>().map(|signal| signal as i32).map_err(|_| unknown())
}

/// Options of `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    /// Kill it if it runs; no error if there is none
    #[arg(long, short)]
    pub force: bool,
}

/// Options of `update`.
#[derive(Debug, Args)]
pub struct Update {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    /// Read the limits from this file, or from standard input for `-`: `linux.resources` of the runtime specification
    #[arg(long, short, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Weight of CPU time, from 2 to 262144
    #[arg(long, alias = "cpu-shares", value_name = "N")]
    pub cpu_share: Option<u64>,
    /// CPU time in a period, in microseconds
    #[arg(long, value_name = "USEC", allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    /// The period of --cpu-quota, in microseconds
    #[arg(long, value_name = "USEC")]
    pub cpu_period: Option<u64>,
    /// CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "USEC")]
    pub cpu_burst: Option<u64>,
    /// Whether the container gets CPU time only when nobody else wants it: 1, or 0
    #[arg(long, value_name = "0|1")]
    pub cpu_idle: Option<i64>,
    /// The period of --cpu-rt-runtime, in microseconds
    #[arg(long, value_name = "USEC", hide = true)]
    pub cpu_rt_period: Option<u64>,
    /// CPU time of realtime scheduling in a period, in microseconds
    #[arg(long, value_name = "USEC", hide = true, allow_hyphen_values = true)]
    pub cpu_rt_runtime: Option<i64>,
    /// CPUs of the host that the guest's run on: 0-3,7
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes of the host that the guest's memory is in: 0-1
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Weight of the sandbox' I/O on the host, from 10 to 1000
    #[arg(long, value_name = "N")]
    pub blkio_weight: Option<u16>,
    /// Memory in bytes, or as 512M, 1G; -1 for no limit
    #[arg(long, short = 'm', value_name = "BYTES", allow_hyphen_values = true, value_parser = bytes)]
    pub memory: Option<i64>,
    /// Memory that is kept for the container, in bytes
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = bytes)]
    pub memory_reservation: Option<i64>,
    /// Memory and swap together, in bytes
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true, value_parser = bytes)]
    pub memory_swap: Option<i64>,
    /// Accepted: control groups have no such limit any more
    #[arg(long, value_name = "BYTES", hide = true, allow_hyphen_values = true)]
    pub kernel_memory: Option<String>,
    /// Accepted: control groups have no such limit any more
    #[arg(long, value_name = "BYTES", hide = true, allow_hyphen_values = true)]
    pub kernel_memory_tcp: Option<String>,
    /// Number of processes and threads
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
}

/// Options of `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// The container's name
    #[arg(value_name = "CONTAINER")]
    pub id: Id,
    /// Print the statistics of this moment and end
    #[arg(long)]
    pub stats: bool,
    /// Seconds between statistics: 5, 5s or 500ms
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub interval: std::time::Duration,
}

fn duration(text: &str) -> Result<std::time::Duration, String> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let number: u64 = digits.parse().map_err(|_| "write seconds as 5 or 5s, milliseconds as 500ms".to_owned())?;
    let duration = match unit {
        "" | "s" => std::time::Duration::from_secs(number),
        "ms" => std::time::Duration::from_millis(number),
        "m" => std::time::Duration::from_secs(number * 60),
        _ => return Err("write seconds as 5 or 5s, milliseconds as 500ms".into()),
    };
    if duration.is_zero() { Err("it must be greater than zero".into()) } else { Ok(duration) }
}

/// Options of `spec`.
#[derive(Debug, Args)]
pub struct Spec {
    /// The folder to write config.json to [default: the current one]
    #[arg(long, short, value_name = "DIR")]
    pub bundle: Option<PathBuf>,
    /// For a user who is not root
    #[arg(long)]
    pub rootless: bool,
}

/// How timings are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimingsFormat {
    /// For people
    Table,
    /// One line of JSON, nanoseconds
    Json,
}

/// Options of `check`.
#[derive(Debug, Args)]
pub struct Check {
    /// Say nothing: the exit code tells
    #[arg(long, short)]
    pub quiet: bool,
}

/// An amount of memory as runc's `update` takes it: bytes, or with a unit, binary whichever way it is written; -1 is none.
fn bytes(text: &str) -> Result<i64, String> {
    if text == "-1" {
        return Ok(-1);
    }
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    let unit = unit.trim_start().to_ascii_lowercase();
    let letter = unit.strip_suffix('b').map_or(&*unit, |letter| letter.strip_suffix('i').unwrap_or(letter));
    let exponent = match letter {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        _ => return Err("write bytes, or 512M, 1G".into()),
    };
    let number: i64 = digits.parse().map_err(|_| "write bytes, or 512M, 1G")?;
    number.checked_mul(1 << exponent).ok_or_else(|| "more than there can be".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(arguments: &[&str]) -> Run {
        let all = ["katavm", "run"].iter().chain(arguments);
        match Arguments::try_parse_from(all).unwrap().command {
            Command::Run(run) => run,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_holds() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn timings_may_stand_before_the_bundle() {
        assert_eq!(run(&["--timings", "bundle"]).timings, Some(TimingsFormat::Table));
        assert_eq!(run(&["--timings=json", "bundle"]).timings, Some(TimingsFormat::Json));
        assert_eq!(run(&["bundle"]).timings, None);
    }

    #[test]
    fn wrong_values_are_named() {
        for (arguments, words) in [
            (["--memory", "lots"], "write MiB as 512 or 512M"),
            (["--preserve-fds", "x"], "--preserve-fds"),
            (["--id", "a/b"], "invalid container id"),
            (["--cpus", "x"], "--cpus"),
        ] {
            let all = ["katavm", "run", "bundle"].iter().chain(&arguments);
            let error = Arguments::try_parse_from(all).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in
            [("9", 9), ("KILL", 9), ("sigkill", 9), ("SIGTERM", 15), ("RTMIN+1", libc::SIGRTMIN() + 1)]
        {
            assert_eq!(signal_number(text), Ok(number), "{text}");
        }
        for text in ["0", "65", "NOPE", "SIGRTMIN+99", ""] {
            assert!(signal_number(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_command_of_an_exec_is_left_alone() {
        let all = ["katavm", "exec", "-e", "A=1", "c1", "ls", "-l", "--all"];
        let Command::Exec(exec) = Arguments::try_parse_from(all).unwrap().command else { panic!() };
        assert_eq!(
            (exec.env, exec.command),
            (vec!["A=1".to_owned()], ["ls", "-l", "--all"].map(str::to_owned).to_vec())
        );
    }

    #[test]
    fn amounts_of_memory_are_read_as_runc_reads_them() {
        for (text, expected) in [
            ("0", 0),
            ("-1", -1),
            ("4096", 4096),
            ("1k", 1024),
            ("2M", 2 << 20),
            ("3 GB", 3 << 30),
            ("1GiB", 1 << 30),
            ("5b", 5),
        ] {
            assert_eq!(bytes(text), Ok(expected), "{text}");
        }
        for text in ["", "x", "-2", "1.5", "1x", "1ib2", "M", "99999999999P", "9223372036854775808"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
