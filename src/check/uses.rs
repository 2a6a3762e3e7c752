//! How often tickets of links are used: five times each, one at a time, twenty a minute in all. Pure.

use std::collections::{HashMap, VecDeque};

/// Times that one ticket is used.
pub(super) const MAX_USES: u8 = 5;
/// Uses of all tickets in a minute. No ticket lives for more than four hours, so this bounds how many are known, too.
pub(super) const MAX_A_MINUTE: usize = 20;
/// The minute, in seconds.
const MINUTE_SECONDS: u64 = 60;

/// Refusal of a use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The ticket was used as often as it may be.
    UsedUp,
    /// Another use of the ticket is just beginning, or there were enough uses of all tickets; seconds to wait.
    Later(u32),
}

/// A use that was let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entered {
    /// Number of this use, from 1 on.
    pub(super) number: u8,
    /// Whether the room of the use before it may still stand.
    pub(super) replaces: bool,
}

/// State of one ticket.
#[derive(Debug, Default)]
struct Ticket {
    /// When it ends, in seconds since 1970.
    ends: u64,
    used: u8,
    is_beginning: bool,
    has_room: bool,
    has_reported: bool,
}

/// Tickets that were used and are not over.
#[derive(Debug, Default)]
pub(super) struct Uses {
    tickets: HashMap<Box<str>, Ticket>,
    /// When the uses of the last minute were, in seconds since 1970.
    recent: VecDeque<u64>,
}

impl Uses {
    /// Begins a use at `now`, in seconds since 1970, of the ticket that is called `jti` and ends at `ends`.
    ///
    /// # Errors
    /// When it must not be used, or not yet.
    pub(super) fn enter(&mut self, jti: &str, ends: u64, now: u64) -> Result<Entered, Refusal> {
        // A ticket that is over is refused for that; its room is ended by its number, whether it is known or not.
        self.tickets.retain(|_, ticket| ticket.ends >= now || ticket.has_room);
        self.recent.retain(|at| at + MINUTE_SECONDS > now);
        let known = self.tickets.get(jti);
        if known.is_some_and(|ticket| ticket.used >= MAX_USES) {
            return Err(Refusal::UsedUp);
        }
        if known.is_some_and(|ticket| ticket.is_beginning) {
            return Err(Refusal::Later(1));
        }
        if self.recent.len() >= MAX_A_MINUTE {
            let wait = self.recent.front().map_or(MINUTE_SECONDS, |at| at + MINUTE_SECONDS - now);
            return Err(Refusal::Later(u32::try_from(wait).unwrap_or(60)));
        }
        self.recent.push_back(now);
        let ticket = self.tickets.entry(jti.into()).or_default();
        let replaces = ticket.has_room;
        *ticket = Ticket {
            ends,
            used: ticket.used + 1,
            is_beginning: true,
            has_room: true,
            has_reported: false,
        };
        Ok(Entered {
            number: ticket.used,
            replaces,
        })
    }

    /// The use has begun, or could not.
    pub(super) fn begun(&mut self, jti: &str) {
        if let Some(ticket) = self.tickets.get_mut(jti) {
            ticket.is_beginning = false;
        }
    }

    /// Whether the room is still that of this use, whose time is over; from now on there is none.
    pub(super) fn is_over(&mut self, jti: &str, number: u8) -> bool {
        let of_this_use = self.tickets.get_mut(jti).filter(|ticket| ticket.used == number && ticket.has_room);
        of_this_use.is_some_and(|ticket| std::mem::take(&mut ticket.has_room))
    }

    /// Whether a report may be sent, which is once a use.
    pub(super) fn may_report(&mut self, jti: &str) -> bool {
        let ticket = self.tickets.get_mut(jti).filter(|ticket| !ticket.has_reported);
        ticket.map(|ticket| ticket.has_reported = true).is_some()
    }

    /// Names of the tickets whose rooms may stand; from now on there are none.
    pub(super) fn take_rooms(&mut self) -> Vec<Box<str>> {
        let open = self.tickets.iter_mut().filter(|(_, ticket)| ticket.has_room);
        open.map(|(jti, ticket)| {
            ticket.has_room = false;
            jti.clone()
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: u64 = 1_000_000;

    fn entered(number: u8, replaces: bool) -> Result<Entered, Refusal> {
        Ok(Entered { number, replaces })
    }

    #[test]
    fn a_ticket_is_used_five_times_and_not_six() {
        let mut uses = Uses::default();
        for number in 1..=MAX_USES {
            assert_eq!(uses.enter("a", NOW + 60, NOW), entered(number, number > 1));
            assert!(uses.enter("a", NOW + 60, NOW).is_err(), "two at a time");
            uses.begun("a");
        }
        assert_eq!(uses.enter("a", NOW + 60, NOW), Err(Refusal::UsedUp));
        assert_eq!(uses.enter("b", NOW + 60, NOW), entered(1, false));
    }

    #[test]
    fn all_tickets_together_are_used_twenty_times_a_minute() {
        let mut uses = Uses::default();
        for number in 0..MAX_A_MINUTE {
            assert!(uses.enter(&format!("{number}"), NOW + 600, NOW + 1).is_ok());
        }
        assert_eq!(uses.enter("x", NOW + 600, NOW + 11), Err(Refusal::Later(50)));
        assert_eq!(uses.enter("x", NOW + 600, NOW + 61), entered(1, false));
    }

    #[test]
    fn a_room_ends_with_its_own_use() {
        let mut uses = Uses::default();
        assert!(!uses.is_over("a", 1));
        for number in [1, 2] {
            assert_eq!(uses.enter("a", NOW + 60, NOW), entered(number, number == 2));
            uses.begun("a");
        }
        assert!(!uses.is_over("a", 1), "that of the second use is left alone");
        assert!(uses.is_over("a", 2));
        assert!(!uses.is_over("a", 2), "once");
        assert_eq!(uses.enter("a", NOW + 60, NOW), entered(3, false));
        assert_eq!(uses.take_rooms(), ["a".into()]);
        assert!(uses.take_rooms().is_empty());
    }

    #[test]
    fn a_report_is_sent_once_a_use() {
        let mut uses = Uses::default();
        assert!(!uses.may_report("a"), "never used");
        for _ in 0..2 {
            assert!(uses.enter("a", NOW + 60, NOW).is_ok());
            uses.begun("a");
            assert!(uses.may_report("a"));
            assert!(!uses.may_report("a"));
        }
    }

    #[test]
    fn what_is_over_is_forgotten() {
        let mut uses = Uses::default();
        for at in 0..2_000 {
            assert!(uses.enter(&format!("{at}"), NOW + 4 * at + 60, NOW + 4 * at).is_ok());
            assert!(uses.is_over(&format!("{at}"), 1));
        }
        assert!(uses.tickets.len() <= 17 && uses.recent.len() <= 16, "{}", uses.tickets.len());
    }
}
