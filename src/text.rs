//! A string that stands where it is used, as long as it is short; an error with its causes as text. Pure.
//!
//! Jobs live for hours. A few small allocations for each of a hundred thousand, between those of the requests that brought
//! them, would leave half of the memory in holes.

use std::fmt;

/// Text; up to `N` bytes of it need no allocation.
#[derive(Clone)]
pub(crate) enum Text<const N: usize> {
    /// In place: the first `length` of the bytes.
    Short { length: u8, bytes: [u8; N] },
    /// Text on the heap.
    Long(Box<str>),
}

impl<const N: usize> Text<N> {
    /// Copies the text, into the value itself where it is short.
    pub(crate) fn new(text: &str) -> Self {
        let mut bytes = [0; N];
        match (u8::try_from(text.len()), bytes.get_mut(..text.len())) {
            (Ok(length), Some(place)) => {
                place.copy_from_slice(text.as_bytes());
                Self::Short { length, bytes }
            }
            (Ok(_) | Err(_), _) => Self::Long(text.into()),
        }
    }

    /// Bytes of the text, for comparisons.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Short { length, bytes } => bytes.get(..usize::from(*length)).unwrap_or_default(),
            Self::Long(text) => text.as_bytes(),
        }
    }

    /// Text as a string.
    pub(crate) fn as_str(&self) -> &str {
        match self {
            // It was text when it was put there.
            Self::Short { .. } => std::str::from_utf8(self.as_bytes()).unwrap_or_default(),
            Self::Long(text) => text,
        }
    }
}

impl<const N: usize> fmt::Debug for Text<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// An error with its causes, as one line.
pub(crate) fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_put_in_comes_out() {
        for length in [0, 1, 45, 46, 47, 300] {
            for letter in ["a", "é", "😀"] {
                let text = letter.repeat(length);
                assert_eq!(Text::<46>::new(&text).as_str(), text);
                assert_eq!(Text::<46>::new(&text).as_bytes(), text.as_bytes());
                assert_eq!(Text::<300>::new(&text).as_str(), text);
            }
        }
    }

    #[test]
    fn what_is_short_stands_in_place() {
        assert!(matches!(Text::<46>::new(&"a".repeat(46)), Text::Short { length: 46, .. }));
        assert!(matches!(Text::<46>::new(&"a".repeat(47)), Text::Long(_)));
        assert_eq!(size_of::<Option<Text<46>>>(), 48);
    }
}
