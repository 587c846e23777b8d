//! How often guests hung, which is measured once more and told.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{self, Write};

use anyhow::Result;

use super::process::Hung;

/// How often a guest that hangs is tried again.
const RETRIES: u32 = 3;

/// Boots and hangs by the name of who booted.
#[derive(Default)]
pub struct Hangs(RefCell<BTreeMap<&'static str, (u32, u32)>>);

impl Hangs {
    /// Measures, and once more when the guest hangs.
    ///
    /// # Errors
    /// Those of `measure`; [`Hung`] if it hangs again and again.
    pub fn again<T>(&self, name: &'static str, measure: impl Fn() -> Result<T>) -> Result<T> {
        let mut left = RETRIES;
        loop {
            let outcome = measure();
            let hung = outcome.as_ref().is_err_and(|error| error.is::<Hung>());
            let mut tally = self.0.borrow_mut();
            let (boots, hangs) = tally.entry(name).or_default();
            *boots += 1;
            *hangs += u32::from(hung);
            drop(tally);
            match outcome {
                Err(error) if hung && left > 0 => eprintln!("{name}, once more: {error:#}"),
                outcome => return outcome,
            }
            left -= 1;
        }
    }

    /// Prints a line for each name.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn print(&self, benchmark: &str, out: &mut impl Write) -> io::Result<()> {
        for (name, (boots, hung)) in &*self.0.borrow() {
            writeln!(out, "{benchmark} hung {name} {hung} of {boots} boots")?;
        }
        Ok(())
    }
}
