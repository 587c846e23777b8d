//! Every operation on every kind of file, by root and by an ordinary user: one line each.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{Gid, Mode, Uid};
use rustix::process::{chdir, umask};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};

use super::operations::{self, GROUP, Operation, Outcome, USER};
use super::subjects::{self, BEFORE, SUBJECTS, Subject};

const CALLERS: [(&str, bool); 2] = [("root", true), ("user", false)];

/// Tries one in `step` in `folder`, which must be empty, and tells of each in a line: what was tried, what came of it, and all
/// that the folder is then.
///
/// # Errors
/// When what an operation needs cannot be made.
pub fn run(folder: &Path, step: usize, out: &mut dyn Write) -> Result<()> {
    umask(Mode::from_bits_retain(0o027));
    let operations = operations::all();
    let mut count = 0_usize;
    for subject in SUBJECTS {
        for operation in &operations {
            for (caller, is_root) in CALLERS {
                count += 1;
                if !count.is_multiple_of(step) {
                    continue;
                }
                let (name, _, _) = subject;
                let case = format!("{caller}: {}: {name}", operation.name);
                let outcome = one(folder, subject, operation, is_root).with_context(|| case.clone())?;
                writeln!(out, "{case} = {outcome}")?;
            }
        }
    }
    Ok(())
}

fn one(folder: &Path, subject: &Subject, operation: &Operation, is_root: bool) -> Result<String> {
    let case = folder.join("case");
    fs::create_dir(&case)?;
    fs::set_permissions(&case, PermissionsExt::from_mode(0o755))?;
    chdir(&case)?;
    subjects::prepare(subject, operation.with_others)?;
    let outcome = if is_root { (operation.act)() } else { as_user(&operation.act)? };
    let mut said = match outcome {
        Ok(what) => what,
        Err(error) => format!("errno {}", error.raw_os_error()),
    };
    describe(Path::new("in"), &mut said)?;
    chdir(folder)?;
    fs::remove_dir_all(&case)?;
    Ok(said)
}

/// This thread acts as the user for a while. There must be no other one that minds.
fn as_user(act: impl Fn() -> Outcome) -> Result<Outcome> {
    let (user, root) = (Uid::from_raw(USER), Uid::ROOT);
    set_thread_groups(&[Gid::from_raw(GROUP)])?;
    set_thread_res_gid(Gid::from_raw(USER), Gid::from_raw(USER), Gid::ROOT)?;
    set_thread_res_uid(user, user, root)?;
    let outcome = act();
    set_thread_res_uid(root, root, root)?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    set_thread_groups(&[])?;
    Ok(outcome)
}

/// Everything that is the same on each machine about what is at `path` and below.
fn describe(path: &Path, said: &mut String) -> Result<()> {
    let meta = fs::symlink_metadata(path)?;
    let kind = meta.file_type();
    write!(said, "; {} {:o} {} {}:{}", path.display(), meta.mode(), meta.nlink(), meta.uid(), meta.gid())?;
    // Times of today differ from run to run.
    match meta.mtime() {
        BEFORE => {}
        time if time < 1_000_000_000 => write!(said, " at {time}.{}", meta.mtime_nsec())?,
        _ => said.push_str(" changed"),
    }
    if meta.atime() < 1_000_000_000 && meta.atime() != BEFORE {
        write!(said, " used {}.{}", meta.atime(), meta.atime_nsec())?;
    }
    if kind.is_file() {
        write!(said, " {} {}", meta.len(), contents(&fs::read(path)?))?;
    } else if kind.is_symlink() {
        write!(said, " to {}", fs::read_link(path)?.display())?;
    } else if kind.is_char_device() {
        write!(said, " {:x}", meta.rdev())?;
    }
    let mut value = [0; 64];
    if !kind.is_symlink()
        && let Ok(len) = rustix::fs::lgetxattr(path, "user.note", &mut value[..])
    {
        write!(said, " note {:?}", String::from_utf8_lossy(value.get(..len).unwrap_or_default()))?;
    }
    if kind.is_dir() {
        let entries = fs::read_dir(path)?.map(|entry| Ok(entry?.path()));
        let mut entries = entries.collect::<Result<Vec<PathBuf>>>()?;
        entries.sort_unstable();
        entries.iter().try_for_each(|entry| describe(entry, said))?;
    }
    Ok(())
}

/// The bytes that are none, told shortly.
fn contents(bytes: &[u8]) -> String {
    let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
    parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect::<Vec<_>>().join("|")
}

/// A guest says done where a host says EPERM: nothing is done by either. The guest's kernel asks its file server with
/// words that may also come before fallocate(2), which is allowed.
const DONE_FOR_NOTHING: &str = "user: chown to nobody else: a file with set-id bits";

/// What has become of the folder, without what the caller was told.
fn folder(said: &str) -> Option<&str> {
    said.split_once("; ").map(|(_, folder)| folder)
}

/// Compares what two runs said; how many cases there were.
///
/// # Errors
/// The cases that differ.
pub fn compare(host: &str, guest: &str) -> Result<usize> {
    let parse = |text: &str| -> BTreeMap<String, String> {
        text.lines().filter_map(|line| line.split_once(" = ")).map(|(case, said)| (case.into(), said.into())).collect()
    };
    let (host, guest) = (parse(host), parse(guest));
    let cases = host.keys().chain(guest.keys().filter(|case| !host.contains_key(*case)));
    let differ = cases.filter(|case| match (host.get(*case), guest.get(*case)) {
        (Some(host), Some(guest)) if *case == DONE_FOR_NOTHING => folder(host) != folder(guest),
        (host, guest) => host != guest,
    });
    let none = String::from("nothing");
    let said: Vec<_> = differ
        .map(|case| {
            let of = |run: &BTreeMap<String, String>| run.get(case).unwrap_or(&none).clone();
            format!("{case}\n  host  {}\n  guest {}", of(&host), of(&guest))
        })
        .collect();
    ensure!(said.is_empty(), "{} of {} cases differ:\n{}", said.len(), host.len(), said.join("\n"));
    Ok(host.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_says_the_same_each_time() {
        if !rustix::process::geteuid().is_root() {
            println!("SKIPPED: changing owners needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let said = |name: &str| {
            let folder = dir.path().join(name);
            fs::create_dir(&folder).unwrap();
            // With ids and a umask of its own.
            let output = std::thread::scope(|scope| {
                let run = scope.spawn(|| {
                    // SAFETY: FS affects this thread's own working directory and umask, no descriptors.
                    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
                    let mut said = Vec::new();
                    run(&folder, 1, &mut said).unwrap();
                    said
                });
                run.join().unwrap()
            });
            String::from_utf8(output).unwrap()
        };
        let (one, other) = (said("one"), said("other"));
        let cases = compare(&one, &other).unwrap();
        println!("{cases} cases");
        assert!(cases >= 300);
        // The user may do some of it.
        let done = one.lines().filter(|line| line.starts_with("user: ") && !line.contains(" = errno 13;")).count();
        assert!(done * 3 > cases, "{done} of the user's");
        let changed = other.replacen("errno 2", "errno 5", 1);
        assert!(compare(&one, &changed).unwrap_err().to_string().starts_with("1 of"));
    }
}
