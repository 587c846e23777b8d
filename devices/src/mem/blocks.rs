//! Which blocks of the region are plugged.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// The size of a block in bytes: a huge page, so that none of the host's is torn for one. Linux plugs no less at once.
pub const BLOCK: u64 = 2 << 20;

const WORD: usize = u64::BITS as usize;

/// What a run of blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// All of them are plugged.
    Plugged,
    /// None of them is.
    Unplugged,
    /// Some are.
    Mixed,
}

/// One bit per block.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocks {
    words: Vec<u64>,
    count: usize,
}

impl Blocks {
    /// `count` blocks, none of them plugged.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self { words: vec![0; count.div_ceil(WORD)], count }
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// Whether this, which came from a file, is what [`new`](Self::new) and [`set`](Self::set) make of `count` blocks.
    #[must_use]
    pub fn is_sound(&self, count: usize) -> bool {
        let beyond = |block: &usize| self.is_plugged(*block);
        self.count == count
            && self.words.len() == count.div_ceil(WORD)
            && !(count..self.words.len() * WORD).any(|b| beyond(&b))
    }

    /// What the blocks of `range` are; those that there are not are not plugged.
    #[must_use]
    pub fn run(&self, range: Range<usize>) -> Run {
        let len = range.len();
        match range.filter(|block| self.is_plugged(*block)).count() {
            0 => Run::Unplugged,
            plugged if plugged == len => Run::Plugged,
            _ => Run::Mixed,
        }
    }

    /// Plugs or unplugs the blocks of `range`.
    pub fn set(&mut self, range: Range<usize>, plugged: bool) {
        for block in range.start..range.end.min(self.count) {
            let Some(word) = self.words.get_mut(block / WORD) else { return };
            let bit = 1 << (block % WORD);
            *word = if plugged { *word | bit } else { *word & !bit };
        }
    }

    /// How many are plugged.
    #[must_use]
    pub fn plugged(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// One past the last one that is plugged; 0 where none is.
    #[must_use]
    pub fn top(&self) -> usize {
        let last = self.words.iter().enumerate().rev().find(|(_, word)| **word != 0);
        last.map_or(0, |(index, word)| (index + 1) * WORD - word.leading_zeros() as usize)
    }

    fn is_plugged(&self, block: usize) -> bool {
        self.words.get(block / WORD).is_some_and(|word| word & 1 << (block % WORD) != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_told_apart() {
        let mut blocks = Blocks::new(130);
        assert_eq!((blocks.run(0..130), blocks.plugged(), blocks.top()), (Run::Unplugged, 0, 0));
        blocks.set(62..66, true);
        assert_eq!(
            (blocks.run(62..66), blocks.run(61..66), blocks.run(66..130)),
            (Run::Plugged, Run::Mixed, Run::Unplugged)
        );
        assert_eq!((blocks.plugged(), blocks.top()), (4, 66));
        blocks.set(129..200, true);
        assert_eq!((blocks.plugged(), blocks.top()), (5, 130));
        blocks.set(64..130, false);
        assert_eq!((blocks.plugged(), blocks.top()), (2, 64));
    }

    #[test]
    fn what_a_file_says_is_checked() {
        let mut blocks = Blocks::new(65);
        blocks.set(64..65, true);
        assert!(blocks.is_sound(65));
        assert!(!blocks.is_sound(64) && !blocks.is_sound(200));
        let more = Blocks { words: vec![0, 4], count: 65 };
        assert!(!more.is_sound(65));
        assert!(!Blocks { words: vec![0], count: 65 }.is_sound(65));
    }
}
