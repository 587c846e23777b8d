//! The smallest guest: an init that marks its first instruction, prints a line, marks that, and waits.
//!
//! It marks a moment by CPUID with a leaf that nobody else asks for: every VMM's guest leaves for it, and KVM's trace
//! shows it with the time, however loud or quiet the console is.

use anyhow::Result;
use katavm_guest_image::cpio::Archive;

/// CPUID leaf of the first instruction in user mode.
pub const INSTRUCTION: u32 = 0x4b41_0001;
/// CPUID leaf once [`LINE`] has left the serial port.
pub const PRINTED: u32 = 0x4b41_0002;
/// What it prints.
pub const LINE: &str = "first line of userspace\n";

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
/// ELF header and one program header.
const HEADERS: u64 = 64 + 56;

/// An initramfs with that init alone.
///
/// # Errors
/// None that this content could cause.
pub fn initramfs() -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    archive.directory("dev", 0o755)?;
    archive.character_device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, &elf(&code()))?;
    Ok(archive.finish())
}

/// A static x86-64 executable of `code`.
fn elf(code: &[u8]) -> Vec<u8> {
    let size = HEADERS + code.len() as u64;
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    // Executable, x86-64, version 1.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Entry, program headers, no section headers, no flags.
    [BASE + HEADERS, 64, 0].into_iter().for_each(|field| elf.extend(field.to_le_bytes()));
    elf.extend([0; 4]);
    [64_u16, 56, 1, 0, 0, 0].into_iter().for_each(|field| elf.extend(field.to_le_bytes()));
    // PT_LOAD, readable and executable: offset, virtual and physical address, size in file and memory, alignment.
    [1_u32, 5].into_iter().for_each(|field| elf.extend(field.to_le_bytes()));
    [0, BASE, BASE, size, size, 0x1000].into_iter().for_each(|field| elf.extend(field.to_le_bytes()));
    elf.extend(code);
    elf
}

fn code() -> Vec<u8> {
    const WRITE: u32 = 1;
    const IOCTL: u32 = 16;
    const PAUSE: u32 = 34;
    // With an argument other than 0 it waits until all output is sent (tcdrain(3)).
    const TCSBRK: u32 = 0x5409;
    const STDOUT: u32 = 1;
    let mut code = Vec::new();
    mark(&mut code, INSTRUCTION);
    mov(&mut code, EDI, STDOUT);
    // lea rsi, [rip + 11]: past edx, eax, the call and the jump over the text.
    let past = 5 + 5 + 2 + 2;
    code.extend([0x48, 0x8d, 0x35, past, 0, 0, 0]);
    mov(&mut code, EDX, LINE.len() as u32);
    mov(&mut code, EAX, WRITE);
    code.extend(SYSCALL);
    // jmp over the text.
    code.extend([0xeb, LINE.len() as u8]);
    code.extend(LINE.as_bytes());
    mov(&mut code, EDI, STDOUT);
    mov(&mut code, ESI, TCSBRK);
    mov(&mut code, EDX, 1);
    mov(&mut code, EAX, IOCTL);
    code.extend(SYSCALL);
    mark(&mut code, PRINTED);
    mov(&mut code, EAX, PAUSE);
    code.extend(SYSCALL);
    // jmp to the last mov: back over it, the call and this.
    code.extend([0xeb, (-9_i8).cast_unsigned()]);
    code
}

const SYSCALL: [u8; 2] = [0x0f, 0x05];
/// Opcodes of `mov r32, imm32`.
const EAX: u8 = 0xb8;
const EDX: u8 = 0xba;
const ESI: u8 = 0xbe;
const EDI: u8 = 0xbf;

fn mov(code: &mut Vec<u8>, register: u8, value: u32) {
    code.push(register);
    code.extend(value.to_le_bytes());
}

/// `mov eax, leaf; cpuid`
fn mark(code: &mut Vec<u8>, leaf: u32) {
    mov(code, EAX, leaf);
    code.extend([0x0f, 0xa2]);
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// On the machine itself: CPUID of a leaf that is not there harms nobody.
    #[test]
    fn the_program_prints_its_line_and_waits() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("init");
        fs::write(&path, elf(&code())).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
        let mut child = Command::new(&path).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
        let ended = child.try_wait().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((line.as_str(), ended), (LINE, None));
    }
}
