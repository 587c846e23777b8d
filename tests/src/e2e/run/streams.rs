//! Bytes through a container: whole, in order, each stream for itself, however many.

use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Result, ensure};

use super::super::{Context, Table, Verdict};
use super::bundle::bundle;
use super::debian;
use super::katavm::{expect, finish, run};

/// The table.
pub const CASES: Table = (
    "streams",
    &[
        ("stdin_of_seq_2000000_comes_back_whole", seq_2_million),
        ("stdout_of_32_mib_arrives_whole", stdout_32_mib),
        ("stdout_and_stderr_are_apart", apart),
        ("dev_null_is_an_empty_stdin", dev_null),
        ("closed_streams_are_dev_null", closed),
        ("a_reader_that_goes_away_ends_the_writer", reader_gone),
        ("a_reader_that_waits_loses_nothing", slow_reader),
        ("a_file_is_appended_to", appended),
    ],
);

/// The sizes of gigabytes; about five minutes each in the lab.
pub const LONG_CASES: Table = (
    "streams",
    &[("stdin_of_seq_20000000_comes_back_whole", seq_20_million), ("stdout_of_2_gib_arrives_whole", stdout_2_gib)],
);

/// Runs a script of bash, which finds the bundle's folder in `$1`; a failure anywhere in a pipeline is its failure.
fn bash(context: &Context, script: &str, bundle: &Path) -> Result<Output> {
    let mut command = Command::new("bash");
    command.args(["-euo", "pipefail", "-c", script, "bash"]).arg(bundle);
    finish(context, command, b"")
}

/// What goes in on standard input comes out again, by checksum.
fn seq(context: &Context, last: u32) -> Result<Verdict> {
    let bundle = bundle(context, &["cat"], |_| ())?;
    let there = bash(context, &format!("seq 1 {last} | katavm run \"$1\" | sha256sum"), &bundle)?;
    let here = bash(context, &format!("seq 1 {last} | sha256sum"), &bundle)?;
    expect(&there, 0, &String::from_utf8_lossy(&here.stdout), "")
}

fn seq_2_million(context: &Context) -> Result<Verdict> {
    seq(context, 2_000_000)
}

fn seq_20_million(context: &Context) -> Result<Verdict> {
    seq(context, 20_000_000)
}

/// Lines of 4001 bytes, a prime number: a block that is lost, doubled or out of its place shows at the next byte.
fn stdout(context: &Context, bytes: u64) -> Result<Verdict> {
    let Some(debian) = debian::bundle() else { return Ok(debian::no_bundle()) };
    let line: String = ('a'..='z').cycle().take(4000).collect();
    let script = format!("yes {line} | head -c {bytes}");
    debian::write_config(&debian, context.scratch(), &["sh", "-c", &script], &[])?;
    let compare = format!("katavm run \"$1\" | cmp - <({script}) && echo the same");
    expect(&bash(context, &compare, context.scratch())?, 0, "the same\n", "")
}

fn stdout_32_mib(context: &Context) -> Result<Verdict> {
    stdout(context, 32 << 20)
}

fn stdout_2_gib(context: &Context) -> Result<Verdict> {
    stdout(context, 2 << 30)
}

fn apart(context: &Context) -> Result<Verdict> {
    let output = run(context, &bundle(context, &["sh", "-c", "echo out; echo err >&2"], |_| ())?, b"")?;
    expect(&output, 0, "out\n", "")?;
    ensure!(output.stderr == b"err\n", "stderr {:?}", String::from_utf8_lossy(&output.stderr));
    Ok(Verdict::Passed)
}

fn dev_null(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "cat; echo end; ls -l /proc/self/fd/0"], |_| ())?;
    let output = bash(context, "katavm run \"$1\" < /dev/null", &bundle)?;
    let stdout = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && stdout.starts_with("end\n") && stdout.ends_with("/dev/null\n"), "{stdout:?}");
    Ok(Verdict::Passed)
}

fn closed(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "cat && echo out && echo err >&2 && exit 6"], |_| ())?;
    let script = "code=0; katavm run \"$1\" <&- >&- 2>&- || code=$?; echo $code";
    expect(&bash(context, script, &bundle)?, 0, "6\n", "")
}

/// `yes` would write for ever: it ends because katavm hands on that `head` reads no more.
fn reader_gone(context: &Context) -> Result<Verdict> {
    let script = "yes; echo \"yes ended with $?\" >&2";
    let bundle = bundle(context, &["sh", "-c", script], |_| ())?;
    let output = bash(context, "katavm run \"$1\" | head -n 1", &bundle)?;
    let ended = String::from_utf8_lossy(&output.stderr);
    ensure!(output.stdout == b"y\n", "stdout {:?}", String::from_utf8_lossy(&output.stdout));
    // By SIGPIPE, or, where that is ignored, by the failed write.
    ensure!(ended.contains("yes ended with 141\n") || ended.contains("yes ended with 1\n"), "{ended:?}");
    Ok(Verdict::Passed)
}

/// The reader begins only when the writer has filled every buffer on the way, and tells that by standing still.
fn slow_reader(context: &Context) -> Result<Verdict> {
    let script = "head -c 8388608 /dev/zero & while kill -0 $! 2>/dev/null; do echo >&2; sleep 1; done";
    let bundle = bundle(context, &["sh", "-c", script], |_| ())?;
    // Six lines on stderr mean that the writer has waited for five seconds.
    let script = "katavm run \"$1\" 2> >(head -n 6 > \"$1/waited\"; cat > /dev/null; ) | \
                  { until [ \"$(wc -l < \"$1/waited\")\" = 6 ]; do sleep 0.2; done; wc -c; }";
    expect(&bash(context, script, &bundle)?, 0, "8388608\n", "")
}

fn appended(context: &Context) -> Result<Verdict> {
    let bundle = bundle(context, &["sh", "-c", "echo out; echo err >&2"], |_| ())?;
    let script = "echo before > \"$1/log\"; katavm run \"$1\" >> \"$1/log\" 2>&1 < /dev/null; cat \"$1/log\"";
    let output = bash(context, script, &bundle)?;
    let log = String::from_utf8_lossy(&output.stdout);
    let mut lines: Vec<_> = log.lines().collect();
    ensure!(lines.first() == Some(&"before"), "{log:?}");
    // Two streams on one file: each arrives whole, in either order.
    lines.sort_unstable();
    ensure!(lines == ["before", "err", "out"], "{log:?}");
    Ok(Verdict::Passed)
}
