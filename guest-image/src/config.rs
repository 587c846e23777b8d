//! Whether a kernel's final `.config` holds every option that was asked for.
//!
//! Kconfig drops an option silently when a dependency is missing or its name changed, and turns one on that something
//! else selects. Either would only show much later, in a guest.

use std::collections::BTreeMap;
use std::fmt;

/// An option that the final configuration does not hold as asked.
#[derive(Debug, PartialEq, Eq)]
pub struct Unmet {
    /// The option's name, with `CONFIG_`.
    pub option: String,
    /// The value asked for; `n` for an option asked to be off.
    pub wanted: String,
    /// The value found; `n` for an option that is off or unknown.
    pub found: String,
}

impl fmt::Display for Unmet {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} is {}, wanted {}", self.option, self.found, self.wanted)
    }
}

/// Compares a fragment (`CONFIG_X=value` and `# CONFIG_X is not set` lines) with a final `.config`.
///
/// Returns what does not hold, in the fragment's order; an option that is absent from the `.config` is off.
#[must_use]
pub fn unmet(fragment: &str, dot_config: &str) -> Vec<Unmet> {
    let found: BTreeMap<&str, &str> = dot_config.lines().filter_map(setting).collect();
    let differing = |(option, wanted): (&str, &str)| {
        let found = found.get(option).copied().unwrap_or("n");
        (found != wanted).then(|| Unmet { option: option.into(), wanted: wanted.into(), found: found.into() })
    };
    fragment.lines().filter_map(setting).filter_map(differing).collect()
}

/// The option and value that a line sets; none for comments and blank lines.
fn setting(line: &str) -> Option<(&str, &str)> {
    let line = line.trim_end();
    if let Some(option) = line.strip_prefix("# ").and_then(|rest| rest.strip_suffix(" is not set")) {
        return option.starts_with("CONFIG_").then_some((option, "n"));
    }
    if !line.starts_with("CONFIG_") {
        return None;
    }
    line.split_once('=')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(fragment: &str, dot_config: &str) -> Vec<String> {
        unmet(fragment, dot_config).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_config_that_holds_everything_passes() {
        let fragment =
            "# why\nCONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_GONE is not set\nCONFIG_N=240\nCONFIG_S=\"\"\n";
        let dot_config = "CONFIG_N=240\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_S=\"\"\nCONFIG_MORE=y\n";
        assert_eq!(names(fragment, dot_config), Vec::<String>::new());
    }

    #[test]
    fn each_option_that_does_not_hold_is_named() {
        let fragment = "CONFIG_MISSING=y\nCONFIG_OFF=y\n# CONFIG_ON is not set\nCONFIG_N=240\n";
        let dot_config = "# CONFIG_OFF is not set\nCONFIG_ON=y\nCONFIG_N=64\n";
        assert_eq!(
            names(fragment, dot_config),
            [
                "CONFIG_MISSING is n, wanted y",
                "CONFIG_OFF is n, wanted y",
                "CONFIG_ON is y, wanted n",
                "CONFIG_N is 64, wanted 240"
            ]
        );
    }

    #[test]
    fn a_longer_name_is_another_option() {
        assert_eq!(names("CONFIG_NET=y\n", "CONFIG_NETFILTER=y\n"), ["CONFIG_NET is n, wanted y"]);
    }

    /// A prose comment that ends in the same words is no setting.
    #[test]
    fn comments_set_nothing() {
        assert_eq!(setting("# this is not set"), None);
        assert_eq!(setting("## CONFIG_X=y"), None);
        assert_eq!(setting(""), None);
    }

    #[test]
    fn our_own_fragment_asks_for_each_option_once() {
        let mut seen = std::collections::BTreeSet::new();
        for (option, _) in crate::kernel::CONFIG.lines().filter_map(setting) {
            assert!(seen.insert(option), "{option} stands twice in kernel.config");
        }
        assert!(seen.len() > 200, "only {} options were read", seen.len());
    }
}
