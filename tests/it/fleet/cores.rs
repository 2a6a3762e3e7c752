//! The pure cores of a fleet on the model of Redis, in virtual time: each rule by itself, then all of them under random faults.

use std::collections::{BTreeMap, HashMap};

use lk_jwt_service::internals::core::{Action, Core, Fact, Settings};
use lk_jwt_service::internals::delayed_leave::Bounds;
use lk_jwt_service::internals::fleet::{Fleet, NodeId, NodeState, Output, Own, Position, Takeover};
use lk_jwt_service::internals::livekit::{Answer, ParticipantRow};
use lk_jwt_service::internals::presence::Question;
use lk_jwt_service::internals::store::JobRecord;
use lk_jwt_service::internals::time::{Time, WallClock};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::model::Model;

const STEP_MS: u64 = 20;
/// For the longest life of a node and its beats.
const LIFE_MS: u64 = 5_000;
const BEAT_MS: u64 = 1_000;
const SHORT_LIFE_MS: u64 = 2_000;
const SHORT_BEAT_MS: u64 = 400;
const TOLERANCE_MS: u64 = 300;

struct Node {
    fleet: Fleet,
    next_beat: u64,
    /// How often it began to watch, and how.
    takeovers: Vec<(u64, Takeover)>,
    /// Whether it may judge those who were there before as its own, since it began to watch.
    is_continuous: bool,
    yields: usize,
    put_again: usize,
    shortest_ms: Option<u32>,
    is_alive: bool,
    is_paused: bool,
    is_deaf: bool,
    is_cut: bool,
    reaches_sfu: bool,
    /// Does not begin what it was given.
    is_lazy: bool,
    /// Redis refuses it to change the watcher.
    is_refused: bool,
}

struct World {
    now_ms: u64,
    redis: Model,
    is_frozen: bool,
    nodes: BTreeMap<u64, Node>,
    /// Who has watched under which epoch.
    epochs: HashMap<u64, NodeId>,
}

impl World {
    fn new(nodes: u64) -> Self {
        let mut world = Self {
            now_ms: 0,
            redis: Model {
                now_ms: 1_700_000_000_000,
                ..Model::default()
            },
            is_frozen: false,
            nodes: BTreeMap::new(),
            epochs: HashMap::new(),
        };
        for id in 1..=nodes {
            world.add(id, 1);
            world.run(100);
        }
        world.run(3 * BEAT_MS);
        world
    }

    fn add(&mut self, id: u64, fingerprint: u64) {
        let own = Own {
            node: NodeId(id),
            fingerprint,
            host: "h".into(),
        };
        let node = Node {
            fleet: Fleet::new(own),
            next_beat: self.now_ms,
            takeovers: Vec::new(),
            is_continuous: false,
            yields: 0,
            put_again: 0,
            shortest_ms: None,
            is_alive: true,
            is_paused: false,
            is_deaf: false,
            is_cut: false,
            reaches_sfu: true,
            is_lazy: false,
            is_refused: false,
        };
        self.nodes.insert(id, node);
    }

    fn run(&mut self, millis: u64) {
        let end = self.now_ms + millis;
        while self.now_ms < end {
            self.now_ms += STEP_MS;
            self.redis.now_ms += STEP_MS.cast_signed();
            let ids: Vec<_> = self.nodes.keys().copied().collect();
            for id in ids {
                self.step(id);
            }
            let watching = self.nodes.iter().filter(|(_, node)| node.is_alive);
            for (id, watch) in watching.filter_map(|(id, node)| Some((*id, node.fleet.own_watch()?))) {
                let first = *self.epochs.entry(watch.epoch).or_insert(NodeId(id));
                assert_eq!(first, NodeId(id), "two nodes watch under epoch {}", watch.epoch);
            }
        }
    }

    fn now(&self) -> Time {
        Time::START.after(self.now_ms)
    }

    fn step(&mut self, id: u64) {
        let (now, now_ms) = (self.now(), self.now_ms);
        let is_frozen = self.is_frozen;
        let node = self.nodes.get_mut(&id).expect("a node");
        if !node.is_alive || node.is_paused {
            return;
        }
        let reaches_redis = !node.is_cut && !is_frozen;
        node.fleet.on_timer(now);
        if now_ms % 1_000 == 0 {
            node.fleet.on_sfu(node.reaches_sfu, now);
        }
        if reaches_redis && !node.is_deaf {
            node.fleet.on_read(now);
        }
        if now_ms < node.next_beat {
            return;
        }
        node.next_beat = now_ms + node.fleet.pace_ms();
        node.fleet.on_progress(0, node.shortest_ms);
        let entry = node.fleet.beat(now);
        let (own, remove) = (node.fleet.own_watch(), node.fleet.to_remove());
        if !reaches_redis {
            node.fleet.on_no_answer();
            return;
        }
        let answer = self.redis.beat(NodeId(id), &entry, own, Position::FIRST, &remove);
        let mut outputs = node.fleet.on_answer(&answer, now, now);
        while !outputs.is_empty() {
            for output in std::mem::take(&mut outputs) {
                match output {
                    Output::Change { .. } if node.is_refused => {}
                    Output::Change { seen, wanted } => outputs.extend(node.fleet.on_changed(self.redis.change(seen, wanted))),
                    Output::Watching { how, continuous } => {
                        node.takeovers.push((now_ms, how));
                        node.is_continuous = continuous;
                        if !node.is_lazy {
                            node.fleet.on_records_read();
                            node.next_beat = now_ms + STEP_MS;
                        }
                    }
                    Output::PutAgain => node.put_again += 1,
                    Output::Yield { .. } => node.yields += 1,
                    Output::WriteAgain | Output::HandOverAgain => {}
                }
            }
        }
    }

    fn node(&mut self, id: u64) -> &mut Node {
        self.nodes.get_mut(&id).expect("a node")
    }

    /// Those that think that they watch.
    fn watching(&self) -> Vec<u64> {
        let alive = self.nodes.iter().filter(|(_, node)| node.is_alive);
        alive
            .filter(|(_, node)| node.fleet.own_watch().is_some())
            .map(|(id, _)| *id)
            .collect()
    }

    /// Runs until exactly this one watches; how long that took.
    #[track_caller]
    fn until_watching(&mut self, id: u64, within: u64) -> u64 {
        let began = self.now_ms;
        while self.watching() != [id] {
            self.run(STEP_MS);
            let took = self.now_ms - began;
            assert!(took <= within, "{id} does not watch after {took} ms, but {:?}", self.watching());
        }
        self.now_ms - began
    }
}

#[test]
fn the_first_watches_at_once_and_newcomers_take_nothing() {
    let mut world = World::new(1);
    assert_eq!(world.watching(), [1]);
    assert!(matches!(world.node(1).takeovers[..], [(at, Takeover::First)] if at <= 2 * BEAT_MS));
    world.add(2, 1);
    world.add(3, 1);
    world.run(30_000);
    assert_eq!(world.watching(), [1]);
    assert_eq!(world.redis.watch.map(|watch| watch.epoch), Some(1));
}

#[test]
fn a_dead_watcher_is_followed_by_the_longest_serving_node() {
    for short in [false, true] {
        let (life, beat) = if short {
            (SHORT_LIFE_MS, SHORT_BEAT_MS)
        } else {
            (LIFE_MS, BEAT_MS)
        };
        let mut worst = 0;
        for offset in 0..20 {
            let mut world = World::new(3);
            world.node(1).shortest_ms = short.then_some(18_000);
            world.run(10_000 + offset * 50);
            world.node(1).is_alive = false;
            worst = worst.max(world.until_watching(2, life + 2 * beat + TOLERANCE_MS));
            world.run(20_000);
            assert_eq!(world.watching(), [2]);
            assert!(matches!(world.node(2).takeovers[..], [(_, Takeover::Claimed)]));
        }
        eprintln!("L = {life} ms: taken over after at most {worst} ms");
    }
}

#[test]
fn where_the_first_heir_does_not_claim_the_next_one_does() {
    let mut world = World::new(4);
    world.run(10_000);
    world.node(1).is_alive = false;
    // It is seen alive until a life after that, too.
    world.node(2).is_paused = true;
    world.until_watching(3, LIFE_MS + 4 * BEAT_MS + TOLERANCE_MS);
    world.node(2).is_paused = false;
    world.run(20_000);
    assert_eq!(world.watching(), [3]);
}

#[test]
fn where_the_first_heir_lives_and_cannot_claim_the_others_do() {
    let mut world = World::new(4);
    world.run(10_000);
    world.node(1).is_alive = false;
    (world.node(2).is_refused, world.node(3).is_refused) = (true, true);
    world.until_watching(4, LIFE_MS + 4 * BEAT_MS + TOLERANCE_MS);
}

#[test]
fn where_redis_answers_now_and_then_only_nobody_dies() {
    let mut world = World::new(3);
    world.run(10_000);
    for _ in 0..20 {
        world.is_frozen = true;
        world.run(2_600);
        world.is_frozen = false;
        world.run(900);
    }
    world.run(20_000);
    assert_eq!(world.watching(), [1]);
}

/// A hole in our own beats says nothing about others: an heir that comes through now and then, just when the watcher does not, waits.
#[test]
fn holes_in_our_own_beats_count_for_nothing() {
    let mut world = World::new(3);
    world.run(10_000);
    for _ in 0..8 {
        world.is_frozen = true;
        world.run(3_000);
        (world.is_frozen, world.node(1).is_cut) = (false, true);
        world.run(BEAT_MS + STEP_MS);
        world.is_frozen = true;
        world.node(1).is_cut = false;
    }
    world.is_frozen = false;
    world.run(20_000);
    assert_eq!(world.watching(), [1]);
    assert_eq!(world.redis.watch.map(|watch| watch.epoch), Some(1));
}

/// Death is measured on our own clock, whatever clocks of hosts and of Redis show.
#[test]
fn a_clock_of_redis_that_runs_fast_makes_nobody_dead() {
    let mut world = World::new(3);
    world.run(10_000);
    world.node(1).is_paused = true;
    // With the time since its last beat that is less than a life.
    for _ in 0..(LIFE_MS - BEAT_MS - TOLERANCE_MS) / STEP_MS {
        world.redis.now_ms += STEP_MS.cast_signed();
        world.run(STEP_MS);
    }
    world.node(1).is_paused = false;
    world.run(20_000);
    assert_eq!(world.redis.watch.map(|watch| watch.epoch), Some(1));
}

#[test]
fn nodes_that_reach_the_sfu_come_first() {
    let mut world = World::new(3);
    world.run(10_000);
    world.node(2).reaches_sfu = false;
    world.run(3_000);
    world.node(1).is_alive = false;
    world.until_watching(3, LIFE_MS + 2 * BEAT_MS + TOLERANCE_MS);
    // Where nobody reaches it, somebody watches all the same.
    world.node(3).is_alive = false;
    world.until_watching(2, LIFE_MS + 3 * BEAT_MS + TOLERANCE_MS);
}

#[test]
fn while_redis_is_away_nobody_dies() {
    for (away, short) in [(4_000, false), (4_000, true), (60_000, false)] {
        let mut world = World::new(3);
        world.node(1).shortest_ms = short.then_some(18_000);
        world.run(10_000);
        world.is_frozen = true;
        world.run(away);
        world.is_frozen = false;
        world.run(30_000);
        assert_eq!(world.watching(), [1], "{away}");
        assert_eq!(world.redis.watch.map(|watch| watch.epoch), Some(1));
    }
}

#[test]
fn a_deaf_watcher_is_dead() {
    let mut world = World::new(2);
    world.run(10_000);
    world.node(1).is_deaf = true;
    // Its counter stands still two beats later.
    world.until_watching(2, LIFE_MS + 4 * BEAT_MS + TOLERANCE_MS);
    assert_eq!(world.node(1).yields, 1);
    world.node(1).is_deaf = false;
    world.run(30_000);
    assert_eq!(world.watching(), [2]);
}

/// What it waits for began at the slower pace of longer delays.
#[test]
fn a_shorter_delay_makes_no_watcher_deaf() {
    let mut fleet = Fleet::new(Own {
        node: NodeId(1),
        fingerprint: 1,
        host: "h".into(),
    });
    let (mut redis, at) = (Model::default(), |millis| Time::START.after(millis));
    let mut beat = |fleet: &mut Fleet, millis| {
        let (now, entry) = (at(millis), fleet.beat(at(millis)));
        redis.now_ms += 1;
        let answer = redis.beat(NodeId(1), &entry, None, Position::FIRST, &[]);
        fleet.on_answer(&answer, now, now);
        fleet.on_read(now);
        fleet.on_timer(now);
        entry.counter
    };
    let counters: Vec<_> = (0..3).map(|n| beat(&mut fleet, n * BEAT_MS)).collect();
    assert_eq!(counters, [0, 1, 2]);
    fleet.on_progress(0, Some(18_000));
    assert_eq!(fleet.beat_ms(), SHORT_BEAT_MS);
    assert_eq!(beat(&mut fleet, 3 * BEAT_MS), 3);
    // From here on it has the pace of the shorter one.
    assert_eq!(beat(&mut fleet, 3 * BEAT_MS + SHORT_BEAT_MS), 4);
    assert_eq!(beat(&mut fleet, 4 * BEAT_MS + SHORT_BEAT_MS), 4);
}

#[test]
fn a_paused_or_cut_watcher_yields_when_it_is_back() {
    for paused in [true, false] {
        let mut world = World::new(3);
        world.run(10_000);
        (world.node(1).is_paused, world.node(1).is_cut) = (paused, !paused);
        world.run(30_000);
        assert_eq!(world.redis.watch.map(|watch| watch.node), Some(NodeId(2)));
        // Cut off it goes on.
        assert!(world.node(1).fleet.works());
        (world.node(1).is_paused, world.node(1).is_cut) = (false, false);
        world.until_watching(2, 2 * BEAT_MS);
        assert_eq!(world.node(1).yields, 1);
    }
}

#[test]
fn lost_writes_do_not_change_the_watcher() {
    let mut world = World::new(3);
    world.run(10_000);
    world.node(1).is_alive = false;
    world.until_watching(2, LIFE_MS + 3 * BEAT_MS);
    // Everything is gone.
    (world.redis.watch, world.redis.nodes) = (None, BTreeMap::new());
    world.run(20_000);
    assert_eq!(world.watching(), [2]);
    // Under another epoch, so that all others hand over again what they keep.
    assert_eq!(world.redis.watch.map(|watch| watch.epoch), Some(3));
    assert_eq!(world.node(2).put_again, 1);
    // A newcomer began anew while the watcher was away.
    world.node(2).is_cut = true;
    world.node(3).is_alive = false;
    (world.redis.watch, world.redis.nodes) = (None, BTreeMap::new());
    world.epochs.clear();
    world.add(4, 1);
    world.run(5_000);
    assert_eq!(world.redis.watch.map(|watch| (watch.node, watch.epoch)), Some((NodeId(4), 1)));
    world.node(2).is_cut = false;
    world.until_watching(2, 3 * BEAT_MS);
    assert_eq!(world.node(4).yields, 1);
}

#[test]
fn whoever_leaves_gives_the_watch_to_the_youngest_that_is_settled() {
    let mut world = World::new(2);
    world.run(15_000);
    world.add(3, 1);
    world.run(3_000);
    world.node(1).fleet.on_stopping();
    world.until_watching(2, 2 * BEAT_MS);
    assert!(matches!(world.node(2).takeovers[..], [(_, Takeover::Given)]));
    world.run(BEAT_MS);
    assert_eq!(world.node(1).yields, 1);
    // Where nobody is settled, whoever is up.
    world.node(1).is_alive = false;
    world.node(3).is_alive = false;
    world.add(4, 1);
    world.run(3_000);
    world.node(2).fleet.on_stopping();
    world.until_watching(4, 2 * BEAT_MS);
}

#[test]
fn an_heir_that_does_not_begin_is_passed_over() {
    let mut world = World::new(3);
    world.run(15_000);
    world.node(3).is_lazy = true;
    world.node(1).fleet.on_stopping();
    world.until_watching(2, 5 * BEAT_MS);
    // The giver works on until somebody has begun.
    assert_eq!(world.node(3).yields, 1);
    world.run(2 * BEAT_MS);
    assert!(!world.node(1).fleet.works());
}

#[test]
fn nobody_to_give_to_keeps_the_watch() {
    let mut world = World::new(1);
    world.node(1).fleet.on_stopping();
    world.run(10_000);
    assert_eq!(world.watching(), [1]);
}

#[test]
fn a_watcher_without_the_sfu_gives_to_one_that_reaches_it_once_a_minute() {
    let mut world = World::new(3);
    world.run(15_000);
    (world.node(1).reaches_sfu, world.node(3).reaches_sfu) = (false, false);
    world.until_watching(2, 12_000 + 2 * BEAT_MS);
    // Nobody reaches it: it stays where it is.
    world.node(2).reaches_sfu = false;
    world.run(60_000);
    assert_eq!(world.watching(), [2]);
}

#[test]
fn a_watcher_without_the_homeserver_gives_to_one_that_reaches_it() {
    let mut world = World::new(4);
    world.run(15_000);
    world.node(1).fleet.on_homeserver("hs.example", "");
    // Nobody else says that it reaches it.
    world.run(30_000);
    assert_eq!(world.watching(), [1]);
    assert_eq!(world.node(3).fleet.asked_about(), "hs.example");
    world.node(2).fleet.on_homeserver("", "other.example");
    world.node(4).fleet.on_homeserver("", "hs.example");
    world.node(4).reaches_sfu = false;
    world.run(5_000);
    assert_eq!(world.watching(), [1]);
    world.node(3).fleet.on_homeserver("", "hs.example");
    world.until_watching(3, 2 * BEAT_MS);
    assert!(matches!(world.node(3).takeovers[..], [(_, Takeover::Given)]));
    world.run(BEAT_MS);
    assert_eq!(world.node(1).yields, 1);
    assert_eq!(world.node(1).fleet.asked_about(), "");
}

/// An heir that did not begin in time is given the watch another time: the giver does not stop.
#[test]
fn an_heir_that_was_slow_once_is_not_passed_over_for_good() {
    let mut world = World::new(2);
    world.run(15_000);
    world.node(2).is_lazy = true;
    world.node(1).reaches_sfu = false;
    world.run(40_000);
    assert_eq!(world.watching(), [1], "taken back");
    assert_eq!(world.node(2).yields, 1);
    world.node(2).is_lazy = false;
    world.until_watching(2, 70_000);
    world.run(2 * BEAT_MS);
    assert_eq!(world.node(1).yields, 1);
}

/// Who gives the watch away and does not leave has time: the heir may have much to read.
#[test]
fn an_heir_may_take_seconds_to_read_the_records() {
    let mut world = World::new(2);
    world.run(15_000);
    world.node(2).is_lazy = true;
    world.node(1).reaches_sfu = false;
    world.run(13_000);
    assert_eq!(world.redis.watch.map(|watch| watch.node), Some(NodeId(2)));
    world.node(2).fleet.on_records_read();
    world.until_watching(2, 2 * BEAT_MS);
    world.run(2 * BEAT_MS);
    assert_eq!((world.node(1).yields, world.node(2).yields), (1, 0));
}

/// One that claims and cannot read the records watches nobody.
#[test]
fn an_heir_that_cannot_read_the_records_is_as_good_as_dead() {
    let mut world = World::new(3);
    world.run(15_000);
    world.node(2).is_lazy = true;
    world.node(1).is_alive = false;
    world.until_watching(2, LIFE_MS + 3 * BEAT_MS);
    world.until_watching(3, 2 * LIFE_MS + 4 * BEAT_MS);
    assert_eq!(world.node(2).yields, 1);
    // Alone it goes on trying.
    world.node(3).is_alive = false;
    world.run(60_000);
    assert_eq!(world.watching(), [2]);
}

/// What is being given away cannot be written any more: a reading that ends only then opens nothing.
#[test]
fn a_reading_that_ends_while_the_watch_is_given_begins_nothing() {
    let mut world = World::new(3);
    world.run(15_000);
    world.node(2).is_lazy = true;
    world.node(1).is_alive = false;
    world.until_watching(2, LIFE_MS + 3 * BEAT_MS);
    world.node(2).fleet.on_stopping();
    while world.node(2).fleet.own_watch().is_some() {
        world.run(STEP_MS);
    }
    let fleet = &mut world.node(2).fleet;
    assert!(fleet.works());
    fleet.on_records_read();
    assert!(!fleet.has_read() && !fleet.takes_in());
}

/// While an heir does not begin what it was given, and the giver takes the watch back, that is a new beginning: what is written under the
/// former epoch is refused.
#[test]
fn a_watch_that_is_taken_back_begins_anew() {
    let mut world = World::new(2);
    world.run(15_000);
    world.node(2).is_lazy = true;
    world.node(1).fleet.on_homeserver("hs.example", "");
    world.node(2).fleet.on_homeserver("", "hs.example");
    world.run(2 * BEAT_MS);
    world.node(1).fleet.on_homeserver("", "");
    world.until_watching(1, 8 * BEAT_MS);
    let watch = world.redis.watch.expect("a watcher");
    assert_eq!((watch.node, world.node(1).fleet.own_watch()), (NodeId(1), Some(watch)));
    assert!(watch.epoch > 2, "{watch}");
    assert!(matches!(world.node(1).takeovers[..], [(_, Takeover::First), (_, Takeover::Given)]));
}

/// Of a delegation then, whose event has run since.
fn record(unix_millis: i64) -> JobRecord<'static> {
    JobRecord {
        room: "room".into(),
        identity: "identity".into(),
        delay_id: "e1".into(),
        delay_ms: 3_600_000,
        homeserver: "hs.example".into(),
        user: "@alice:hs.example".into(),
        delegated_at_ms: Some(unix_millis),
        restarted_at_ms: unix_millis,
        ..JobRecord::default()
    }
}

/// A watcher reads the same records again and again, by a clock that was read over a network: that delegates nothing anew.
#[test]
fn a_record_that_is_read_again_is_no_new_delegation() {
    let (start, unix_millis) = (Time::START, 1_700_000_000_000);
    let mut core = Core::new(Settings::default(), 1, start);
    let record = record(unix_millis);
    let mut adopt = |late: i64, after: u64| {
        let now = start.after(after);
        let clock = WallClock::new(now, unix_millis + after.cast_signed() - late);
        let actions = core.adopt(&record, false, true, &clock, now);
        actions
            .iter()
            .any(|action| matches!(action, Action::Call { .. } | Action::Store(_)))
    };
    adopt(0, 10);
    for late in [0, 1, 300, 900] {
        assert!(!adopt(late, 20_000), "{late}");
    }
    assert!(adopt(5_000, 20_000), "delegated again five seconds later");
}

/// A replica that was told of a departure hands over what it looked after before it has judged: the record does not say so.
#[test]
fn who_is_handed_over_once_more_is_asked_about() {
    let (start, unix_millis) = (Time::START, 1_700_000_000_000);
    let clock = WallClock::new(start, unix_millis);
    let record = JobRecord {
        last_sighted_ms: Some(unix_millis),
        seen: true,
        ..record(unix_millis)
    };
    let questions = |is_handed_over_again: bool| {
        let mut core = Core::new(Settings::default(), 1, start);
        let mut actions = core.adopt(&record, false, true, &clock, start);
        let mut asked = Vec::new();
        for ms in (0..5_000).step_by(10) {
            let now = start.after(ms);
            if ms == 4_000 && is_handed_over_again {
                actions.extend(core.adopt(&record, false, true, &clock, now));
                actions.extend(core.ask_again(&record.room, &record.identity, now));
            }
            actions.extend(core.handle(Fact::Time, now));
            for action in std::mem::take(&mut actions) {
                let row = ParticipantRow {
                    identity: "identity",
                    sid: "PA_1",
                    joined_at_ms: 1,
                    active: true,
                };
                let rows = [row];
                let Action::Ask(question) = action else { continue };
                let answer = match question {
                    Question::Participant { participant, asked, .. } => Fact::Participant(participant, asked, Answer::Yes(row)),
                    Question::Participants { room, asked, .. } => Fact::Participants(room, asked, Answer::Yes(&rows)),
                    Question::Rooms { .. } | Question::CreateRoom { .. } | Question::Probe => continue,
                };
                asked.push(ms);
                actions.extend(core.handle(answer, now));
            }
        }
        asked
    };
    let after = |asked: Vec<u64>| asked.into_iter().filter(|ms| *ms >= 4_000).count();
    assert_eq!((after(questions(false)), after(questions(true))), (0, 1));
}

/// Whoever took it has said yes: a watcher that has no room for it watches it all the same.
#[test]
fn a_watcher_without_room_adopts_what_others_have_taken() {
    let (start, unix_millis) = (Time::START, 1_700_000_000_000);
    let clock = WallClock::new(start, unix_millis);
    let bounds = Bounds {
        total: 2,
        ..Bounds::default()
    };
    let settings = Settings {
        bounds,
        ..Settings::default()
    };
    let mut core = Core::new(settings, 1, start);
    for n in 0..4 {
        let record = JobRecord {
            identity: format!("identity{n}").into(),
            delay_id: format!("e{n}").into(),
            last_sighted_ms: Some(unix_millis),
            seen: true,
            ..record(unix_millis)
        };
        assert_eq!(core.leaves().is_full(), n >= 2);
        core.adopt(&record, false, true, &clock, start.after(10));
        assert_eq!(core.leaves().len(), n + 1);
    }
}

#[test]
fn another_fingerprint_waits_until_the_last_of_the_others_leaves() {
    let mut world = World::new(1);
    world.add(2, 99);
    world.run(20_000);
    assert!(world.node(2).fleet.waits_for().is_some());
    assert_eq!(world.watching(), [1]);
    assert_eq!(world.redis.nodes[&NodeId(2)].state, NodeState::Waiting);
    world.node(1).fleet.on_stopping();
    world.until_watching(2, 5 * BEAT_MS);
    // One that dies without a word is waited for during its life.
    world.add(3, 1);
    world.run(5_000);
    world.node(1).is_alive = false;
    world.node(2).is_alive = false;
    world.until_watching(3, 2 * LIFE_MS + 4 * BEAT_MS);
}

/// Whoever has another SFU takes the watch of a dead watcher, and judges nobody by what that SFU says of rooms that it never had.
#[test]
fn a_watch_of_another_fingerprint_is_not_gone_on_with() {
    let mut world = World::new(1);
    world.add(2, 99);
    world.run(20_000);
    world.node(1).is_alive = false;
    world.until_watching(2, LIFE_MS + 3 * BEAT_MS);
    assert!(!world.node(2).is_continuous, "it judges another SFU's rooms");
    world.add(3, 99);
    world.run(20_000);
    world.node(2).is_alive = false;
    world.until_watching(3, LIFE_MS + 3 * BEAT_MS);
    assert!(world.node(3).is_continuous, "of its own kind");
}

#[test]
fn no_clock_of_redis_makes_anybody_dead() {
    let mut world = World::new(3);
    world.run(10_000);
    for jump in [3_600_000, -7_200_000, 40_000] {
        world.redis.now_ms += jump;
        world.run(20_000);
        assert_eq!(world.watching(), [1]);
    }
}

#[test]
fn entries_of_the_dead_go_after_a_minute() {
    let mut world = World::new(3);
    world.node(3).is_alive = false;
    world.run(30_000);
    assert_eq!(world.redis.nodes.len(), 3);
    world.run(40_000);
    assert_eq!(world.redis.nodes.len(), 2);
}

/// Random faults for two minutes; then half a minute of calm, after which exactly one watches and all agree.
#[test]
fn after_any_faults_one_watches() {
    let seeds = std::env::var("LK_FLEET_SEEDS")
        .ok()
        .and_then(|seeds| seeds.parse().ok())
        .unwrap_or(60);
    let mut claims = 0;
    for seed in 0..seeds {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut world = World::new(rng.random_range(2..=5));
        let mut next_id = 10;
        for _ in 0..40 {
            let ids: Vec<_> = world.nodes.keys().copied().collect();
            let id = ids[rng.random_range(0..ids.len())];
            match rng.random_range(0..12) {
                0 => world.node(id).is_alive = false,
                1 | 2 => world.node(id).is_paused = true,
                3 | 4 => world.node(id).is_cut = true,
                5 => world.node(id).is_deaf = true,
                6 => world.is_frozen = !world.is_frozen,
                7 => world.redis.now_ms += rng.random_range(-100_000..100_000),
                8 => world.node(id).fleet.on_stopping(),
                9 => world.node(id).reaches_sfu = rng.random(),
                _ => {
                    let node = world.node(id);
                    (node.is_paused, node.is_cut, node.is_deaf) = (false, false, false);
                }
            }
            if world
                .nodes
                .values()
                .filter(|node| node.is_alive && !node.fleet.is_leaving())
                .count()
                < 2
            {
                next_id += 1;
                world.add(next_id, 1);
            }
            world.run(rng.random_range(1..6) * 500);
        }
        world.is_frozen = false;
        for node in world.nodes.values_mut() {
            (node.is_paused, node.is_cut, node.is_deaf, node.reaches_sfu) = (false, false, false, true);
        }
        world.run(30_000);
        let watching = world.watching();
        assert_eq!(watching.len(), 1, "seed {seed}: {watching:?}");
        let watch = world.redis.watch.expect("a watcher");
        assert_eq!(watch.node, NodeId(watching[0]), "seed {seed}");
        for node in world.nodes.values().filter(|node| node.is_alive) {
            assert_eq!(node.fleet.watch(), Some(watch), "seed {seed}");
            assert!(
                node.fleet.works() == (node.fleet.node() == watch.node),
                "seed {seed}: a giver waits for ever"
            );
        }
        claims += world.nodes.values().map(|node| node.takeovers.len()).sum::<usize>();
    }
    eprintln!("{seeds} seeds, {claims} takeovers");
    assert!(claims > usize::try_from(seeds).expect("few"), "the faults change nothing");
}
