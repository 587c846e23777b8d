//! The agent's words on the kernel command line.

use crate::transport::Transport;

/// What the command line says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Cmdline {
    /// `katavm.log=debug`
    pub debug: bool,
    /// `katavm.transport=unix`, for tests without vsock.
    pub transport: Transport,
}

impl Cmdline {
    /// From /proc/cmdline; one that cannot be read says nothing.
    pub fn read() -> Self {
        Self::parse(&std::fs::read_to_string("/proc/cmdline").unwrap_or_default())
    }

    fn parse(line: &str) -> Self {
        let mut cmdline = Self::default();
        for word in line.split_ascii_whitespace() {
            match word {
                "katavm.log=debug" => cmdline.debug = true,
                "katavm.transport=unix" => cmdline.transport = Transport::Unix,
                _ => {}
            }
        }
        cmdline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_own_words_only() {
        let line = "console=ttyS0 quiet katavm.log=debug xkatavm.transport=unix\n";
        assert_eq!(Cmdline::parse(line), Cmdline { debug: true, transport: Transport::Vsock });
        assert_eq!(Cmdline::parse("katavm.transport=unix").transport, Transport::Unix);
        assert_eq!(Cmdline::parse(""), Cmdline::default());
    }
}
