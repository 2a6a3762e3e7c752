//! The rules of presence, row by row: facts in, questions and findings out, time moved by hand.

use super::*;
use crate::livekit::DisconnectReason as Reason;
use Output::{Changed, Gone, JoinFailed, Present};
use std::collections::BTreeMap;

/// What the SFU's clock shows when ours begins, in seconds.
const SFU: i64 = 1_000;
const QUICK: u64 = 400;

/// One participant in one room, its answers given by hand.
struct Bench {
    presence: Presence,
    id: ParticipantId,
    now: Time,
    asked: Time,
    digest: u64,
    ahead: i64,
}

/// Outputs that are about the participant: a question by the time it may take, or what was found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Seen {
    Ask(u64),
    Check,
    Create,
    Changed,
    Present,
    Gone(DepartureCause),
    JoinFailed,
}

const ASK: Seen = Seen::Ask(5_000);
const QUICK_ASK: Seen = Seen::Ask(QUICK);

/// The delay of each delegation.
fn hour() -> Delay {
    Delay::from_millis(3_600_000).unwrap()
}

impl Bench {
    fn new() -> Self {
        let now = Time::START;
        let settings = Settings {
            sweep_ms: None,
            ..Settings::default()
        };
        let mut presence = Presence::new(settings, 3, now);
        presence.on_date(SFU, now);
        let id = presence.track("room", "al", now, hour(), now);
        let mut bench = Self {
            presence,
            id,
            now,
            asked: now,
            digest: 0,
            ahead: 0,
        };
        // A first webhook, about somebody else.
        let _ = bench.tell(EventKind::Track, "", 0, 0);
        bench
    }

    /// Somebody is there whom the SFU told of.
    fn present() -> Self {
        let mut bench = Self::new();
        bench.wait(300);
        assert_eq!(bench.joined("a", 1_000), [Seen::Changed, Seen::Present]);
        bench.wait(700);
        bench
    }

    fn state(&self) -> &State {
        self.presence.get(self.id).unwrap().presence()
    }

    fn wait(&mut self, millis: u64) {
        self.now = self.now.after(millis);
        let _ = self.settle();
    }

    fn settle(&mut self) -> Vec<Seen> {
        let mut seen = Vec::new();
        for output in self.presence.settle(self.now) {
            match output {
                Output::Ask(Question::Participant { asked, within, .. }) => {
                    self.asked = asked;
                    seen.push(Seen::Ask(u64::try_from(within.as_millis()).unwrap()));
                }
                Output::Ask(Question::Rooms { .. }) => seen.push(Seen::Check),
                Output::Ask(Question::Probe) => self.presence.on_probed(Reach::Answered, self.now),
                Output::Ask(Question::CreateRoom { .. }) => seen.push(Seen::Create),
                Output::Ask(question @ Question::Participants { .. }) => panic!("{question:?}"),
                Changed(_) => seen.push(Seen::Changed),
                Present(_) => seen.push(Seen::Present),
                Gone(_, evidence) => seen.push(Seen::Gone(evidence.cause)),
                JoinFailed(_) => seen.push(Seen::JoinFailed),
                Output::Silent(_) | Output::SfuSilent(_) | Output::NoWebhooks => {}
            }
        }
        seen
    }

    /// Lets so many milliseconds go by; what was asked and found, and how many milliseconds in.
    fn until(&mut self, millis: u64) -> Vec<(u64, Seen)> {
        let (start, end) = (self.now, self.now.after(millis));
        let mut all = Vec::new();
        while let Some(at) = self.presence.next_deadline().filter(|&at| at <= end) {
            self.now = self.now.max(at);
            let passed = self.now.since(start);
            // The question for all rooms that comes every thirty seconds is not about the participant.
            let is_own = |seen: &Seen| *seen != Seen::Check;
            all.extend(self.settle().into_iter().filter(is_own).map(|seen| (passed, seen)));
        }
        self.now = end;
        all
    }

    fn tell(&mut self, kind: EventKind, sid: &str, joined_at_ms: u64, ago: u64) -> Vec<Seen> {
        self.tell_of("RM", kind, sid, joined_at_ms, ago)
    }

    fn tell_of(&mut self, room_sid: &str, kind: EventKind, sid: &str, joined_at_ms: u64, ago: u64) -> Vec<Seen> {
        self.digest += 1;
        let seconds = SFU + i64::try_from(self.now.before(ago).since(Time::START) / 1_000).unwrap() + self.ahead;
        self.presence.on_event(
            &SfuEvent {
                kind,
                digest: self.digest,
                issued_at: seconds,
                id: "",
                created_at: seconds,
                room: "room",
                room_sid,
                identity: if matches!(kind, EventKind::Track | EventKind::RoomFinished) {
                    ""
                } else {
                    "al"
                },
                sid,
                joined_at_ms,
            },
            self.now,
        );
        self.settle()
    }

    fn joined(&mut self, sid: &str, joined_at_ms: u64) -> Vec<Seen> {
        self.tell(EventKind::Joined, sid, joined_at_ms, 0)
    }

    fn left(&mut self, reason: Reason) -> Vec<Seen> {
        self.tell(EventKind::Left(reason), "a", 1_000, 0)
    }

    fn answer(&mut self, answer: Answer<ParticipantRow<'_>>) -> Vec<Seen> {
        self.now = self.now.after(1);
        self.presence.on_participant(self.id, self.asked, &answer, self.now);
        self.settle()
    }

    fn listed(&mut self, sid: Option<&str>) -> Vec<Seen> {
        let asked = self.now;
        self.now = self.now.after(1);
        let row = sid.map(|sid| RoomRow {
            name: "room",
            sid,
            num_participants: 1,
            departure_timeout: 20,
        });
        let room = self.presence.by_name["room"];
        let rows: Vec<_> = row.into_iter().collect();
        self.presence.on_rooms(&[room], asked, &Answer::Yes(&rows), self.now);
        self.settle()
    }
}

fn yes(sid: &str, joined_at_ms: u64, active: bool) -> Answer<ParticipantRow<'_>> {
    Answer::Yes(ParticipantRow {
        identity: "",
        sid,
        joined_at_ms,
        active,
    })
}

fn reported(bench: &Bench) -> bool {
    matches!(
        bench.state(),
        State::Suspected {
            why: Suspicion::Reported { .. },
            ..
        }
    )
}

#[test]
fn l2_a_repeat_and_a_late_event_of_an_older_session_change_nothing() {
    let mut al = Bench::present();
    assert_eq!(al.joined("b", 2_000), [Seen::Changed, Seen::Present]);
    assert_eq!(al.left(Reason::ClientInitiated), []);
    assert_eq!(al.joined("a", 1_000), []);
    assert_eq!(*al.state(), State::Present);
}

/// A room that is forgotten, whose sid is known no more; the SFU tells of somebody in it minutes later.
#[test]
fn l2_an_event_of_a_former_room_that_nobody_remembers_does_not_take_the_place_of_the_one_that_stands() {
    let mut al = Bench::present();
    al.wait(60_000);
    al.tell(EventKind::Track, "", 0, 0);
    al.tell_of("RM_FORMER", EventKind::Track, "", 0, 40_000);
    al.left(Reason::ClientInitiated);
    assert!(reported(&al), "{:?}", al.state());
    // Whatever happened since is of the room that came after.
    let mut al = Bench::present();
    al.wait(60_000);
    al.tell_of("RM_NEXT", EventKind::Joined, "b", 61_000, 0);
    al.tell_of("RM_NEXT", EventKind::Left(Reason::ClientInitiated), "b", 61_000, 0);
    assert!(reported(&al), "{:?}", al.state());
}

#[test]
fn l2_a_departure_of_a_newer_session_counts_though_its_join_was_never_told() {
    let mut al = Bench::present();
    let kind = EventKind::Left(Reason::ClientInitiated);
    assert_eq!(al.tell(kind, "b", 2_000, 0), [Seen::Changed]);
    assert_eq!(al.until(800), [(800, Seen::Ask(QUICK))]);
}

#[test]
fn l2_reports_from_more_than_two_seconds_before_the_delegation_change_nothing() {
    let mut al = Bench::present();
    al.wait(5_000);
    al.presence.track("room", "al", al.now, hour(), al.now);
    let kind = EventKind::Left(Reason::ClientInitiated);
    assert_eq!(al.tell(kind, "a", 1_000, 3_000), []);
    assert_eq!(*al.state(), State::Present);
    // From before it, but not by that much: whoever delegates comes back, and is missed until then.
    al.tell(kind, "a", 1_000, 1_000);
    assert!(
        matches!(
            al.state(),
            State::Suspected {
                why: Suspicion::Missing { .. },
                ..
            }
        ),
        "{:?}",
        al.state()
    );
    // From after it.
    let mut al = Bench::present();
    al.wait(5_000);
    al.presence.track("room", "al", al.now, hour(), al.now);
    al.wait(2_000);
    al.left(Reason::ClientInitiated);
    assert!(reported(&al), "{:?}", al.state());
}

/// A page is reloaded: its new session delegates before the end of the former one is told, and joins after that.
#[test]
fn l14_a_departure_from_before_the_delegation_that_is_told_after_it_does_not_end_whoever_comes_back() {
    let mut al = Bench::present();
    al.wait(60_000);
    al.presence.track("room", "al", al.now, hour(), al.now);
    al.tell(EventKind::Left(Reason::ClientInitiated), "a", 1_000, 1_000);
    assert!(!reported(&al), "{:?}", al.state());
    // Both quick questions would find nobody by then.
    assert_eq!(al.until(1_500), []);
    al.tell(EventKind::Joined, "b", 62_000, 0);
    assert_eq!(*al.state(), State::Present);
}

/// Of two requests the earlier one took longer.
#[test]
fn l14_an_earlier_delegation_that_is_done_later_says_nothing_new() {
    let mut al = Bench::present();
    al.wait(5_000);
    let (earlier, later) = (al.now, al.now.after(300));
    al.presence.track("room", "al", later, hour(), later);
    al.wait(3_000);
    al.left(Reason::ClientInitiated);
    let _ = (al.until(800), al.answer(Answer::No), al.until(699), al.answer(Answer::No));
    assert!(matches!(al.state(), State::Gone(_)), "{:?}", al.state());
    al.presence.track("room", "al", earlier, hour(), al.now);
    assert!(matches!(al.state(), State::Gone(_)), "{:?}", al.state());
}

#[test]
fn l2a_usually_final_reasons_take_two_quick_questions() {
    for reason in [
        Reason::ClientInitiated,
        Reason::ConnectionTimeout,
        Reason::ParticipantRemoved,
        Reason::RoomDeleted,
        Reason::RoomClosed,
        Reason::SignalClose,
        Reason::UserRejected,
        Reason::UserUnavailable,
    ] {
        let mut al = Bench::present();
        assert_eq!(al.left(reason), []);
        assert_eq!(al.until(800), [(800, Seen::Ask(QUICK))]);
        assert_eq!(al.answer(Answer::No), [], "the first no is not believed");
        assert_eq!(al.until(699), [(699, Seen::Ask(QUICK))]);
        assert_eq!(al.answer(Answer::No), [Seen::Gone(DepartureCause::Reported)], "{reason:?}");
    }
}

/// Without two clear noes it is judged as an absence that was found by asking.
#[test]
fn l2a_no_answer_and_the_same_sid_are_no_evidence() {
    for answer in [yes("a", 1_000, true), yes("", 0, true), Answer::Unclear, Answer::TimedOut] {
        let mut al = Bench::present();
        let _ = al.left(Reason::ClientInitiated);
        let _ = al.until(800);
        assert_eq!(al.answer(answer), []);
        assert_eq!(al.until(699), [(699, Seen::Ask(QUICK))]);
        assert_eq!(al.answer(answer), []);
        assert_eq!(al.until(3_000), [(3_000, ASK)], "{answer:?}");
        let mut al = Bench::present();
        let _ = al.left(Reason::ClientInitiated);
        let _ = al.until(800);
        let _ = al.answer(Answer::No);
        let _ = al.until(699);
        // Who came back unannounced between the two questions was reported gone where the second answer was lost.
        assert_eq!(al.answer(answer), [], "one no is not enough");
        assert_eq!(al.until(2_299), [(2_299, ASK)], "{answer:?}");
    }
}

#[test]
fn l2a_another_sid_is_a_continuation_joining_counts() {
    let mut al = Bench::present();
    let _ = al.left(Reason::ClientInitiated);
    let _ = al.until(800);
    assert_eq!(al.answer(yes("b", 2_000, false)), [Seen::Changed, Seen::Present]);
    let mut al = Bench::present();
    let _ = al.left(Reason::ClientInitiated);
    assert_eq!(al.joined("b", 2_000), [Seen::Changed, Seen::Present]);
    assert_eq!(al.until(5_000), []);
}

#[test]
fn l2a_a_report_that_comes_late_is_checked_at_once_and_once_more() {
    let mut al = Bench::present();
    al.wait(7_000);
    let kind = EventKind::Left(Reason::ClientInitiated);
    assert_eq!(al.tell(kind, "a", 1_000, 6_000), [Seen::Ask(QUICK)]);
    assert_eq!(al.answer(Answer::No), []);
    assert_eq!(al.until(499), [(499, Seen::Ask(QUICK))]);
    assert_eq!(al.answer(Answer::No), [Seen::Gone(DepartureCause::Reported)]);
}

#[test]
fn l2a_other_reasons_are_judged_by_asking_after_three_seconds() {
    for reason in [
        Reason::DuplicateIdentity,
        Reason::Migration,
        Reason::StateMismatch,
        Reason::ServerShutdown,
        Reason::JoinFailure,
        Reason::Unknown,
    ] {
        let mut al = Bench::present();
        assert_eq!(al.left(reason), []);
        assert_eq!(al.until(3_000), [(3_000, ASK)]);
        assert_eq!(al.answer(Answer::No), []);
        assert_eq!(al.until(3_000), [(3_000, ASK)]);
        assert_eq!(al.answer(Answer::No), [Seen::Check]);
        assert_eq!(al.listed(Some("RM")), [Seen::Gone(DepartureCause::Missing)], "{reason:?}");
        let mut al = Bench::present();
        let _ = al.left(reason);
        let _ = al.until(3_000);
        assert_eq!(al.answer(yes("a", 1_000, true)), [Seen::Present], "{reason:?}");
    }
}

#[test]
fn l2a_an_aborted_connection_of_the_session_that_was_seen_is_a_report() {
    let mut al = Bench::present();
    let kind = EventKind::Aborted(Reason::SignalClose);
    assert_eq!(al.tell(kind, "z", 9_000, 0), []);
    assert_eq!(*al.state(), State::Present);
    assert_eq!(al.tell(kind, "a", 1_000, 0), []);
    assert!(reported(&al));
}

#[test]
fn l2b_aborts_change_nothing_but_a_failed_join_is_told() {
    let mut al = Bench::new();
    assert_eq!(al.tell(EventKind::Aborted(Reason::SignalClose), "a", 1_000, 0), []);
    assert!(matches!(al.state(), State::Unknown { .. }));
    assert_eq!(al.tell(EventKind::Aborted(Reason::JoinFailure), "a", 1_000, 0), [Seen::JoinFailed]);
    let mut al = Bench::present();
    assert_eq!(al.tell(EventKind::Aborted(Reason::JoinFailure), "z", 9_000, 0), []);
    assert_eq!(*al.state(), State::Present);
}

#[test]
fn l2b_questions_about_who_never_came_grow_apart_and_come_before_the_end() {
    let mut al = Bench::new();
    let mut asked = Vec::new();
    while al.now < Time::START.after(3_600_000) {
        let _ = al.answer(Answer::No);
        let start = al.now.since(Time::START);
        asked.extend(al.until(100).into_iter().map(|(at, _)| start + at));
    }
    assert!(asked[0] <= 1_000, "{asked:?}");
    assert!(asked.windows(2).all(|pair| pair[1] - pair[0] <= 900_000), "{asked:?}");
    assert!(asked.len() < 30, "{asked:?}");
    assert!(asked.iter().any(|at| (3_585_000..3_586_000).contains(at)), "{asked:?}");
    assert!(al.presence.get(al.id).unwrap().last_no().is_some());
}

#[test]
fn l3_a_no_to_a_question_from_before_a_sighting_is_stale() {
    let mut al = Bench::present();
    let asked = al.now;
    al.wait(10);
    let _ = al.joined("b", 2_000);
    al.asked = asked;
    assert_eq!(al.answer(Answer::No), []);
    assert_eq!(*al.state(), State::Present);
}

#[test]
fn l3_what_is_neither_a_clear_yes_nor_a_clear_no_changes_nothing() {
    for answer in [Answer::Refused, Answer::TooLarge, Answer::Unclear, Answer::TimedOut] {
        let mut al = Bench::present();
        al.asked = al.now;
        assert_eq!(al.answer(answer), []);
        assert_eq!(*al.state(), State::Present, "{answer:?}");
        al.asked = al.now;
        let _ = al.answer(Answer::No);
        let _ = al.until(3_000);
        for _ in 0..3 {
            assert_eq!(al.answer(answer), []);
            assert!(al.until(20_000).iter().any(|(_, seen)| *seen == ASK), "it is asked again");
            assert!(matches!(al.state(), State::Suspected { .. }));
        }
        assert_eq!(al.answer(yes("a", 1_000, true)), [Seen::Present]);
    }
}

#[test]
fn l5a_whoever_is_gone_is_asked_for_again_when_that_is_old() {
    let mut al = Bench::present();
    let _ = al.left(Reason::ClientInitiated);
    let _ = (al.until(800), al.answer(Answer::No), al.until(699), al.answer(Answer::No));
    assert!(matches!(al.state(), State::Gone(_)));
    al.presence.confirm(al.id, al.now);
    assert_eq!(al.settle(), [ASK]);
    assert_eq!(
        al.answer(Answer::No),
        [Seen::Gone(DepartureCause::Missing)],
        "one clear no is enough"
    );
    al.presence.confirm(al.id, al.now);
    let _ = al.settle();
    assert_eq!(
        al.answer(yes("b", 2_000, true)),
        [Seen::Changed, Seen::Present],
        "a clear yes ends it"
    );
}

#[test]
fn l13_the_participants_of_a_lost_room_have_a_minute_to_come_back() {
    let mut al = Bench::present();
    assert_eq!(al.listed(None), [Seen::Create], "creating is eager, judging is careful");
    assert_eq!(al.until(60_000), [(60_000, ASK)]);
    assert_eq!(al.answer(Answer::Unclear), []);
    assert!(!al.until(2_000).is_empty());
    assert_eq!(al.answer(Answer::No), [Seen::Gone(DepartureCause::RoomLost)]);
    let mut twin = Bench::present();
    let _ = twin.listed(None);
    twin.asked = twin.now;
    assert_eq!(twin.answer(yes("b", 9_000_000, true)), [Seen::Changed, Seen::Present, Seen::Check]);
}

#[test]
fn l13_a_room_that_was_missed_and_is_then_told_to_be_over_was_not_lost() {
    let mut al = Bench::present();
    assert_eq!(al.listed(None), [Seen::Create]);
    assert_eq!(al.until(5_000), []);
    assert_eq!(
        al.tell(EventKind::RoomFinished, "", 0, 0),
        [Seen::Changed, QUICK_ASK],
        "stored, and evidence first"
    );
    assert_eq!(al.answer(Answer::No), []);
    assert_eq!(al.until(3_000), [(499, QUICK_ASK)]);
    assert_eq!(al.answer(Answer::No), [Seen::Gone(DepartureCause::Reported)]);
    // Of somebody who is back nothing is said.
    let mut twin = Bench::present();
    let _ = twin.listed(None);
    twin.wait(5_000);
    assert_eq!(twin.tell(EventKind::RoomFinished, "", 0, 0), [Seen::Changed, QUICK_ASK]);
    assert_eq!(twin.answer(yes("b", 9_000_000, true)), [Seen::Changed, Seen::Present, Seen::Check]);
}

#[test]
fn l13_whose_room_was_over_before_a_start_is_asked_about_and_no_room_is_missed() {
    let mut al = Bench::new();
    al.wait(1_000);
    let stored = SessionRecord {
        sid: Some("a"),
        joined_at_ms: 1_000,
        room_sid: Some("RM"),
        room_over: true,
        last_sighted: Some(Time::START),
        seen: true,
    };
    al.presence.restore(al.id, &stored, false, al.now);
    assert_eq!(al.settle(), [QUICK_ASK]);
    assert_eq!(al.answer(Answer::No), []);
    assert_eq!(al.until(3_000), [(499, QUICK_ASK)]);
    assert_eq!(al.answer(Answer::No), [Seen::Gone(DepartureCause::Reported)]);
    // Somebody who is in the next room of that name.
    let mut twin = Bench::new();
    twin.wait(1_000);
    twin.presence.restore(twin.id, &stored, false, twin.now);
    assert_eq!(twin.settle(), [QUICK_ASK]);
    assert_eq!(twin.answer(yes("b", 9_000_000, true)), [Seen::Changed, Seen::Present, Seen::Check]);
    assert!(!twin.presence.get(twin.id).unwrap().session().room_over);
}

/// Who was in room X, which is over.
const OF_A_ROOM_THAT_IS_OVER: SessionRecord<'_> = SessionRecord {
    sid: Some("a"),
    joined_at_ms: 0,
    room_sid: Some("X"),
    room_over: true,
    last_sighted: Some(Time::START),
    seen: true,
};

fn restored<const N: usize>(mut all: [(&str, SessionRecord<'_>); N], turn: usize, now: Time) -> Presence {
    let mut presence = Presence::new(Settings::default(), 1, Time::START);
    all.rotate_left(turn);
    for (identity, stored) in &all {
        let id = presence.track("room", identity, Time::START, hour(), now);
        presence.restore(id, stored, false, now);
    }
    presence
}

#[test]
fn l13_a_room_that_is_over_is_not_made_again_after_a_start() {
    for turn in 0..2 {
        let now = Time::START.after(30_000);
        let all = [("al", OF_A_ROOM_THAT_IS_OVER), ("cy", SessionRecord::default())];
        let mut presence = restored(all, turn, now);
        let room = presence.by_name["room"];
        presence.on_rooms(&[room], now.after(1), &Answer::Yes(&[]), now.after(1));
        let creates = |output: &Output| matches!(output, Output::Ask(Question::CreateRoom { .. }));
        assert!(!presence.settle(now.after(1)).iter().any(creates), "turn {turn}");
    }
}

/// Whoever is in another room of that name than the one that is over has a minute to come back when that one is missing.
#[test]
fn l13_a_record_of_a_room_that_is_over_says_nothing_of_the_room_at_hand() {
    for turn in 0..3 {
        let at_hand = SessionRecord {
            sid: Some("b"),
            room_sid: Some("Y"),
            room_over: false,
            ..OF_A_ROOM_THAT_IS_OVER
        };
        let now = Time::START.after(30_000);
        // Somebody else has not come yet.
        let all = [("al", OF_A_ROOM_THAT_IS_OVER), ("bo", at_hand), ("cy", SessionRecord::default())];
        let mut presence = restored(all, turn, now);
        let room = presence.by_name["room"];
        let [al, bo] = ["al", "bo"].map(|identity| presence.find("room", identity).unwrap());
        let (mut gone, mut is_created, mut time) = (BTreeMap::new(), false, now);
        while time < now.after(59_000) {
            for output in presence.settle(time) {
                match output {
                    Output::Ask(Question::Participant { participant, asked, .. }) => {
                        presence.on_participant(participant, asked, &Answer::No, time);
                    }
                    Output::Ask(Question::Rooms { asked, .. }) => presence.on_rooms(&[room], asked, &Answer::Yes(&[]), time),
                    Output::Ask(Question::CreateRoom { .. }) => is_created = true,
                    Gone(id, evidence) => drop(gone.insert(id, evidence.cause)),
                    Output::Ask(_)
                    | Changed(_)
                    | Present(_)
                    | JoinFailed(_)
                    | Output::Silent(_)
                    | Output::SfuSilent(_)
                    | Output::NoWebhooks => {}
                }
            }
            time = time.after(100);
        }
        assert!(is_created);
        assert_eq!(gone.get(&al), Some(&DepartureCause::Reported), "turn {turn}");
        assert_eq!(gone.get(&bo), None, "turn {turn}");
    }
}

#[test]
fn what_was_told_before_this_node_watched_is_asked_about_and_not_believed() {
    let past = |bench: &mut Bench, kind| {
        let event = SfuEvent {
            kind,
            digest: 77,
            issued_at: SFU,
            id: "",
            created_at: SFU,
            room: "room",
            room_sid: "RM",
            identity: "al",
            sid: "a",
            joined_at_ms: 1_000,
        };
        bench.presence.on_past_event(&event, bench.now);
        bench.settle()
    };
    let of_before = SessionRecord {
        sid: Some("a"),
        joined_at_ms: 1_000,
        ..SessionRecord::default()
    };
    // Who waits to come back is waited for.
    for kind in [EventKind::Left(Reason::ClientInitiated), EventKind::Aborted(Reason::JoinFailure)] {
        let mut al = Bench::new();
        if kind != EventKind::Aborted(Reason::JoinFailure) {
            al.presence.restore(al.id, &of_before, false, al.now);
        }
        let _ = al.settle();
        let _ = al.answer(Answer::No);
        assert_eq!(past(&mut al, kind), [ASK]);
        assert_eq!(al.answer(Answer::No), []);
        assert!(matches!(al.state(), State::Unknown { .. }));
    }
    // So is who was there before.
    let mut al = Bench::new();
    al.presence.restore(al.id, &of_before, false, al.now);
    let _ = al.settle();
    let _ = al.answer(Answer::No);
    assert_eq!(past(&mut al, EventKind::Joined), [ASK]);
    assert!(matches!(al.state(), State::Unknown { .. }));
    // Who was seen since, as who comes now.
    let mut al = Bench::present();
    let _ = past(&mut al, EventKind::Left(Reason::ClientInitiated));
    assert!(reported(&al));
}

#[test]
fn l14_delegated_anew_after_a_report_somebody_is_waited_for() {
    let mut al = Bench::present();
    let _ = al.left(Reason::ClientInitiated);
    al.wait(500);
    assert_eq!(al.presence.track("room", "al", al.now, hour(), al.now), al.id);
    assert!(matches!(al.state(), State::Unknown { .. }), "a page was reloaded");
    let _ = al.settle();
    assert_eq!(al.left(Reason::ClientInitiated), [], "that session's departure is known");
    assert_eq!(al.joined("b", 9_000), [Seen::Changed, Seen::Present]);
}

#[test]
fn l14_delegated_anew_what_was_asked_before_proves_nothing() {
    // Missed once, then delegated by a request that came after that: two noes from then on, not one.
    let mut bench = Bench::present();
    bench.presence.on_participant(bench.id, bench.now, &Answer::No, bench.now);
    bench.wait(2_500);
    bench.presence.track("room", "al", bench.now, hour(), bench.now);
    assert_eq!(bench.until(3_000), [(3_000, ASK)]);
    assert_eq!(bench.answer(Answer::No), []);
    assert_eq!(bench.until(3_000), [(3_000, ASK)]);
    assert_eq!(bench.answer(Answer::No), [Seen::Check]);
    assert_eq!(bench.listed(Some("RM")), [Seen::Gone(DepartureCause::Missing)]);
    // Gone, asked about once more since that grew old, and delegated: waited for, whatever is answered to the old question.
    bench.presence.confirm(bench.id, bench.now);
    assert_eq!(bench.settle(), [ASK]);
    let asked = bench.asked;
    bench.wait(100);
    bench.presence.track("room", "al", bench.now, hour(), bench.now);
    assert_eq!(bench.settle(), [ASK]);
    bench.presence.on_participant(bench.id, asked, &Answer::No, bench.now);
    assert_eq!(bench.settle(), []);
    assert!(matches!(bench.state(), State::Unknown { .. }), "{:?}", bench.state());
}

#[test]
fn l2_who_is_shown_three_seconds_after_a_report_is_there_though_delegated_meanwhile() {
    // The report was wrong: the session goes on under its sid. It was waited for another one for ever.
    let mut bench = Bench::present();
    let _ = bench.left(Reason::ClientInitiated);
    bench.wait(300);
    bench.presence.track("room", "al", bench.now, hour(), bench.now);
    assert_eq!(bench.settle(), [ASK]);
    assert_eq!(bench.answer(yes("a", 1_000, true)), [], "not forgotten yet, perhaps");
    let mut since = 1;
    while *bench.state() != State::Present {
        let asked = bench.until(5_000 - since);
        since += asked.first().map_or(5_000, |(at, _)| *at) + 1;
        assert!(since < 5_000, "{asked:?}");
        let _ = bench.answer(yes("a", 1_000, true));
    }
}

#[test]
fn l5a_an_answer_from_before_the_process_stood_still_proves_nothing() {
    let asks_again = |bench: &mut Bench| {
        let asked = bench.asked;
        bench.now = bench.now.after(1);
        bench.presence.on_woke(bench.now);
        let again = bench.settle();
        bench.presence.on_participant(bench.id, asked, &Answer::No, bench.now);
        assert_eq!(bench.settle(), [], "{:?}", bench.state());
        again
    };
    // The second question about a report was under way.
    let mut bench = Bench::present();
    let _ = bench.left(Reason::ClientInitiated);
    assert_eq!(bench.until(800), [(800, Seen::Ask(QUICK))]);
    assert_eq!(bench.answer(Answer::No), []);
    assert_eq!(bench.until(700), [(699, Seen::Ask(QUICK))]);
    assert_eq!(asks_again(&mut bench), [Seen::Ask(QUICK)]);
    // The room was being checked after two noes.
    let mut bench = Bench::present();
    bench.presence.on_participant(bench.id, bench.now, &Answer::No, bench.now);
    assert_eq!(bench.until(3_000), [(3_000, ASK)]);
    assert_eq!(bench.answer(Answer::No), [Seen::Check]);
    assert_eq!(asks_again(&mut bench), [ASK]);
    assert_eq!(bench.listed(Some("RM")), [], "{:?}", bench.state());
}

#[test]
fn l3_a_check_of_a_room_that_comes_due_with_the_question_for_all_rooms_is_made() {
    let mut bench = Bench::new();
    let ids = ["al", "bo", "cy"].map(|identity| bench.presence.track("room", identity, bench.now, hour(), bench.now));
    let other = bench.presence.track("other", "di", bench.now, hour(), bench.now);
    let row = |sid| ParticipantRow {
        identity: "",
        sid,
        joined_at_ms: 0,
        active: true,
    };
    bench.wait(300);
    let mut lists = Vec::new();
    for &id in ids.iter().chain([&other]) {
        bench.presence.on_participant(id, bench.now, &Answer::Yes(row("a")), bench.now);
    }
    let _ = bench.settle();
    // All three are reported gone; a list of nobody leaves it to the room, which is not shown.
    for identity in ["al", "bo", "cy"] {
        bench.digest += 1;
        let event = SfuEvent {
            kind: EventKind::Left(Reason::ClientInitiated),
            digest: bench.digest,
            issued_at: SFU,
            id: "",
            created_at: SFU,
            room: "room",
            room_sid: "RM",
            identity,
            sid: "",
            joined_at_ms: 0,
        };
        bench.presence.on_event(&event, bench.now);
    }
    for _ in 0..2 {
        bench.now = bench.now.after(2_000);
        for output in bench.presence.settle(bench.now) {
            if let Output::Ask(Question::Participants { room, asked, .. }) = output {
                lists.push(room);
                bench.presence.on_participants(room, asked, &Answer::Yes(&[]), bench.now.after(1));
            }
        }
    }
    let room = lists[0];
    bench.now = bench.now.after(1);
    let _ = bench.presence.settle(bench.now);
    bench.presence.on_rooms(&[room], bench.now, &Answer::Unclear, bench.now);
    // They come again: nobody is thought to be in the room when its check and the question for all rooms come due together.
    for identity in ["al", "bo", "cy"] {
        bench.presence.track("room", identity, bench.now, hour(), bench.now);
    }
    bench.now = bench.now.after(60_000);
    let outputs = bench.presence.settle(bench.now);
    let asked = outputs
        .iter()
        .any(|output| matches!(output, Output::Ask(Question::Rooms { rooms, .. }) if rooms.contains(&room)));
    assert!(asked, "{outputs:?}");
}

#[test]
fn a_participant_that_is_forgotten_takes_its_room_along_and_leaves_nothing() {
    let mut presence = Presence::new(Settings::default(), 1, Time::START);
    let mut last = Vec::new();
    for round in 0..3 {
        let ids: Vec<_> = (0..2_000)
            .map(|n| presence.track("room", &n.to_string(), Time::START, hour(), Time::START))
            .collect();
        assert!(ids.iter().all(|id| !last.contains(id)), "round {round}");
        assert_eq!((presence.participants.len(), presence.rooms.len()), (2_000, 1));
        for &id in &ids {
            presence.forget(id, Time::START);
        }
        assert_eq!(
            (presence.participants.len(), presence.rooms.len(), presence.by_name.len()),
            (0, 0, 0)
        );
        assert!(presence.find("room", "1").is_none());
        last = ids;
    }
    let _ = presence.settle(Time::START);
    assert!(presence.timers.len() <= 64 + 6_000);
}

#[test]
fn l3_a_list_is_read_in_any_order_and_with_strangers_in_it() {
    let mut presence = Presence::new(Settings::default(), 1, Time::START);
    let identities: Vec<_> = (0..50).map(|n| format!("i{n}")).collect();
    for identity in &identities {
        presence.track("room", identity, Time::START, hour(), Time::START);
    }
    let known = identities.iter().filter(|identity| *identity != "i7").map(String::as_str);
    let mut rows: Vec<_> = known
        .chain(["", "i", "i500", "z"])
        .map(|identity| ParticipantRow {
            identity,
            sid: identity,
            joined_at_ms: 1,
            active: true,
        })
        .collect();
    let (room, asked) = (presence.by_name["room"], Time::START.after(1_000));
    for turn in [0, 17] {
        rows.rotate_left(turn);
        presence.on_participants(room, asked, &Answer::Yes(&rows), asked);
        for identity in &identities {
            let found = presence.get(presence.find("room", identity).unwrap()).unwrap();
            let expected = (identity != "i7").then_some(identity.as_str());
            assert_eq!(found.session().sid, expected);
        }
    }
}

#[test]
fn l3_where_a_list_is_too_long_to_be_read_each_who_is_there_is_asked_for() {
    let now = Time::START;
    for (answer, expected) in [(Answer::Unclear, 0), (Answer::TooLarge, 2), (Answer::Refused, 2)] {
        let mut presence = Presence::new(Settings::default(), 1, now);
        for identity in ["a", "b", "c"] {
            let id = presence.track("room", identity, now, hour(), now);
            // One of them has not come yet.
            if identity != "b" {
                presence.on_participant(id, now, &yes(identity, 1, true), now);
            }
        }
        let _ = presence.settle(now);
        let room = presence.by_name["room"];
        presence.on_participants(room, now, &answer, now);
        let awaited = presence.find("room", "b");
        let asked = presence.settle(now).into_iter().filter(|output| match output {
            Output::Ask(Question::Participant { participant, .. }) => Some(*participant) != awaited,
            Output::Ask(_) | Changed(_) | Present(_) | Gone(..) | JoinFailed(_) => false,
            Output::Silent(_) | Output::SfuSilent(_) | Output::NoWebhooks => false,
        });
        assert_eq!(asked.count(), expected, "{answer:?}");
    }
}

#[test]
fn l3_while_the_sfu_swallows_questions_one_waits_for_each_participant() {
    let mut bench = Bench::present();
    bench.presence.settings.sweep_ms = Some(30_000);
    let asks = |all: &[(u64, Seen)]| all.iter().filter(|(_, seen)| *seen == ASK).count();
    let now = bench.now;
    bench.presence.plan_sweep(bench.presence.get(bench.id).unwrap().room, now);
    assert_eq!(asks(&bench.until(600_000)), 1);
    // Its answer is the way to the next.
    let asked = bench.asked;
    bench.presence.on_participant(bench.id, asked, &Answer::TimedOut, bench.now);
    assert_eq!(asks(&bench.until(600_000)), 1);
    bench
        .presence
        .on_participant(bench.id, bench.asked, &yes("a", 1_000, true), bench.now);
    assert_eq!(asks(&bench.until(40_000)), 1);
}
