//! The waiting room: complete requests that wait for somebody else, by class. Pure.
//!
//! Half of the places belong to listed homeservers, a quarter each to verified ones and to strangers. What a class does not
//! use is lent, but for an eighth of it. A newcomer always gets in: where there is no place, the class that is furthest
//! above its share gives one up, and in it the oldest request of the domain that has most of them. Whoever was verified
//! stays.

use std::collections::HashMap;

use super::{Class, Who};

/// Unused places of a class are lent but for this part of its share.
const KEPT_BACK: usize = 8;

/// A request that has a place in the room.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Ticket {
    place: usize,
    number: u64,
}

/// Outcome of a newcomer's entering.
#[derive(Debug, PartialEq, Eq)]
pub enum Entered<T> {
    /// The newcomer has a place that was free.
    In(Ticket),
    /// There is a place now: that of the request which this belongs to. Tell it.
    InsteadOf(Ticket, T),
    /// No place: the homeservers of all in the room were verified.
    Full,
}

struct Guest<T> {
    number: u64,
    who: Who,
    kept: bool,
    payload: T,
}

/// Places for complete requests; each carries a `T` by which it is told that it lost its place.
pub struct Room<T> {
    most: usize,
    places: Vec<Option<Guest<T>>>,
    free: Vec<usize>,
    next: u64,
    /// By class: all, and of them those that may be pushed out, by domain.
    count: [usize; 3],
    domains: [HashMap<u64, usize>; 3],
}

impl<T> Room<T> {
    /// A room of `most` places.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            most,
            places: Vec::new(),
            free: Vec::new(),
            next: 0,
            count: [0; 3],
            domains: Default::default(),
        }
    }

    /// How many are in the room.
    #[must_use]
    pub fn len(&self) -> usize {
        self.count.iter().sum()
    }

    /// Whether nobody is in the room.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A request about `who` is complete.
    pub fn enter(&mut self, who: Who, payload: T) -> Entered<T> {
        let pushed = if self.has_place_for(who.class) {
            None
        } else if let Some(victim) = self.victim(who.class) {
            self.remove(victim)
        } else {
            return Entered::Full;
        };
        let ticket = self.admit(who, payload);
        match pushed {
            Some(guest) => Entered::InsteadOf(ticket, guest.payload),
            None => Entered::In(ticket),
        }
    }

    /// The request got past verification: it is not pushed out any more.
    pub fn keep(&mut self, ticket: Ticket) {
        let guest = self.places.get_mut(ticket.place).and_then(Option::as_mut);
        if let Some(guest) = guest.filter(|guest| guest.number == ticket.number && !guest.kept) {
            guest.kept = true;
            let who = guest.who;
            self.forget_domain(who);
        }
    }

    /// The request is over. One that was pushed out has left already.
    pub fn leave(&mut self, ticket: Ticket) {
        let guest = self.places.get(ticket.place).and_then(Option::as_ref);
        if guest.is_some_and(|guest| guest.number == ticket.number) {
            self.remove(ticket.place);
        }
    }

    /// Places of `class` that others may borrow, but not all of them.
    fn share(&self, class: Class) -> usize {
        match class {
            Class::Listed => self.most - 2 * (self.most / 4),
            Class::Verified | Class::Stranger => self.most / 4,
        }
    }

    fn has_place_for(&self, class: Class) -> bool {
        let free = self.most.saturating_sub(self.len());
        if self.count[class as usize] < self.share(class) {
            return free > 0;
        }
        let others = Class::ALL.into_iter().filter(|other| *other != class);
        let kept_back: usize = others
            .map(|other| (self.share(other) / KEPT_BACK).saturating_sub(self.count[other as usize]))
            .sum();
        free > kept_back
    }

    /// Chooses whose place a newcomer of `class` gets.
    fn victim(&self, class: Class) -> Option<usize> {
        let above = |of: Class| {
            let newcomer = usize::from(of == class);
            (self.count[of as usize] + newcomer)
                .checked_sub(self.share(of))
                .filter(|above| *above > 0)
        };
        let mut classes = Class::ALL;
        // Of classes that are equally far above, the least trusted; the newcomer's own in any case, as the last resort.
        classes.sort_by_key(|of| std::cmp::Reverse((above(*of), *of)));
        let candidates = classes.into_iter().filter(|of| above(*of).is_some() || *of == class);
        candidates.filter_map(|of| self.oldest(of)).next()
    }

    /// The oldest request of the domain that has most of them.
    fn oldest(&self, class: Class) -> Option<usize> {
        let domains = &self.domains[class as usize];
        let most = *domains.values().max()?;
        let mut oldest: Option<(u64, usize)> = None;
        for (place, guest) in self.places.iter().enumerate() {
            let Some(guest) = guest else { continue };
            let older = oldest.is_none_or(|(number, _)| guest.number < number);
            if older && !guest.kept && guest.who.class == class && domains.get(&guest.who.domain) == Some(&most) {
                oldest = Some((guest.number, place));
            }
        }
        oldest.map(|(_, place)| place)
    }

    fn admit(&mut self, who: Who, payload: T) -> Ticket {
        let place = self.free.pop().unwrap_or_else(|| {
            self.places.push(None);
            self.places.len() - 1
        });
        let number = self.next;
        self.next += 1;
        self.places[place] = Some(Guest {
            number,
            who,
            kept: false,
            payload,
        });
        self.count[who.class as usize] += 1;
        *self.domains[who.class as usize].entry(who.domain).or_default() += 1;
        Ticket { place, number }
    }

    fn remove(&mut self, place: usize) -> Option<Guest<T>> {
        let guest = self.places[place].take()?;
        self.free.push(place);
        self.count[guest.who.class as usize] -= 1;
        if !guest.kept {
            self.forget_domain(guest.who);
        }
        if self.is_empty() {
            // After a flood the memory goes back.
            *self = Self {
                next: self.next,
                ..Self::new(self.most)
            };
        }
        Some(guest)
    }

    fn forget_domain(&mut self, who: Who) {
        let domains = &mut self.domains[who.class as usize];
        if let Some(count) = domains.get_mut(&who.domain) {
            *count -= 1;
            if *count == 0 {
                domains.remove(&who.domain);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn who(class: Class, domain: u64) -> Who {
        Who {
            class,
            domain,
            name: domain,
        }
    }

    /// Enters `count` requests; how many got in without pushing, and who was pushed out.
    fn enter(room: &mut Room<&'static str>, class: Class, domain: u64, name: &'static str, count: usize) -> (usize, Vec<&'static str>) {
        let (mut placed, mut pushed) = (0, Vec::new());
        for _ in 0..count {
            match room.enter(who(class, domain), name) {
                Entered::In(_) => placed += 1,
                Entered::InsteadOf(_, out) => pushed.push(out),
                Entered::Full => panic!("refused"),
            }
        }
        (placed, pushed)
    }

    #[test]
    fn what_others_do_not_use_is_lent_but_for_an_eighth() {
        for (class, most) in [(Class::Listed, 64 - 4), (Class::Verified, 64 - 6), (Class::Stranger, 64 - 6)] {
            let mut room = Room::new(64);
            let (placed, pushed) = enter(&mut room, class, 1, "a", 100);
            assert_eq!((placed, pushed.len()), (most, 100 - most), "{class:?}");
        }
    }

    #[test]
    fn each_class_gets_its_share_back() {
        let mut room = Room::new(64);
        enter(&mut room, Class::Stranger, 1, "stranger", 100);
        let (placed, pushed) = enter(&mut room, Class::Listed, 2, "listed", 32);
        assert_eq!((placed, pushed.len()), (6, 26));
        assert!(pushed.iter().all(|out| *out == "stranger"));
        let (_, pushed) = enter(&mut room, Class::Verified, 3, "verified", 16);
        assert!(pushed.iter().all(|out| *out == "stranger"));
        // All have what is theirs now: whoever comes costs his own.
        for (class, domain, name) in [
            (Class::Stranger, 9, "stranger"),
            (Class::Listed, 9, "listed"),
            (Class::Verified, 9, "verified"),
        ] {
            assert_eq!(enter(&mut room, class, domain, name, 1), (0, vec![name]));
        }
    }

    #[test]
    fn the_domain_with_most_requests_pays() {
        let mut room = Room::new(64);
        enter(&mut room, Class::Stranger, 1, "one", 2);
        enter(&mut room, Class::Stranger, 2, "flood", 56);
        let (_, pushed) = enter(&mut room, Class::Stranger, 3, "three", 20);
        assert!(pushed.iter().all(|out| *out == "flood"), "{pushed:?}");
    }

    #[test]
    fn the_oldest_goes_first() {
        let mut room = Room::new(16);
        let mut pushed = Vec::new();
        for number in 0..20 {
            if let Entered::InsteadOf(_, out) = room.enter(who(Class::Listed, 1), number) {
                pushed.push(out);
            }
        }
        assert_eq!(pushed, [0, 1, 2, 3]);
    }

    #[test]
    fn whoever_was_verified_stays() {
        let mut room = Room::new(8);
        let mut tickets = Vec::new();
        while let Entered::In(ticket) = room.enter(who(Class::Listed, 1), "kept") {
            room.keep(ticket);
            room.keep(ticket);
            tickets.push(ticket);
            assert!(tickets.len() <= 8);
        }
        assert_eq!(room.enter(who(Class::Listed, 2), "new"), Entered::Full);
        room.leave(tickets[0]);
        room.leave(tickets[0]);
        assert!(matches!(room.enter(who(Class::Listed, 2), "new"), Entered::In(_)));
        assert!(matches!(room.enter(who(Class::Listed, 1), "newer"), Entered::InsteadOf(_, "new")));
    }

    #[test]
    fn nothing_is_left_behind() {
        let mut room = Room::new(1000);
        let tickets: Vec<_> = (0..500)
            .filter_map(|n| match room.enter(who(Class::Stranger, n), ()) {
                Entered::In(ticket) => Some(ticket),
                Entered::InsteadOf(..) | Entered::Full => None,
            })
            .collect();
        assert_eq!(tickets.len(), 500);
        for ticket in tickets {
            room.leave(ticket);
        }
        assert!(room.is_empty() && room.places.capacity() == 0 && room.domains.iter().all(HashMap::is_empty));
    }

    proptest! {
        /// Checks, whatever comes and goes: never more than there are places, a newcomer gets in while anybody is not verified, and
        /// nobody is pushed out who was verified, or whose class is within its share.
        #[test]
        fn shares_hold(most in 1usize..40, steps in prop::collection::vec((0usize..3, 0u64..4, 0u8..4), 1..400)) {
            let mut room = Room::new(most);
            let mut inside: Vec<(Ticket, usize, bool)> = Vec::new();
            for (number, (class, domain, kind)) in steps.into_iter().enumerate() {
                let class = Class::ALL[class];
                match kind {
                    0 if !inside.is_empty() => {
                        let (ticket, ..) = inside.swap_remove(number % inside.len());
                        room.leave(ticket);
                    }
                    1 if !inside.is_empty() => {
                        let at = number % inside.len();
                        inside[at].2 = true;
                        room.keep(inside[at].0);
                    }
                    _ => {
                        let before = room.count;
                        match room.enter(who(class, domain), (number, class)) {
                            Entered::In(ticket) => inside.push((ticket, number, false)),
                            Entered::InsteadOf(ticket, (out, of)) => {
                                let at = inside.iter().position(|(_, n, _)| *n == out).unwrap();
                                prop_assert!(!inside[at].2);
                                prop_assert!(of == class || before[of as usize] > room.share(of));
                                inside.swap_remove(at);
                                inside.push((ticket, number, false));
                            }
                            Entered::Full => {
                                let own = inside.iter().any(|(ticket, _, kept)| {
                                    !kept && room.places[ticket.place].as_ref().is_some_and(|guest| guest.who.class == class)
                                });
                                prop_assert!(!own);
                            }
                        }
                    }
                }
                prop_assert!(room.len() <= most);
                prop_assert_eq!(room.len(), inside.len());
            }
        }
    }
}
