//! Decides whose turn it is where there are fewer places than askers. Pure: asked for a place, told of one that is given back, it
//! says who goes on.
//!
//! * Each class has a share. What it does not use is lent, but for an eighth of it, so that a class that was idle finds
//!   places at once; whatever is given back goes first to a class below its share.
//! * A group may hold a part, an eighth say, of what its class could still have ("dynamic threshold", Choudhury and Hahne
//!   1998): one group alone has a ninth at the most, and after twenty groups that hang a newcomer still finds some.
//! * The queue goes round by group, then by domain, then by name, then by client; inside one client the newest is first, since
//!   whoever has waited for longest is the likeliest to have gone.

use std::collections::VecDeque;
use std::collections::btree_map::{BTreeMap, Entry};

use super::Class;

/// A class lends all of its share but this part.
const KEPT: u32 = 8;
/// A group may hold this part of what its class could still have.
const GROUP_PART: u32 = 8;

/// Describes whose place it is, from the widest to the narrowest: hashes or numbers that the caller chose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Asker {
    /// Class of the homeserver, which decides about the share.
    pub class: Class,
    /// The machines that are dialled.
    pub group: u64,
    /// Hash of the domain, which its owner had to register.
    pub domain: u64,
    /// Hash of the homeserver's name.
    pub name: u64,
    /// Sender of the request.
    pub client: u64,
}

impl Asker {
    const fn path(&self) -> [u64; 4] {
        [self.group, self.domain, self.name, self.client]
    }
}

/// Stands for an asker who waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(u64);

/// Numbers of places, and how they are shared.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// Number of all places.
    pub total: u32,
    /// Places that belong to each [`Class`].
    pub shares: [u32; 3],
    /// Most places that one name may hold, by [`Class`].
    pub per_name: [u32; 3],
    /// A group may hold one such part of what its class could still have; not 0.
    pub group_part: u32,
}

impl Places {
    /// Half for the listed, a quarter each for the verified and for strangers; where nobody is listed, three quarters for the
    /// verified (decision H7a).
    #[must_use]
    pub const fn shared(total: u32, somebody_is_listed: bool, per_name: [u32; 3]) -> Self {
        let quarter = total / 4;
        let shares = if somebody_is_listed {
            [total - 2 * quarter, quarter, quarter]
        } else {
            [0, total - quarter, quarter]
        };
        Self {
            total,
            shares,
            per_name,
            group_part: GROUP_PART,
        }
    }
}

/// The places, and those who wait for one.
#[derive(Debug)]
pub struct FairQueue {
    places: Places,
    held: [u32; 3],
    groups: BTreeMap<(Class, u64), u32>,
    names: BTreeMap<(Class, u64), u32>,
    waiting: [Queue; 3],
    next: u64,
}

impl FairQueue {
    /// Makes a queue whose places are all free.
    #[must_use]
    pub fn new(places: Places) -> Self {
        Self {
            places,
            held: [0; 3],
            groups: BTreeMap::new(),
            names: BTreeMap::new(),
            waiting: <[Queue; 3]>::default(),
            next: 0,
        }
    }

    /// Takes a place at once, or a ticket for one. Whoever could have a place does not wait behind those who could not.
    ///
    /// # Errors
    /// With the ticket.
    pub fn acquire(&mut self, asker: &Asker) -> Result<(), Ticket> {
        if self.try_acquire(asker) {
            return Ok(());
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        self.waiting[asker.class as usize].push(&asker.path(), ticket);
        Err(ticket)
    }

    /// Takes a place if one may be taken at once.
    pub fn try_acquire(&mut self, asker: &Asker) -> bool {
        let may = self.class_may(asker.class) && self.group_may(asker.class, asker.group) && self.name_may(asker.class, asker.name);
        if may {
            self.take(asker);
        }
        may
    }

    /// Takes an asker who waits no longer out of the queue.
    pub fn cancel(&mut self, asker: &Asker, ticket: Ticket) {
        self.waiting[asker.class as usize].remove(&asker.path(), ticket);
    }

    /// A place is given back; [`Self::grant_next`] says who has it now.
    pub fn release(&mut self, asker: &Asker) {
        self.held[asker.class as usize] -= 1;
        for (held, key) in [(&mut self.groups, asker.group), (&mut self.names, asker.name)] {
            if let Entry::Occupied(mut count) = held.entry((asker.class, key)) {
                *count.get_mut() -= 1;
                if *count.get() == 0 {
                    count.remove();
                }
            }
        }
    }

    /// The next one who has a place now, if there is one: to be asked until there is none.
    #[must_use]
    pub fn grant_next(&mut self) -> Option<Ticket> {
        if self.waiting() == 0 {
            return None;
        }
        let below_share = |queue: &Self, class: Class| queue.held[class as usize] < queue.places.shares[class as usize];
        for borrowing in [false, true] {
            for class in Class::ALL {
                if below_share(self, class) != borrowing
                    && self.class_may(class)
                    && let Some(ticket) = self.next_of(class)
                {
                    return Some(ticket);
                }
            }
        }
        None
    }

    /// Number of askers who wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.iter().map(|queue| queue.len).sum()
    }

    fn next_of(&mut self, class: Class) -> Option<Ticket> {
        let mut queue = std::mem::take(&mut self.waiting[class as usize]);
        let mut may = |level, key| match level {
            0 => self.group_may(class, key),
            2 => self.name_may(class, key),
            _ => true,
        };
        let found = queue.pop(0, &mut may);
        self.waiting[class as usize] = queue;
        let (ticket, path) = found?;
        self.take(&Asker {
            class,
            group: path[0],
            domain: path[1],
            name: path[2],
            client: path[3],
        });
        Some(ticket)
    }

    fn take(&mut self, asker: &Asker) {
        self.held[asker.class as usize] += 1;
        *self.groups.entry((asker.class, asker.group)).or_default() += 1;
        *self.names.entry((asker.class, asker.name)).or_default() += 1;
    }

    /// How many places a class could still take.
    fn left_for(&self, class: Class) -> u32 {
        let free = self.places.total - self.held.iter().sum::<u32>();
        let kept = |class: Class| self.places.shares[class as usize].div_ceil(KEPT);
        if self.held[class as usize] < kept(class) {
            return free;
        }
        let others = Class::ALL.into_iter().filter(|other| *other != class);
        let kept: u32 = others.map(|other| kept(other).saturating_sub(self.held[other as usize])).sum();
        free.saturating_sub(kept)
    }

    fn class_may(&self, class: Class) -> bool {
        self.left_for(class) > 0
    }

    fn group_may(&self, class: Class, group: u64) -> bool {
        let held = self.groups.get(&(class, group)).copied().unwrap_or_default();
        let share = self.places.shares[class as usize];
        // What others have borrowed of the share comes back: it counts as if it were there.
        let left = self.left_for(class).max(share.saturating_sub(self.held[class as usize]));
        held < left.div_ceil(self.places.group_part)
    }

    fn name_may(&self, class: Class, name: u64) -> bool {
        let held = self.names.get(&(class, name)).copied().unwrap_or_default();
        held < self.places.per_name[class as usize]
    }
}

/// Askers who wait, in rings within rings.
#[derive(Debug, Default)]
struct Queue {
    /// Keys in the order of their turns, the next one first.
    ring: VecDeque<u64>,
    below: BTreeMap<u64, Self>,
    /// Tickets of one client, the newest last.
    tickets: Vec<Ticket>,
    len: usize,
}

impl Queue {
    const fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, path: &[u64], ticket: Ticket) {
        self.len += 1;
        match path {
            [] => self.tickets.push(ticket),
            [key, rest @ ..] => {
                let ring = &mut self.ring;
                let below = self.below.entry(*key).or_insert_with(|| {
                    ring.push_back(*key);
                    Self::default()
                });
                below.push(rest, ticket);
            }
        }
    }

    fn remove(&mut self, path: &[u64], ticket: Ticket) -> bool {
        let removed = match path {
            [] => {
                let before = self.tickets.len();
                self.tickets.retain(|other| *other != ticket);
                self.tickets.len() < before
            }
            [key, rest @ ..] => {
                let removed = self.below.get_mut(key).is_some_and(|below| below.remove(rest, ticket));
                if removed && self.below.get(key).is_some_and(Self::is_empty) {
                    self.below.remove(key);
                    self.ring.retain(|other| other != key);
                }
                removed
            }
        };
        self.len -= usize::from(removed);
        removed
    }

    /// The next one, as far as `may` lets a key of a level have a turn.
    fn pop(&mut self, level: usize, may: &mut impl FnMut(usize, u64) -> bool) -> Option<(Ticket, [u64; 4])> {
        if let Some(ticket) = self.tickets.pop() {
            self.len -= 1;
            return Some((ticket, [0; 4]));
        }
        for at in 0..self.ring.len() {
            let key = self.ring[at];
            if !may(level, key) {
                continue;
            }
            let Some(below) = self.below.get_mut(&key) else { continue };
            let Some((ticket, mut path)) = below.pop(level + 1, may) else {
                continue;
            };
            let is_empty = below.is_empty();
            path[level] = key;
            self.len -= 1;
            // Who had a turn goes to the end; those who were passed over keep their places.
            self.ring.remove(at);
            if is_empty {
                self.below.remove(&key);
            } else {
                self.ring.push_back(key);
            }
            return Some((ticket, path));
        }
        None
    }
}

#[cfg(test)]
mod tests;
