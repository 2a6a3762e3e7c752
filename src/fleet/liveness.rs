//! Liveness: whose counter stands still. Measured between our own answered beats: while Redis is away, nobody dies.

/// How long a counter has stood still, as far as our own beats have seen it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Stillness {
    millis: u64,
    beats: u32,
}

impl Stillness {
    /// Takes in that one more beat of ours has shown the counter; `gap` is the time since the one before, where that was in time.
    pub(super) const fn on_beat(&mut self, moved: bool, gap: Option<u64>) {
        if moved {
            *self = Self { millis: 0, beats: 0 };
        } else if let Some(gap) = gap {
            self.millis = self.millis.saturating_add(gap);
            self.beats = self.beats.saturating_add(1);
        }
    }

    pub(super) const fn millis(self) -> u64 {
        self.millis
    }

    pub(super) const fn beats(self) -> u32 {
        self.beats
    }

    /// Whether the counter has stood still for that long.
    pub(super) const fn is_over(self, millis: u64) -> bool {
        self.millis >= millis && self.beats >= super::MIN_BEATS
    }
}
