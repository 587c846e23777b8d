//! A terminal session, from a pseudo-terminal on the host to the container's own.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::process::{Signal, kill_process};

use super::super::{Context, Table, Verdict};
use super::bundle::on_terminal;
use super::katavm::ends;
use super::pty::{Ended, Pty, Session};

/// The table.
pub const CASES: Table = (
    "terminal",
    &[
        ("stty_size_follows_a_resize", resize),
        ("ctrl_c_interrupts_and_the_shell_goes_on", ctrl_c),
        ("ctrl_c_before_the_container_runs_ends_katavm", early_ctrl_c),
        ("what_was_typed_ahead_arrives", typed_ahead),
        ("a_full_screen_arrives_byte_by_byte", full_screen),
        ("all_bytes_reach_the_container", all_bytes),
        ("vi_edits_a_file", vi),
        ("a_terminal_that_is_none_is_refused", no_terminal),
        ("the_mode_is_restored_after_kill_9", restored_after_kill),
        ("the_mode_is_restored_after_sigterm", restored_after_sigterm),
        ("the_mode_is_restored_after_an_error", restored_after_error),
    ],
);

/// Asks that the session ended with `code` and left the terminal as it was.
fn restored(session: Session<'_>, code: i32) -> Result<Ended> {
    let before = Pty::open()?.mode()?;
    let ended = session.end()?;
    ensure!(ended.status.code() == Some(code), "{} instead of {code}: {}", ended.status, screen(&ended));
    ensure!(ended.mode == before, "the mode was {before:?} and is {:?}", ended.mode);
    Ok(ended)
}

fn screen(ended: &Ended) -> String {
    String::from_utf8_lossy(&ended.screen).into_owned()
}

/// A session with a shell at its prompt.
fn shell(context: &Context) -> Result<Session<'_>> {
    let mut session = Session::start(context, Pty::open()?, &[], &on_terminal(context, &["sh"])?)?;
    session.wait_for("$ ")?;
    Ok(session)
}

fn resize(context: &Context) -> Result<Verdict> {
    let mut session = shell(context)?;
    session.press("stty size\r")?;
    session.wait_for("\r\n24 80\r\n")?;
    // The foreground process hears of it by SIGWINCH, and the terminal has the new size by then.
    session.press("sh -c 'trap \"stty size; exit\" WINCH; echo rea''dy; while :; do sleep 1; done'\r")?;
    session.wait_for("ready\r\n")?;
    session.pty().resize(50, 132)?;
    session.wait_for("50 132\r\n")?;
    // Of many in a row the last one counts.
    for columns in 1..=100 {
        session.pty().resize(40, columns)?;
    }
    session.press("until [ \"$(stty size)\" = '40 100' ]; do sleep 1; done; echo arr''ived\r")?;
    session.wait_for("arrived\r\n")?;
    session.press("exit 7\r")?;
    restored(session, 7)?;
    Ok(Verdict::Passed)
}

fn ctrl_c(context: &Context) -> Result<Verdict> {
    let mut session = shell(context)?;
    // Said by the process that is to be interrupted: the shell would take a key that comes before there is one for its own.
    session.press("sh -c \"echo go''ing; exec sleep 10000\"\r")?;
    session.wait_for("going\r\n")?;
    session.press([3])?;
    session.wait_for("$ ")?;
    session.press("echo code $?\r")?;
    // 128 + SIGINT.
    session.wait_for("code 130\r\n")?;
    // Not before the shell edits its line again: a key that the terminal takes while it is in its other mode gets lost.
    session.wait_for("$ ")?;
    // The end of the input ends the shell, with its last code.
    session.press([4])?;
    restored(session, 0)?;
    Ok(Verdict::Passed)
}

/// The terminal is not raw yet: the key is a signal to katavm, which takes its virtual machine down and leaves.
fn early_ctrl_c(context: &Context) -> Result<Verdict> {
    let bundle = on_terminal(context, &["sh"])?;
    let mut session = Session::start(context, Pty::open()?, &["--console"], &bundle)?;
    // The guest's kernel has begun to boot.
    session.wait_for("Linux version")?;
    session.press([3])?;
    let ended = restored(session, 1)?;
    ensure!(screen(&ended).contains("interrupted by signal 2"), "{}", screen(&ended));
    Ok(Verdict::Passed)
}

fn typed_ahead(context: &Context) -> Result<Verdict> {
    let mut session = Session::start(context, Pty::open()?, &[], &on_terminal(context, &["sh"])?)?;
    session.press("echo typed ah''ead\rexi")?;
    session.wait_for("typed ahead\r\n")?;
    session.press("t 9\r")?;
    restored(session, 9)?;
    Ok(Verdict::Passed)
}

/// What a full-screen program draws: the other screen, cursor movements, colours, characters of several bytes.
fn drawing() -> Result<Vec<u8>> {
    let mut text = String::from("\x1b[?1049h\x1b[?25l");
    for frame in 0..60_u32 {
        text.push_str("\x1b[H\x1b[2J\x1b[38;5;39m╔══ katavm ══╗\x1b[0m");
        for row in 2..24_u32 {
            let (column, colour) = ((row * 7 + frame * 3) % 60 + 1, (row * frame) % 256);
            write!(text, "\x1b[{row};{column}H\x1b[48;5;{colour}m│ {frame:>3}·{row:<3}\t▓░é│\x1b[0m\x1b[K\r\n\x07")?;
        }
    }
    text.push_str("\x1b[?25h\x1b[?1049l");
    let mut bytes = text.into_bytes();
    // And what no terminal expects.
    bytes.extend((0..=255).chain((0..=255).rev()));
    Ok(bytes)
}

fn full_screen(context: &Context) -> Result<Verdict> {
    let bundle = on_terminal(context, &["sh", "-c", "stty -opost; cat /drawing"])?;
    let drawing = drawing()?;
    fs::write(bundle.join("rootfs/drawing"), &drawing)?;
    let ended = restored(Session::start(context, Pty::open()?, &[], &bundle)?, 0)?;
    let differs = ended.screen.iter().zip(&drawing).position(|(a, b)| a != b);
    ensure!(ended.screen == drawing, "{} bytes of {}, first other: {differs:?}", ended.screen.len(), drawing.len());
    Ok(Verdict::Passed)
}

fn all_bytes(context: &Context) -> Result<Verdict> {
    let script = "stty raw -echo; echo ready; head -c 256 > /typed";
    let bundle = on_terminal(context, &["sh", "-c", script])?;
    let mut session = Session::start(context, Pty::open()?, &[], &bundle)?;
    session.wait_for("ready\n")?;
    let keys: Vec<u8> = (0..=255).collect();
    session.press(&keys)?;
    restored(session, 0)?;
    let typed = fs::read(bundle.join("rootfs/typed"))?;
    ensure!(typed == keys, "{typed:?}");
    Ok(Verdict::Passed)
}

fn vi(context: &Context) -> Result<Verdict> {
    let bundle = on_terminal(context, &["vi", "/poem"])?;
    fs::write(bundle.join("rootfs/poem"), "last line\n")?;
    let mut session = Session::start(context, Pty::open()?, &[], &bundle)?;
    // It draws the file, and a tilde on every row below it, down to the last but one.
    session.wait_for("last line")?;
    session.wait_for("\x1b[23;1H")?;
    session.press("Ofirst line")?;
    session.wait_for("first line")?;
    // What follows an escape character at once would be taken for a key's sequence.
    session.press("\x1b")?;
    session.wait_for("- /poem [Modified]")?;
    session.press(":wq\r")?;
    restored(session, 0)?;
    let poem = fs::read_to_string(bundle.join("rootfs/poem"))?;
    ensure!(poem == "first line\nlast line\n", "{poem:?}");
    Ok(Verdict::Passed)
}

fn no_terminal(context: &Context) -> Result<Verdict> {
    let bundle = on_terminal(context, &["sh"])?;
    super::katavm::refused(&super::katavm::run(context, &bundle, b"")?, &["not a TTY", "process.terminal"])
}

/// The watcher restores the terminal, which nothing in katavm's own process can do any more.
fn restored_after_kill(context: &Context) -> Result<Verdict> {
    let before = Pty::open()?.mode()?;
    let mut session = shell(context)?;
    ensure!(session.pty().mode()? != before, "the terminal is not raw while the container runs");
    let children = session.children()?;
    ensure!(children.len() == 2, "{children:?}");
    session.kill()?;
    for child in children {
        ensure!(ends(child)?, "the watcher or the stand-in did not end");
    }
    let ended = session.end()?;
    ensure!(ended.mode == before, "the mode was {before:?} and is {:?}", ended.mode);
    Ok(Verdict::Passed)
}

/// The signal goes to the container, whose end is katavm's.
fn restored_after_sigterm(context: &Context) -> Result<Verdict> {
    let script = "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 1; done";
    let bundle = on_terminal(context, &["sh", "-c", script])?;
    let mut session = Session::start(context, Pty::open()?, &[], &bundle)?;
    session.wait_for("ready\r\n")?;
    kill_process(session.pid(), Signal::TERM)?;
    session.wait_for("bye\r\n")?;
    restored(session, 4)?;
    Ok(Verdict::Passed)
}

fn restored_after_error(context: &Context) -> Result<Verdict> {
    // Before there is a guest.
    let bundle = on_terminal(context, &["sh"])?;
    let session = Session::start(context, Pty::open()?, &["--kernel", "/no/kernel"], &bundle)?;
    let ended = restored(session, 1)?;
    ensure!(screen(&ended).contains("/no/kernel"), "{}", screen(&ended));
    // By the agent, when the container is made.
    let ended = restored(Session::start(context, Pty::open()?, &[], &on_terminal(context, &["nosuch"])?)?, 1)?;
    ensure!(screen(&ended).contains("executable file not found in $PATH\r\n"), "{}", screen(&ended));
    // By the process, when its program is no program.
    let bundle = on_terminal(context, &["/broken"])?;
    broken_program(&bundle.join("rootfs/broken"))?;
    let ended = restored(Session::start(context, Pty::open()?, &[], &bundle)?, 1)?;
    ensure!(screen(&ended).contains("exec format error"), "{}", screen(&ended));
    Ok(Verdict::Passed)
}

/// A file that may be executed and cannot be.
fn broken_program(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, "\0\0\0\0")?;
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(0o755))?)
}
