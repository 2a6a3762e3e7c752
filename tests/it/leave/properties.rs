//! The promises of L1, pinned over random sequences of inputs: first one machine and any facts at all, then a whole world.

use super::world::{Fate, World};
use lk_jwt_service::backoff::Jitter;
use lk_jwt_service::delayed_leave::jobs::{Call, Config, Fact, Webhook, WebhookKind};
use lk_jwt_service::delayed_leave::machine::{
    Action, Answer, Event, Input, LeaveReason, Machine, Outcome, Participant, Sfu, State, Verdict, Wish,
};
use lk_jwt_service::delayed_leave::machine::{Cause, Reason};
use lk_jwt_service::time::{Delay, Time};
use proptest::prelude::*;
use std::time::Duration;

fn cases(count: u32) -> ProptestConfig {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok())
        .unwrap_or(count);
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Wait(u64),
    Joined(u8, u8),
    Left(u8, u8, LeaveReason, u16),
    Aborted(u8, LeaveReason),
    Answer(u8, u8),
    Listed(u8),
    Ask,
    Turn,
    Called(u8),
    Room(u8),
    Sfu(u8),
    Renewed,
    Replaced,
    Stopping,
}

fn reason() -> impl Strategy<Value = LeaveReason> {
    (0u8..16).prop_map(|n| LeaveReason::parse(&n.to_string()))
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0u64..4_000).prop_map(Op::Wait),
        2 => (4_000u64..100_000).prop_map(Op::Wait),
        2 => (0u8..4, 0u8..8).prop_map(|(sid, id)| Op::Joined(sid, id)),
        2 => (0u8..4, 0u8..8, reason(), 0u16..8_000).prop_map(|(sid, id, reason, late)| Op::Left(sid, id, reason, late)),
        1 => (0u8..4, reason()).prop_map(|(sid, reason)| Op::Aborted(sid, reason)),
        6 => (0u8..4, 0u8..4).prop_map(|(kind, sid)| Op::Answer(kind, sid)),
        1 => (0u8..4).prop_map(Op::Listed),
        1 => Just(Op::Ask),
        8 => Just(Op::Turn),
        6 => (0u8..8).prop_map(Op::Called),
        2 => (0u8..3).prop_map(Op::Room),
        1 => (0u8..3).prop_map(Op::Sfu),
        1 => Just(Op::Renewed),
        (1) => Just(Op::Stopping),
        (1) => prop_oneof![9 => Just(Op::Ask), 1 => Just(Op::Replaced)],
    ]
}

const SIDS: [&str; 4] = ["PA_a", "PA_b", "PA_c", "PA_d"];

/// One machine, and what must hold of it whatever it is told.
struct Watched {
    machine: Machine,
    jitter: Jitter,
    now: Time,
    finished: bool,
    restarting: bool,
    last_restart: Option<Time>,
    sending: Option<Call>,
    leaving_since: Option<(Time, Time)>,
    asked: Vec<Time>,
}

impl Watched {
    fn step(&mut self, input: Input<'_>) {
        let deadline = self.machine.deadline();
        let was_leaving = matches!(self.machine.state(), State::Leaving { .. });
        let actions = self.machine.step(input, self.now, &mut self.jitter);
        assert!(!self.finished || actions.is_empty(), "{actions:?} after the end");
        for action in actions {
            assert!(!self.finished, "{action:?} after the end");
            match action {
                Action::LookUp { .. } => self.asked.push(self.now),
                Action::Restart => {
                    assert!(!self.restarting, "two restarts in flight");
                    assert!(
                        self.last_restart.is_none_or(|last| self.now.since(last) >= 250),
                        "restarted too soon"
                    );
                    assert!(self.now < deadline, "a restart after the event has run out");
                    self.restarting = true;
                    self.last_restart = Some(self.now);
                }
                Action::Send | Action::Cancel => {
                    let call = if action == Action::Send { Call::Send } else { Call::Cancel };
                    assert_ne!(self.sending, Some(call), "two calls in flight");
                    self.sending = Some(call);
                    if let Some((_, until)) = self.leaving_since {
                        assert!(self.now <= until, "tried after the window");
                    }
                }
                Action::Finish(_) => self.finished = true,
                Action::JudgeRoom | Action::Persist => {}
            }
        }
        match self.machine.state() {
            State::Leaving { until, errand, .. } if !was_leaving => {
                if matches!(errand, lk_jwt_service::delayed_leave::machine::Errand::Send { .. }) {
                    let least = deadline.clamp(self.now.after(30_000), self.now.after(3_600_000));
                    assert!(*until <= least.max(self.machine.deadline()).min(self.now.after(3_600_000)));
                }
                self.leaving_since = Some((self.now, *until));
            }
            State::Leaving { until, .. } => self.leaving_since = Some((self.now, *until)),
            State::Waiting | State::Connected | State::Doubted { .. } | State::Finished(_) => self.leaving_since = None,
        }
    }

    fn wait(&mut self, millis: u64) {
        let until = self.now.after(millis);
        let mut steps = 0;
        while let Some(at) = self.machine.next_deadline().filter(|&at| at <= until) {
            self.now = self.now.max(at);
            self.step(Input::Time);
            assert!(
                self.machine.next_deadline().is_none_or(|next| next > self.now),
                "no progress in {:?}",
                self.machine
            );
            steps += 1;
            assert!(steps < 100_000);
        }
        self.now = until;
    }

    fn run(&mut self, op: Op) {
        let participant = |sid: u8| Participant {
            sid: SIDS[usize::from(sid)],
            joined_at_ms: u64::from(sid) * 1_000,
            active: sid.is_multiple_of(2),
        };
        let event = |now: Time, sid: u8, id: u8, late: u16| Event {
            id: (id > 0).then_some(u64::from(id)),
            sid: SIDS[usize::from(sid)],
            joined_at_ms: u64::from(sid) * 1_000,
            happened: now.before(u64::from(late)),
            room_sid: None,
        };
        match op {
            Op::Wait(millis) => self.wait(millis),
            Op::Joined(sid, id) => self.step(Input::Joined(event(self.now, sid, id, 0))),
            Op::Left(sid, id, reason, late) => self.step(Input::Left(event(self.now, sid, id, late), reason)),
            Op::Aborted(sid, reason) => self.step(Input::Aborted(event(self.now, sid, 0, 0), reason)),
            Op::Answer(kind, sid) => {
                if let Some(asked) = self.asked.pop() {
                    let answer = match kind {
                        0 => Answer::Present(participant(sid)),
                        1 => Answer::Unclear,
                        _ => Answer::Absent,
                    };
                    self.step(Input::LookedUp {
                        asked,
                        answer,
                        room_sid: None,
                    });
                }
            }
            Op::Listed(sid) => self.step(Input::Listed {
                asked: self.now,
                participant: participant(sid),
                room_sid: None,
            }),
            Op::Ask => self.step(Input::Ask),
            Op::Turn => {
                if self.machine.wish().is_some() {
                    self.step(Input::Turn);
                    assert!(!self.finished || self.machine.wish().is_none());
                }
            }
            Op::Called(kind) => {
                let outcome = [
                    Outcome::Done,
                    Outcome::Done,
                    Outcome::NotFound,
                    Outcome::Limited(None),
                    Outcome::Transient(None),
                    Outcome::Transient(Some(Duration::ZERO)),
                    Outcome::Transient(Some(Duration::MAX)),
                    Outcome::Transient(Some(Duration::from_secs(3))),
                ][usize::from(kind)];
                if let Some(call) = self.sending.take() {
                    self.step(if call == Call::Send {
                        Input::Sent(outcome)
                    } else {
                        Input::Cancelled(outcome)
                    });
                } else if self.restarting {
                    self.restarting = false;
                    self.step(Input::Restarted(outcome));
                }
            }
            Op::Room(kind) => {
                let verdict = [Verdict::Stands, Verdict::Ended, Verdict::Lost][usize::from(kind)];
                self.step(Input::Room { asked: self.now, verdict });
            }
            Op::Sfu(kind) => self.step(Input::Sfu([Sfu::Answering, Sfu::Failing, Sfu::Silent][usize::from(kind)])),
            Op::Renewed => self.step(Input::Renewed {
                delay: self.machine.delay(),
                arrived: self.now,
            }),
            Op::Replaced => {
                self.sending = None;
                self.step(Input::Replaced);
            }
            Op::Stopping => self.step(Input::Stopping),
        }
    }
}

proptest! {
    #![proptest_config(cases(1_000))]

    #[test]
    fn a_machine_keeps_its_bounds_whatever_it_is_told(
        delay in prop_oneof![1u64..2_000, 2_000u64..60_000, 60_000u64..=86_400_000],
        seed: u64,
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let machine = Machine::new(Delay::from_millis(delay).unwrap(), Time::START, Sfu::Answering);
        let mut watched = Watched {
            machine, jitter: Jitter::new(seed), now: Time::START, finished: false, restarting: false, last_restart: None,
            sending: None, leaving_since: None, asked: Vec::new(),
        };
        watched.step(Input::Time);
        for op in ops {
            watched.run(op);
            if let Some(Wish::Restart { until, relaxed }) = watched.machine.wish() {
                prop_assert!(relaxed <= until);
            }
        }
    }

    #[test]
    fn nobody_waits_for_ever(
        delay in 1u64..86_400_000,
        ops in prop::collection::vec(op(), 0..60),
    ) {
        // The homeserver and the SFU fall silent: the job ends by itself, at most one delay and an hour later.
        let machine = Machine::new(Delay::from_millis(delay).unwrap(), Time::START, Sfu::Answering);
        let mut watched = Watched {
            machine, jitter: Jitter::new(1), now: Time::START, finished: false, restarting: false, last_restart: None,
            sending: None, leaving_since: None, asked: Vec::new(),
        };
        watched.step(Input::Time);
        for op in ops {
            watched.run(op);
        }
        let end = watched.now.after(delay + 3_600_000 + 10_000);
        while !watched.finished && watched.now < end {
            watched.wait(1_000.max(delay / 50));
            watched.run(Op::Turn);
            watched.run(Op::Called(4));
            watched.run(Op::Called(4));
        }
        prop_assert!(watched.finished, "{:?}", watched.machine);
    }
}

/// What may happen in the world between two looks at it.
#[derive(Clone, Copy, Debug)]
enum Happening {
    Wait(u64),
    Delegate(u8, u8),
    Join(u8, bool),
    Part(u8, LeaveReason, bool),
    SfuDown,
    SfuUp,
    Lossy(bool),
    Stale(u8),
    RoomForgotten,
    WebhookAgain(u8),
    HomeserverAway(u64),
    SfuHangs(u64),
    Crash(u64),
    Webhooks(u64, bool),
}

fn happening() -> impl Strategy<Value = Happening> {
    prop_oneof![
        6 => (1u64..5_000).prop_map(Happening::Wait),
        3 => (5_000u64..70_000).prop_map(Happening::Wait),
        3 => (0u8..3, 0u8..4).prop_map(|(who, event)| Happening::Delegate(who, event)),
        4 => (0u8..3, any::<bool>()).prop_map(|(who, told)| Happening::Join(who, told)),
        3 => (0u8..3, reason(), any::<bool>()).prop_map(|(who, reason, told)| Happening::Part(who, reason, told)),
        1 => any::<bool>().prop_map(Happening::Lossy),
        1 => (0u8..3).prop_map(Happening::Stale),
        1 => (0u8..3).prop_map(Happening::WebhookAgain),
        1 => (500u64..6_000).prop_map(Happening::HomeserverAway),
        1 => (500u64..9_000).prop_map(Happening::SfuHangs),
        1 => (0u64..4_000).prop_map(Happening::Crash),
        1 => (prop_oneof![Just(0u64), 1u64..25_000], any::<bool>()).prop_map(|(delay, twice)| Happening::Webhooks(delay, twice)),
        1 => Just(Happening::SfuDown),
        2 => Just(Happening::SfuUp),
        1 => Just(Happening::RoomForgotten),
    ]
}

const DELAY: u64 = 18_000;

struct Story {
    world: World,
    lossy: bool,
    /// Since when somebody is there or not; how long an SFU outage may excuse it.
    present_since: [Option<Time>; 3],
    events: [Vec<String>; 3],
    old_sids: [Option<(String, u64)>; 3],
}

impl Story {
    fn happen(&mut self, happening: Happening) {
        let name = |who: u8| format!("user{who}");
        match happening {
            Happening::Wait(millis) => self.wait(millis),
            Happening::Delegate(who, event) => {
                // Once in a while the same event again; an old one is never handed over again.
                let events = &self.events[usize::from(who)];
                let again = events.last().filter(|_| event == 0).cloned();
                let delay_id = again.unwrap_or_else(|| format!("{who}-{}", events.len()));
                // A homeserver does not give out an id twice.
                if self
                    .world
                    .events
                    .get(&delay_id)
                    .is_none_or(|(fate, _)| matches!(fate, Fate::Scheduled { .. }))
                    && self.world.delegate("room", &name(who), &delay_id, DELAY).is_ok()
                {
                    self.events[usize::from(who)].push(delay_id);
                }
            }
            Happening::Join(who, told) => {
                if self.world.sfu_up {
                    self.world.open("room");
                    if let Some(old) = self.world.rooms["room"].guests.get(&name(who)) {
                        self.old_sids[usize::from(who)] = Some((old.sid.clone(), old.joined_at_ms));
                    }
                    self.world.advance(1);
                    self.world.join("room", &name(who), told);
                    self.present_since[usize::from(who)].get_or_insert(self.world.now);
                }
            }
            Happening::Part(who, reason, told) => {
                if self.world.sfu_up {
                    self.world.part("room", &name(who), reason, told);
                    self.present_since[usize::from(who)] = None;
                }
            }
            Happening::SfuDown => {
                self.world.kill_sfu();
                self.present_since = [None; 3];
            }
            Happening::Webhooks(delay, twice) => {
                self.world.webhook_delay = delay;
                self.world.webhooks_twice = twice;
            }
            Happening::Crash(down_for) => {
                self.lossy = true;
                self.world.crash(down_for);
                self.wait(DELAY / 2);
            }
            Happening::SfuUp => self.world.sfu_up = true,
            Happening::HomeserverAway(millis) => {
                self.lossy = true;
                self.world.homeserver_down = true;
                self.wait(millis);
                self.world.homeserver_down = false;
                // Two outages in a row are one of twice the length: a delay carries one.
                self.wait(DELAY / 2);
            }
            Happening::SfuHangs(millis) => {
                self.lossy = true;
                self.world.sfu_hangs = true;
                self.wait(millis);
                self.world.sfu_hangs = false;
            }
            Happening::Lossy(lossy) => {
                self.lossy |= lossy;
                self.world.lossy = lossy.then_some(3);
            }
            Happening::Stale(who) => {
                if let Some((sid, joined)) = self.old_sids[usize::from(who)].clone() {
                    self.world
                        .tell(WebhookKind::Left(LeaveReason::DuplicateIdentity), "room", &name(who), &sid, joined);
                }
            }
            Happening::RoomForgotten => {
                self.world.rooms.clear();
                self.present_since = [None; 3];
            }
            Happening::WebhookAgain(who) => {
                if let Some(guest) = self.world.rooms.get("room").and_then(|room| room.guests.get(&name(who)).cloned()) {
                    self.world
                        .tell(WebhookKind::Joined, "room", &name(who), &guest.sid, guest.joined_at_ms);
                }
            }
        }
        self.check();
    }

    fn wait(&mut self, millis: u64) {
        let until = self.world.now.after(millis);
        while self.world.now < until {
            let next = self.world.now.after(200).min(until);
            self.world.advance_to(next);
            self.check();
        }
    }

    /// Whoever comes unannounced in the last moments of a wait may be missed, the more so when answers get lost.
    fn tolerance(&self) -> u64 {
        if self.lossy { 20_000 } else { 1_000 }
    }

    /// Nobody who is there is reported gone: not by us, and not by the homeserver's timer while we hold the event.
    fn check(&self) {
        for (who, since) in self.present_since.iter().enumerate() {
            let Some(since) = since else { continue };
            let Some(delay_id) = self.events[who].last() else { continue };
            if let Fate::Sent(at) | Fate::Fired(at) = self.world.fate(delay_id) {
                let reason = self
                    .world
                    .finished
                    .iter()
                    .rfind(|(_, _, id, _)| id == delay_id)
                    .map(|(_, _, _, reason)| *reason);
                let tolerance = match reason {
                    // An arrival at the very end of a wait may be missed, or come too late for a restart.
                    Some(Reason::Sent(Cause::NeverCame) | Reason::NotSent(Cause::NeverCame) | Reason::NeverCame)
                    | Some(Reason::GivenUp | Reason::EventGone)
                    | None => self.tolerance(),
                    // Where no answer comes, the SFU's own report is believed (L2a).
                    Some(Reason::Sent(Cause::Reported)) if self.lossy => 28_000,
                    Some(_) => 50,
                };
                assert!(
                    at <= since.after(tolerance),
                    "user{who} is there since {since:?}, {delay_id} was sent at {at:?}: {:?}",
                    self.world.finished
                );
            }
        }
    }
}

fn story(seed: u64, config: Config) -> Story {
    let mut world = World::new(config, seed);
    world.homeserver_latency = 10;
    Story {
        lossy: false,
        world,
        present_since: [None; 3],
        events: Default::default(),
        old_sids: Default::default(),
    }
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn nobody_present_is_reported_gone_and_nobody_gone_stays(
        seed: u64,
        disasters: bool,
        happenings in prop::collection::vec(happening(), 1..60),
    ) {
        let mut story = story(seed, Config::default());
        for happening in happenings {
            if disasters || !matches!(happening, Happening::SfuDown | Happening::RoomForgotten) {
                story.happen(happening);
            }
        }
        // Peace: whoever is there stays, whoever is not is reported.
        story.world.sfu_up = true;
        story.world.lossy = None;
        story.wait(200_000);
        for who in 0..3 {
            let Some(delay_id) = story.events[who].last() else { continue };
            let there = story.world.rooms.get("room").is_some_and(|room| room.guests.contains_key(&format!("user{who}")));
            let fate = story.world.fate(delay_id);
            if there {
                let since = story.present_since[who].unwrap();
                match fate {
                    Fate::Scheduled { .. } => {}
                    // Reported before this session began, or never seen within the delay of its delegation.
                    Fate::Sent(at) | Fate::Fired(at) => prop_assert!(at <= since.after(story.tolerance()), "{delay_id} {fate:?} {since:?} {:?}", story.world.finished),
                    Fate::Cancelled(_) => prop_assert!(false, "the last event was cancelled"),
                }
            } else {
                prop_assert!(!matches!(fate, Fate::Scheduled { .. }), "{delay_id} is still running, {:?}", story.world.jobs.find("room", &format!("user{who}")).map(|id| story.world.jobs.get(id).unwrap().machine().clone()));
            }
            // Every event but the last was cancelled, sent, or has run out: none is left to fire later.
            for old in &story.events[who] {
                if old != delay_id {
                    prop_assert!(!matches!(story.world.fate(old), Fate::Scheduled { .. }), "{old} will fire");
                }
            }
        }
    }

    #[test]
    fn results_of_a_replaced_job_never_touch_its_successor(
        seed: u64,
        outcomes in prop::collection::vec((0u8..3, 0u64..3_000), 1..20),
    ) {
        // All calls to the homeserver are answered late, by whatever: the last delegation's event runs on.
        let mut world = World::new(Config::default(), seed);
        world.open("room");
        world.homeserver_latency = 900;
        world.join("room", "al", true);
        for (n, (_, wait)) in outcomes.iter().enumerate() {
            world.delegate("room", "al", &format!("event{n}"), DELAY).unwrap();
            world.advance(*wait);
        }
        let last = format!("event{}", outcomes.len() - 1);
        for (n, (kind, wait)) in outcomes.iter().enumerate() {
            if n + 1 < outcomes.len() && *kind == 0 {
                // The homeserver forgets an old event: its restart and its cancellation meet a 404.
                world.events.remove(&format!("event{n}"));
            }
            world.advance(*wait);
        }
        world.advance(100_000);
        prop_assert!(matches!(world.fate(&last), Fate::Scheduled { .. }), "{:?} {:?}", world.fate(&last), world.finished);
        prop_assert_eq!(world.jobs.len(), 1);
        for n in 0..outcomes.len() - 1 {
            let id = format!("event{n}");
            if let Some((fate, _)) = world.events.get(&id) {
                prop_assert!(matches!(fate, Fate::Cancelled(_)), "{id}: {fate:?}");
            }
        }
    }

    #[test]
    fn any_webhook_at_all_is_survived(
        webhooks in prop::collection::vec((0u8..7, 0u8..3, 0u8..3, 0u8..3, 0u64..100_000, any::<u64>()), 1..80),
    ) {
        let mut world = World::new(Config::default(), 1);
        world.delegate("room", "al", "leave", DELAY).unwrap();
        for (kind, sid, room_sid, identity, wait, joined_at_ms) in webhooks {
            let reason = LeaveReason::parse(&(wait % 16).to_string());
            let kind = [
                WebhookKind::RoomStarted, WebhookKind::RoomFinished, WebhookKind::Joined, WebhookKind::Left(reason),
                WebhookKind::Aborted(reason), WebhookKind::Track, WebhookKind::Other,
            ][usize::from(kind)];
            let happened = world.now.before(joined_at_ms % 100_000);
            world.fact(Fact::Webhook(Webhook {
                kind, id: "", happened, room: "room", room_sid: ["", "RM_a", "RM_b"][usize::from(room_sid)],
                identity: ["", "al", "bo"][usize::from(identity)], sid: ["", "PA_a", "PA_b"][usize::from(sid)], joined_at_ms,
            }));
            world.advance(wait % 4_000);
        }
    }
}
