//! Draws medians beside each other.

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Result, anyhow};
use plotters::prelude::{
    BLACK, Color, IntoDrawingArea as _, IntoFont as _, Palette as _, Palette99, Rectangle, SVGBackend, Text, WHITE,
};

/// A measure with the median of each monitor.
pub struct Row {
    /// The measure's name.
    pub name: &'static str,
    /// Its unit; empty for a plain count.
    pub unit: &'static str,
    /// By monitor, in the order of the picture.
    pub medians: Vec<(&'static str, f64)>,
}

const WIDTH: i32 = 900;
/// Where the bars begin, and how long the longest is.
const BARS: (i32, i32) = (260, 480);
const BAR_HEIGHT: i32 = 16;
const GAP: i32 = 14;

/// Draws `rows` to `bench-NAME.svg` in the output folder, each with its longest bar as long as every other's: what is
/// compared are the monitors. Gives the file.
///
/// # Errors
/// When it cannot be written.
pub fn draw(name: &str, rows: &[Row]) -> Result<PathBuf> {
    let folder = env::var_os("KATAVM_OUT").map_or_else(|| PathBuf::from("out"), PathBuf::from);
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("bench-{name}.svg"));
    let picture = picture(rows).map_err(|error| anyhow!("the picture of {name}: {error}"))?;
    fs::write(&path, picture)?;
    Ok(path)
}

fn picture(rows: &[Row]) -> Result<String, Box<dyn std::error::Error>> {
    let bars: i32 = rows.iter().map(|row| row.medians.len()).sum::<usize>().try_into()?;
    let height = GAP + bars * BAR_HEIGHT + i32::try_from(rows.len())? * GAP;
    let mut text = String::new();
    {
        let area = SVGBackend::with_string(&mut text, (WIDTH.try_into()?, height.try_into()?)).into_drawing_area();
        area.fill(&WHITE)?;
        let label = ("sans-serif", 13).into_font().color(&BLACK);
        let mut top = GAP;
        for row in rows {
            let most = row.medians.iter().map(|(_, value)| *value).fold(f64::MIN_POSITIVE, f64::max);
            for (index, (monitor, value)) in row.medians.iter().enumerate() {
                let name = format!("{} {monitor}", if index == 0 { row.name } else { "" });
                area.draw(&Text::new(name, (8, top), label.clone()))?;
                #[expect(clippy::cast_possible_truncation, reason = "at most the longest bar")]
                let end = BARS.0 + (f64::from(BARS.1) * value / most) as i32;
                let corners = [(BARS.0, top), (end, top + BAR_HEIGHT - 3)];
                area.draw(&Rectangle::new(corners, Palette99::pick(index).filled()))?;
                let told = format!("{value:.1} {}", row.unit);
                area.draw(&Text::new(told.trim_end().to_owned(), (end + 6, top), label.clone()))?;
                top += BAR_HEIGHT;
            }
            top += GAP;
        }
        area.present()?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_monitor_has_a_bar_by_its_share() {
        let rows = [Row { name: "time", unit: "ms", medians: vec![("katavm", 5.0), ("runc", 10.0)] }];
        let picture = picture(&rows).unwrap();
        assert!(picture.contains("time katavm") && picture.contains("10.0 ms"), "{picture}");
        assert!(picture.contains("width=\"240\"") && picture.contains("width=\"480\""), "{picture}");
    }
}
