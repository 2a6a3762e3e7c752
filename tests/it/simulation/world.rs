//! The world of a story: neighbours, clients, and the process around the core, on one clock that jumps from one moment to the next.
//! Moments are milliseconds since the world began; the process has a clock of its own, which may stand still.

use super::homeserver::{Event, Fate, Homeserver};
use super::judge::{Departure, Person, Sample, Stay};
use super::sfu::{Guest, Sfu, WALL};
use super::story::{Chance, Happening, Story, covered};
use lk_jwt_service::internals::backoff::READ_AFTER_SECONDS;
use lk_jwt_service::internals::core::{
    Action, CLOCK_CHECK_INTERVAL_MS, Core, Delegation, Fact, RESTORE_TIMEOUT, SUSPENDED_AFTER_MS, Settings,
};
use lk_jwt_service::internals::delayed_event::{DelayedEventAction, Outcome};
use lk_jwt_service::internals::delayed_leave::{Delegated, FinishReason, Handover, HomeserverId, LeaveId, Phase};
use lk_jwt_service::internals::livekit::{Answer, DisconnectReason, ParticipantRow, Reach, RoomRow};
use lk_jwt_service::internals::presence::{self, EventKind, ParticipantId, Question, RoomId, SfuEvent};
use lk_jwt_service::internals::store::{JobRecord, field};
use lk_jwt_service::internals::time::{Delay, Time, WallClock};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

const GRACE_MS: u64 = 10_000;
/// When livekit-client tries again after the SFU was lost.
const ATTEMPTS: [u64; 7] = [300, 600, 2_000, 5_000, 11_000, 19_000, 26_000];

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Trouble {
    WebhooksOff,
    WebhooksLossy,
    WebhooksLate,
    WebhooksTwice,
    SfuDown,
    SfuHangs,
    SfuErrors,
    SfuHalfDead,
    SfuRefusesLists,
    SfuLossy,
    SfuSlow,
    HomeserverDown(usize),
    HomeserverPage(usize),
    HomeserverHint(usize),
    HomeserverHangs(usize),
    HomeserverSlow(usize),
    StoreAway,
    /// Away, and back without anything.
    StoreEmpty,
    ProcessDown,
    ProcessFrozen,
    /// Its clock stands still, too.
    ProcessSuspended,
    /// The wall clock was set: what that leads to goes on for a while.
    ClockSet,
    /// Somebody deleted a room.
    RoomDeleted,
}

impl Trouble {
    pub(super) const fn of_webhooks(self) -> bool {
        matches!(
            self,
            Self::WebhooksOff | Self::WebhooksLossy | Self::WebhooksLate | Self::WebhooksTwice
        )
    }

    pub(super) const fn of_sfu(self) -> bool {
        matches!(
            self,
            Self::SfuDown | Self::SfuHangs | Self::SfuErrors | Self::SfuHalfDead | Self::SfuRefusesLists | Self::SfuLossy | Self::SfuSlow
        )
    }

    pub(super) const fn of_process(self) -> bool {
        matches!(self, Self::ProcessDown | Self::ProcessFrozen | Self::ProcessSuspended)
    }

    pub(super) fn of_homeserver(self, homeserver: usize) -> bool {
        [
            Self::HomeserverDown(homeserver),
            Self::HomeserverPage(homeserver),
            Self::HomeserverHint(homeserver),
            Self::HomeserverHangs(homeserver),
            Self::HomeserverSlow(homeserver),
        ]
        .contains(&self)
    }
}

/// A span of some trouble.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spell {
    pub(super) what: Trouble,
    pub(super) from: u64,
    pub(super) until: u64,
}

/// A webhook, told or to be told.
#[derive(Clone, Debug)]
struct Told {
    kind: EventKind,
    digest: u64,
    issued_at: i64,
    id: u64,
    created_at: i64,
    room: String,
    room_sid: String,
    who: Option<usize>,
    sid: String,
    joined_at_ms: u64,
    sent: u64,
}

/// What a client does next.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// With a new event or the one at hand; the request is held for so long.
    Delegate {
        same: bool,
        held: u64,
    },
    /// The request has been held: the checks are done. When the process took it, if it did, by its own clock, too.
    Arrive {
        event: usize,
        taken: Option<(u64, Time)>,
    },
    /// Connects to the SFU, and has media so much later. Whoever has just asked for a token finds the room open.
    Enter {
        ice: u64,
        opens: bool,
    },
    Activate,
    /// The SFU notices that it is gone.
    Noticed(DisconnectReason),
    Retry(usize),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Client {
    #[default]
    Away,
    Connecting,
    Inside,
    Retrying,
    Vanished,
}

/// What reaches the process.
#[derive(Clone, Debug)]
enum Input {
    Participant(usize, ParticipantId, Time, u64, Answer<Option<Guest>>),
    Participants(String, RoomId, Time, u64, Answer<BTreeMap<String, Guest>>),
    Rooms(Vec<RoomId>, Vec<String>, Time, Answer<Vec<(String, String, u32)>>),
    Created(RoomId, Answer<(String, String)>),
    Probed(Reach),
    Closed,
    Called {
        event: usize,
        leave: LeaveId,
        homeserver: HomeserverId,
        action: DelayedEventAction,
        sent: Time,
        served: u64,
        outcome: Outcome,
    },
    Kicked(usize),
}

#[derive(Clone, Debug)]
enum Due {
    Happens(Happening),
    Client {
        who: usize,
        generation: u64,
        step: Step,
    },
    SfuServes {
        epoch: u64,
        question: Question,
        about: Vec<String>,
        asked: u64,
    },
    Arrives {
        epoch: u64,
        input: Input,
    },
    HomeserverServes {
        epoch: u64,
        event: usize,
        leave: LeaveId,
        homeserver: HomeserverId,
        action: DelayedEventAction,
        sent: Time,
    },
    Webhook {
        told: Told,
        tries: u32,
    },
    Fires {
        event: usize,
    },
    Written {
        epoch: u64,
    },
    Wakes {
        epoch: u64,
        suspended: u64,
    },
    Starts {
        epoch: u64,
    },
    Restores {
        epoch: u64,
    },
    Opens {
        epoch: u64,
    },
    Ends {
        epoch: u64,
        down: u64,
    },
    PutAgain,
    /// The store is read again, unless another sequence of readings has begun.
    Reads {
        epoch: u64,
        sequence: u64,
        was_away: bool,
    },
    /// A record that a reading has found.
    Found {
        epoch: u64,
        key: (String, String),
        value: String,
    },
    ReadingEnds {
        epoch: u64,
        was_away: bool,
    },
    StoreIsBack,
    /// Another instance looks after an event.
    Elsewhere {
        event: usize,
        until: u64,
    },
    RoomsExpire,
    Check {
        who: usize,
        stay: usize,
    },
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Gate {
    Restoring,
    Open,
    Stopping,
}

/// The process around the core: what the driver does.
struct Process {
    epoch: u64,
    core: Core,
    began: u64,
    suspended: u64,
    armed: Option<Time>,
    clocks: WallClock,
    gate: Gate,
    runs: bool,
    stopped: Option<u64>,
    frozen: bool,
    /// What came while it was frozen.
    inbox: Vec<Due>,
    last_date: Option<(i64, Time)>,
    unwritten: BTreeMap<(String, String), Option<JobRecord<'static>>>,
    writing: bool,
    /// Sequences of readings that have begun, readings that are not over, and what was changed since they began.
    sequence: u64,
    readings: usize,
    touched: BTreeSet<(String, String)>,
    probed: bool,
    /// Questions that were asked and not answered, by whom or which room they are about.
    asked: Vec<(String, Time)>,
    /// When a clock of the SFU's was first heard of.
    knows_clock: bool,
}

pub(super) struct World {
    pub(super) now: u64,
    pub(super) story: Story,
    pub(super) people: Vec<Person>,
    pub(super) events: Vec<Event>,
    pub(super) spells: Vec<Spell>,
    pub(super) sfu: Sfu,
    pub(super) homeservers: Vec<Homeserver>,
    chance: Chance,
    agenda: BTreeMap<(u64, u64), Due>,
    serial: u64,
    process: Process,
    wall_offset: i64,
    /// Values by room and identity.
    disk: BTreeMap<(String, String), String>,
    history: Vec<Told>,
    /// When the last webhook of each room arrives.
    queues: BTreeMap<String, u64>,
    tells: bool,
    pub(super) steps: u64,
    /// Records of other instances that were taken in.
    pub(super) taken_in: u64,
    settings: Settings,
}

impl Process {
    fn new(epoch: u64, settings: Settings, seed: u64, now: u64, wall: i64) -> Self {
        Self {
            epoch,
            core: Core::new(settings, seed, Time::START),
            began: now,
            suspended: 0,
            armed: None,
            clocks: WallClock::new(Time::START, wall),
            gate: Gate::Restoring,
            runs: true,
            stopped: None,
            frozen: false,
            inbox: Vec::new(),
            last_date: None,
            unwritten: BTreeMap::new(),
            writing: false,
            sequence: 0,
            readings: 0,
            touched: BTreeSet::new(),
            probed: false,
            asked: Vec::new(),
            knows_clock: false,
        }
    }
}

macro_rules! tell {
    ($world:expr, $($what:tt)*) => {
        if $world.tells {
            eprintln!("{:>9.3}  {}", $world.now as f64 / 1_000.0, format!($($what)*));
        }
    };
}

impl World {
    pub(super) fn new(story: Story, tells: bool) -> Self {
        let settings = Settings {
            presence: presence::Settings {
                sweep_ms: Some(story.sweep_ms).filter(|_| story.sweeps),
                list_rooms_ms: presence::Settings::default().list_rooms_ms.filter(|_| story.watches_rooms),
            },
            ..Settings::default()
        };
        let seed = story.seed;
        let mut world = Self {
            now: 0,
            people: story.people.iter().map(|_| Person::default()).collect(),
            events: Vec::new(),
            spells: Vec::new(),
            sfu: Sfu::new(story.nodes.clone()),
            homeservers: story.limiters.iter().copied().map(Homeserver::new).collect(),
            chance: Chance::new(seed ^ 0x5eed),
            agenda: BTreeMap::new(),
            serial: 0,
            process: Process::new(0, settings, seed, 0, WALL),
            wall_offset: 0,
            disk: BTreeMap::new(),
            history: Vec::new(),
            queues: BTreeMap::new(),
            tells,
            steps: 0,
            taken_in: 0,
            settings,
            story,
        };
        tell!(world, "{:#?}", world.story.people);
        let happenings = world.story.happenings.clone();
        for (at, happening) in happenings {
            world.at(at, Due::Happens(happening));
        }
        world.at(5, Due::Restores { epoch: 0 });
        world.will_read(false);
        world.act(Vec::new());
        world
    }

    // --- time ---

    fn at(&mut self, at: u64, due: Due) {
        self.serial += 1;
        self.agenda.insert((at.max(self.now), self.serial), due);
    }

    fn after(&mut self, millis: u64, due: Due) {
        self.at(self.now + millis, due);
    }

    /// The process's clock.
    fn mono(&self) -> Time {
        Time::START.after(self.now - self.process.began - self.process.suspended)
    }

    fn wall(&self) -> WallClock {
        WallClock::new(self.mono(), WALL + i64::try_from(self.now).unwrap() + self.wall_offset)
    }

    fn when(&self, time: Time) -> u64 {
        (self.process.began + self.process.suspended + time.as_millis()).saturating_sub(Time::START.as_millis())
    }

    pub(super) fn run_until(&mut self, until: u64) {
        let mut spins = 0;
        loop {
            let running = self.process.runs && !self.process.frozen;
            let timer = self.process.armed.filter(|_| running).map(|at| self.when(at));
            let due = self.agenda.first_key_value().map(|(&(at, _), _)| at);
            let Some(next) = [timer, due].into_iter().flatten().min().filter(|&next| next <= until) else {
                break;
            };
            let next = next.max(self.now);
            spins = if next == self.now { spins + 1 } else { 0 };
            assert!(spins < 20_000, "no progress: {timer:?}");
            self.now = next;
            if due.is_some_and(|at| at <= next) {
                let (_, due) = self.agenda.pop_first().unwrap();
                self.take(due);
            } else {
                self.feed(Fact::Time);
                self.process.armed = None;
                self.rearm();
            }
            self.steps += 1;
        }
        self.now = until;
    }

    pub(super) fn has(&self, what: impl Fn(Trouble) -> bool) -> bool {
        let now = self.now;
        self.spells
            .iter()
            .any(|spell| what(spell.what) && spell.from <= now && now < spell.until)
    }

    pub(super) fn spell(&mut self, what: Trouble, length: u64) {
        let (from, until) = (self.now, self.now + length);
        self.spells.push(Spell { what, from, until });
    }

    fn take(&mut self, due: Due) {
        match due {
            Due::Happens(happening) => self.happen(happening),
            Due::Client { who, generation, step } => {
                if self.people[who].generation == generation {
                    self.client(who, step);
                }
            }
            Due::SfuServes {
                epoch,
                question,
                about,
                asked,
            } => self.sfu_serves(epoch, question, about, asked),
            Due::Arrives { epoch, .. } if epoch != self.process.epoch || !self.process.runs => {}
            Due::Arrives { .. } if self.process.frozen => self.process.inbox.push(due),
            Due::Arrives { input, .. } => self.input(input),
            Due::HomeserverServes {
                epoch,
                event,
                leave,
                homeserver,
                action,
                sent,
            } => {
                let outcome = self.homeserver_serves(event, action);
                let (outcome, after) = match outcome {
                    Some(outcome) => (outcome, self.homeserver_latency(event)),
                    None => (Outcome::Transient(None), 29_990),
                };
                let input = Input::Called {
                    event,
                    leave,
                    homeserver,
                    action,
                    sent,
                    served: self.now,
                    outcome,
                };
                self.after(after, Due::Arrives { epoch, input });
            }
            Due::Webhook { .. } if self.process.frozen => self.process.inbox.push(due),
            Due::Webhook { told, tries } => self.webhook(told, tries),
            Due::Fires { event } => self.fires(event),
            Due::Written { epoch } => {
                if epoch == self.process.epoch && self.process.runs {
                    self.write();
                }
            }
            Due::Wakes { epoch, .. } if epoch != self.process.epoch => {}
            Due::Wakes { suspended, .. } => {
                self.process.frozen = false;
                self.process.suspended += suspended;
                tell!(self, "the process wakes");
                let mut inbox = std::mem::take(&mut self.process.inbox);
                while !inbox.is_empty() {
                    let any = usize::try_from(self.chance.between(0, inbox.len() as u64 - 1)).unwrap();
                    let due = inbox.swap_remove(any);
                    self.after(0, due);
                }
            }
            Due::Starts { epoch } => {
                if epoch == self.process.epoch {
                    self.start();
                }
            }
            Due::Restores { epoch } => {
                if epoch == self.process.epoch && self.process.runs {
                    self.restore();
                }
            }
            Due::Opens { epoch } => {
                if epoch == self.process.epoch && self.process.gate == Gate::Restoring {
                    self.process.gate = Gate::Open;
                }
            }
            Due::Ends { epoch, down } => {
                if epoch == self.process.epoch {
                    self.ends(down);
                }
            }
            Due::PutAgain => self.put_again(),
            Due::Reads { epoch, sequence, .. } if (epoch, sequence) != (self.process.epoch, self.process.sequence) => {}
            Due::Found { epoch, .. } | Due::ReadingEnds { epoch, .. } if epoch != self.process.epoch || !self.process.runs => {}
            // In order.
            Due::Reads { .. } | Due::Found { .. } | Due::ReadingEnds { .. } | Due::StoreIsBack if self.process.frozen => {
                self.after(50, due);
            }
            Due::Reads { was_away, .. } => self.read(was_away),
            Due::Found { key, value, .. } => self.found(&key, &value),
            Due::ReadingEnds { was_away, .. } => self.reading_ends(was_away),
            Due::StoreIsBack => {
                if self.process.runs {
                    self.will_read(true);
                }
            }
            Due::Elsewhere { event, until } => self.elsewhere(event, until),
            Due::RoomsExpire => self.expire_rooms(),
            Due::Check { who, stay } => self.check_departure(who, stay),
        }
    }

    /// Looks at a departure again at that moment.
    pub(super) fn check_at(&mut self, at: u64, who: usize, stay: usize) {
        self.at(at, Due::Check { who, stay });
    }

    // --- what happens ---

    fn happen(&mut self, happening: Happening) {
        tell!(self, "* {happening:?}");
        match happening {
            Happening::Join { who, early, ice } => {
                if matches!(self.people[who].client, Client::Away | Client::Vanished) {
                    let entry = u64::try_from(early.max(0)).unwrap();
                    let delegation = u64::try_from((-early).max(0)).unwrap();
                    self.begin(who, Client::Connecting);
                    self.step(who, delegation, Step::Delegate { same: false, held: 0 });
                    self.step(who, entry, Step::Enter { ice, opens: true });
                }
            }
            Happening::Leave { who, reason, itself } => {
                if self.people[who].client != Client::Away {
                    self.begin(who, Client::Away);
                    self.leaves_sfu(who, reason, Departure::Told);
                    if itself {
                        for event in self.events.iter_mut().filter(|event| event.who == who && event.is_running()) {
                            event.fate = Fate::Ended(self.now);
                        }
                    }
                }
            }
            Happening::Vanish { who, noticed } => {
                if self.people[who].client == Client::Inside {
                    self.begin(who, Client::Vanished);
                    self.step(who, noticed, Step::Noticed(DisconnectReason::ConnectionTimeout));
                }
            }
            Happening::Reload { who, goodbye, gap } => {
                if self.people[who].client == Client::Inside {
                    self.begin(who, Client::Connecting);
                    if goodbye {
                        self.leaves_sfu(who, DisconnectReason::ClientInitiated, Departure::Told);
                    }
                    self.step(who, gap, Step::Delegate { same: false, held: 0 });
                    self.step(who, gap + 80, Step::Enter { ice: 250, opens: true });
                }
            }
            Happening::Resume { who, reason, gap } => {
                if self.people[who].client == Client::Inside {
                    self.begin(who, Client::Connecting);
                    if gap > 0 {
                        self.leaves_sfu(who, reason, Departure::Told);
                    }
                    self.step(who, gap, Step::Enter { ice: 40, opens: false });
                }
            }
            Happening::Delegate { who, same, held } => {
                if self.people[who].client != Client::Vanished {
                    self.step(who, 0, Step::Delegate { same, held });
                }
            }
            Happening::Abort { who, reason, after } => {
                if self.people[who].client == Client::Away {
                    self.begin(who, Client::Connecting);
                    self.step(who, 0, Step::Delegate { same: false, held: 0 });
                    self.step(
                        who,
                        100,
                        Step::Enter {
                            ice: 3_600_000,
                            opens: true,
                        },
                    );
                    self.step(who, 100 + after, Step::Noticed(reason));
                }
            }
            Happening::Kick { who } => {
                self.begin(who, Client::Away);
                self.leaves_sfu(who, DisconnectReason::ParticipantRemoved, Departure::Told);
                // Who was removed from the Matrix room has no membership that could be ended.
                for event in self.events.iter_mut().filter(|event| event.who == who) {
                    (event.delegated, event.elsewhere) = (None, None);
                }
                let epoch = self.process.epoch;
                self.after(
                    5,
                    Due::Arrives {
                        epoch,
                        input: Input::Kicked(who),
                    },
                );
            }
            Happening::Again { who, same_token } => {
                // One whose token has been issued.
                let now = self.now;
                let elapsed = |told: &Told| i64::try_from((now - told.sent) / 1_000).unwrap();
                let of = |told: &&Told| told.who == Some(who) && told.issued_at <= told.created_at + elapsed(told);
                if let Some(mut told) = self.history.iter().rfind(of).cloned() {
                    if !same_token {
                        self.serial += 1;
                        told.digest = self.serial;
                        told.issued_at = told.created_at + elapsed(&told);
                    }
                    self.after(1, Due::Webhook { told, tries: 9 });
                }
            }
            Happening::DeleteRoom { who, told } => self.delete_room(who, told),
            Happening::SfuRestart { down, told } => self.restart_sfu(down, told),
            Happening::Kill { down } => {
                if self.process.runs && !self.process.frozen {
                    self.kill(down);
                }
            }
            Happening::Stop { down } => {
                if self.process.runs && !self.process.frozen && self.process.gate == Gate::Open {
                    self.process.gate = Gate::Stopping;
                    self.process.stopped = Some(self.now);
                    self.spell(Trouble::ProcessDown, GRACE_MS);
                    self.feed(Fact::Stopping);
                    self.ends(down);
                }
            }
            Happening::Freeze { length, suspended } => {
                if self.process.runs && !self.process.frozen {
                    self.process.frozen = true;
                    let (what, suspended) = if suspended {
                        (Trouble::ProcessSuspended, length)
                    } else {
                        (Trouble::ProcessFrozen, 0)
                    };
                    self.spell(what, length);
                    let epoch = self.process.epoch;
                    self.after(length, Due::Wakes { epoch, suspended });
                }
            }
            Happening::ClockSet(by) => {
                self.wall_offset += by;
                self.spell(Trouble::ClockSet, 20_000);
            }
            Happening::FalseNo { homeserver } => self.homeservers[homeserver].deny(self.now),
            Happening::Trouble(what, length) => {
                self.spell(what, length);
                if what == Trouble::StoreEmpty {
                    self.disk.clear();
                    if !self.process.runs || self.process.gate == Gate::Restoring {
                        // A double fault: nobody knows any more what was in it.
                        self.nobody_is_known();
                    }
                    self.after(length + 50, Due::PutAgain);
                }
                if self.story.shares_store && matches!(what, Trouble::StoreAway | Trouble::StoreEmpty) {
                    self.after(length + 50, Due::StoreIsBack);
                }
            }
            Happening::JoinElsewhere { who, early, ice, watched } => {
                let is_idle = matches!(self.people[who].client, Client::Away | Client::Vanished | Client::Inside);
                if is_idle && !self.store_is_away() {
                    self.begin(who, Client::Connecting);
                    let event = self.new_event(who);
                    self.events[event].elsewhere = Some(self.now);
                    self.put_elsewhere(event);
                    let until = self.now + watched;
                    self.after(self.events[event].delay_ms / 2, Due::Elsewhere { event, until });
                    self.step(who, early, Step::Enter { ice, opens: true });
                }
            }
            Happening::RemovedElsewhere { who } => {
                if self.disk.remove(&self.key(who)).is_some() {
                    self.is_tampered_with(who);
                }
            }
            Happening::Damaged { who, with } => {
                let key = self.key(who);
                if let Some(value) = self.disk.get_mut(&key) {
                    with.clone_into(value);
                    self.is_tampered_with(who);
                }
            }
        }
        self.check_all();
    }

    // --- clients ---

    /// What a client was about to do is over.
    fn begin(&mut self, who: usize, client: Client) {
        self.people[who].generation += 1;
        self.people[who].client = client;
    }

    fn step(&mut self, who: usize, after: u64, step: Step) {
        let generation = self.people[who].generation;
        self.after(after, Due::Client { who, generation, step });
    }

    fn client(&mut self, who: usize, step: Step) {
        match step {
            Step::Delegate { same, held } => {
                let at_hand = self.people[who].events.last().copied();
                let at_hand = at_hand.filter(|&event| same && self.events[event].is_running());
                let event = at_hand.unwrap_or_else(|| self.new_event(who));
                let taken = self.runs().then(|| (self.now, self.mono()));
                self.step(who, held, Step::Arrive { event, taken });
            }
            Step::Arrive { event, taken } => self.delegate(who, event, taken),
            Step::Enter { ice, opens } => self.enter(who, ice, opens),
            Step::Activate => {
                let room = self.story.people[who].room.clone();
                let name = name(who);
                if let Some(guest) = self.sfu.rooms.get_mut(&room).and_then(|room| room.guests.get_mut(name)) {
                    guest.active = true;
                    self.people[who].is_active();
                    let guest = guest.clone();
                    self.emit(EventKind::Joined, &room, Some((who, &guest)));
                }
            }
            Step::Noticed(reason) => {
                self.people[who].client = Client::Away;
                self.leaves_sfu(who, reason, Departure::Told);
            }
            Step::Retry(n) => {
                let room = &self.story.people[who].room;
                let (up, there) = (!self.has(|what| what == Trouble::SfuDown), self.sfu.rooms.contains_key(room));
                if up && there {
                    self.people[who].client = Client::Connecting;
                    self.enter(who, 300, false);
                } else if n + 1 < ATTEMPTS.len() && (!up || self.story.people[who].stubborn) {
                    self.step(who, ATTEMPTS[n + 1] - ATTEMPTS[n], Step::Retry(n + 1));
                } else {
                    tell!(self, "{} is stranded", name(who));
                    self.begin(who, Client::Away);
                }
            }
        }
    }

    fn new_event(&mut self, who: usize) -> usize {
        let delay_ms = self.story.people[who].delay_ms;
        let event = self.events.len();
        self.events.push(Event {
            who,
            homeserver: self.story.people[who].homeserver,
            delay_ms,
            fate: Fate::Scheduled {
                fires: self.now + delay_ms,
            },
            delegated: None,
            granted: false,
            restarted: self.now,
            replaced: None,
            lost: false,
            elsewhere: None,
        });
        self.people[who].events.push(event);
        self.after(delay_ms, Due::Fires { event });
        event
    }

    fn delegate(&mut self, who: usize, event: usize, taken: Option<(u64, Time)>) {
        if !self.process.runs || self.process.frozen || self.process.gate != Gate::Open {
            // Nobody took it: the client keeps its event alive itself, and asks again.
            if self.events[event].is_running() {
                self.restarted(event);
                self.step(who, 1_000, Step::Arrive { event, taken: None });
            } else {
                self.step(who, 1_000, Step::Delegate { same: false, held: 0 });
            }
            return;
        }
        if self.process.core.presence().find(&self.story.people[who].room, name(who)).is_none() {
            self.people[who].is_not_noticed();
        }
        self.feed(Fact::Time);
        let profile = &self.story.people[who];
        let (room, user, homeserver) = (
            profile.room.clone(),
            format!("@u{}", profile.user),
            format!("hs{}", profile.homeserver),
        );
        let now = self.mono();
        // What came to a process that stood still, was down or is another one by now is taken by this one now.
        let taken = taken.filter(|&(at, _)| at >= self.process.began);
        let (arrived, arrived_here) = taken.unwrap_or((self.now, now));
        let delegation = Delegation {
            room: &room,
            identity: name(who),
            handover: Handover {
                user: &user,
                homeserver: &homeserver,
                delay_id: &format!("e{event}"),
                delay: Delay::from_millis(self.events[event].delay_ms).unwrap(),
                arrived: arrived_here,
                listed: profile.homeserver == 0,
                as_user: profile.as_user,
            },
        };
        let (delegated, actions) = self.process.core.delegate(&delegation, now).expect("there is room");
        tell!(self, "{} delegates e{event}: {delegated:?}", name(who));
        let before = self.events[event].delegated.map_or(0, |(_, arrived)| arrived);
        self.events[event].delegated = Some((self.now, arrived.max(before)));
        (self.events[event].lost, self.events[event].elsewhere) = (false, None);
        if delegated != Delegated::Overtaken {
            self.people[who].unwritten = false;
            self.events[event].replaced = None;
            let now = self.now;
            for (other, found) in self.events.iter_mut().enumerate() {
                if other != event && found.who == who && found.delegated.is_some() {
                    found.replaced.get_or_insert(now);
                }
            }
            if matches!(delegated, Delegated::New(_)) {
                self.events[event].granted = false;
            }
        } else {
            self.events[event].replaced = Some(self.now);
        }
        self.act(actions);
    }

    fn enter(&mut self, who: usize, ice: u64, opens: bool) {
        let room = self.story.people[who].room.clone();
        if self.has(|what| what == Trouble::SfuDown) {
            return self.step(who, 500, Step::Enter { ice, opens: true });
        }
        if opens && self.sfu.open(&room, self.now) {
            self.after(60_000, Due::RoomsExpire);
            self.emit(EventKind::RoomStarted, &room, None);
        }
        let Some(old) = self.sfu.enter(&room, name(who), self.now) else {
            tell!(self, "{} finds no room", name(who));
            return self.begin(who, Client::Away);
        };
        tell!(self, "{} enters {room}", name(who));
        self.people[who].client = Client::Inside;
        self.people[who].arrives(self.now, old.is_some());
        if let Some(old) = old {
            let kind = if old.active { EventKind::Left } else { EventKind::Aborted };
            self.emit(kind(DisconnectReason::DuplicateIdentity), &room, Some((who, &old)));
        }
        self.check_return(who);
        self.step(who, ice, Step::Activate);
    }

    fn leaves_sfu(&mut self, who: usize, reason: DisconnectReason, departure: Departure) {
        let room = self.story.people[who].room.clone();
        let Some(guest) = self.sfu.remove(&room, name(who), self.now) else {
            return;
        };
        self.after(20_000, Due::RoomsExpire);
        self.departs(who, departure, &guest.sid);
        let kind = if guest.active {
            EventKind::Left(reason)
        } else {
            EventKind::Aborted(reason)
        };
        self.emit(kind, &room, Some((who, &guest)));
    }

    fn departs(&mut self, who: usize, departure: Departure, sid: &str) {
        tell!(self, "{} is out: {departure:?}", name(who));
        if let Some(stay) = self.people[who].departs(self.now, departure, sid) {
            self.check_at(self.now + 500, who, stay);
        }
    }

    // --- the SFU ---

    fn expire_rooms(&mut self) {
        if !self.has(|what| what == Trouble::SfuDown) {
            for (name, room) in self.sfu.expire(self.now) {
                self.emit_of(EventKind::RoomFinished, &name, &room.sid.clone(), room.node, None);
            }
        }
    }

    fn delete_room(&mut self, who: usize, told: bool) {
        let name_of = self.story.people[who].room.clone();
        let Some(room) = self.sfu.rooms.get(&name_of).cloned() else {
            return;
        };
        self.spell(Trouble::RoomDeleted, 1_000);
        for who in 0..self.people.len() {
            if let Some(guest) = room.guests.get(name(who)) {
                self.begin(who, Client::Away);
                if told {
                    self.leaves_sfu(who, DisconnectReason::RoomDeleted, Departure::Told);
                } else {
                    self.departs(who, Departure::Told, &guest.sid);
                }
            }
        }
        self.sfu.rooms.remove(&name_of);
        if told {
            self.emit_of(EventKind::RoomFinished, &name_of, &room.sid, room.node, None);
        }
    }

    fn restart_sfu(&mut self, down: u64, told: bool) {
        let rooms = self.sfu.rooms.clone();
        self.sfu.restart();
        self.spell(Trouble::SfuDown, down);
        for (room, found) in rooms {
            for who in 0..self.people.len() {
                let Some(guest) = found.guests.get(name(who)).filter(|_| self.story.people[who].room == room) else {
                    continue;
                };
                if told && guest.active {
                    self.emit_of(
                        EventKind::Left(DisconnectReason::ServerShutdown),
                        &room,
                        &found.sid,
                        found.node,
                        Some((who, guest)),
                    );
                }
                self.departs(who, Departure::SfuRestart { back: self.now + down }, &guest.sid);
                if self.people[who].client == Client::Inside {
                    self.begin(who, Client::Retrying);
                    self.step(who, ATTEMPTS[0], Step::Retry(0));
                }
            }
        }
        let epoch = self.process.epoch;
        if std::mem::take(&mut self.process.probed) {
            self.after(
                1,
                Due::Arrives {
                    epoch,
                    input: Input::Closed,
                },
            );
        }
    }

    fn emit(&mut self, kind: EventKind, room: &str, about: Option<(usize, &Guest)>) {
        if let Some(found) = self.sfu.rooms.get(room) {
            let (sid, node) = (found.sid.clone(), found.node);
            self.emit_of(kind, room, &sid, node, about);
        }
    }

    fn emit_of(&mut self, kind: EventKind, room: &str, room_sid: &str, node: usize, about: Option<(usize, &Guest)>) {
        self.serial += 1;
        let late = self.has(|what| what == Trouble::WebhooksLate) && self.chance.one_in(2);
        let wait = if late { self.chance.between(500, 25_000) } else { 0 };
        // A webhook that was sent again has its first token, one that waited behind others has not.
        let queued = if late && self.chance.one_in(2) { wait } else { 0 };
        let seconds = |at| self.sfu.unix_millis(node, at).div_euclid(1_000);
        let told = Told {
            kind,
            digest: self.serial,
            id: self.serial,
            created_at: seconds(self.now),
            issued_at: seconds(self.now + queued),
            room: room.into(),
            room_sid: room_sid.into(),
            who: about.map(|(who, _)| who),
            sid: about.map(|(_, guest)| guest.sid.clone()).unwrap_or_default(),
            joined_at_ms: about.map_or(0, |(_, guest)| guest.joined_at_ms),
            sent: self.now,
        };
        self.history.push(told.clone());
        let lost =
            self.has(|what| what == Trouble::WebhooksOff) || (self.has(|what| what == Trouble::WebhooksLossy) && self.chance.one_in(3));
        let (least, most) = self.story.sfu_latency;
        let latency = self.chance.between(least, most) + self.chance.between(0, 5) + wait;
        // One queue per room, in order.
        let queue = self.queues.entry(room.to_owned()).or_default();
        *queue = (*queue).max(self.now + latency - wait);
        let latency = *queue - self.now + wait;
        if !lost {
            self.after(
                latency,
                Due::Webhook {
                    told: told.clone(),
                    tries: 0,
                },
            );
        }
        if self.has(|what| what == Trouble::WebhooksTwice) {
            let mut told = told;
            if self.chance.one_in(2) {
                self.serial += 1;
                told.digest = self.serial;
            }
            let after = latency + self.chance.between(100, 9_000);
            self.after(after, Due::Webhook { told, tries: 0 });
        }
    }

    fn webhook(&mut self, told: Told, tries: u32) {
        if !self.process.runs || self.process.gate != Gate::Open {
            let pause = 1_000 << tries.min(5);
            if self.now + pause < told.sent + 30_000 {
                self.after(pause, Due::Webhook { told, tries: tries + 1 });
            }
            return;
        }
        if let Some((seconds, at)) = self.process.last_date {
            self.feed(Fact::Date(seconds, at));
        }
        tell!(
            self,
            "webhook {:?} {} {}",
            told.kind,
            told.who.map(name).unwrap_or_default(),
            told.sid
        );
        if let Some(who) = told.who {
            let knows_clock = self.process.knows_clock;
            match told.kind {
                EventKind::Joined => {
                    let present = self.sfu_sid(who);
                    self.people[who].is_shown_by_webhook(&told.sid, present.as_deref());
                }
                EventKind::Left(reason) | EventKind::Aborted(reason) => {
                    self.people[who].is_told(&told.sid, self.now, reason.is_usually_final() && knows_clock);
                }
                EventKind::RoomStarted | EventKind::RoomFinished | EventKind::Track | EventKind::Other => {}
            }
        }
        self.process.knows_clock = true;
        self.feed(Fact::Event(&SfuEvent {
            kind: told.kind,
            digest: told.digest,
            issued_at: told.issued_at,
            id: &format!("EV_{}", told.id),
            created_at: told.created_at,
            room: &told.room,
            room_sid: &told.room_sid,
            identity: told.who.map(name).unwrap_or_default(),
            sid: &told.sid,
            joined_at_ms: told.joined_at_ms,
        }));
    }

    pub(super) fn is_told_of_nobody(&mut self) {
        self.feed(Fact::Event(&SfuEvent {
            kind: EventKind::Other,
            digest: 0,
            issued_at: 0,
            id: "",
            created_at: 0,
            room: "",
            room_sid: "",
            identity: "",
            sid: "",
            joined_at_ms: 0,
        }));
    }

    fn sfu_sid(&self, who: usize) -> Option<String> {
        let room = self.sfu.rooms.get(&self.story.people[who].room)?;
        room.guests.get(name(who)).map(|guest| guest.sid.clone())
    }

    fn ask(&mut self, question: Question) {
        let presence = self.process.core.presence();
        let (about, asked): (Vec<String>, Option<Time>) = match &question {
            Question::Participant { participant, asked, .. } => {
                let found = presence.get(*participant).map(|found| found.identity().to_owned());
                (found.into_iter().collect(), Some(*asked))
            }
            Question::Participants { room, asked, .. } => (
                presence.room_name(*room).map(ToString::to_string).into_iter().collect(),
                Some(*asked),
            ),
            Question::Rooms { rooms, asked } => {
                let names = rooms.iter().filter_map(|&room| presence.room_name(room));
                (names.map(ToString::to_string).collect(), Some(*asked))
            }
            Question::CreateRoom { room } => (presence.room_name(*room).map(ToString::to_string).into_iter().collect(), None),
            Question::Probe => (vec!["probe".to_owned()], None),
        };
        if about.is_empty() {
            return;
        }
        if let Some(asked) = asked {
            let what = if matches!(question, Question::Rooms { .. }) { "list " } else { "" };
            self.process
                .asked
                .extend(about.iter().map(|about| (format!("{what}{about}"), asked)));
        }
        let (least, most) = self.story.sfu_latency;
        let slow = self.has(|what| what == Trouble::SfuSlow);
        let latency = if slow {
            self.chance.between(300, 3_000)
        } else {
            self.chance.between(least, most)
        };
        let (epoch, now) = (self.process.epoch, self.now);
        self.after(
            latency / 2,
            Due::SfuServes {
                epoch,
                question,
                about,
                asked: now,
            },
        );
    }

    /// What the SFU, or what is before it, makes of a question. How long the answer takes then, and what comes instead of a yes.
    fn reach(&mut self, within: u64, is_list: bool) -> (u64, Answer<()>) {
        let (least, most) = self.story.sfu_latency;
        let latency = self.chance.between(least, most);
        let half = latency - latency / 2;
        if self.has(|what| what == Trouble::SfuDown) {
            return (half.min(3), Answer::Unreachable);
        }
        if self.has(|what| what == Trouble::SfuHangs) || (self.has(|what| what == Trouble::SfuLossy) && self.chance.one_in(3)) {
            return (within, Answer::TimedOut);
        }
        if self.has(|what| what == Trouble::SfuHalfDead) && self.chance.one_in(2) {
            return (half, Answer::Unreachable);
        }
        if self.has(|what| what == Trouble::SfuErrors) {
            return (half, Answer::Unclear);
        }
        if is_list && self.has(|what| what == Trouble::SfuRefusesLists) {
            return (half, Answer::Refused);
        }
        let slow = self.has(|what| what == Trouble::SfuSlow);
        let half = if slow { self.chance.between(150, 1_500) } else { half };
        if half > within {
            (within, Answer::TimedOut)
        } else {
            (half, Answer::Yes(()))
        }
    }

    fn sfu_serves(&mut self, epoch: u64, question: Question, about: Vec<String>, asked_at: u64) {
        let within = match &question {
            Question::Participant { within, .. } | Question::Participants { within, .. } => u64::try_from(within.as_millis()).unwrap(),
            Question::Rooms { .. } | Question::CreateRoom { .. } => 5_000,
            Question::Probe => 1_000,
        };
        let left = within.saturating_sub(self.now - asked_at);
        let is_list = matches!(question, Question::Participants { .. } | Question::Rooms { .. });
        let (after, reached) = self.reach(left, is_list);
        let input = match question {
            Question::Participant { participant, asked, .. } => {
                let who = who(&about[0]);
                let guest = self
                    .sfu
                    .rooms
                    .get(&self.story.people[who].room)
                    .and_then(|room| room.guests.get(&about[0]).cloned());
                Input::Participant(who, participant, asked, self.now, map(reached, |()| guest))
            }
            Question::Participants { room, asked, .. } => {
                let guests = self.sfu.rooms.get(&about[0]).map(|room| room.guests.clone()).unwrap_or_default();
                Input::Participants(about[0].clone(), room, asked, self.now, map(reached, |()| guests))
            }
            Question::Rooms { rooms, asked } => {
                let shown = about.iter().filter_map(|name| {
                    let room = self.sfu.rooms.get(name)?;
                    Some((name.clone(), room.sid.clone(), room.shown(self.now)))
                });
                let shown = shown.collect();
                Input::Rooms(rooms, about, asked, map(reached, |()| shown))
            }
            Question::CreateRoom { room } => {
                if matches!(reached, Answer::Yes(())) && self.sfu.open(&about[0], self.now) {
                    tell!(self, "{} is created again", about[0]);
                    self.after(60_000, Due::RoomsExpire);
                    self.emit(EventKind::RoomStarted, &about[0], None);
                }
                let sid = self.sfu.rooms.get(&about[0]).map(|room| room.sid.clone()).unwrap_or_default();
                Input::Created(room, map(reached, |()| (about[0].clone(), sid)))
            }
            Question::Probe => Input::Probed(reached.reach()),
        };
        self.after(after, Due::Arrives { epoch, input });
    }

    // --- the homeservers ---

    fn homeserver_latency(&mut self, event: usize) -> u64 {
        if self.has(|what| what == Trouble::HomeserverSlow(self.events[event].homeserver)) {
            return 750;
        }
        let (least, most) = self.story.homeserver_latency;
        self.chance.between(least, most) / 2
    }

    /// None where the call hangs.
    fn homeserver_serves(&mut self, event: usize, action: DelayedEventAction) -> Option<Outcome> {
        let homeserver = self.events[event].homeserver;
        if self.has(|what| what == Trouble::HomeserverHangs(homeserver)) {
            // Some get through all the same; only nobody is told.
            if self.chance.one_in(4) {
                self.effect(event, action);
            }
            return None;
        }
        if self.has(|what| [Trouble::HomeserverDown(homeserver), Trouble::HomeserverPage(homeserver)].contains(&what)) {
            return Some(Outcome::Transient(None));
        }
        if self.has(|what| what == Trouble::HomeserverHint(homeserver)) {
            return Some(Outcome::Transient(Some(Duration::from_secs(3_600))));
        }
        Some(self.effect(event, action))
    }

    fn effect(&mut self, event: usize, action: DelayedEventAction) -> Outcome {
        let found = &mut self.events[event];
        let before = found.fate;
        let user = self.story.people[found.who].user;
        let outcome = self.homeservers[found.homeserver].serve(found, user, action, self.now);
        tell!(self, "hs: {action:?} e{event}: {outcome:?}");
        if self.events[event].fate != before {
            match self.events[event].fate {
                Fate::Scheduled { fires } => self.at(fires, Due::Fires { event }),
                Fate::Cancelled(_) => self.check_cancelled(event),
                Fate::Fired(_) | Fate::Sent(_) | Fate::Ended(_) => {}
            }
        }
        outcome
    }

    /// Its own client restarts an event.
    fn restarted(&mut self, event: usize) {
        let fires = self.now + self.events[event].delay_ms;
        self.events[event].fate = Fate::Scheduled { fires };
        self.events[event].restarted = self.now;
        self.at(fires, Due::Fires { event });
    }

    fn fires(&mut self, event: usize) {
        if self.events[event].fate == (Fate::Scheduled { fires: self.now }) {
            self.events[event].fate = Fate::Fired(self.now);
            tell!(self, "hs: e{event} fires");
            self.check_fired(event);
        }
    }

    // --- the process ---

    fn rearm(&mut self) {
        let now = self.mono();
        let look = (!self.process.core.leaves().is_empty()).then(|| now.after(CLOCK_CHECK_INTERVAL_MS));
        let next = self.process.core.next_deadline();
        self.process.armed = [next, look].into_iter().flatten().min().map(|at| at.max(now));
    }

    fn feed(&mut self, fact: Fact<'_>) {
        let clocks = self.wall();
        let jumped = std::mem::replace(&mut self.process.clocks, clocks).drift_ms(&clocks);
        let now = self.mono();
        let late = self.process.armed.map_or(0, |at| now.since(at));
        let mut actions = Vec::new();
        if late > SUSPENDED_AFTER_MS || jumped.unsigned_abs() > SUSPENDED_AFTER_MS {
            tell!(self, "woke: {late} ms late, the clock jumped {jumped} ms");
            self.process.armed = None;
            actions = self.process.core.handle(Fact::Woke(u64::try_from(jumped).unwrap_or(0)), now);
        }
        actions.extend(self.process.core.handle(fact, now));
        self.act(actions);
    }

    fn input(&mut self, input: Input) {
        match input {
            Input::Participant(who, participant, asked, sampled, answer) => {
                self.answered(name(who), asked);
                self.date(&answer);
                match &answer {
                    Answer::Yes(Some(_)) => self.is_shown(who, asked, sampled),
                    Answer::Yes(None) => self.is_denied(who, asked, sampled),
                    Answer::No | Answer::Refused | Answer::TooLarge | Answer::Unclear | Answer::TimedOut | Answer::Unreachable => {}
                }
                tell!(self, "sfu: {} {answer:?}", name(who));
                let guest = if let Answer::Yes(guest) = &answer { guest.clone() } else { None };
                let nobody = &NOBODY;
                let answer = match (answer, &guest) {
                    (Answer::Yes(_), None) => Answer::No,
                    (Answer::Yes(_), Some(guest)) => Answer::Yes(row_of("", guest)),
                    (answer, None | Some(_)) => map(answer, |_| row_of("", nobody)),
                };
                self.feed(Fact::Participant(participant, asked, answer));
            }
            Input::Participants(room, id, asked, sampled, answer) => {
                self.answered(&room, asked);
                self.date(&answer);
                tell!(self, "sfu: list of {room} {answer:?}");
                if let Answer::Yes(guests) = &answer {
                    for who in 0..self.people.len() {
                        if self.story.people[who].room != room {
                        } else if guests.contains_key(name(who)) {
                            self.is_shown(who, asked, sampled);
                        } else {
                            self.is_denied(who, asked, sampled);
                        }
                    }
                }
                let guests = if let Answer::Yes(guests) = &answer {
                    guests.clone()
                } else {
                    BTreeMap::new()
                };
                let rows: Vec<_> = guests.iter().map(|(name, guest)| row_of(name, guest)).collect();
                self.feed(Fact::Participants(id, asked, map(answer, |_| &rows[..])));
            }
            Input::Rooms(ids, names, asked, answer) => {
                for room in names {
                    self.answered(&format!("list {room}"), asked);
                }
                self.date(&answer);
                tell!(self, "sfu: rooms {answer:?}");
                let shown = if let Answer::Yes(shown) = &answer {
                    shown.clone()
                } else {
                    Vec::new()
                };
                let rows: Vec<_> = shown.iter().map(|(name, sid, count)| room_row(name, sid, *count)).collect();
                self.feed(Fact::Rooms(&ids, asked, map(answer, |_| &rows[..])));
            }
            Input::Created(id, answer) => {
                self.date(&answer);
                let (name, sid) = if let Answer::Yes(created) = &answer {
                    created.clone()
                } else {
                    Default::default()
                };
                self.feed(Fact::Created(id, map(answer, |_| room_row(&name, &sid, 0))));
            }
            Input::Probed(reach) => {
                self.process.probed = reach == Reach::Answered;
                self.feed(Fact::Probed(reach));
            }
            Input::Closed => {
                tell!(self, "the probe's connection is closed");
                self.feed(Fact::ProbeClosed);
            }
            Input::Called {
                event,
                leave,
                homeserver,
                action,
                sent,
                served,
                outcome,
            } => {
                tell!(self, "answer: {action:?} e{event}: {outcome:?}");
                if action == DelayedEventAction::Restart && outcome == Outcome::Done {
                    self.events[event].granted = true;
                    self.events[event].restarted = served;
                }
                self.feed(Fact::Called {
                    leave,
                    homeserver,
                    action,
                    sent,
                    outcome,
                });
            }
            Input::Kicked(who) => {
                let room = self.story.people[who].room.clone();
                self.feed(Fact::Kicked(&room, name(who)));
            }
        }
    }

    fn answered(&mut self, about: &str, asked: Time) {
        self.process.asked.retain(|(other, at)| other != about || *at != asked);
    }

    /// Answers carry the clock of the node that gave them.
    fn date<T>(&mut self, answer: &Answer<T>) {
        if matches!(answer, Answer::Yes(_) | Answer::No) {
            let any = self.chance.between(0, 7);
            let node = self.sfu.a_node(any);
            let seconds = self.sfu.unix_millis(node, self.now).div_euclid(1_000);
            self.process.last_date = Some((seconds, self.mono()));
            self.process.knows_clock = true;
        }
    }

    fn is_shown(&mut self, who: usize, asked: Time, sampled: u64) {
        let asked_at = self.when(asked);
        self.people[who].is_shown(Sample { asked, asked_at, sampled });
    }

    fn is_denied(&mut self, who: usize, asked: Time, sampled: u64) {
        let asked_at = self.when(asked);
        self.people[who].is_denied(Sample { asked, asked_at, sampled });
    }

    fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Ask(question) => self.ask(question),
                Action::Call {
                    leave,
                    homeserver,
                    action,
                    sent,
                } => {
                    let Some(job) = self.process.core.leaves().get(leave) else {
                        // Ended by the next fact, before the call was made.
                        self.process.core.handle(
                            Fact::Called {
                                leave,
                                homeserver,
                                action,
                                sent,
                                outcome: Outcome::Forbidden,
                            },
                            self.mono(),
                        );
                        continue;
                    };
                    let event = event_of(job.delay_id());
                    let phase = job.leave().phase();
                    let as_user = self.story.people[self.events[event].who].as_user;
                    assert_eq!(job.is_as_user(), as_user, "in whose name is e{event} called about?");
                    tell!(self, "calls {action:?} e{event} {phase:?}");
                    match (action, phase) {
                        (DelayedEventAction::Send, Phase::Sending { cause, .. }) => self.check_send(event, cause),
                        (DelayedEventAction::Cancel, _) => self.check_cancel(event),
                        (DelayedEventAction::Restart, _) => self.people[self.events[event].who].is_restarted(event, self.now),
                        (DelayedEventAction::Send, phase) => panic!("e{event} is sent, but {phase:?}"),
                    }
                    let latency = self.homeserver_latency(event);
                    let epoch = self.process.epoch;
                    self.after(
                        latency,
                        Due::HomeserverServes {
                            epoch,
                            event,
                            leave,
                            homeserver,
                            action,
                            sent,
                        },
                    );
                }
                Action::Store(leave) => {
                    if let Some(record) = self.process.core.record(leave, &self.wall()) {
                        let stored = JobRecord::read(record.field().as_bytes(), record.value().as_bytes()).unwrap();
                        let key = (record.room.to_string(), record.identity.to_string());
                        self.put(key, Some(stored));
                    }
                }
                Action::Forget(room, identity) => self.put((room.to_string(), identity.to_string()), None),
                Action::Finished { delay_id, reason, .. } => {
                    tell!(self, "{delay_id} is over: {reason:?}");
                    if matches!(reason, FinishReason::JoinFailed | FinishReason::NeverJoined) {
                        // Left to the homeserver's timer, whoever comes later with another one (L2b).
                        self.events[event_of(&delay_id)].lost = true;
                    }
                    if matches!(reason, FinishReason::GivenUp | FinishReason::NotSent(_) | FinishReason::SfuSilent) {
                        self.check_given_up(event_of(&delay_id));
                    }
                }
                Action::SfuSilent(for_so_long) => tell!(self, "the SFU has been silent for {for_so_long:?}"),
                Action::Overloaded { leaves, .. } => tell!(self, "{leaves} leaves cannot be carried"),
                Action::NoWebhooks => {}
            }
        }
        let next = self.process.core.next_deadline();
        if self.process.armed.is_none() || next.is_some_and(|next| self.process.armed.is_none_or(|armed| next < armed)) {
            self.rearm();
        }
        self.check_step();
    }

    // --- the store ---

    fn put(&mut self, key: (String, String), record: Option<JobRecord<'static>>) {
        if self.process.readings > 0 {
            self.process.touched.insert(key.clone());
        }
        self.process.unwritten.insert(key, record);
        if !self.process.writing {
            self.process.writing = true;
            let (epoch, after) = (self.process.epoch, self.chance.between(0, 20));
            self.after(after, Due::Written { epoch });
        }
    }

    fn write(&mut self) {
        let epoch = self.process.epoch;
        if self.store_is_away() {
            return self.after(500, Due::Written { epoch });
        }
        self.process.writing = false;
        for (key, record) in std::mem::take(&mut self.process.unwritten) {
            match record {
                Some(record) => self.disk.insert(key, record.value()),
                None => self.disk.remove(&key),
            };
        }
    }

    /// A stopping process ends when there is nothing to wait for, or its grace is over (L12).
    fn ends(&mut self, down: u64) {
        let stopped = self.process.stopped.unwrap_or(self.now);
        let is_over = self.process.core.is_at_rest() || self.now >= stopped + GRACE_MS;
        if self.process.frozen || !is_over {
            let epoch = self.process.epoch;
            return self.after(50, Due::Ends { epoch, down });
        }
        self.write();
        self.kill(down);
    }

    fn kill(&mut self, down: u64) {
        tell!(self, "the process is gone for {down} ms");
        for who in 0..self.people.len() {
            self.is_killed(who);
        }
        self.process.runs = false;
        self.process.epoch += 1;
        self.spell(Trouble::ProcessDown, down);
        let epoch = self.process.epoch;
        self.after(down, Due::Starts { epoch });
    }

    fn nobody_is_known(&mut self) {
        self.people.iter_mut().for_each(|person| person.unwritten = true);
        self.events.iter_mut().for_each(|event| event.lost = true);
    }

    /// A double fault: what was not written when the process is killed is lost.
    fn is_killed(&mut self, who: usize) {
        let key = self.key(who);
        let record = self.stored(&key);
        // A record names what it is to replace, too, until that is cancelled (L10).
        let stored = record.as_ref().map(|record| event_of(&record.delay_id));
        let is_stored = |event: usize| {
            let arrived = |event: usize| self.events[event].delegated.map(|(_, arrived)| arrived);
            stored.is_some_and(|heir| heir == event || (self.events[event].replaced.is_some() && arrived(event) <= arrived(heir)))
        };
        let lost: Vec<_> = self.people[who].events.iter().copied().filter(|&event| !is_stored(event)).collect();
        for event in lost {
            self.events[event].lost = true;
        }
        if self.process.unwritten.contains_key(&key) || record.is_none() {
            self.people[who].unwritten = true;
        }
    }

    fn start(&mut self) {
        tell!(self, "the process starts");
        let wall = WALL + i64::try_from(self.now).unwrap() + self.wall_offset;
        let epoch = self.process.epoch;
        self.process = Process::new(epoch, self.settings, self.story.seed ^ epoch, self.now, wall);
        for person in &mut self.people {
            person.is_unknown();
        }
        let after = self.chance.between(2, 400);
        self.after(after, Due::Restores { epoch });
        self.after(u64::try_from(RESTORE_TIMEOUT.as_millis()).expect("short"), Due::Opens { epoch });
        self.will_read(false);
        self.act(Vec::new());
    }

    fn restore(&mut self) {
        let epoch = self.process.epoch;
        if self.process.frozen || self.store_is_away() {
            // A double fault: nobody can be watched of whom nothing can be read.
            self.nobody_is_known();
            return self.after(300, Due::Restores { epoch });
        }
        let keys: Vec<_> = self.disk.keys().cloned().collect();
        for key in keys {
            if let Some(record) = self.stored(&key) {
                self.take_in(&record);
            }
        }
        if self.process.gate == Gate::Restoring {
            self.process.gate = Gate::Open;
        }
    }

    fn store_is_away(&self) -> bool {
        self.has(|what| matches!(what, Trouble::StoreAway | Trouble::StoreEmpty))
    }

    fn key(&self, who: usize) -> (String, String) {
        (self.story.people[who].room.clone(), name(who).to_owned())
    }

    /// A record, where there is one that can be read.
    fn stored(&self, key: &(String, String)) -> Option<JobRecord<'static>> {
        let value = self.disk.get(key)?;
        JobRecord::read(field(&key.0, &key.1).as_bytes(), value.as_bytes()).ok()
    }

    fn put_again(&mut self) {
        let clock = self.wall();
        let lacks = |record: JobRecord<'_>| {
            let stored = self.stored(&(record.room.clone().into(), record.identity.clone().into()));
            stored.is_none_or(|stored| stored.restarted_at_ms + 1_000 < record.restarted_at_ms)
        };
        let core = &self.process.core;
        let missing = core.leaves().all().filter(|&leave| core.record(leave, &clock).is_some_and(lacks));
        let missing: Vec<_> = missing.map(Action::Store).collect();
        self.act(missing);
    }

    /// The store is read again after these times, and at once where it was away (L11).
    fn will_read(&mut self, was_away: bool) {
        if !self.story.shares_store {
            return;
        }
        self.process.sequence += 1;
        let (epoch, sequence) = (self.process.epoch, self.process.sequence);
        for seconds in READ_AFTER_SECONDS.into_iter().filter(|&seconds| was_away || seconds > 0) {
            let was_away = seconds == 0;
            self.after(seconds * 1_000, Due::Reads { epoch, sequence, was_away });
        }
    }

    fn read(&mut self, was_away: bool) {
        // A store that comes back is read anyhow.
        if self.store_is_away() || self.process.gate == Gate::Restoring {
            return;
        }
        self.process.readings += 1;
        self.process.touched.extend(self.process.unwritten.keys().cloned());
        let epoch = self.process.epoch;
        let mut last = 0;
        for (key, value) in self.disk.clone() {
            last += self.chance.between(0, 100);
            self.after(last, Due::Found { epoch, key, value });
        }
        self.after(last, Due::ReadingEnds { epoch, was_away });
    }

    fn found(&mut self, key: &(String, String), value: &str) {
        let Ok(record) = JobRecord::read(field(&key.0, &key.1).as_bytes(), value.as_bytes()) else {
            return;
        };
        if !self.process.touched.contains(key) && self.process.gate != Gate::Stopping {
            self.feed(Fact::Time);
            self.take_in(&record);
        }
    }

    fn reading_ends(&mut self, was_away: bool) {
        self.process.readings -= 1;
        if self.process.readings == 0 {
            self.process.touched.clear();
        }
        if was_away {
            self.put_again();
        }
    }

    fn take_in(&mut self, record: &JobRecord<'static>) {
        tell!(self, "reads {} {}", record.identity, record.delay_id);
        let listed = record.homeserver == "hs0";
        let key = (record.room.to_string(), record.identity.to_string());
        let before = self.current(&key);
        let (clock, now) = (self.wall(), self.mono());
        let actions = self.process.core.restore(record, false, listed, &clock, now);
        self.check_taken_in(&key, &record.delay_id, before, &actions);
        let event = event_of(&record.delay_id);
        if before.is_none()
            && let Some(arrived) = self.events[event].elsewhere.take()
        {
            // From now on it is ours.
            self.taken_in += 1;
            // Where it is not said, it was delegated when it began to run.
            let arrived = record.delegated_at_ms.map_or(self.events[event].restarted, |_| arrived);
            self.events[event].delegated = Some((self.now, arrived));
            let who = self.events[event].who;
            self.people[who].unwritten = false;
            self.people[who].is_not_noticed();
            if let Some(stay) = self.people[who].stays.len().checked_sub(1) {
                self.check_at(self.now + 500, who, stay);
            }
        }
        self.act(actions);
    }

    /// The event of this process's leave of a room and identity.
    pub(super) fn current(&self, (room, identity): &(String, String)) -> Option<usize> {
        let core = &self.process.core;
        let job = core.find(room, identity).and_then(|leave| core.leaves().get(leave));
        job.map(|job| event_of(job.delay_id()))
    }

    // --- other instances ---

    fn put_elsewhere(&mut self, event: usize) {
        let found = &self.events[event];
        let profile = &self.story.people[found.who];
        let wall = |at: u64| WALL + i64::try_from(at).unwrap() + self.wall_offset;
        let record = JobRecord {
            room: profile.room.as_str().into(),
            identity: name(found.who).into(),
            delay_id: format!("e{event}").into(),
            delay_ms: i64::try_from(found.delay_ms).unwrap(),
            homeserver: format!("hs{}", found.homeserver).into(),
            restarted_at_ms: wall(found.restarted),
            user: format!("@u{}", profile.user).into(),
            // Former versions do not say it.
            delegated_at_ms: found.elsewhere.filter(|at| at % 2 == 0).map(wall),
            as_user: profile.as_user,
            ..JobRecord::default()
        };
        let (who, value) = (found.who, record.value());
        self.disk.insert(self.key(who), value);
        self.is_tampered_with(who);
    }

    /// Restarts an event as long as it is there; whoever hears that it is gone removes the record, whatever it is about by now.
    fn elsewhere(&mut self, event: usize, until: u64) {
        if self.now > until || self.store_is_away() {
            return;
        }
        if !self.events[event].is_running() {
            let who = self.events[event].who;
            self.disk.remove(&self.key(who));
            return self.is_tampered_with(who);
        }
        let homeserver = self.events[event].homeserver;
        if self.has(|what| what.of_homeserver(homeserver) && what != Trouble::HomeserverSlow(homeserver)) {
            return self.after(500, Due::Elsewhere { event, until });
        }
        self.restarted(event);
        self.put_elsewhere(event);
        // What was replaced or is over here, and outlives that elsewhere.
        let found = &self.events[event];
        let is_open = self.process.runs && self.process.gate == Gate::Open;
        let is_over = is_open && found.delegated.is_some() && self.current(&self.key(found.who)) != Some(event);
        self.events[event].lost |= is_over || found.replaced.is_some();
        self.after(self.events[event].delay_ms / 2, Due::Elsewhere { event, until });
    }

    /// A double fault: what somebody else spoils while this process is down, nobody can read.
    fn is_tampered_with(&mut self, who: usize) {
        if !self.process.runs || self.process.gate == Gate::Restoring {
            self.is_killed(who);
        }
    }

    // --- for the judge ---

    pub(super) const fn core(&self) -> &Core {
        &self.process.core
    }

    pub(super) fn core_mut(&mut self) -> &mut Core {
        &mut self.process.core
    }

    pub(super) const fn runs(&self) -> bool {
        self.process.runs && !self.process.frozen
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.process.gate == Gate::Stopping
    }

    pub(super) fn core_now(&self) -> Time {
        self.mono()
    }

    pub(super) fn is_asked(&self, about: &str, asked: Time) -> bool {
        self.process.asked.iter().any(|(other, at)| other == about && *at == asked)
    }

    pub(super) fn is_listed(&self, room: &str) -> bool {
        self.process
            .asked
            .iter()
            .any(|(other, _)| other.strip_prefix("list ") == Some(room))
    }

    pub(super) fn questions(&self) -> usize {
        self.process.asked.len()
    }

    /// Those of this process's leaves, whose events it knows of.
    pub(super) fn records(&self) -> usize {
        let is_ours = |record: JobRecord<'_>| {
            let event = &self.events[event_of(&record.delay_id)];
            !self.story.shares_store || (event.delegated.is_some() && event.elsewhere.is_none() && !event.lost)
        };
        let ours = self
            .disk
            .keys()
            .filter_map(|key| self.stored(key))
            .filter(|record| is_ours(record.clone()));
        ours.count() + self.process.unwritten.len()
    }

    pub(super) fn trouble(&self, which: impl Fn(Trouble) -> bool, from: u64, until: u64) -> u64 {
        covered(&self.spells, which, from, until)
    }

    pub(super) fn stay_of(&self, who: usize) -> Option<&Stay> {
        self.people[who].stays.last()
    }

    /// Everybody goes home.
    pub(super) fn go_home(&mut self) {
        for who in 0..self.people.len() {
            let reason = DisconnectReason::ClientInitiated;
            self.happen(Happening::Leave {
                who,
                reason,
                itself: false,
            });
        }
    }
}

static NOBODY: Guest = Guest {
    sid: String::new(),
    joined_at_ms: 0,
    active: false,
};

pub(super) const fn name(who: usize) -> &'static str {
    [
        "u0", "u1", "u2", "u3", "u4", "u5", "u6", "u7", "u8", "u9", "u10", "u11", "u12", "u13", "u14", "u15", "u16", "u17", "u18", "u19",
    ][who]
}

fn event_of(delay_id: &str) -> usize {
    delay_id[1..].parse().unwrap()
}

fn who(name: &str) -> usize {
    name[1..].parse().unwrap()
}

fn map<T, U>(answer: Answer<T>, yes: impl FnOnce(T) -> U) -> Answer<U> {
    match answer {
        Answer::Yes(found) => Answer::Yes(yes(found)),
        Answer::No => Answer::No,
        Answer::Refused => Answer::Refused,
        Answer::TooLarge => Answer::TooLarge,
        Answer::Unclear => Answer::Unclear,
        Answer::TimedOut => Answer::TimedOut,
        Answer::Unreachable => Answer::Unreachable,
    }
}

fn row_of<'a>(identity: &'a str, guest: &'a Guest) -> ParticipantRow<'a> {
    ParticipantRow {
        identity,
        sid: &guest.sid,
        joined_at_ms: guest.joined_at_ms,
        active: guest.active,
    }
}

fn room_row<'a>(name: &'a str, sid: &'a str, num_participants: u32) -> RoomRow<'a> {
    RoomRow {
        name,
        sid,
        num_participants,
        departure_timeout: 20,
    }
}
