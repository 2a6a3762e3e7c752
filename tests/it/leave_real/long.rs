//! The long run: in each round one thing goes wrong, at a moment drawn by chance, to people in a real call; `./tests/long`.
//!
//! A round ends with a line in a file of results, and is not played again while its line is there. A line counts; it does not stop at the
//! first thing that is wrong:
//!
//! * *false*: somebody was shown as gone, or a leave was sent, while they were there.
//! * *lost*: a departure that was not reported within what [`Trouble::allowed_ms`] allows.
//! * *excused*: the homeserver's own timer ended the event of somebody who was there while nobody could restart it: 18 s, and a service
//!   that stands still for 30 s. No leave was sent, and the last restart that was granted was a whole delay ago.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rand::random_range;

use super::clock::{lateness_since, now_ms, sleep_s, sleep_until};
use super::stage::{Caller, Delayed, Plan, Stage};
use super::steered::{Browser, Party, Tab};
use super::takes::Void;
use crate::support::lateness;
use crate::support::process::{directory, real_neighbours, say};
use crate::support::redis::RedisServer;
use crate::support::synapse::Synapse;

const DELAYS_S: [u64; 3] = [18, 90, 3600];
/// livekit-client's, all of them.
const SCENARIOS: [&str; 14] = [
    "signal-reconnect",
    "speaker",
    "node-failure",
    "server-leave",
    "migration",
    "resume-reconnect",
    "force-tcp",
    "force-tls",
    "full-reconnect",
    "subscriber-bandwidth",
    "disconnect-signal-on-resume",
    "disconnect-signal-on-resume-no-messages",
    "leave-full-reconnect",
    "fail-on-v1-path",
];
/// The judge is late where it is late by this, and then no further stack is put beside the others.
const LATE_MS: u64 = 100;
const STACKS: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kept {
    InRedis,
    InAFile,
}

/// What goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Trouble {
    ServiceFrozen,
    ServiceKilled(Kept),
    Scenario(&'static str),
    SfuBackAfter(u64),
    PageReloaded,
    ClientKilled,
    WebhooksDown,
    HomeserverFrozen,
}

impl Trouble {
    fn name(self) -> String {
        match self {
            Self::ServiceFrozen => "service-frozen-30s".into(),
            Self::ServiceKilled(Kept::InRedis) => "service-killed-redis".into(),
            Self::ServiceKilled(Kept::InAFile) => "service-killed-file".into(),
            Self::Scenario(scenario) => format!("scenario-{scenario}"),
            Self::SfuBackAfter(seconds) => format!("sfu-back-after-{seconds}s"),
            Self::PageReloaded => "page-reloaded".into(),
            Self::ClientKilled => "client-killed".into(),
            Self::WebhooksDown => "webhooks-down".into(),
            Self::HomeserverFrozen => "homeserver-frozen".into(),
        }
    }

    /// How long it lasts, where it does: never so long that nothing could be done within a short delay, but for the service that stands
    /// still for half a minute.
    fn length_ms(self, delay_s: u64) -> u64 {
        match self {
            Self::ServiceFrozen => 30_000,
            Self::ServiceKilled(_) if delay_s < 60 => random_range(200..4_000),
            Self::ServiceKilled(_) => random_range(200..20_000),
            Self::HomeserverFrozen if delay_s < 60 => random_range(1_000..4_000),
            Self::HomeserverFrozen => random_range(5_000..25_000),
            Self::Scenario(_) | Self::SfuBackAfter(_) | Self::PageReloaded | Self::ClientKilled | Self::WebhooksDown => 0,
        }
    }

    /// Within what time a departure is reported, counted from it or from the end of the trouble, whichever is later.
    const fn allowed_ms(self) -> u64 {
        match self {
            Self::ServiceFrozen => 20_000,
            // A room whose end came while nobody listened seems forgotten, and whoever was in it has a minute to be back (L11, L13).
            Self::ServiceKilled(_) => 80_000,
            // Found by asking, every 30 s, and confirmed 3 s later.
            Self::WebhooksDown => 45_000,
            // The SFU needs 20 s to notice; a send that hung is tried again within half a minute.
            Self::ClientKilled | Self::HomeserverFrozen | Self::Scenario(_) => 45_000,
            Self::SfuBackAfter(_) | Self::PageReloaded => 10_000,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Round {
    trouble: Trouble,
    delay_s: u64,
    number: u64,
}

impl Round {
    fn name(self) -> String {
        format!("{} {}s {}", self.trouble.name(), self.delay_s, self.number)
    }
}

/// In the order in which they are played: the 50 random moments of each kind of outage of the service among the others.
fn rounds() -> Vec<Round> {
    let mut rounds = Vec::new();
    let mut put = |trouble, delay_s, number| {
        rounds.push(Round { trouble, delay_s, number });
    };
    let outages = [
        Trouble::ServiceFrozen,
        Trouble::ServiceKilled(Kept::InRedis),
        Trouble::ServiceKilled(Kept::InAFile),
    ];
    let others = SCENARIOS
        .into_iter()
        .map(Trouble::Scenario)
        .chain([1, 3, 20].map(Trouble::SfuBackAfter))
        .chain([
            Trouble::PageReloaded,
            Trouble::ClientKilled,
            Trouble::WebhooksDown,
            Trouble::HomeserverFrozen,
        ]);
    let mut others: Vec<_> = DELAYS_S
        .into_iter()
        .flat_map(|delay_s| others.clone().map(move |trouble| (trouble, delay_s)))
        .collect();
    others.reverse();
    for number in 0..50 {
        for outage in outages {
            // Half of the time the shortest delay, which is the hardest.
            let delay_s = DELAYS_S[[0, 1, 0, 2][usize::try_from(number % 4).expect("small")]];
            put(outage, delay_s, number);
        }
        for (trouble, delay_s) in others.split_off(others.len().saturating_sub(3)).into_iter().rev() {
            put(trouble, delay_s, 0);
        }
    }
    rounds
}

/// What was seen in a round.
#[derive(Default)]
struct Seen {
    people: usize,
    falsely: Vec<String>,
    lost: Vec<String>,
    excused: usize,
    by_timer: usize,
    /// From a departure, or the end of the trouble, to its report.
    longest_ms: u64,
    /// When what went wrong, since the people were in.
    moment_ms: u64,
}

/// All rounds whose lines are not in the file of results yet; without such a file, one round.
#[test]
fn a_round_of_the_long_run() {
    if !real_neighbours() {
        return;
    }
    let Some(file) = std::env::var_os("LK_TESTS_LONG") else {
        let round = Round {
            trouble: Trouble::ServiceKilled(Kept::InAFile),
            delay_s: 18,
            number: 0,
        };
        let Ok(seen) = play(round) else { return };
        assert!(seen.falsely.is_empty() && seen.lost.is_empty(), "{}", seen.text());
        return;
    };
    note_panics();
    lateness::measure();
    all_of_them(Path::new(&file));
}

thread_local! {
    /// Message and place of this thread's first panic.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

fn note_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANIC.with_borrow_mut(|noted| {
            if noted.is_empty() {
                *noted = info.to_string();
            }
        });
        usual(info);
    }));
}

fn all_of_them(file: &Path) {
    let known = std::fs::read_to_string(file).unwrap_or_default();
    let known: HashSet<_> = known.lines().filter_map(|line| line.split('\t').next()).collect();
    let wanted = std::env::var("LK_TESTS_LONG_ROUNDS").unwrap_or_default();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.split_whitespace().any(|word| name.contains(word));
    let rounds = rounds().into_iter().map(|round| (round, round.name()));
    let rounds: Vec<_> = rounds
        .filter(|(_, name)| !known.contains(name.as_str()) && is_wanted(name))
        .collect();
    let results = Mutex::new(
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(file)
            .expect("the file of results"),
    );
    let stacks = std::env::var("LK_TESTS_LONG_STACKS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(STACKS);
    let minutes = std::env::var("LK_TESTS_LONG_MINUTES").ok().and_then(|n| n.parse().ok());
    let end = minutes.map(|minutes: u64| now_ms() + minutes * 60_000);
    let (next, playing, bad) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
    say(&format!("{} rounds, at most {stacks} side by side", rounds.len()));
    std::thread::scope(|scope| {
        for _ in 0..stacks {
            scope.spawn(|| {
                loop {
                    let others = enters(&playing, end);
                    let Some((round, name)) = rounds.get(next.fetch_add(1, Relaxed)).filter(|_| others.is_some()) else {
                        return;
                    };
                    let is_good = plays(*round, name, others.unwrap_or_default() + 1, &results);
                    bad.fetch_add(usize::from(!is_good), Relaxed);
                    playing.fetch_sub(1, Relaxed);
                }
            });
        }
    });
    assert_eq!(bad.into_inner(), 0, "rounds that went wrong; the file of results names them");
}

/// Waits until there may be one more stack; how many others there are. A machine on which the judge itself is late has enough of them.
fn enters(playing: &AtomicUsize, end: Option<u64>) -> Option<usize> {
    // One by one: the load of a stack shows after its start.
    static DOOR: Mutex<()> = Mutex::new(());
    let _one = DOOR.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if end.is_some_and(|end| now_ms() >= end) {
            return None;
        }
        sleep_s(5.0);
        if playing.load(Relaxed) == 0 || lateness_since(now_ms() - 5_000) < LATE_MS {
            return Some(playing.fetch_add(1, Relaxed));
        }
    }
}

/// Whether it went well.
fn plays(round: Round, name: &str, stacks: usize, results: &Mutex<File>) -> bool {
    let began = now_ms();
    let played = catch_unwind(AssertUnwindSafe(|| play(round))).map_err(|_| PANIC.take());
    let (outcome, rest) = match played {
        Ok(Err(Void(why))) => {
            say(&format!("{name}: shows nothing: {why}"));
            return true;
        }
        Ok(Ok(seen)) if seen.falsely.is_empty() && seen.lost.is_empty() => ("ok", seen.text()),
        Ok(Ok(seen)) => ("WRONG", seen.text()),
        Err(why) => ("FAILED", why.split_whitespace().collect::<Vec<_>>().join(" ")),
    };
    let line = format!(
        "{name}\t{outcome}\tstacks {stacks}, took {} s, judge late by {} ms\t{rest}\n",
        (now_ms() - began) / 1000,
        lateness_since(began)
    );
    say(line.trim_end());
    let written = results.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
    written.expect("the file of results");
    outcome == "ok"
}

fn play(round: Round) -> Result<Seen, Void> {
    lateness::measure();
    match round.trouble {
        Trouble::ServiceFrozen | Trouble::ServiceKilled(_) | Trouble::ClientKilled | Trouble::WebhooksDown | Trouble::HomeserverFrozen => {
            Ok(a_call(round))
        }
        Trouble::Scenario(scenario) => Ok(a_scenario(round, scenario)),
        Trouble::SfuBackAfter(seconds) => {
            super::sfu::is_back_after(seconds, round.delay_s)?;
            Ok(Seen {
                people: 2,
                ..Seen::default()
            })
        }
        Trouble::PageReloaded => {
            super::browsers::page_is_reloaded(round.delay_s)?;
            Ok(Seen {
                people: 1,
                ..Seen::default()
            })
        }
    }
}

/// Somebody in the call.
struct Guest {
    caller: Caller,
    delayed: Delayed,
    /// When they went.
    gone: Option<u64>,
}

impl Guest {
    fn new(caller: Caller, delay_s: u64) -> Self {
        let delayed = caller.schedule(delay_s);
        Self {
            caller,
            delayed,
            gone: None,
        }
    }

    /// Judges what happened to them so far, while the service was unable to act for that time.
    fn judge(&self, unable: Option<(u64, u64)>, seen: &mut Seen) {
        let is_there = |at: u64| self.gone.is_none_or(|gone| at < gone);
        let calls = self.caller.stage.calls.of_any(&self.delayed);
        let left = self.caller.left().filter(|&at| is_there(at));
        if let Some(sent) = calls.iter().find(|call| call.action == "send" && is_there(call.at)) {
            seen.falsely
                .push(format!("{}: a leave was sent at {}: {calls:?}", self.caller.name, sent.at));
        } else if let Some(left) = left {
            let granted = calls.iter().filter(|call| call.action == "restart" && call.status == 200);
            let running_since = granted.map(|call| call.at).filter(|&at| at < left).max().unwrap_or(self.delayed.at);
            // Timers of the homeserver are late by a second at most.
            if unable.is_some_and(|(from, until)| from <= left && left <= until + 1_000)
                && left + 50 >= running_since + self.delayed.delay_ms
            {
                seen.excused += 1;
            } else {
                seen.falsely
                    .push(format!("{}: shown as gone at {left}: {calls:?}", self.caller.name));
            }
        }
    }

    /// Waits for the report of their departure.
    fn is_reported(&self, counted_from: u64, allowed_ms: u64, seen: &mut Seen) {
        let Some(gone) = self.gone else { return };
        let from = gone.max(counted_from);
        let left = loop {
            let left = self.caller.left();
            if left.is_some() || now_ms() > from + allowed_ms + lateness_since(from) {
                break left;
            }
            sleep_s(0.1);
        };
        let Some(left) = left else {
            let calls = self.caller.stage.calls.of_any(&self.delayed);
            let late = now_ms() - gone;
            seen.lost.push(format!(
                "{}: not reported {late} ms after the departure: {calls:?}",
                self.caller.name
            ));
            return;
        };
        // The proxy notes a call when it has the answer, which is after the event.
        let noted = now_ms() + 2_000;
        while now_ms() < noted {
            if self
                .caller
                .stage
                .calls
                .of(&self.delayed, "send")
                .iter()
                .any(|call| call.at <= left + 100)
            {
                seen.longest_ms = seen.longest_ms.max(left.saturating_sub(from));
                return;
            }
            sleep_s(0.01);
        }
        seen.by_timer += 1;
    }
}

impl Seen {
    fn text(&self) -> String {
        let mut text = format!(
            "people {}, false {}, lost {}, excused {}, by the timer {}, after {} ms, reported within {} ms",
            self.people,
            self.falsely.len(),
            self.lost.len(),
            self.excused,
            self.by_timer,
            self.moment_ms,
            self.longest_ms
        );
        for wrong in self.falsely.iter().chain(&self.lost) {
            let _ = write!(text, "; {wrong}");
        }
        text
    }
}

/// One that can be frozen: by one round at a time.
fn freezable() -> (&'static Synapse, &'static Mutex<()>) {
    static SYNAPSE: OnceLock<Synapse> = OnceLock::new();
    static ONE: Mutex<()> = Mutex::new(());
    (SYNAPSE.get_or_init(Synapse::start), &ONE)
}

/// What is done at some moment of a round.
enum Step {
    Begins,
    Ends,
    Leaves(usize),
    Comes(usize),
}

/// Five are in, three of them in one room; what goes wrong goes wrong at some moment within the shortest delay. One leaves shortly
/// before, one somewhere meanwhile, one comes meanwhile; in the end all leave.
fn a_call(round: Round) -> Seen {
    let Round { trouble, delay_s, .. } = round;
    let (freezable, one) = freezable_for(trouble);
    let _one = one.map(|one| one.lock().unwrap_or_else(PoisonError::into_inner));
    let redis = (trouble == Trouble::ServiceKilled(Kept::InRedis)).then(|| RedisServer::start(&[]).expect("redis-server"));
    let mut plan = Plan {
        webhooks: trouble != Trouble::WebhooksDown,
        ..Plan::default()
    };
    if let Some(synapse) = freezable {
        plan.synapse = synapse;
    }
    if let Some(redis) = &redis {
        plan = plan.env("LIVEKIT_REDIS_URL", &format!("redis://{}", redis.address()));
    }
    if trouble == Trouble::ServiceKilled(Kept::InAFile) {
        plan = plan.env("LIVEKIT_STATE_PATH", &directory("state").join("jobs").to_string_lossy());
    }
    let stage = Arc::new(Stage::new(plan));
    let (party, doomed) = (Party::start(), Party::start());
    // The last one comes later; where clients are killed, those of the second process.
    let names = ["stays", "together", "meanwhile", "alone", "before", "comes"];
    let [stays, together, meanwhile] = stage.callers([names[0], names[1], names[2]]);
    let [alone, before, comes] = [names[3], names[4], names[5]].map(|name| stage.caller(name));
    let of = |who: usize| {
        if trouble == Trouble::ClientKilled && [1, 3].contains(&who) {
            &doomed
        } else {
            &party
        }
    };
    let mut guests: Vec<Guest> = Vec::new();
    for (who, caller) in [stays, together, meanwhile, alone, before].into_iter().enumerate() {
        let guest = Guest::new(caller, delay_s);
        of(who).join(names[who], &guest.caller.token(Some(&guest.delayed)));
        guests.push(guest);
    }
    let all_in = now_ms();
    let length = trouble.length_ms(delay_s);
    let begins = all_in + random_range(1_500..18_000);
    sleep_until(begins.saturating_sub(4_000));
    let coming = Guest::new(comes, delay_s);
    let token = coming.caller.token(Some(&coming.delayed));
    guests.push(coming);

    let within = begins..begins + length.max(2_000);
    let mut steps = vec![
        (begins, Step::Begins),
        (begins + length, Step::Ends),
        (begins.saturating_sub(random_range(0..2_500)), Step::Leaves(4)),
        (random_range(within.clone()), Step::Leaves(2)),
        (random_range(within), Step::Comes(5)),
    ];
    steps.sort_by_key(|&(at, _)| at);
    let (mut began, mut ended) = (0, 0);
    for (at, step) in steps {
        sleep_until(at);
        match step {
            Step::Begins => {
                began = now_ms();
                match trouble {
                    Trouble::ServiceFrozen => stage.service().signal("STOP"),
                    Trouble::ServiceKilled(_) => stage.kill_service(),
                    Trouble::HomeserverFrozen => freezable.expect("one to freeze").freeze(),
                    Trouble::ClientKilled => {
                        doomed.kill();
                        [1, 3].into_iter().for_each(|who| guests[who].gone = Some(began));
                    }
                    Trouble::Scenario(_) | Trouble::SfuBackAfter(_) | Trouble::PageReloaded | Trouble::WebhooksDown => {}
                }
            }
            Step::Ends => {
                match trouble {
                    Trouble::ServiceFrozen => stage.service().signal("CONT"),
                    Trouble::ServiceKilled(_) => stage.start_service(),
                    Trouble::HomeserverFrozen => freezable.expect("one to freeze").thaw(),
                    Trouble::Scenario(_)
                    | Trouble::SfuBackAfter(_)
                    | Trouble::PageReloaded
                    | Trouble::ClientKilled
                    | Trouble::WebhooksDown => {}
                }
                ended = now_ms();
            }
            Step::Leaves(who) => {
                guests[who].gone = Some(now_ms());
                of(who).leave(names[who]);
            }
            Step::Comes(who) => {
                of(who).join(names[who], &token);
            }
        }
    }
    let mut seen = Seen {
        people: guests.len(),
        moment_ms: began - all_in,
        ..Seen::default()
    };
    let unable = (trouble == Trouble::ServiceFrozen && delay_s < 30).then_some((began, ended));
    let allowed_ms = trouble.allowed_ms();
    for guest in &guests {
        guest.is_reported(ended, allowed_ms, &mut seen);
    }
    // What was left of a short delay then is over.
    sleep_until(ended + 20_000);
    for guest in &guests {
        guest.judge(unable, &mut seen);
    }
    let is_shown: Vec<_> = guests
        .iter()
        .map(|guest| guest.gone.is_none() && guest.caller.left().is_none())
        .collect();
    let staying: Vec<_> = (0..guests.len()).filter(|&who| is_shown[who]).collect();
    for &who in &staying {
        guests[who].gone = Some(now_ms());
        of(who).leave(names[who]);
    }
    for &who in &staying {
        let allowed_ms = if trouble == Trouble::WebhooksDown { allowed_ms } else { 10_000 };
        guests[who].is_reported(0, allowed_ms, &mut seen);
    }
    for &who in &staying {
        guests[who].judge(None, &mut seen);
    }
    dump_where_wrong(&stage, round, &seen);
    seen
}

fn freezable_for(trouble: Trouble) -> (Option<&'static Synapse>, Option<&'static Mutex<()>>) {
    if trouble == Trouble::HomeserverFrozen {
        let (synapse, one) = freezable();
        (Some(synapse), Some(one))
    } else {
        (None, None)
    }
}

fn dump_where_wrong(stage: &Stage, round: Round, seen: &Seen) {
    if !seen.falsely.is_empty() || !seen.lost.is_empty() {
        stage.dump(&round.name().replace(' ', "-"));
    }
}

/// A browser and another client in one room. Whoever livekit-client gives up has left, as far as the SFU can tell.
fn a_scenario(round: Round, scenario: &str) -> Seen {
    let stage = Arc::new(Stage::new(Plan::default()));
    let (party, tab) = (Party::start(), Browser::shared().open());
    let mut guests = stage.callers(["browser", "beside"]).map(|caller| Guest::new(caller, round.delay_s));
    tab.join(&guests[0].caller.token(Some(&guests[0].delayed)));
    party.join("beside", &guests[1].caller.token(Some(&guests[1].delayed)));
    let all_in = now_ms();
    sleep_s(f64::from(random_range(1_500_u32..9_000)) / 1000.0);
    let began = tab.simulate(scenario);
    let mut seen = Seen {
        people: 2,
        moment_ms: began - all_in,
        ..Seen::default()
    };
    sleep_until(began + 25_000);
    let state = settled(&tab);
    if state == "disconnected" {
        guests[0].gone = Some(given_up(&tab, &guests[0].caller, began));
        guests[0].is_reported(0, round.trouble.allowed_ms(), &mut seen);
    }
    guests.iter().for_each(|guest| guest.judge(None, &mut seen));
    // One who still tries (there is no TURN for force-tls) is there and not there: found missing by asking.
    let allowed_ms = if state == "connected" { 10_000 } else { round.trouble.allowed_ms() };
    if guests[0].gone.is_none() {
        guests[0].gone = Some(now_ms());
        tab.leave();
    }
    guests[1].gone = Some(now_ms());
    party.leave("beside");
    tab.close();
    for guest in &guests {
        guest.is_reported(0, allowed_ms, &mut seen);
        guest.judge(None, &mut seen);
    }
    dump_where_wrong(&stage, round, &seen);
    seen
}

/// livekit-client's word for it, when it is back or has given up; or after half a minute.
fn settled(tab: &Tab) -> String {
    let end = now_ms() + 30_000;
    loop {
        let (state, _) = tab.state();
        if ["connected", "disconnected"].contains(&state.as_str()) || now_ms() > end {
            return state;
        }
        sleep_s(0.05);
    }
}

/// When the tab's client gave up, or the SFU told that it went and did not come back.
fn given_up(tab: &Tab, caller: &Caller, since: u64) -> u64 {
    let told = caller.stage.notices.all();
    let mut of_them = told
        .iter()
        .filter(|notice| notice.identity == caller.identity && notice.at >= since);
    let last = of_them.rfind(|notice| matches!(notice.event.as_str(), "participant_left" | "participant_joined"));
    let told = last.filter(|notice| notice.event == "participant_left").map(|notice| notice.at);
    let disconnected = tab.wait_event("Disconnected", since, Duration::from_secs(5));
    let by_itself = disconnected["at"].as_u64().expect("at");
    told.map_or(by_itself, |told| told.min(by_itself))
}

#[test]
fn every_kind_of_trouble_meets_every_delay_in_the_long_run() {
    let rounds = rounds();
    let names: HashSet<_> = rounds.iter().map(|round| round.name()).collect();
    assert_eq!(names.len(), rounds.len(), "a round has no name of its own");
    assert_eq!(rounds.len(), 3 * 50 + 3 * (SCENARIOS.len() + 3 + 4));
}
