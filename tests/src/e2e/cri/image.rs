//! Images made for the tests, as archives that `ctr image import` takes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

/// Writes an image of one layer, the folder `root`, to `archive`; `config` is the image's own (its command, user, ...).
pub fn archive(name: &str, root: &Path, config: &Value, archive: &Path) -> Result<()> {
    of_layers(name, &[root], config, archive)
}

/// Writes one of several layers, each a folder, the lowest first.
pub fn of_layers(name: &str, folders: &[impl AsRef<Path>], config: &Value, archive: &Path) -> Result<()> {
    let work = tempfile::TempDir::with_prefix("katavm-e2e-image-")?;
    let (mut layers, mut digests) = (Vec::new(), Vec::new());
    for (number, folder) in folders.iter().enumerate() {
        let layer = format!("layer-{number}.tar");
        let file = work.path().join(&layer);
        let tar = ["--owner=0", "--group=0", "."];
        run(Command::new("tar").arg("-C").arg(folder.as_ref()).arg("-cf").arg(&file).args(tar))?;
        let sum = run(Command::new("sha256sum").arg(&file))?;
        digests.push(format!("sha256:{}", sum.split_ascii_whitespace().next().unwrap_or_default()));
        layers.push(layer);
    }
    let image = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": { "type": "layers", "diff_ids": digests },
    });
    fs::write(work.path().join("config.json"), image.to_string())?;
    let manifest = json!([{ "Config": "config.json", "RepoTags": [name], "Layers": layers }]);
    fs::write(work.path().join("manifest.json"), manifest.to_string())?;
    let parts = ["manifest.json", "config.json"].into_iter().map(str::to_owned).chain(layers);
    run(Command::new("tar").arg("-C").arg(work.path()).arg("-cf").arg(archive).args(parts)).map(drop)
}

/// A command's standard output; its end must be good.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// A root file system with nothing but `/pause` in it.
pub fn pause(root: &Path) -> Result<()> {
    fs::create_dir_all(root)?;
    let program = root.join("pause");
    fs::write(&program, pause_program())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Where the program is in memory.
const BASE: u64 = 0x40_0000;
/// The sizes of an ELF file's header and of one program header (elf(5)).
const HEADERS: (u16, u16) = (64, 56);
/// Has the kernel reap children (rt_sigaction(2) with SIGCHLD ignored), and waits for ever (pause(2)). At the end lies
/// the `struct sigaction` of the kernel: the handler SIG_IGN, no flags, no restorer, no mask.
const CODE: [u8; 68] = [
    0xb8, 13, 0, 0, 0, // mov eax, SYS_rt_sigaction
    0xbf, 17, 0, 0, 0, // mov edi, SIGCHLD
    0x48, 0x8d, 0x35, 19, 0, 0, 0, // lea rsi, [rip + 19]
    0x31, 0xd2, // xor edx, edx
    0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8
    0x0f, 0x05, // syscall
    0xb8, 34, 0, 0, 0, // mov eax, SYS_pause
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp -9
    1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// A static program for x86-64 that does what the first container of a pod has to do.
fn pause_program() -> Vec<u8> {
    let (elf, program) = HEADERS;
    let start = u64::from(elf) + u64::from(program);
    let size = start + CODE.len() as u64;
    let mut file = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // ET_EXEC for EM_X86_64, version 1; the entry; where the program header is; no sections.
    file.extend([2_u16, 62].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(1_u32.to_le_bytes());
    file.extend([BASE + start, elf.into(), 0].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(0_u32.to_le_bytes());
    file.extend([elf, program, 1, 0, 0, 0].iter().flat_map(|n| n.to_le_bytes()));
    // PT_LOAD, to be read and executed: all of the file.
    file.extend([1_u32, 5].iter().flat_map(|n| n.to_le_bytes()));
    file.extend([0, BASE, BASE, size, size, 0x1000].iter().flat_map(|n| n.to_le_bytes()));
    file.extend(CODE);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_program_waits() {
        let folder = tempfile::tempdir().unwrap();
        pause(folder.path()).unwrap();
        let mut child = Command::new(folder.path().join("pause")).spawn().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(100));
        assert!(child.try_wait().unwrap().is_none());
        let state = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        assert!(state.contains("State:\tS"), "{state}");
        let ignored = state.lines().find_map(|line| line.strip_prefix("SigIgn:\t")).unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert!(ignored & 1 << (libc::SIGCHLD - 1) != 0, "{state}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
