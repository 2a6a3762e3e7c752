//! How often `doctor` runs: one at a time, six a minute, and no ticket twice. Pure.

/// Runs in a minute.
pub(super) const MAX_A_MINUTE: usize = 6;
/// The minute, in seconds.
const MINUTE_SECONDS: u64 = 60;

/// Refusal of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The ticket was used before.
    Used,
    /// Another run is not over, or there were enough of them; seconds to wait.
    Later(u32),
}

/// Runs that were let in during the last minute.
#[derive(Debug, Default)]
pub(super) struct Gate {
    running: bool,
    /// When each was let in, in seconds, and the name and end of its ticket.
    let_in: Vec<(u64, String, u64)>,
}

impl Gate {
    /// Lets a run in at `now`, in seconds since 1970, whose ticket is called `jti` and ends at `ends`.
    ///
    /// # Errors
    /// When it must not run, or not yet.
    pub(super) fn enter(&mut self, jti: &str, ends: u64, now: u64) -> Result<(), Refusal> {
        // A ticket that is over is refused for that; as long as it is not, its name is kept.
        self.let_in.retain(|(at, _, ends)| at + MINUTE_SECONDS > now || *ends >= now);
        if self.let_in.iter().any(|(_, used, _)| used == jti) {
            return Err(Refusal::Used);
        }
        if self.running {
            return Err(Refusal::Later(5));
        }
        let recent = self.let_in.iter().filter(|(at, ..)| at + MINUTE_SECONDS > now);
        if recent.clone().count() >= MAX_A_MINUTE {
            let wait = recent.map(|(at, ..)| at + MINUTE_SECONDS - now).min().unwrap_or(MINUTE_SECONDS);
            return Err(Refusal::Later(u32::try_from(wait).unwrap_or(60)));
        }
        self.running = true;
        self.let_in.push((now, jti.to_owned(), ends));
        Ok(())
    }

    /// The run is over.
    pub(super) const fn leave(&mut self) {
        self.running = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_six_a_minute_and_no_ticket_twice() {
        let mut gate = Gate::default();
        let now = 1_000;
        assert_eq!(gate.enter("a", now + 60, now), Ok(()));
        assert_eq!(gate.enter("b", now + 60, now), Err(Refusal::Later(5)));
        gate.leave();
        assert_eq!(gate.enter("a", now + 60, now), Err(Refusal::Used));
        // One that was refused was not used.
        for jti in ["b", "c", "d", "e", "f"] {
            assert_eq!(gate.enter(jti, now + 70, now + 10), Ok(()), "{jti}");
            gate.leave();
        }
        assert_eq!(gate.enter("g", now + 80, now + 20), Err(Refusal::Later(40)));
        assert_eq!(gate.enter("g", now + 80, now + 60), Ok(()));
        gate.leave();
        assert_eq!(gate.enter("b", now + 70, now + 69), Err(Refusal::Used));
        assert!(gate.let_in.len() <= 2 * MAX_A_MINUTE + 1);
    }
}
