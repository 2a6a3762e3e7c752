//! The model homeservers: delayed events and their timers, and limits on calls about them.

use super::story::Limiter;
use lk_jwt_service::internals::delayed_event::{DelayedEventAction, Outcome};
use std::collections::BTreeMap;
use std::time::Duration;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    Scheduled {
        fires: u64,
    },
    Fired(u64),
    Sent(u64),
    Cancelled(u64),
    /// Its own client ended it.
    Ended(u64),
}

/// A delayed event, and what this service has to do with it.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub(super) who: usize,
    pub(super) homeserver: usize,
    pub(super) delay_ms: u64,
    pub(super) fate: Fate,
    /// When it was delegated the last time, and when the request for that arrived.
    pub(super) delegated: Option<(u64, u64)>,
    /// A restart was granted since, and told.
    pub(super) granted: bool,
    /// When the last one was granted and told.
    pub(super) restarted: u64,
    /// Another event was delegated in its place.
    pub(super) replaced: Option<u64>,
    /// What was known of it was not written when the process was killed: it is left to its homeserver.
    pub(super) lost: bool,
    /// When it was delegated to another instance, of which this one has not read yet.
    pub(super) elsewhere: Option<u64>,
}

impl Event {
    pub(super) const fn is_running(&self) -> bool {
        matches!(self.fate, Fate::Scheduled { .. })
    }
}

pub(super) struct Homeserver {
    limiter: Limiter,
    /// Tokens left, and since when, by user; all are one where the address is limited.
    tokens: BTreeMap<usize, (f64, u64)>,
    /// The next restart is denied though the event is there; the one after it is not.
    denies: bool,
    denied: Option<u64>,
}

impl Homeserver {
    pub(super) const fn new(limiter: Limiter) -> Self {
        Self {
            limiter,
            tokens: BTreeMap::new(),
            denies: false,
            denied: None,
        }
    }

    pub(super) fn deny(&mut self, now: u64) {
        self.denies = self.denied.is_none_or(|at| at + 30_000 < now);
    }

    pub(super) const fn is_limited(&self) -> bool {
        !matches!(self.limiter, Limiter::None)
    }

    fn refusal(&mut self, user: usize, now: u64) -> Option<Outcome> {
        let (key, burst, per_second) = match self.limiter {
            Limiter::None => return None,
            Limiter::Address { burst, per_second } => (0, burst, per_second),
            Limiter::User { burst, per_second } => (user, burst, per_second),
        };
        let (tokens, last) = self.tokens.entry(key).or_insert((burst, now));
        *tokens = (*tokens + (now - *last) as f64 / 1_000.0 * per_second).min(burst);
        *last = now;
        if *tokens < 1.0 {
            let wait = (1.0 - *tokens) / per_second * 1_000.0;
            return Some(Outcome::Limited(Some(Duration::from_millis(wait as u64))));
        }
        *tokens -= 1.0;
        None
    }

    /// What a well homeserver makes of a call.
    pub(super) fn serve(&mut self, event: &mut Event, user: usize, action: DelayedEventAction, now: u64) -> Outcome {
        if let Some(refusal) = self.refusal(user, now) {
            return refusal;
        }
        if action == DelayedEventAction::Restart && std::mem::take(&mut self.denies) {
            self.denied = Some(now);
            return Outcome::NotFound;
        }
        match (event.fate, action) {
            (Fate::Scheduled { .. }, DelayedEventAction::Restart) => {
                event.fate = Fate::Scheduled {
                    fires: now + event.delay_ms,
                };
            }
            (Fate::Scheduled { .. }, DelayedEventAction::Send) => event.fate = Fate::Sent(now),
            (Fate::Scheduled { .. }, DelayedEventAction::Cancel) => event.fate = Fate::Cancelled(now),
            // Some say 404 of what is finalised, some 409.
            (Fate::Fired(at) | Fate::Sent(at) | Fate::Cancelled(at) | Fate::Ended(at), _) if at % 2 == 0 => return Outcome::Conflict,
            (Fate::Fired(_) | Fate::Sent(_) | Fate::Cancelled(_) | Fate::Ended(_), _) => return Outcome::NotFound,
        }
        Outcome::Done
    }
}
