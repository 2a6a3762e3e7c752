//! Remembers which homeservers have answered `userinfo` well within a day. Pure.
//!
//! Bounded by machines and not by names: what somebody with many names can fill is a part of it (decision H7a).

use std::collections::HashMap;
use std::time::Duration;

use super::Group;
use crate::server_name::ServerName;

/// Homeservers that are remembered: about 150 bytes each.
const MAX_REMEMBERED: usize = 4096;
/// Most homeservers of one group that are remembered.
const MAX_PER_GROUP: usize = 64;
/// A domain with more names in a group than that is taken for a crowd, whoever its participants are.
const CROWD: usize = MAX_PER_GROUP / 8;
/// Time for which a verification counts.
pub const REMEMBERED_FOR: Duration = Duration::from_secs(24 * 3600);
/// An answer is stored again after this time.
const STORED_AGAIN_AFTER: Duration = Duration::from_secs(3600);

/// The memory, by host without case, final dot and port. Times are seconds of the wall clock: it outlives the process.
#[derive(Debug, Default)]
pub struct Verified {
    hosts: HashMap<Box<str>, Entry>,
    groups: HashMap<Option<Group>, usize>,
}

/// Changes that an answer makes in the store.
#[derive(Debug, PartialEq, Eq)]
pub struct Changes {
    /// The host that answered is to be stored.
    pub store: bool,
    /// Hosts that gave way to the new one.
    pub forget: Vec<Box<str>>,
}

#[derive(Debug)]
struct Entry {
    /// Unknown for one that was restored: those are one group until they answer again.
    group: Option<Group>,
    /// A participant of the homeserver, with a leave that is looked after here, was seen on the SFU.
    has_participant: bool,
    first: u64,
    last: u64,
    stored: u64,
}

impl Verified {
    /// The second until which `host` counts as verified; 0 where it does not.
    #[must_use]
    pub fn until(&self, host: &str) -> u64 {
        self.hosts
            .get(host)
            .map_or(0, |entry| entry.last.saturating_add(REMEMBERED_FOR.as_secs()))
    }

    /// `host`, on the machines of `group`, has answered well. Says what is to be stored, and what forgotten.
    #[must_use]
    pub fn on_answer(&mut self, host: &str, group: Group, now: u64) -> Changes {
        let mut forget = Vec::new();
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.last = now;
            if entry.group != Some(group) {
                let old = entry.group.replace(group);
                self.count_out(old);
                *self.groups.entry(Some(group)).or_default() += 1;
                self.make_room(group, now, &mut forget);
            }
        } else {
            self.insert(host, Some(group), now);
            self.make_room(group, now, &mut forget);
        }
        let due = |entry: &&mut Entry| now >= entry.stored.saturating_add(STORED_AGAIN_AFTER.as_secs());
        let entry = self.hosts.get_mut(host).filter(due);
        let store = entry.map(|entry| entry.stored = now).is_some();
        Changes { store, forget }
    }

    /// Takes in a stored record: `host` answered well at `at`.
    pub fn restore(&mut self, host: &str, at: u64, now: u64) {
        if is_fresh(at, now) && self.hosts.len() < MAX_REMEMBERED && !self.hosts.contains_key(host) {
            self.insert(host, None, at);
            if let Some(entry) = self.hosts.get_mut(host) {
                entry.stored = at;
            }
        }
    }

    /// A participant of `host`, with a leave that is looked after here, was seen on the SFU: it is the last to be forgotten.
    pub fn on_participant(&mut self, host: &str) {
        if let Some(entry) = self.hosts.get_mut(host) {
            entry.has_participant = true;
        }
    }

    fn insert(&mut self, host: &str, group: Option<Group>, at: u64) {
        let entry = Entry {
            group,
            has_participant: false,
            first: at,
            last: at,
            stored: 0,
        };
        self.hosts.insert(host.into(), entry);
        *self.groups.entry(group).or_default() += 1;
    }

    /// Gives way where the group is full, and of the largest group where all is: the youngest of the domain with most names there, of those
    /// without participants before others, unless the domain is a crowd.
    fn make_room(&mut self, group: Group, now: u64, forgotten: &mut Vec<Box<str>>) {
        if self.is_full(group) {
            self.forget_stale(Some(group), now, forgotten);
        }
        if self.is_full(group) {
            forgotten.extend(self.forget_youngest(Some(group)));
        }
        if self.hosts.len() > MAX_REMEMBERED {
            self.forget_stale(None, now, forgotten);
        }
        if self.hosts.len() > MAX_REMEMBERED
            && let Some((&largest, _)) = self.groups.iter().max_by_key(|(group, count)| (**count, **group))
        {
            forgotten.extend(self.forget_youngest(largest));
        }
    }

    fn is_full(&self, group: Group) -> bool {
        self.groups.get(&Some(group)).is_some_and(|names| *names > MAX_PER_GROUP)
    }

    /// Forgets whoever has not answered for a day, of one group or of all.
    fn forget_stale(&mut self, group: Option<Group>, now: u64, forgotten: &mut Vec<Box<str>>) {
        let stale = self.hosts.iter().filter(|(_, entry)| !is_fresh(entry.last, now));
        let of_group = stale.filter(|(_, entry)| group.is_none() || entry.group == group);
        let stale: Vec<_> = of_group.map(|(host, _)| host.clone()).collect();
        for host in stale {
            self.forget(&host);
            forgotten.push(host);
        }
    }

    fn forget_youngest(&mut self, group: Option<Group>) -> Option<Box<str>> {
        let of_group = || self.hosts.iter().filter(|(_, entry)| entry.group == group);
        let mut names = HashMap::<String, usize>::new();
        for (host, _) in of_group() {
            *names.entry(domain(host)).or_default() += 1;
        }
        let (host, _) = of_group().max_by_key(|(host, entry)| {
            let names = names.get(&domain(host)).copied().unwrap_or_default();
            (names > CROWD, !entry.has_participant, names, entry.first, *host)
        })?;
        let host = host.clone();
        self.forget(&host);
        Some(host)
    }

    fn forget(&mut self, host: &str) {
        if let Some(entry) = self.hosts.remove(host) {
            self.count_out(entry.group);
        }
    }

    fn count_out(&mut self, group: Option<Group>) {
        if let Some(count) = self.groups.get_mut(&group) {
            *count -= 1;
            if *count == 0 {
                self.groups.remove(&group);
            }
        }
    }
}

/// The domain of a remembered host, whatever its port.
fn domain(host: &str) -> String {
    let Ok(server) = ServerName::parse(host) else {
        return host.to_owned();
    };
    super::domain(&server, &server.host_key()).to_owned()
}

const fn is_fresh(at: u64, now: u64) -> bool {
    at.saturating_add(REMEMBERED_FOR.as_secs()) > now
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(n: usize) -> Group {
        let [.., a, b, c] = n.to_be_bytes();
        Group::V4([a, b, c])
    }

    #[test]
    fn many_names_of_one_machine_push_nobody_out() {
        let mut verified = Verified::default();
        assert!(verified.on_answer("home.example", group(0), 10_000).store);
        for n in 0..10_000 {
            let changes = verified.on_answer(&format!("n{n}.evil.example"), group(1), 10_001);
            assert_eq!(changes.forget.len(), usize::from(n >= MAX_PER_GROUP), "{n}");
        }
        assert_eq!(verified.hosts.len(), 1 + MAX_PER_GROUP);
        // The oldest names of a crowded machine stay, too.
        assert!(verified.until("n0.evil.example") > 2 && verified.until("home.example") > 2);
        // Whoever comes there later is no less known for them.
        assert_eq!(verified.on_answer("late.home", group(1), 10_002).forget.len(), 1);
        assert!(verified.until("late.home") > 2);
    }

    #[test]
    fn whose_participants_were_seen_goes_last() {
        let mut verified = Verified::default();
        for n in 0..MAX_PER_GROUP {
            let _ = verified.on_answer(&format!("n{n}.evil{n}.example"), group(1), 10_000);
        }
        verified.on_participant("home.example");
        assert_eq!(verified.on_answer("home.example", group(1), 10_001).forget.concat(), "home.example");
        let _ = verified.on_answer("n0.evil0.example", group(1), 10_002);
        verified.forget("n1.evil1.example");
        let _ = verified.on_answer("home.example", group(1), 10_003);
        verified.on_participant("home.example");
        for n in 0..100 {
            let later = format!("later{n}.example");
            assert_eq!(verified.on_answer(&later, group(1), 10_004 + n).forget.concat(), later);
        }
        // A few domains cannot keep all places by it.
        let mut crowd = Verified::default();
        for n in 0..MAX_PER_GROUP {
            let name = format!("n{n}.evil{}.example", n % 7);
            let _ = crowd.on_answer(&name, group(1), 10_000);
            crowd.on_participant(&name);
        }
        let forgotten = crowd.on_answer("home.example", group(1), 10_001).forget.concat();
        assert!(forgotten.contains(".evil"), "{forgotten}");
        // Where all have some, it is as if none had.
        for host in verified.hosts.keys().cloned().collect::<Vec<_>>() {
            verified.on_participant(&host);
        }
        assert_eq!(verified.forget_youngest(Some(group(1))).as_deref(), Some("home.example"));
    }

    #[test]
    fn ports_of_an_address_are_one_domain() {
        for (host, expected) in [
            ("192.0.2.1:8448", "192.0.2.1"),
            ("192.0.2.1", "192.0.2.1"),
            ("[2001:db8::1]:8448", "2001:db8::1"),
            ("2001:db8::1", "2001:db8::1"),
            ("a.b.example.org:443", "example.org"),
            ("localhost", "localhost"),
        ] {
            assert_eq!(domain(host), expected);
        }
    }

    #[test]
    fn whoever_was_silent_for_a_day_makes_room() {
        let mut verified = Verified::default();
        for n in 0..MAX_PER_GROUP {
            let _ = verified.on_answer(&format!("home.n{n}"), group(1), 10_000);
        }
        let late = 10_000 + 86_400;
        assert_eq!(verified.on_answer("late.example", group(1), late).forget.len(), MAX_PER_GROUP);
        assert!(verified.until("late.example") > late);
    }

    #[test]
    fn many_machines_are_bounded_and_the_largest_gives_way() {
        let mut verified = Verified::default();
        let _ = verified.on_answer("home.example", group(9999), 0);
        for n in 0..10_000 {
            let _ = verified.on_answer(&format!("n{n}.example"), group(n % 80), 1);
        }
        assert!(verified.hosts.len() <= MAX_REMEMBERED);
        assert!(verified.until("home.example") > 2);
    }

    #[test]
    fn an_answer_counts_for_a_day_and_is_stored_once_an_hour() {
        let mut verified = Verified::default();
        assert!(verified.on_answer("a.example", group(1), 10_000).store);
        assert!(!verified.on_answer("a.example", group(1), 10_000 + 3599).store);
        assert!(verified.on_answer("a.example", group(2), 10_000 + 3600).store);
        assert!(verified.until("a.example") > 10_000 + 3600 + 86_399 && verified.until("a.example") <= 10_000 + 3600 + 86_400);
        let mut again = Verified::default();
        again.restore("a.example", 13_600, 14_000);
        again.restore("old.example", 13_600, 13_600 + 86_400);
        assert!(again.until("a.example") > 14_000 && again.hosts.len() == 1);
        assert!(!again.on_answer("a.example", group(1), 14_000).store, "stored already");
    }
}
