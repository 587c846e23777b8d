//! What is measured, and the table of all values.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::plot::Row;

/// Whose values are compared with everybody else's.
const OURS: &str = "katavm";

/// One row of a benchmark.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Its name in the output.
    pub name: &'static str,
    /// The unit in the output; empty for a plain count.
    pub unit: &'static str,
    /// The most that katavm's median should be.
    pub aim: Option<f64>,
}

impl Measure {
    /// A measure without an aim.
    pub const fn new(name: &'static str, unit: &'static str) -> Self {
        Self { name, unit, aim: None }
    }

    /// A measure of which katavm's median should be at most `aim`.
    pub const fn aim(name: &'static str, unit: &'static str, aim: f64) -> Self {
        Self { name, unit, aim: Some(aim) }
    }
}

/// All values of one measure for one monitor.
#[derive(Clone, Debug, Default)]
struct Series(Vec<f64>);

impl Series {
    /// Minimum, median and maximum; none without values.
    fn summary(&self) -> Option<(f64, f64, f64)> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len().checked_sub(1)? / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle] + sorted[middle + 1]) / 2.0 };
        Some((sorted[0], median, sorted[sorted.len() - 1]))
    }

    fn median(&self) -> Option<f64> {
        self.summary().map(|(_, median, _)| median)
    }
}

/// Values by measure and monitor.
#[derive(Debug, Default)]
pub struct Table(BTreeMap<(&'static str, &'static str), Series>);

impl Table {
    /// Adds a value.
    pub fn add(&mut self, measure: &Measure, monitor: &'static str, value: f64) {
        self.0.entry((measure.name, monitor)).or_default().0.push(value);
    }

    /// Prints a line per measure and monitor, then a line per ratio, then a line per aim.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn print(&self, benchmark: &str, measures: &[Measure], out: &mut impl Write) -> io::Result<()> {
        for measure in measures {
            let Measure { name, unit, .. } = measure;
            for (monitor, series) in self.row(measure) {
                let Some((min, median, max)) = series.summary() else { continue };
                let runs = series.0.len();
                let text = format!("{benchmark} {name} {monitor} median {median:.1} {unit}");
                writeln!(out, "{} (min {min:.1}, max {max:.1}, runs {runs})", text.trim_end())?;
            }
        }
        for measure in measures {
            let Some(ours) = self.ours(measure) else { continue };
            for (monitor, series) in self.row(measure).filter(|(monitor, _)| *monitor != OURS) {
                let Some(theirs) = series.median() else { continue };
                writeln!(out, "{benchmark} {} {OURS}/{monitor} ratio {:.2}", measure.name, ours / theirs)?;
            }
        }
        for measure in measures {
            let (Some(aim), Some(ours)) = (measure.aim, self.ours(measure)) else { continue };
            let verdict = if ours <= aim { "met" } else { "missed" };
            writeln!(out, "{benchmark} {} {OURS} aim {aim} {}: {verdict}", measure.name, measure.unit)?;
        }
        Ok(())
    }

    /// The medians of measures that have values, by monitor.
    pub fn medians(&self, measures: &[Measure]) -> Vec<Row> {
        let row = |measure: &Measure| Row {
            name: measure.name,
            unit: measure.unit,
            medians: self.row(measure).filter_map(|(name, series)| Some((name, series.median()?))).collect(),
        };
        measures.iter().map(row).filter(|row| !row.medians.is_empty()).collect()
    }

    fn row(&self, measure: &Measure) -> impl Iterator<Item = (&'static str, &Series)> {
        let name = measure.name;
        self.0.iter().filter(move |((other, _), _)| *other == name).map(|((_, monitor), series)| (*monitor, series))
    }

    fn ours(&self, measure: &Measure) -> Option<f64> {
        self.0.get(&(measure.name, OURS)).and_then(Series::median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let mut series = Series::default();
        assert!(series.summary().is_none());
        series.0.extend([3.0, 1.0, 2.0]);
        assert_eq!(series.summary(), Some((1.0, 2.0, 3.0)));
        series.0.push(10.0);
        assert_eq!(series.summary(), Some((1.0, 2.5, 10.0)));
    }

    #[test]
    fn a_line_per_measure_and_monitor_then_ratios_then_aims() {
        const MEASURES: [Measure; 2] = [Measure::aim("time", "ms", 4.0), Measure::new("count", "")];
        let mut table = Table::default();
        for (monitor, value) in [("katavm", 5.0), ("qemu", 10.0)] {
            MEASURES.iter().for_each(|measure| table.add(measure, monitor, value));
        }
        let mut out = Vec::new();
        table.print("b", &MEASURES, &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let expected = "b time katavm median 5.0 ms (min 5.0, max 5.0, runs 1)\n\
                        b time qemu median 10.0 ms (min 10.0, max 10.0, runs 1)\n\
                        b count katavm median 5.0 (min 5.0, max 5.0, runs 1)\n\
                        b count qemu median 10.0 (min 10.0, max 10.0, runs 1)\n\
                        b time katavm/qemu ratio 0.50\nb count katavm/qemu ratio 0.50\n\
                        b time katavm aim 4 ms: missed\n";
        assert_eq!(text, expected);
    }
}
