//! Whether the SFU answers (L13, L13a): when to ask its base address, when to ask for all rooms, when it counts as silent.
//!
//! It knows no room. What the answers say about rooms is for `rooms`.

use crate::delayed_leave::machine::Sfu;
use crate::livekit::Reach;

use crate::time::Time;

const CALM: u64 = 1_000;
const HUNT: u64 = 100;
/// A little later, so that what comes together is asked for together.
pub(crate) const SOON: u64 = 100;
const HUNTED_FAST: u64 = 60_000;
/// How long an SFU that has answered may be silent, and one that never has (L13a).
const SILENT_AFTER: u64 = 600_000;
const NEVER_HEARD_FOR: u64 = 3_600_000;
const WARN_EVERY: u64 = 60_000;

/// What the watch wants done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Wanted {
    /// `GET` the base address on the watch's own connection, within a second.
    Probe,
    /// `ListRooms` for all rooms with connected jobs.
    ListRooms,
    /// Say that the SFU has been silent for that many milliseconds, and that restarts pause.
    Warn(u64),
    /// Tell all jobs.
    Tell(Sfu),
}

/// The watch.
#[derive(Debug)]
pub struct Watch {
    /// Between two questions for all rooms; `None` switches L13 off.
    interval: Option<u64>,
    needed: bool,
    probing: Option<Time>,
    last_probe: Option<Time>,
    probe_at: Option<Time>,
    hunting_since: Option<Time>,
    list_at: Option<Time>,
    last_list: Option<Time>,
    started: Time,
    last_answer: Option<Time>,
    unanswered: bool,
    trouble: Option<Time>,
    silent: bool,
    warn_at: Option<Time>,
    told: Sfu,
}

impl Watch {
    /// The watch of an SFU nothing is known of. `interval` is in milliseconds.
    #[must_use]
    pub fn new(interval: Option<u64>, now: Time) -> Self {
        Self {
            interval,
            needed: false,
            probing: None,
            last_probe: None,
            probe_at: None,
            hunting_since: None,
            list_at: None,
            last_list: None,
            started: now,
            last_answer: None,
            unanswered: false,
            trouble: None,
            silent: false,
            warn_at: None,
            told: Sfu::Answering,
        }
    }

    /// How the SFU stands, as the jobs were last told.
    #[must_use]
    pub fn sfu(&self) -> Sfu {
        self.told
    }

    /// Whether rooms are watched at all.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.interval.is_some()
    }

    /// When a call last failed at the connection.
    #[must_use]
    pub fn trouble(&self) -> Option<Time> {
        self.trouble
    }

    /// Whether there are connected jobs.
    pub fn need(&mut self, needed: bool, now: Time) {
        let Some(interval) = self.interval else { return };
        if needed == self.needed {
            return;
        }
        self.needed = needed;
        if needed {
            self.probe_at = Some(now);
            self.list_at = Some(self.list_at.unwrap_or_else(|| now.after(interval)).max(now));
        } else {
            self.probe_at = None;
            self.hunting_since = None;
        }
    }

    /// All rooms are to be asked for as soon as the SFU answers: jobs were restored, and the SFU may have gone down with us.
    pub fn list_soon(&mut self, now: Time) {
        // The first of many restored jobs sets the moment, so that one question serves all of them.
        let soon = now.after(SOON);
        self.list_at = Some(self.list_at.map_or(soon, |at| at.min(soon)));
    }

    /// A call other than the probe has ended.
    pub fn called(&mut self, reach: Reach, now: Time) {
        match reach {
            Reach::Answered => self.answered(now),
            Reach::TimedOut => {
                // Some questions have little time. One of them says nothing of an SFU that has just answered another.
                if self.last_answer.is_none_or(|last| now.since(last) > 2 * CALM) {
                    self.unanswered = true;
                }
                if self.needed && self.probing.is_none() {
                    self.probe_at = Some(now);
                }
            }
            Reach::Unreachable => self.hunt(now),
        }
    }

    /// The probe has ended.
    pub fn probed(&mut self, reach: Reach, now: Time) {
        let asked = self.probing.take().unwrap_or(now);
        match reach {
            Reach::Answered => {
                self.answered(now);
                if self.needed {
                    self.probe_at = Some(asked.after(CALM).max(now));
                }
            }
            Reach::TimedOut | Reach::Unreachable => {
                self.hunt(now);
                if self.needed {
                    let hunted = self.hunting_since.map_or(0, |since| now.since(since));
                    self.probe_at = Some(asked.after(if hunted < HUNTED_FAST { HUNT } else { CALM }).max(now));
                }
            }
        }
    }

    /// The watch's own connection was closed.
    pub fn closed(&mut self, now: Time) {
        self.hunt(now);
    }

    /// A verified webhook came: the SFU lives, but that is no answer to a question.
    pub fn heard(&mut self, now: Time) {
        self.last_answer = Some(now);
        self.silent = false;
    }

    fn answered(&mut self, now: Time) {
        self.last_answer = Some(now);
        self.unanswered = false;
        self.silent = false;
        if self.hunting_since.take().is_some() {
            self.list_at = Some(self.last_list.map_or(now, |last| last.after(CALM).max(now)));
        }
    }

    fn hunt(&mut self, now: Time) {
        self.unanswered = true;
        self.trouble = Some(now);
        if self.needed && self.hunting_since.is_none() {
            self.hunting_since = Some(now);
            if self.probing.is_none() {
                // A front that closes after each answer must not be asked as fast as it answers.
                self.probe_at = Some(self.last_probe.map_or(now, |last| last.after(HUNT).max(now)));
            }
        }
    }

    /// What is due.
    pub fn settle(&mut self, now: Time, wanted: &mut Vec<Wanted>) {
        if self.silent_at().is_some_and(|at| at <= now) && !self.silent {
            self.silent = true;
            self.warn_at = Some(now);
        }
        if self.silent {
            if self.warn_at.is_some_and(|at| at <= now) {
                self.warn_at = Some(now.after(WARN_EVERY));
                wanted.push(Wanted::Warn(now.since(self.last_answer.unwrap_or(self.started))));
            }
        } else {
            self.warn_at = None;
        }
        let sfu = match (self.silent, self.unanswered) {
            (true, _) => Sfu::Silent,
            (false, true) => Sfu::Failing,
            (false, false) => Sfu::Answering,
        };
        if sfu != self.told {
            self.told = sfu;
            wanted.push(Wanted::Tell(sfu));
        }
        if self.probing.is_none() && self.probe_at.is_some_and(|at| at <= now) {
            self.probe_at = None;
            self.probing = Some(now);
            self.last_probe = Some(now);
            wanted.push(Wanted::Probe);
        }
        if let Some(interval) = self.interval
            && self.needed
            && self.hunting_since.is_none()
            && self.list_at.is_some_and(|at| at <= now)
        {
            self.list_at = Some(now.after(interval));
            self.last_list = Some(now);
            wanted.push(Wanted::ListRooms);
        }
    }

    /// When [`Self::settle`] has something to do.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        let probe = self.probe_at.filter(|_| self.probing.is_none());
        let list = self
            .list_at
            .filter(|_| self.needed && self.hunting_since.is_none() && self.interval.is_some());
        let silent = if self.silent { None } else { self.silent_at() };
        [probe, list, silent, self.warn_at].into_iter().flatten().min()
    }

    /// A quiet SFU is not a silent one: a question must have gone unanswered.
    fn silent_at(&self) -> Option<Time> {
        let at = self
            .last_answer
            .map_or_else(|| self.started.after(NEVER_HEARD_FOR), |last| last.after(SILENT_AFTER));
        self.unanswered.then_some(at)
    }
}

#[cfg(test)]
mod tests;
