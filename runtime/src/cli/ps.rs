//! `katavm ps`

use std::io::Write;

use super::arguments::{Format, Global, Ps};
use super::messages::rfc3339_ns;
use super::state::table;
use super::{control, find};
use crate::sandbox::agent::GuestProcess;

/// Prints the processes of a container as the guest counts them. As JSON, which engines ask for to look the pids up in the
/// host's /proc, it is the one that they find there: the stand-in.
///
/// # Errors
/// That it does not run.
pub fn ps(global: &Global, options: &Ps) -> anyhow::Result<u8> {
    let found = find(global, &options.id)?;
    let client = control::client(&found, "container not running")?;
    let mut out = std::io::stdout();
    match options.format {
        Format::Json => {
            writeln!(out, "{}", serde_json::to_string(&[found.record.pid])?)?;
        }
        Format::Table => {
            let mut rows = vec![["UID", "PID", "PPID", "STIME", "TTY", "TIME", "CMD"].map(str::to_owned)];
            rows.extend(client.processes()?.iter().map(row));
            write!(out, "{}", table(&rows))?;
        }
    }
    Ok(0)
}

fn row(process: &GuestProcess) -> [String; 7] {
    let seconds = process.cpu_ns / 1_000_000_000;
    let started = rfc3339_ns(process.started_at_ns);
    [
        process.uid.to_string(),
        process.pid.to_string(),
        process.ppid.to_string(),
        // The time of day of `2026-01-02T03:04:05...`.
        started.get(11..19).unwrap_or_default().to_owned(),
        terminal(process.tty),
        format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
        process.command.clone(),
    ]
}

/// A pseudo-terminal by its number; majors 136 to 143 are theirs (Documentation/admin-guide/devices.txt).
fn terminal(device: u32) -> String {
    let (major, minor) = (device >> 8 & 0xfff, device & 0xff | device >> 12 & 0xfff00);
    if (136..144).contains(&major) { format!("pts/{}", (major - 136) * 256 + minor) } else { "?".into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_a_row() {
        let process = GuestProcess {
            pid: 7,
            ppid: 1,
            uid: 33,
            started_at_ns: 951_782_400_000_000_000,
            cpu_ns: 3_725_000_000_000,
            tty: 136 << 8 | 3,
            command: "sleep 1".into(),
            ..Default::default()
        };
        assert_eq!(row(&process), ["33", "7", "1", "00:00:00", "pts/3", "01:02:05", "sleep 1"].map(str::to_owned));
        assert_eq!(terminal(0), "?");
    }
}
