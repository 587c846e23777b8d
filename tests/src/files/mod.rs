//! What files do: programs that try a folder, run once on the host and once in a guest that shares it.
//!
//! They are this test program itself, told so by its first argument.

mod fsx;
mod operations;
mod subjects;
mod table;

use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

pub use fsx::{Fsx, digest};
pub use table::compare;

/// The argument by which a program is told to try operations on all kinds of files in a folder: `FOLDER STEP`, where only one
/// case in STEP is tried.
pub const TABLE: &str = "--try-files";
/// The argument by which a program is told to try a file at random: `FILE SEED SECONDS`.
pub const FSX: &str = "--fsx";

/// Takes over where this process was started for one of these.
#[must_use]
pub fn enter() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.first()?.as_str() {
        TABLE => run_table(&arguments),
        FSX => run_fsx(&arguments),
        _ => return None,
    };
    Some(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn run_table(arguments: &[String]) -> Result<()> {
    let [_, folder, step] = arguments else { bail!("usage: {TABLE} FOLDER STEP") };
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    table::run(Path::new(folder), step.parse().context("the step")?, &mut out)?;
    Ok(out.flush()?)
}

fn run_fsx(arguments: &[String]) -> Result<()> {
    let [_, file, seed, seconds] = arguments else { bail!("usage: {FSX} FILE SEED SECONDS") };
    let (seed, time) = (seed.parse().context("the seed")?, Duration::from_secs(seconds.parse().context("the time")?));
    let mut fsx = Fsx::new(Path::new(file), seed)?;
    let operations = fsx.run(time)?;
    println!("operations {operations} digest {:016x}", digest(fsx.model()));
    Ok(())
}
