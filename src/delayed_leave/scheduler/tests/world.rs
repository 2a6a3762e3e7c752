//! Homeservers and leaves around the scheduler, in virtual time: jobs are restarted as L4 says.

use super::*;

/// A homeserver answers a call with an outcome after so many milliseconds, or never.
pub(super) trait Answers: FnMut(Time, usize, DelayedEventAction) -> Option<(Outcome, u64)> {}

impl<F: FnMut(Time, usize, DelayedEventAction) -> Option<(Outcome, u64)>> Answers for F {}

/// A homeserver that lets so many calls a second through after a burst. As Synapse does, it answers a refusal half a second later,
/// and says in whole seconds when to come back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    pub(super) per_second: f64,
    pub(super) burst: f64,
    pub(super) whole_seconds: bool,
}

impl Bucket {
    pub(super) const fn synapse() -> Self {
        Self {
            per_second: 1.0,
            burst: 5.0,
            whole_seconds: true,
        }
    }

    fn answers(self) -> impl Answers + 'static {
        let (mut tokens, mut filled) = (self.burst, at(0));
        move |now: Time, _: usize, _: DelayedEventAction| {
            tokens = (tokens + now.since(filled) as f64 / 1_000.0 * self.per_second).min(self.burst);
            filled = now;
            if tokens >= 1.0 {
                tokens -= 1.0;
                return Some((Outcome::Done, 10));
            }
            let exact = ((1.0 - tokens) / self.per_second * 1_000.0).ceil() as u64;
            let hint = if self.whole_seconds { exact.div_ceil(1_000) * 1_000 } else { exact };
            Some((Outcome::Limited(Some(Duration::from_millis(hint))), 500))
        }
    }
}

pub(super) trait IntoAnswers {
    fn into_answers(self) -> Box<dyn Answers>;
}

impl IntoAnswers for Bucket {
    fn into_answers(self) -> Box<dyn Answers> {
        Box::new(self.answers())
    }
}

impl<F: FnMut(Time, usize, DelayedEventAction) -> Option<(Outcome, u64)> + 'static> IntoAnswers for F {
    fn into_answers(self) -> Box<dyn Answers> {
        Box::new(self)
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) homeserver: usize,
    pub(super) delay: u64,
    /// 0: a user of its own.
    pub(super) user: u64,
    pub(super) seen: bool,
    /// Whether all that it wants is to be sent.
    pub(super) leaves: bool,
    /// Whether its loss is no loss.
    pub(super) attacks: bool,
    /// When it leaves (a send); or when it is over, where it was never seen.
    pub(super) until: Option<Time>,
}

impl Job {
    pub(super) const fn present(homeserver: usize, delay: u64) -> Self {
        Self {
            homeserver,
            delay,
            user: 0,
            seen: true,
            leaves: false,
            attacks: false,
            until: None,
        }
    }
}

#[derive(Debug)]
struct Running {
    job: Job,
    /// When the last restart that was granted was sent.
    granted: Time,
    due: Time,
    /// What is enqueued.
    pending: Option<PendingCall>,
    failures: u8,
    ended: bool,
    lost: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Event {
    Begins,
    Due,
    Leaves,
    /// A call, by its number, is given up waiting for, or is answered.
    GivenUp(usize),
    Answered(usize),
}

#[derive(Clone, Copy)]
struct Made {
    job: usize,
    sent: Time,
    action: DelayedEventAction,
    outcome: Option<Outcome>,
    waiting: bool,
}

pub(super) struct World {
    pub(super) scheduler: CallScheduler,
    homeservers: Vec<(Box<dyn Answers>, HomeserverId, bool)>,
    jobs: Vec<Running>,
    by_leave: BTreeMap<LeaveId, usize>,
    made: Vec<Made>,
    events: BTreeMap<(Time, usize, usize), Event>,
    jitter: Jitter,
    count: usize,
    pub(super) overloads: Vec<(u64, usize)>,
    pub(super) sent: usize,
    pub(super) last_sent: Time,
    pub(super) calls: usize,
    pub(super) refused: usize,
    pub(super) most_strangers: u32,
    /// The least time that a restart of those who stay left unused.
    pub(super) least: u64,
}

impl World {
    pub(super) fn new() -> Self {
        Self {
            scheduler: CallScheduler::new(Concurrency::default()),
            homeservers: Vec::new(),
            jobs: Vec::new(),
            by_leave: BTreeMap::new(),
            made: Vec::new(),
            events: BTreeMap::new(),
            jitter: Jitter::new(7),
            count: 0,
            overloads: Vec::new(),
            sent: 0,
            last_sent: at(0),
            calls: 0,
            refused: 0,
            most_strangers: 0,
            least: u64::MAX,
        }
    }

    pub(super) fn homeserver(&mut self, listed: bool, answers: impl IntoAnswers) -> usize {
        let n = self.homeservers.len();
        let id = self.scheduler.enter(&format!("hs{n}"), listed);
        self.homeservers.push((answers.into_answers(), id, listed));
        n
    }

    pub(super) fn job(&mut self, begins: Time, job: Job) {
        let n = self.jobs.len();
        self.by_leave.insert(leave(n as u32), n);
        self.jobs.push(Running {
            job,
            granted: begins,
            due: begins,
            pending: None,
            failures: 0,
            ended: false,
            lost: false,
        });
        self.at(begins, n, Event::Begins);
        if let Some(until) = job.until {
            self.at(until, n, Event::Leaves);
        }
    }

    /// Who stays and was reported gone.
    pub(super) fn lost(&self) -> Vec<usize> {
        (0..self.jobs.len())
            .filter(|&n| self.jobs[n].lost && !self.jobs[n].job.attacks)
            .collect()
    }

    fn at(&mut self, time: Time, job: usize, event: Event) {
        self.count += 1;
        self.events.insert((time, self.count, job), event);
    }

    fn want(&mut self, n: usize, now: Time) {
        let running = &mut self.jobs[n];
        if running.ended || running.pending.is_some() {
            return;
        }
        let job = running.job;
        let deadline = if job.leaves {
            now.after(30_000)
        } else {
            running.granted.after(job.delay)
        };
        let call = PendingCall {
            action: if job.leaves {
                DelayedEventAction::Send
            } else {
                DelayedEventAction::Restart
            },
            deadline,
            relaxed: if job.leaves {
                deadline
            } else {
                running.granted.after(job.delay * 4 / 5)
            },
            delay_ms: job.delay as u32,
            user: if job.user == 0 { 1_000 + n as u64 } else { job.user },
            seen: job.seen,
        };
        running.pending = Some(call);
        self.scheduler
            .enqueue(self.homeservers[job.homeserver].1, leave(n as u32), call, now);
    }

    fn drop_pending(&mut self, n: usize, now: Time) {
        if let Some(call) = self.jobs[n].pending.take() {
            let id = self.homeservers[self.jobs[n].job.homeserver].1;
            self.scheduler.dequeue(id, leave(n as u32), call.deadline, now);
        }
    }

    fn call(&mut self, permit: Permit, now: Time) {
        let n = self.by_leave[&permit.leave];
        let call = self.jobs[n].pending.take().expect("a permit is for what is enqueued");
        self.calls += 1;
        let job = self.jobs[n].job;
        let (homeserver, id, _) = &mut self.homeservers[job.homeserver];
        let answer = homeserver(now, n, call.action);
        let left = call.deadline.since(now);
        let timeout = if job.leaves {
            10_000
        } else {
            timeout_ms(left, self.scheduler.usual_ms(*id))
        };
        let number = self.made.len();
        self.made.push(Made {
            job: n,
            sent: now,
            action: call.action,
            outcome: answer.map(|(outcome, _)| outcome),
            waiting: true,
        });
        self.at(now.after(u64::from(timeout)), n, Event::GivenUp(number));
        if let Some((_, millis)) = answer {
            self.at(now.after(millis), n, Event::Answered(number));
        }
    }

    fn on_end(&mut self, number: usize, answered: bool, now: Time) {
        let made = self.made[number];
        let job = self.jobs[made.job].job;
        let id = self.homeservers[job.homeserver].1;
        let outcome = made.outcome.filter(|_| answered).unwrap_or(Outcome::Transient(None));
        if made.waiting {
            self.made[number].waiting = false;
            self.scheduler.on_result(id, made.sent, outcome, now, &mut self.jitter);
            self.refused += usize::from(matches!(outcome, Outcome::Limited(_)));
        } else if outcome != Outcome::Done {
            return;
        }
        let running = &mut self.jobs[made.job];
        if running.ended || (made.action == DelayedEventAction::Send) != job.leaves {
            return;
        }
        let left = running.granted.after(job.delay).since(now);
        if outcome == Outcome::Done {
            running.failures = 0;
            self.drop_pending(made.job, now);
            let running = &mut self.jobs[made.job];
            if job.leaves {
                running.ended = true;
                self.sent += 1;
                self.last_sent = now;
                return;
            }
            if !job.attacks {
                self.least = self.least.min(running.granted.after(job.delay).since(made.sent));
            }
            running.granted = running.granted.max(made.sent);
            let due = running.granted.after((job.delay / 2).max(250)).max(now);
            running.due = due;
            self.at(due, made.job, Event::Due);
            return;
        }
        running.failures = running.failures.saturating_add(1);
        let pause = match outcome {
            Outcome::Limited(_) => 250,
            Outcome::Transient(Some(hint)) => backoff::as_millis(hint).min(left / 3).clamp(250, 60_000),
            Outcome::Done | Outcome::NotFound | Outcome::Conflict | Outcome::Forbidden | Outcome::Transient(None) => {
                Schedule::RESTART.pause(running.failures, &mut self.jitter).min(left / 3).max(250)
            }
        };
        running.due = now.after(pause);
        let due = running.due;
        self.at(due, made.job, Event::Due);
    }

    pub(super) fn run(&mut self, until: Time) {
        let mut expiries: BTreeSet<(Time, usize)> = BTreeSet::new();
        let mut now = at(0);
        loop {
            let next = [
                self.events.first_key_value().map(|((time, _, _), _)| *time),
                self.scheduler.next_deadline(),
                expiries.first().map(|(time, _)| *time),
            ];
            let Some(next) = next.into_iter().flatten().min().filter(|next| *next <= until) else {
                return;
            };
            now = now.max(next);
            while let Some(entry) = self.events.first_entry().filter(|entry| entry.key().0 <= now) {
                let ((_, _, n), event) = entry.remove_entry();
                match event {
                    Event::Begins => {
                        let (_, id, listed) = self.homeservers[self.jobs[n].job.homeserver];
                        let name = self.scheduler.name(id).expect("it is kept").to_string();
                        self.scheduler.enter(&name, listed);
                        expiries.insert((now.after(self.jobs[n].job.delay), n));
                        self.want(n, now);
                    }
                    Event::Due => {
                        let running = &self.jobs[n];
                        if now >= running.due {
                            self.want(n, now);
                        }
                    }
                    Event::Leaves => {
                        self.drop_pending(n, now);
                        if self.jobs[n].job.seen {
                            self.jobs[n].job.leaves = true;
                            self.want(n, now);
                        } else {
                            self.jobs[n].ended = true;
                        }
                    }
                    Event::GivenUp(number) => {
                        if self.made[number].waiting {
                            self.on_end(number, false, now);
                        }
                    }
                    Event::Answered(number) => self.on_end(number, true, now),
                }
            }
            while let Some((expiry, n)) = expiries.first().copied().filter(|(expiry, _)| *expiry <= now) {
                expiries.remove(&(expiry, n));
                let running = &mut self.jobs[n];
                let expiry = running.granted.after(running.job.delay);
                if running.ended || running.job.leaves {
                } else if expiry > now {
                    expiries.insert((expiry, n));
                } else {
                    running.ended = true;
                    running.lost = true;
                    self.drop_pending(n, now);
                }
            }
            while let Some(permit) = self.scheduler.next_permit(now) {
                self.call(permit, now);
            }
            let [_, strangers, _, others] = self.scheduler.in_flight;
            self.most_strangers = self.most_strangers.max(strangers + others);
            while let Some(overload) = self.scheduler.overload(now) {
                self.overloads.push((now.since(at(0)), overload.leaves));
            }
            let next = self.scheduler.next_deadline();
            assert!(
                next.is_none_or(|next| next > now),
                "something was due at {next:?} and not granted at {now:?}"
            );
        }
    }
}
