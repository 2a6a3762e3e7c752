//! Whether the SFU answers (decisions L13, L13a): when to ask its base address, when to ask for all rooms, when it counts as silent.

use crate::livekit::Reach;
use crate::time::Time;

/// Between two probes of an SFU that answers, and of one that does not, for the first minute.
const PROBE_INTERVAL_MS: u64 = 1_000;
const FAST_PROBE_INTERVAL_MS: u64 = 100;
const FAST_PROBES_FOR_MS: u64 = 60_000;
/// A little later, so that what comes together is asked for together.
pub(super) const TOGETHER_MS: u64 = 100;
/// How long an SFU that has answered may be silent, and one that never has (L13a).
const SILENT_AFTER_MS: u64 = 600_000;
const NEVER_HEARD_FOR_MS: u64 = 3_600_000;
const WARN_EVERY_MS: u64 = 60_000;

/// Steps that are due for the SFU as a whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Due {
    /// `GET` its base address on a connection of its own.
    Probe,
    /// `ListRooms` for all rooms in which somebody is thought to be.
    ListRooms,
    /// Warn that it has been silent for that many milliseconds.
    Warn(u64),
    /// The SFU began to answer, or ceased to; graces go on or pause.
    Answering,
    /// The SFU counts as silent now, or does so no more.
    Silent(bool),
}

#[derive(Debug)]
pub(super) struct SfuHealth {
    /// Between two questions for all rooms; `None` switches probes and questions off.
    interval: Option<u64>,
    needed: bool,
    probing: Option<Time>,
    last_probe: Option<Time>,
    probe_at: Option<Time>,
    /// Since when no probe and no call got through.
    trouble_since: Option<Time>,
    list_at: Option<Time>,
    last_list: Option<Time>,
    /// The least distance between two questions for all rooms that trouble leads to. It grows while they bring nothing new.
    list_gap: u64,
    started: Time,
    last_answer: Option<Time>,
    unanswered: bool,
    last_trouble: Option<Time>,
    silent: bool,
    warn_at: Option<Time>,
    told_answering: bool,
    told_silent: bool,
    /// For how long the SFU had been answering, until then.
    answered: (u64, Time),
}

impl SfuHealth {
    /// An SFU of which nothing is known.
    pub(super) const fn new(interval: Option<u64>, now: Time) -> Self {
        Self {
            interval,
            needed: false,
            probing: None,
            last_probe: None,
            probe_at: None,
            trouble_since: None,
            list_at: None,
            last_list: None,
            list_gap: PROBE_INTERVAL_MS,
            started: now,
            last_answer: None,
            unanswered: false,
            last_trouble: None,
            silent: false,
            warn_at: None,
            told_answering: true,
            told_silent: false,
            answered: (0, now),
        }
    }

    /// Whether rooms are watched at all.
    pub(super) const fn is_on(&self) -> bool {
        self.interval.is_some()
    }

    /// When a call last failed at the connection.
    pub(super) const fn last_trouble(&self) -> Option<Time> {
        self.last_trouble
    }

    /// Whether the last question was answered.
    pub(super) const fn is_answering(&self) -> bool {
        self.told_answering
    }

    /// For how many milliseconds the SFU has been answering, in all.
    pub(super) const fn answering_ms(&self, now: Time) -> u64 {
        let (answered, since) = self.answered;
        if self.told_answering {
            answered + now.since(since)
        } else {
            answered
        }
    }

    /// Whether anybody is thought to be on the SFU.
    pub(super) fn need(&mut self, needed: bool, now: Time) {
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
            self.trouble_since = None;
        }
    }

    /// All rooms are to be asked for as soon as the SFU answers: it may have gone down together with this process.
    pub(super) fn list_soon(&mut self, now: Time) {
        let soon = now.after(TOGETHER_MS);
        self.list_at = Some(self.list_at.map_or(soon, |at| at.min(soon)));
    }

    /// A room was missing: the next trouble is worth a question again.
    pub(super) const fn rooms_were_lost(&mut self) {
        self.list_gap = PROBE_INTERVAL_MS;
    }

    /// A call other than the probe has ended.
    pub(super) fn on_call(&mut self, reach: Reach, now: Time) {
        match reach {
            Reach::Answered => self.on_answer(now),
            Reach::TimedOut => {
                // Some questions have little time. One of them says nothing of an SFU that has just answered another.
                if self.last_answer.is_none_or(|last| now.since(last) > 2 * PROBE_INTERVAL_MS) {
                    self.unanswered = true;
                }
                if self.needed && self.probing.is_none() {
                    self.probe_at = Some(now);
                }
            }
            Reach::Unreachable => self.in_trouble(now),
        }
    }

    pub(super) fn on_probe(&mut self, reach: Reach, now: Time) {
        let asked = self.probing.take().unwrap_or(now);
        let pause = match reach {
            Reach::Answered => {
                self.on_answer(now);
                PROBE_INTERVAL_MS
            }
            Reach::TimedOut | Reach::Unreachable => {
                self.in_trouble(now);
                let fast = self.trouble_since.is_none_or(|since| now.since(since) < FAST_PROBES_FOR_MS);
                if fast { FAST_PROBE_INTERVAL_MS } else { PROBE_INTERVAL_MS }
            }
        };
        if self.needed {
            self.probe_at = Some(asked.after(pause).max(now));
        }
    }

    pub(super) fn on_closed(&mut self, now: Time) {
        self.in_trouble(now);
    }

    /// A verified webhook came: the SFU lives, but that is no answer to a question.
    pub(super) const fn on_webhook(&mut self, now: Time) {
        self.last_answer = Some(now);
        self.silent = false;
    }

    /// Rests while no participant is kept in mind: no answer is waited for.
    pub(super) const fn rest(&mut self) {
        (self.unanswered, self.silent) = (false, false);
    }

    fn on_answer(&mut self, now: Time) {
        self.last_answer = Some(now);
        self.unanswered = false;
        self.silent = false;
        if self.trouble_since.take().is_some()
            && let Some(interval) = self.interval
        {
            // Once per trouble; a front with a dead backend is in trouble again and again, and soon as often as the interval says.
            let at = self.last_list.map_or(now, |last| last.after(self.list_gap).max(now));
            self.list_at = Some(self.list_at.map_or(at, |planned| planned.min(at)));
            self.list_gap = (self.list_gap * 4).min(interval.max(PROBE_INTERVAL_MS));
        }
    }

    fn in_trouble(&mut self, now: Time) {
        self.unanswered = true;
        self.last_trouble = Some(now);
        if self.needed && self.trouble_since.is_none() {
            self.trouble_since = Some(now);
            if self.probing.is_none() {
                // A front that closes after each answer must not be asked as fast as it answers.
                self.probe_at = Some(self.last_probe.map_or(now, |last| last.after(FAST_PROBE_INTERVAL_MS).max(now)));
            }
        }
    }

    pub(super) fn settle(&mut self, now: Time, due: &mut Vec<Due>) {
        if self.silent_at().is_some_and(|at| at <= now) && !self.silent {
            self.silent = true;
            self.warn_at = Some(now);
        }
        if !self.silent {
            self.warn_at = None;
        } else if self.warn_at.is_some_and(|at| at <= now) {
            self.warn_at = Some(now.after(WARN_EVERY_MS));
            due.push(Due::Warn(now.since(self.last_answer.unwrap_or(self.started))));
        }
        if self.told_answering == self.unanswered {
            self.answered = (self.answering_ms(now), now);
            self.told_answering = !self.unanswered;
            due.push(Due::Answering);
        }
        if self.told_silent != self.silent {
            self.told_silent = self.silent;
            due.push(Due::Silent(self.silent));
        }
        if self.probing.is_none() && self.probe_at.is_some_and(|at| at <= now) {
            self.probe_at = None;
            self.probing = Some(now);
            self.last_probe = Some(now);
            due.push(Due::Probe);
        }
        if let Some(interval) = self.interval
            && self.next_list().is_some_and(|at| at <= now)
        {
            // An interval without trouble: the next one is worth a question at once.
            if self.last_trouble.is_none_or(|trouble| now.since(trouble) > interval) {
                self.list_gap = PROBE_INTERVAL_MS;
            }
            self.list_at = Some(now.after(interval));
            self.last_list = Some(now);
            due.push(Due::ListRooms);
        }
    }

    pub(super) fn next_deadline(&self) -> Option<Time> {
        let probe = self.probe_at.filter(|_| self.probing.is_none());
        let silent = if self.silent { None } else { self.silent_at() };
        [probe, self.next_list(), silent, self.warn_at].into_iter().flatten().min()
    }

    fn next_list(&self) -> Option<Time> {
        self.list_at
            .filter(|_| self.needed && self.trouble_since.is_none() && self.interval.is_some())
    }

    /// A quiet SFU is not a silent one: a question must have gone unanswered.
    fn silent_at(&self) -> Option<Time> {
        let at = self
            .last_answer
            .map_or_else(|| self.started.after(NEVER_HEARD_FOR_MS), |last| last.after(SILENT_AFTER_MS));
        self.unanswered.then_some(at)
    }
}

#[cfg(test)]
mod tests;
