//! How often an address is dialled (decision O4), so that nobody is attacked through this service, and nobody is kept from
//! being reached by names that somebody points at their address.
//!
//! Connections for strangers, and for verified homeservers while they fail, are paced by the address that is dialled,
//! whatever name led there. Who waits is handed round by domain and by name, the oldest first inside one name, and domains whose
//! connections to that address failed lately come last.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use super::{Class, Who};

/// Interval of new connections to an address, after the burst.
const INTERVAL: Duration = Duration::from_millis(250);
/// So many at once before the pace begins.
const BURST: u32 = 8;
/// How long a failed connection counts.
const FAILURE_LIFE: Duration = Duration::from_secs(60);
/// Names whose failure is remembered per address, and those of one domain among them.
const MAX_FAILURES: usize = 32;
const MAX_FAILURES_PER_DOMAIN: usize = 4;
/// Connections per address that are remembered for the turns.
const MAX_SERVED: usize = 64;
/// Addresses of which nothing has to be known are forgotten when there are so many.
const SWEEP_AT: usize = 512;
/// Failures are forgotten where there are more addresses than this.
const MAX_ADDRESSES: usize = 4096;

/// The machine that is dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Address that is dialled directly.
    Ip(IpAddr),
    /// A hash of the host name that a forward proxy looks up.
    Proxied(u64),
}

impl From<IpAddr> for Target {
    fn from(address: IpAddr) -> Self {
        Self::Ip(address.to_canonical())
    }
}

/// A connection that wants to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The machine to connect to.
    pub target: Target,
    /// The homeserver whose name led to the machine.
    pub who: Who,
    number: u64,
}

/// Whether a connection may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// The connection may be made now.
    Go,
    /// The connection may not be made before that moment: ask again.
    At(Instant),
}

/// Paces new connections by the machine that they lead to.
#[derive(Debug, Default)]
pub struct Dials {
    addresses: HashMap<Target, Address>,
    last: u64,
    sweep_at: usize,
}

#[derive(Debug)]
struct Address {
    /// Listed homeservers, which are dialled freely as long as that works.
    listed: Lane,
    paced: Lane,
    /// Askers whose connection failed, the latest last.
    failed: VecDeque<(Who, Instant)>,
}

/// A queue with its token bucket.
#[derive(Debug)]
struct Lane {
    burst: u32,
    /// When the bucket is full again.
    full_at: Instant,
    waiting: Vec<Ticket>,
    /// Asker whose turn is next, once there is a token.
    chosen: Option<u64>,
    /// Domains and names that had a turn, the latest last.
    served: VecDeque<(u64, u64)>,
}

impl Dials {
    /// A connection for `who`, who leads to `target`: to be asked for with [`Self::poll`].
    pub fn enter(&mut self, now: Instant, target: Target, who: Who) -> Ticket {
        self.last += 1;
        let ticket = Ticket {
            target,
            who,
            number: self.last,
        };
        match self.addresses.get_mut(&target) {
            Some(address) => {
                if let Some(lane) = address.lane(now, who) {
                    lane.waiting.push(ticket);
                }
            }
            None if who.class == Class::Stranger => {
                self.sweep(now);
                let address = self.addresses.entry(target).or_insert_with(|| Address::new(now));
                address.paced.waiting.push(ticket);
            }
            None => {}
        }
        ticket
    }

    /// Whether the connection may be made now; once it may, the ticket is used up.
    pub fn poll(&mut self, now: Instant, ticket: &Ticket) -> Decision {
        let Some(address) = self.addresses.get_mut(&ticket.target) else {
            return Decision::Go;
        };
        let Some(lane) = address.lane(now, ticket.who) else {
            address.leave(ticket);
            return Decision::Go;
        };
        // It may have been free when it came, and has to be paced since.
        if !lane.waiting.iter().any(|other| other.number == ticket.number) {
            lane.waiting.push(*ticket);
        }
        let token = lane.token_at(now);
        if token > now {
            return Decision::At(token);
        }
        if lane.chosen.is_none() {
            address.choose(now, ticket.who);
        }
        let Some(lane) = address.lane(now, ticket.who) else {
            return Decision::Go;
        };
        if lane.chosen != Some(ticket.number) {
            // Whoever is chosen was woken by the same token.
            return Decision::At(now + INTERVAL);
        }
        lane.full_at = lane.full_at.max(now) + INTERVAL;
        lane.served.push_back((ticket.who.domain, ticket.who.name));
        if lane.served.len() > MAX_SERVED {
            lane.served.pop_front();
        }
        address.leave(ticket);
        Decision::Go
    }

    /// The connection is not wanted any more.
    pub fn leave(&mut self, ticket: &Ticket) {
        if let Some(address) = self.addresses.get_mut(&ticket.target) {
            address.leave(ticket);
        }
    }

    /// A connection works. True where that sets others free.
    pub fn succeeded(&mut self, target: Target, who: Who) -> bool {
        let Some(address) = self.addresses.get_mut(&target) else {
            return false;
        };
        let before = address.failed.len();
        address.failed.retain(|(other, _)| !is_same(*other, who));
        address.failed.len() < before
    }

    /// A connection could not be made.
    pub fn failed(&mut self, now: Instant, target: Target, who: Who) {
        if !self.addresses.contains_key(&target) {
            self.sweep(now);
        }
        let failed = &mut self.addresses.entry(target).or_insert_with(|| Address::new(now)).failed;
        failed.retain(|(other, at)| !is_same(*other, who) && now < *at + FAILURE_LIFE);
        let of_domain = failed.iter().filter(|(other, _)| other.domain == who.domain).count();
        if of_domain >= MAX_FAILURES_PER_DOMAIN
            && let Some(oldest) = failed.iter().position(|(other, _)| other.domain == who.domain)
        {
            failed.remove(oldest);
        } else if failed.len() >= MAX_FAILURES {
            failed.pop_front();
        }
        failed.push_back((who, now));
    }

    /// Before an address is added: bounds the table.
    fn sweep(&mut self, now: Instant) {
        if self.addresses.len() < self.sweep_at.max(SWEEP_AT) {
            return;
        }
        self.addresses.retain(|_, address| {
            address.failed.retain(|(_, at)| now < *at + FAILURE_LIFE);
            address.is_busy(now) || !address.failed.is_empty()
        });
        if self.addresses.len() >= MAX_ADDRESSES {
            self.addresses.retain(|_, address| address.is_busy(now));
        }
        self.addresses.shrink_to(SWEEP_AT);
        self.sweep_at = self.addresses.len() * 2;
    }
}

impl Address {
    fn new(now: Instant) -> Self {
        Self {
            listed: Lane::new(now, 1),
            paced: Lane::new(now, BURST),
            failed: VecDeque::new(),
        }
    }

    /// The queue in which `who` has to wait; `None`: in none.
    fn lane(&mut self, now: Instant, who: Who) -> Option<&mut Lane> {
        let fails = self
            .failed
            .iter()
            .any(|(other, at)| is_same(*other, who) && now < *at + FAILURE_LIFE);
        match who.class {
            Class::Listed => fails.then_some(&mut self.listed),
            Class::Verified => fails.then_some(&mut self.paced),
            Class::Stranger => Some(&mut self.paced),
        }
    }

    /// Chooses who has the next turn.
    fn choose(&mut self, now: Instant, who: Who) {
        let failed = std::mem::take(&mut self.failed);
        if let Some(lane) = if who.class == Class::Listed {
            Some(&mut self.listed)
        } else {
            Some(&mut self.paced)
        } {
            let has_failed = |domain| failed.iter().any(|(other, at)| other.domain == domain && now < *at + FAILURE_LIFE);
            let turn = |is: &dyn Fn(&(u64, u64)) -> bool| lane.served.iter().rposition(is).map_or(0, |at| at + 1);
            lane.chosen = lane
                .waiting
                .iter()
                .min_by_key(|ticket| {
                    let (domain, name) = (ticket.who.domain, ticket.who.name);
                    (
                        has_failed(domain),
                        turn(&|served| served.0 == domain),
                        turn(&|served| served.1 == name),
                        ticket.number,
                    )
                })
                .map(|ticket| ticket.number);
        }
        self.failed = failed;
    }

    fn leave(&mut self, ticket: &Ticket) {
        for lane in [&mut self.listed, &mut self.paced] {
            lane.waiting.retain(|other| other.number != ticket.number);
            if lane.chosen == Some(ticket.number) {
                lane.chosen = None;
            }
        }
    }

    fn is_busy(&self, now: Instant) -> bool {
        [&self.listed, &self.paced]
            .iter()
            .any(|lane| !lane.waiting.is_empty() || lane.full_at > now)
    }
}

/// Whether two askers are one: strangers may name another port of a homeserver that is known, where nobody answers.
fn is_same(one: Who, other: Who) -> bool {
    one.name == other.name && one.class == other.class
}

impl Lane {
    const fn new(now: Instant, burst: u32) -> Self {
        Self {
            burst,
            full_at: now,
            waiting: Vec::new(),
            chosen: None,
            served: VecDeque::new(),
        }
    }

    /// When the bucket has, or had, a token.
    fn token_at(&self, now: Instant) -> Instant {
        self.full_at.checked_sub(INTERVAL * (self.burst - 1)).unwrap_or(now)
    }
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a moment to count from")]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn target() -> Target {
        Target::from(IpAddr::from([192, 0, 2, 1]))
    }

    fn who(class: Class, domain: u64, name: u64) -> Who {
        Who { class, domain, name }
    }

    /// Lists who is let through until `for_ms` have gone by, with everybody waiting from the beginning.
    fn run(dials: &mut Dials, start: Instant, for_ms: u32, mut tickets: Vec<Ticket>) -> Vec<(u32, Who)> {
        let mut gone = Vec::new();
        for ms in 0..for_ms {
            let now = start + MS * ms;
            tickets.retain(|ticket| match dials.poll(now, ticket) {
                Decision::Go => {
                    gone.push((ms, ticket.who));
                    false
                }
                Decision::At(_) => true,
            });
        }
        gone
    }

    fn enter(dials: &mut Dials, now: Instant, many: impl IntoIterator<Item = Who>) -> Vec<Ticket> {
        many.into_iter().map(|who| dials.enter(now, target(), who)).collect()
    }

    #[test]
    fn eight_at_once_and_then_four_a_second_whatever_the_names_are() {
        let (mut dials, now) = (Dials::default(), Instant::now());
        let tickets = enter(&mut dials, now, (0..100).map(|n| who(Class::Stranger, n, n)));
        let gone = run(&mut dials, now, 3001, tickets);
        assert_eq!(gone.iter().filter(|(at, _)| *at < 250).count(), 8);
        assert_eq!(gone.len(), 8 + 12);
    }

    #[test]
    fn known_ones_wait_only_while_they_fail() {
        let now = Instant::now();
        for (class, burst) in [(Class::Listed, 1), (Class::Verified, 8)] {
            let (mut dials, one) = (Dials::default(), who(class, 1, 1));
            let tickets = enter(&mut dials, now, [one; 50]);
            assert_eq!(run(&mut dials, now, 1, tickets).len(), 50);
            dials.failed(now, target(), one);
            let tickets = enter(&mut dials, now, [one; 50]);
            assert_eq!(run(&mut dials, now, 1001, tickets.clone()).len(), burst + 4);
            assert!(dials.succeeded(target(), one));
            assert_eq!(run(&mut dials, now, 1, tickets).len(), 50);
        }
    }

    #[test]
    fn whoever_fails_there_comes_last() {
        let (mut dials, now) = (Dials::default(), Instant::now());
        for domain in 1..=10 {
            dials.failed(now, target(), who(Class::Stranger, domain, domain));
        }
        let mut tickets = enter(&mut dials, now, (0..300).map(|n| who(Class::Stranger, 1 + n % 10, 1 + n % 10)));
        let honest = who(Class::Stranger, 99, 99);
        run(&mut dials, now, 1, tickets.clone());
        tickets.extend(enter(&mut dials, now, [honest]));
        let gone = run(&mut dials, now + MS, 600, tickets);
        assert_eq!(gone.iter().position(|(_, who)| *who == honest), Some(0), "{gone:?}");
    }

    #[test]
    fn turns_go_round_by_domain_and_then_by_name_the_oldest_first() {
        let (mut dials, now) = (Dials::default(), Instant::now());
        let burn = enter(&mut dials, now, [who(Class::Stranger, 0, 0); 8]);
        assert_eq!(run(&mut dials, now, 8, burn).len(), 8);
        let names = [(1, 1), (1, 1), (1, 1), (1, 2), (2, 3)];
        let tickets = enter(&mut dials, now, names.map(|(domain, name)| who(Class::Stranger, domain, name)));
        let newest = tickets[2];
        let gone: Vec<_> = run(&mut dials, now, 2000, tickets).iter().map(|(_, who)| who.name).collect();
        assert_eq!(gone.len(), 5);
        assert_eq!(gone, [1, 3, 2, 1, 1]);
        let again = enter(&mut dials, now, [who(Class::Stranger, 1, 1); 2]);
        assert!(again[1].number > newest.number);
        let mut later = now + Duration::from_secs(3600);
        let burn = enter(&mut dials, later, [who(Class::Stranger, 7, 7); 1]);
        drop(burn);
        later += MS;
        assert_eq!(dials.poll(later, &again[0]), Decision::At(later + INTERVAL));
    }

    #[test]
    fn who_was_chosen_and_left_keeps_nobody_waiting() {
        let (mut dials, now) = (Dials::default(), Instant::now());
        let burn = enter(&mut dials, now, [who(Class::Stranger, 0, 0); 8]);
        run(&mut dials, now, 8, burn);
        let tickets = enter(&mut dials, now, [who(Class::Stranger, 1, 1), who(Class::Stranger, 2, 2)]);
        let later = now + INTERVAL;
        assert!(matches!(dials.poll(later, &tickets[1]), Decision::At(_)), "the oldest is chosen");
        dials.leave(&tickets[0]);
        assert_eq!(dials.poll(later, &tickets[1]), Decision::Go);
    }

    #[test]
    fn addresses_are_forgotten() {
        let (mut dials, mut now) = (Dials::default(), Instant::now());
        for n in 0..100_000_u32 {
            let target = Target::from(IpAddr::from(n.to_be_bytes()));
            let one = who(Class::Stranger, 1, 1);
            let ticket = dials.enter(now, target, one);
            assert_eq!(dials.poll(now, &ticket), Decision::Go);
            if n % 2 == 0 {
                dials.failed(now, target, one);
            }
            now += MS;
        }
        assert!(dials.addresses.len() <= MAX_ADDRESSES * 2, "{}", dials.addresses.len());
        now += FAILURE_LIFE;
        dials.sweep_at = 0;
        dials.sweep(now);
        assert!(dials.addresses.is_empty());
    }
}
