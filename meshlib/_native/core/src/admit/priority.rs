//! How much does it matter that this call gets through?
//!
//! Four levels, which the SRE book ("Handling Overload") found to be enough, and says why more are not better: two teams have to mean
//! the same by a word. What is not told is critical, so that nobody loses by not knowing of them. `critical_plus` is for what users
//! see fail at once; `sheddable_plus` for what may be late, as a batch that is tried again; `sheddable` for what may fail often. The
//! levels are ordered, and nothing else: who may claim which one is said in `server`, and what it buys in `queue`.
use serde::Deserialize;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    Sheddable,
    SheddablePlus,
    #[default]
    Critical,
    CriticalPlus,
}

impl Priority {
    /// The least first.
    pub const ALL: [Self; 4] = [Self::Sheddable, Self::SheddablePlus, Self::Critical, Self::CriticalPlus];

    pub fn word(self) -> &'static str {
        match self {
            Self::Sheddable => "sheddable",
            Self::SheddablePlus => "sheddable_plus",
            Self::Critical => "critical",
            Self::CriticalPlus => "critical_plus",
        }
    }

    /// As a header has it, in any case; None: it is none of them.
    pub fn named(word: &[u8]) -> Option<Self> {
        let word = word.trim_ascii();
        Self::ALL.into_iter().find(|known| word.eq_ignore_ascii_case(known.word().as_bytes()))
    }

    /// This one's of a list that has one for each, the least first.
    pub fn of<T: Copy + Default>(self, each: &[T; 4]) -> T {
        each.get(self as usize).copied().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_levels_are_in_order_and_have_one_word_each() {
        assert!(Priority::ALL.is_sorted());
        for (place, priority) in Priority::ALL.into_iter().enumerate() {
            assert_eq!(Priority::named(priority.word().to_ascii_uppercase().as_bytes()), Some(priority));
            assert_eq!(priority.of(&[0, 1, 2, 3]), place);
        }
        assert_eq!(
            (Priority::named(b"urgent"), Priority::named(b""), Priority::default()),
            (None, None, Priority::Critical)
        );
    }
}
