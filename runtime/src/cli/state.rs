//! `katavm state` and `katavm list`

use std::io::Write;

use serde_json::{Value, json};

use super::arguments::{Format, Global, List};
use super::messages::rfc3339_ns;
use super::{find, state_root};
use crate::state::{Found, Id, Status};

/// Prints the state of a container (OCI runtime specification, "State"), with what runc adds to it.
///
/// # Errors
/// That there is none.
pub fn state(global: &Global, id: &Id) -> anyhow::Result<u8> {
    let found = find(global, id)?;
    writeln!(std::io::stdout(), "{:#}", describe(&found))?;
    Ok(0)
}

/// Prints all containers.
///
/// # Errors
/// That the state root cannot be read.
pub fn list(global: &Global, options: &List) -> anyhow::Result<u8> {
    let all = state_root(global)?.list()?;
    let mut out = std::io::stdout();
    if options.quiet {
        for found in &all {
            writeln!(out, "{}", found.record.id)?;
        }
        return Ok(0);
    }
    match options.format {
        Format::Json => {
            // runc prints `null` where there is none; engines read both.
            let all: Vec<Value> = all.iter().map(describe).collect();
            writeln!(out, "{}", if all.is_empty() { Value::Null } else { Value::Array(all) })?;
        }
        Format::Table => {
            let mut rows = vec![["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned)];
            rows.extend(all.iter().map(row));
            write!(out, "{}", table(&rows))?;
        }
    }
    Ok(0)
}

fn describe(found: &Found) -> Value {
    let record = &found.record;
    json!({
        "ociVersion": record.oci_version,
        "id": record.id,
        "pid": pid(found),
        "status": record.status,
        "bundle": record.bundle,
        "rootfs": record.rootfs,
        "created": rfc3339_ns(record.created_ns),
        "annotations": record.annotations,
        "owner": owner(record.uid),
    })
}

fn pid(found: &Found) -> u32 {
    if found.record.status == Status::Stopped { 0 } else { found.record.pid }
}

fn row(found: &Found) -> [String; 6] {
    let record = &found.record;
    [
        record.id.to_string(),
        pid(found).to_string(),
        record.status.to_string(),
        record.bundle.display().to_string(),
        rfc3339_ns(record.created_ns),
        owner(record.uid),
    ]
}

/// The user's name, or the number where there is none.
fn owner(uid: u32) -> String {
    let user = nix::unistd::User::from_uid(uid.into());
    user.ok().flatten().map_or_else(|| format!("#{uid}"), |user| user.name)
}

/// Columns as wide as their widest field, and at least 12, three blanks apart.
pub(super) fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0).max(9) + 3;
    let widths: [usize; N] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        for (index, (field, width)) in row.iter().zip(widths).enumerate() {
            if index + 1 == N {
                text.push_str(field);
            } else {
                text.push_str(&format!("{field:width$}"));
            }
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_in_line() {
        let rows = [["ID".into(), "PID".into()], ["a-rather-long-id".into(), "7".into()]];
        assert_eq!(table(&rows), "ID                 PID\na-rather-long-id   7\n");
    }

    #[test]
    fn root_has_a_name() {
        assert_eq!(owner(0), "root");
        assert_eq!(owner(4_000_000_000), "#4000000000");
    }
}
