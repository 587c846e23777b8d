//! Medians, and how they are printed.

/// All values of one measure for one monitor.
#[derive(Clone, Debug, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a value.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Minimum, median and maximum; none without values.
    pub fn summary(&self) -> Option<(f64, f64, f64)> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len().checked_sub(1)? / 2;
        let median = if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle] + sorted[middle + 1]) / 2.0 };
        Some((sorted[0], median, sorted[sorted.len() - 1]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        let mut series = Series::default();
        assert!(series.summary().is_none());
        [3.0, 1.0, 2.0].into_iter().for_each(|value| series.push(value));
        assert_eq!(series.summary(), Some((1.0, 2.0, 3.0)));
        series.push(10.0);
        assert_eq!(series.summary(), Some((1.0, 2.5, 10.0)));
    }
}
