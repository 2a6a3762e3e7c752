//! The page "Why does my call not work?": whether there is one, and how much it tries.

use super::reader::{Reader, shown};

const CHECK_PAGE: &str = "LIVEKIT_CHECK_PAGE";

/// Extent of the page for users whose call does not work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CheckPage {
    /// There is no page.
    Off,
    /// The page looks at what any visitor sees.
    Basic,
    /// The page also tries media, for whoever has a ticket of `doctor --link`.
    On,
}

impl CheckPage {
    /// The word in the configuration.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Basic => "basic",
            Self::On => "on",
        }
    }
}

pub(super) fn check_page(reader: &mut Reader<'_>) -> CheckPage {
    let Some(text) = reader.value(CHECK_PAGE) else {
        return CheckPage::Basic;
    };
    let all = [CheckPage::Off, CheckPage::Basic, CheckPage::On];
    let known = all.into_iter().find(|page| page.word().eq_ignore_ascii_case(&text));
    known.unwrap_or_else(|| {
        reader.mistake(CHECK_PAGE, format!("must be off, basic or on, not {}", shown(&text)));
        CheckPage::Off
    })
}
