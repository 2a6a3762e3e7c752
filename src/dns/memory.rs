//! Remembers answers of DNS, and for how long they count (decision O2). Pure: it is told the time.

use std::net::IpAddr;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use lru::LruCache;

use crate::cache::bounded;

use super::{DnsError, SrvTarget};

/// Names remembered for each class. Each holds at most eight addresses or targets, whatever came, which bounds it in bytes
/// too: a resolver's own cache keeps whole messages of up to 64 KiB.
const MAX_NAMES: NonZeroUsize = NonZeroUsize::new(1024).unwrap();
/// How long an answer counts at most.
const MAX_LIFE: Duration = Duration::from_secs(30);
/// No name is asked about more often than this, whoever wants it.
const MIN_LIFE: Duration = Duration::from_secs(1);
/// How long the last answer is used while DNS gives none.
const LAST_ANSWER_LIFE: Duration = Duration::from_secs(24 * 3600);

/// An answer with something in it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Found {
    Addresses(Arc<[IpAddr]>),
    Targets(Arc<[SrvTarget]>),
}

/// Answer to a question, and until when its records say that it holds.
pub(super) type Answer = Result<(Found, Instant), NoAnswer>;

/// A question brought nothing.
#[derive(Debug, Clone)]
pub(super) enum NoAnswer {
    /// DNS says that there is nothing, and for how long.
    Nothing(Option<Duration>),
    /// DNS did not say anything.
    Failed(Arc<str>),
}

/// State of the memory about a name.
#[derive(Debug)]
pub(super) enum Known {
    /// The answer counts.
    Current(Result<Found, DnsError>),
    /// The answer was true once, and DNS has to be asked.
    Former(Former),
    /// DNS has to be asked.
    Unknown,
}

/// An answer that does not count any more.
#[derive(Debug, PartialEq)]
pub(super) struct Former {
    pub(super) found: Found,
    /// There is a reason to think that it is wrong, not only that it is old.
    pub(super) doubted: bool,
    /// Until then the name is not asked about again.
    pub(super) due: Instant,
}

/// Answers by name.
pub(super) struct Memory(LruCache<Box<str>, Entry>);

struct Entry {
    /// When the last question was asked.
    asked: Instant,
    /// How long what it brought counts.
    until: Instant,
    /// Reason for which the last question brought no address.
    nothing: Option<DnsError>,
    /// Answer that was found last, and when.
    found: Option<(Found, Instant)>,
    /// Whether the answer came by way of another `/etc/hosts` or `/etc/resolv.conf`.
    outdated: bool,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self(bounded(MAX_NAMES))
    }

    /// Looks up what is known of `name`. An answer to a question that was asked before `since` does not count, but no name is asked
    /// about again within a second.
    pub(super) fn get(&mut self, name: &str, since: Option<Instant>, now: Instant) -> Known {
        let Some(entry) = self.0.get(name) else {
            return Known::Unknown;
        };
        let found = entry.found.as_ref().filter(|(_, at)| now < *at + LAST_ANSWER_LIFE);
        let found = found.map(|(found, _)| found.clone());
        let doubted = entry.outdated || since.is_some_and(|since| entry.asked < since);
        let due = if entry.outdated { now } else { entry.asked + MIN_LIFE };
        match (&entry.nothing, found) {
            (Some(nothing), None) if now < due || (!doubted && now < entry.until) => Known::Current(Err(nothing.clone())),
            (_, None) => Known::Unknown,
            (_, Some(found)) if !doubted && now < entry.until => Known::Current(Ok(found)),
            // That DNS is away was found out a moment ago.
            (Some(_), Some(found)) if !entry.outdated && now < entry.until => Known::Current(Ok(found)),
            (_, Some(found)) => Known::Former(Former { found, doubted, due }),
        }
    }

    /// Takes in what a question of this moment brought. While DNS does not answer, what it said before goes on.
    pub(super) fn put(&mut self, name: &str, answer: &Answer, asked: Instant, now: Instant) {
        let before = self.0.pop(name).and_then(|entry| entry.found);
        let (nothing, found, until) = match answer {
            Ok((found, until)) => (None, Some((found.clone(), now)), (*until).min(now + MAX_LIFE)),
            Err(NoAnswer::Nothing(life)) => (Some(DnsError::NotFound), None, life.map_or(now, |life| now + life.min(MAX_LIFE))),
            Err(NoAnswer::Failed(why)) => (Some(DnsError::Failed(why.clone())), before, now),
        };
        let entry = Entry {
            asked,
            until: until.max(now + MIN_LIFE),
            nothing,
            found,
            outdated: false,
        };
        self.0.put(name.into(), entry);
    }

    /// Moves the memory of `name` here from `there`.
    pub(super) fn take_over(&mut self, there: &mut Self, name: &str) {
        if let Some(entry) = there.0.pop(name) {
            self.0.put(name.into(), entry);
        }
    }

    /// `/etc/hosts` or `/etc/resolv.conf` has changed: everything is asked again. What was found goes on where DNS does not
    /// answer: a machine that changes networks has the new file before it has DNS.
    pub(super) fn outdate(&mut self) {
        self.0.iter_mut().for_each(|(_, entry)| entry.outdated = true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn at(last: u8) -> Found {
        Found::Addresses([IpAddr::from([192, 0, 2, last])].into())
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn failed() -> Answer {
        Err(NoAnswer::Failed("no answer".into()))
    }

    fn current(memory: &mut Memory, since: Option<Instant>, now: Instant) -> Option<Found> {
        match memory.get("a", since, now) {
            Known::Current(found) => Some(found.unwrap()),
            Known::Former(_) | Known::Unknown => None,
        }
    }

    #[test]
    fn an_answer_counts_for_its_ttl_and_half_a_minute_at_most() {
        let start = Instant::now();
        for (ttl, life) in [(HOUR, 30), (seconds(600), 30), (seconds(7), 7), (seconds(0), 1)] {
            let mut memory = Memory::new();
            assert!(matches!(memory.get("a", None, start), Known::Unknown));
            memory.put("a", &Ok((at(1), start + ttl)), start, start);
            assert_eq!(
                current(&mut memory, None, start + seconds(life) - seconds(1)),
                Some(at(1)),
                "{ttl:?}"
            );
            assert!(
                matches!(memory.get("a", None, start + seconds(life)), Known::Former(former) if former.found == at(1)),
                "{ttl:?}"
            );
        }
    }

    #[test]
    fn whoever_could_not_use_it_asks_again_once_a_second() {
        let start = Instant::now();
        let mut memory = Memory::new();
        memory.put("a", &Ok((at(1), start + HOUR)), start, start);
        let used = start + seconds(5);
        assert!(matches!(memory.get("a", Some(used), used), Known::Former(former) if former.found == at(1)));
        memory.put("a", &Ok((at(2), used + HOUR)), used, used);
        assert_eq!(current(&mut memory, Some(used), used), Some(at(2)), "asked since");
        let soon = used + Duration::from_millis(900);
        let due = used + seconds(1);
        let former = |memory: &mut Memory, since, now| match memory.get("a", since, now) {
            Known::Former(former) => former,
            known @ (Known::Current(_) | Known::Unknown) => panic!("{known:?}"),
        };
        let expected = Former {
            found: at(2),
            doubted: true,
            due,
        };
        assert_eq!(former(&mut memory, Some(soon), soon), expected, "when the second is over");
        assert_eq!(former(&mut memory, Some(due), due), expected);
        memory.put("a", &failed(), due, due);
        assert_eq!(current(&mut memory, Some(soon), due), Some(at(2)), "DNS is away");
        let end = due + seconds(2);
        memory.put("a", &failed(), due, end);
        assert_eq!(
            current(&mut memory, Some(due + seconds(1)), end),
            Some(at(2)),
            "it was, a moment ago"
        );
    }

    #[test]
    fn what_was_asked_for_again_counts_no_longer_than_other_answers() {
        let start = Instant::now();
        let mut memory = Memory::new();
        memory.put("a", &Ok((at(1), start + HOUR)), start, start);
        assert_eq!(current(&mut memory, Some(start), start + seconds(29)), Some(at(1)));
        let old = memory.get("a", Some(start), start + seconds(30));
        assert!(matches!(old, Known::Former(former) if former.found == at(1) && !former.doubted));
        memory.put("b", &failed(), start, start);
        assert!(matches!(memory.get("b", Some(start), start), Known::Current(Err(_))));
        assert!(matches!(memory.get("b", Some(start), start + seconds(1)), Known::Unknown));
    }

    #[test]
    fn a_change_of_the_files_makes_everything_former() {
        let start = Instant::now();
        let mut memory = Memory::new();
        memory.put("a", &Ok((at(1), start + HOUR)), start, start);
        memory.put("b", &Err(NoAnswer::Nothing(Some(HOUR))), start, start);
        memory.outdate();
        let old = memory.get("a", None, start);
        assert!(matches!(old, Known::Former(former) if former.found == at(1) && former.doubted && former.due == start));
        assert!(matches!(memory.get("b", None, start + seconds(1)), Known::Unknown));
        memory.put("a", &failed(), start, start);
        assert_eq!(current(&mut memory, None, start), Some(at(1)), "DNS is not there yet");
    }

    #[test]
    fn while_dns_is_away_the_last_answer_goes_on_for_a_day() {
        let start = Instant::now();
        let mut memory = Memory::new();
        memory.put("a", &Ok((at(1), start + HOUR)), start, start);
        let mut now = start + seconds(40);
        for _ in 0..100 {
            assert!(matches!(memory.get("a", None, now), Known::Former(_)), "it is asked for");
            memory.put("a", &failed(), now, now);
            assert_eq!(current(&mut memory, None, now), Some(at(1)), "and used meanwhile");
            now += seconds(600);
        }
        let day = start + seconds(24 * 3600);
        assert!(matches!(memory.get("a", None, day), Known::Unknown));
        memory.put("a", &failed(), day, day);
        assert!(matches!(memory.get("a", None, day), Known::Current(Err(DnsError::Failed(_)))));
    }

    #[test]
    fn that_there_is_no_such_name_ends_what_was_there() {
        let start = Instant::now();
        let mut memory = Memory::new();
        memory.put("a", &Ok((at(1), start + HOUR)), start, start);
        memory.put("a", &Err(NoAnswer::Nothing(Some(HOUR))), start, start);
        assert!(matches!(
            memory.get("a", None, start + seconds(29)),
            Known::Current(Err(DnsError::NotFound))
        ));
        assert!(matches!(memory.get("a", None, start + seconds(30)), Known::Unknown));
    }

    #[test]
    fn a_flood_of_names_is_bounded() {
        let start = Instant::now();
        let mut memory = Memory::new();
        for n in 0..10_000 {
            memory.put(&format!("n{n}"), &failed(), start, start);
        }
        assert_eq!(memory.0.len(), MAX_NAMES.get());
    }
}
