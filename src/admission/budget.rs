//! How much one request may cost others (decision O4). Whoever is not listed can name any machine, so a request that leads
//! there has only so many connections and questions, whatever redirects, SRV records and retries ask for.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::Class;

/// TCP connects to one address each.
const MAX_DIALS: u32 = 8;
/// Well-known files, each with its redirects.
const MAX_FETCHES: u32 = 3;
/// Questions to DNS.
const MAX_QUESTIONS: u32 = 24;

/// Budget that is left for one request of a client, all of its tries together.
#[derive(Debug)]
pub struct Budget {
    unlimited: bool,
    dials: AtomicU32,
    fetches: AtomicU32,
    questions: AtomicU32,
    spent: AtomicBool,
}

impl Budget {
    /// The budget of a request about a homeserver of `class`; a listed one has no limit.
    #[must_use]
    pub const fn of(class: Class) -> Self {
        Self {
            unlimited: matches!(class, Class::Listed),
            dials: AtomicU32::new(MAX_DIALS),
            fetches: AtomicU32::new(MAX_FETCHES),
            questions: AtomicU32::new(MAX_QUESTIONS),
            spent: AtomicBool::new(false),
        }
    }

    /// Takes one TCP connect. False: it must not be made.
    #[must_use]
    pub fn dial(&self) -> bool {
        self.take_or_end(&self.dials, 1)
    }

    /// How many connections are left where they have a limit.
    #[must_use]
    pub fn dials_left(&self) -> u32 {
        self.dials.load(Ordering::Relaxed)
    }

    /// Takes one well-known file. False: it must not be asked for.
    #[must_use]
    pub fn fetch(&self) -> bool {
        self.take(&self.fetches, 1)
    }

    /// Takes so many questions to DNS. False: they must not be asked.
    #[must_use]
    pub fn questions(&self, count: u32) -> bool {
        self.take_or_end(&self.questions, count)
    }

    /// Whether a connection or a question was refused, so that another try makes no sense.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.spent.load(Ordering::Relaxed)
    }

    fn take_or_end(&self, left: &AtomicU32, count: u32) -> bool {
        let taken = self.take(left, count);
        if !taken {
            self.spent.store(true, Ordering::Relaxed);
        }
        taken
    }

    fn take(&self, left: &AtomicU32, count: u32) -> bool {
        self.unlimited
            || left
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(count))
                .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_so_much_of_each() {
        for class in [Class::Verified, Class::Stranger] {
            let budget = Budget::of(class);
            assert_eq!((0..20).filter(|_| budget.fetch()).count(), 3);
            assert!(!budget.is_spent(), "without a file there are other ways");
            assert_eq!((0..20).filter(|_| budget.dial()).count(), 8);
            assert!(budget.is_spent());
            assert_eq!((0..20).filter(|_| budget.questions(2)).count(), 12);
        }
        let budget = Budget::of(Class::Listed);
        assert!((0..1000).all(|_| budget.dial() && budget.fetch() && budget.questions(9)));
        assert!(!budget.is_spent());
    }
}
