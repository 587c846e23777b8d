//! What the guest writes to its serial console: kept, watched for a kernel's last words, and copied on demand.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ending::{Ending, ExitReason};

/// Bytes of output that are kept for an error message.
const TAIL: usize = 16 * 1024;
/// Longest line that is looked at, in bytes.
const LINE: usize = 512;

struct State {
    tail: VecDeque<u8>,
    line: Vec<u8>,
    panicked: bool,
    mirror: Option<Box<dyn Write + Send>>,
}

/// The console of one guest. Clones share it.
#[derive(Clone)]
pub struct Console {
    state: Arc<Mutex<State>>,
    ending: Ending,
}

impl Console {
    pub(crate) fn new(ending: Ending) -> Self {
        let state = State { tail: VecDeque::new(), line: Vec::new(), panicked: false, mirror: None };
        Self { state: Arc::new(Mutex::new(state)), ending }
    }

    /// The last output, at most 16 KiB, as text.
    #[must_use]
    pub fn tail(&self) -> String {
        let mut state = self.lock();
        String::from_utf8_lossy(state.tail.make_contiguous()).replace('\r', "")
    }

    /// From now on, everything is copied to `to` as well. A failure to write there ends the copying.
    pub fn mirror(&self, to: impl Write + Send + 'static) {
        self.lock().mirror = Some(Box::new(to));
    }

    /// Whether the guest kernel said that it panicked.
    #[must_use]
    pub fn panicked(&self) -> bool {
        self.lock().panicked
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Console {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut state = self.lock();
        for byte in data {
            state.push(*byte, &self.ending);
        }
        if let Some(mirror) = &mut state.mirror
            && mirror.write_all(data).and_then(|()| mirror.flush()).is_err()
        {
            state.mirror = None;
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    fn push(&mut self, byte: u8, ending: &Ending) {
        if self.tail.len() == TAIL {
            self.tail.pop_front();
        }
        self.tail.push_back(byte);
        if byte == b'\n' {
            self.judge(ending);
            self.line.clear();
        } else if self.line.len() < LINE {
            self.line.push(byte);
        }
    }

    /// The words by which a kernel without ACPI tells how it ends: it can reset the machine, but not switch it off.
    fn judge(&mut self, ending: &Ending) {
        let says = |words: &[u8]| self.line.windows(words.len()).any(|part| part == words);
        if says(b"Kernel panic - not syncing") {
            self.panicked = true;
        } else if says(b"reboot: ") && (says(b"System halted") || says(b"Power down")) {
            ending.end(ExitReason::Halted);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeline::Timeline;

    fn console() -> Console {
        Console::new(Ending::new(Arc::new(Timeline::default())).unwrap())
    }

    #[test]
    fn the_tail_is_the_newest_output() {
        let mut console = console();
        console.write_all(&vec![b'a'; TAIL]).unwrap();
        console.write_all(b"last\r\n").unwrap();
        assert!(console.tail().ends_with("alast\n"));
        assert_eq!(console.tail().len(), TAIL - 1);
    }

    #[test]
    fn last_words_are_understood() {
        let mut console = console();
        console.write_all(b"[0.1] Kernel panic - not syncing: no init\r\n").unwrap();
        assert!(console.panicked());
        assert_eq!(console.ending.reason(), None);
        console.write_all(b"[0.2] reboot: Power off not available: System halted instead\r\n").unwrap();
        assert_eq!(console.ending.reason(), Some(ExitReason::Halted));
    }
}
