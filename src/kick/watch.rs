//! Who holds a token, who has left the Matrix room, and what is to be done about it. Pure.
//!
//! ```text
//!            a yes, or a checked token             a clear no, asked some seconds after it
//!  unknown ----------------------------> member ----------------------------------------> left
//!                                           ^                                               |
//!                                           +---------- a yes, or a checked token ----------+
//!
//!  unknown   never removed: the homeserver never knew them as a member
//!  left      removed at once, at every sweep, and whenever they are seen coming back
//! ```
//!
//! * What is not a clear answer changes nothing.
//! * A no removes somebody within [`FRESH`] or not at all: later, it is asked again first. It is also asked again before a
//!   removal that failed is tried again, since they may have joined the Matrix room meanwhile.
//! * Where our own homeserver is no longer in the room, it knows nothing of remote users any more, and they may well be there.
//!   Its no counts for its own users only.
//! * A seat is forgotten when its token has expired, ten minutes have passed since it was last seen (the SFU renews the
//!   tokens of those inside, for ten minutes each time), and the SFU says that nobody sits there. Somebody who was not seen
//!   leaving may have left just before that question, with a renewed token: that no only starts the ten minutes.
//! * A sweep goes through all calls in the order of their names, [`LANES`] questions at a time. The next one starts one
//!   interval after the last, at the earliest when that is through; a call is never asked about twice at the same time.
//! * There are two sweeps, each with lanes of its own: one about our homeserver's own users, and one about those of others.
//!   About these it may have to wait for other homeservers, and a hostile one must not keep our own from being removed.
//! * Calls in which nobody is known as a member are asked about ever more rarely: nothing could follow from the answer but
//!   that somebody has become one.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::name::Name;
use crate::backoff::{Jitter, Schedule};
use crate::time::Time;

/// Questions to the homeserver at a time, in each sweep, and calls to the SFU.
pub const LANES: usize = 8;
/// How long a no may be acted upon.
pub const FRESH: u64 = 20_000;
/// For how long a no does not count after a yes, at most: the processes of a homeserver may disagree for a moment.
const SETTLES: u64 = 5_000;
/// The SFU takes a token for this long after its end.
const LEEWAY: u64 = 60_000;
/// For how long the SFU renews the token of somebody inside.
const RENEWED_FOR: u64 = 10 * 60_000;
/// How long a seat is kept that might be forgotten, while the SFU does not say whether somebody sits there.
const UNCLEAR_FOR: u64 = 6 * 60 * 60_000;
/// How long a removal that fails is tried again, until the next sweep takes it up.
const RETRIED_FOR: u64 = 60_000;
/// Between two sweeps at least.
const BREATH: u64 = 1_000;
/// Calls looked at in one go.
const TURNS: usize = 1_000;
/// Bytes of all texts of a token that is kept in mind.
const MAX_TEXT: usize = 2 * 1024;
/// Sweeps of which a call without members takes part in one only: 2 to the power of this.
const IDLE: u8 = 4;

/// Bounds and intervals.
#[derive(Clone, Debug)]
pub struct Config {
    /// Milliseconds from one sweep to the next.
    pub interval: u64,
    /// The homeserver that we belong to.
    pub own: Box<str>,
    /// Tokens in all.
    pub most: usize,
    /// Tokens of one user.
    pub most_per_user: u32,
}

/// A token that was issued.
#[derive(Clone, Copy, Debug)]
pub struct Token<'a> {
    /// The Matrix room.
    pub room_id: &'a str,
    /// The Matrix user.
    pub user_id: &'a str,
    /// The room on the SFU.
    pub room: &'a str,
    /// The identity there.
    pub identity: &'a str,
    /// The end of the token.
    pub end: Time,
    /// The homeserver had said, just before, that the user is joined.
    pub checked: bool,
}

impl Token<'_> {
    const fn text_bytes(&self) -> usize {
        self.room_id.len() + self.user_id.len() + self.room.len() + self.identity.len()
    }
}

/// What is stored of it beside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Past {
    /// Whether the homeserver ever said that the user is joined.
    pub member: bool,
    /// Whether the user has left.
    pub left: bool,
    /// When somebody was last known to sit there.
    pub seen: Option<Time>,
}

/// A seat on the SFU.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key {
    /// The room.
    pub room: Name,
    /// The identity.
    pub identity: Name,
}

/// What is to be done. The answer comes back by the method that is named.
#[derive(Debug, PartialEq, Eq)]
pub enum Output {
    /// Ask the homeserver who is joined: [`Watch::answered`] any number of times, then [`Watch::over`].
    Ask(Question),
    /// Ask the SFU who is in a room: [`Watch::listed`].
    List(Name),
    /// Ask the SFU whether somebody is there: [`Watch::got`].
    Get(Key),
    /// Remove somebody: [`Watch::removed`]. To be done at once or not at all.
    Remove(Key),
    /// Store this seat as it is now.
    Persist(Key),
    /// Remove it from the store.
    Forget(Key),
}

/// A question to the homeserver.
#[derive(Debug, PartialEq, Eq)]
pub struct Question {
    /// What for.
    pub about: About,
    /// The Matrix room.
    pub room_id: Arc<str>,
    /// Those who hold tokens for it.
    pub people: Vec<Person>,
}

/// What a question is for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum About {
    /// All of these who hold tokens for this room.
    All(Name, Whose),
    /// One who came back, or whose removal failed.
    One(Key, Whose),
}

/// Whose users.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Whose {
    /// Our homeserver's.
    Own,
    /// Another one's.
    Other,
}

impl Whose {
    const BOTH: [Self; 2] = [Self::Own, Self::Other];
}

impl About {
    const fn room(&self) -> &Name {
        match self {
            Self::All(room, _) | Self::One(Key { room, .. }, _) => room,
        }
    }

    const fn whose(&self) -> Whose {
        match self {
            Self::All(_, whose) | Self::One(_, whose) => *whose,
        }
    }
}

/// Somebody who holds a token.
#[derive(Debug, PartialEq, Eq)]
pub struct Person {
    /// The user.
    pub user_id: Arc<str>,
    /// A no counts only if our homeserver is in the room: ask that, too, before it is handed over.
    pub doubtful: bool,
}

/// A clear answer of the homeserver about one user.
#[derive(Clone, Copy, Debug)]
pub struct Said {
    /// Whether they are joined.
    pub joined: bool,
    /// When the question was asked.
    pub asked: Time,
}

/// What became of a removal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// They were there.
    Removed,
    /// They were not.
    NotThere,
    /// It may work soon.
    Failed,
    /// It will not work soon.
    Refused,
}

/// What is stored of a seat.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The Matrix room.
    pub room_id: Arc<str>,
    /// The Matrix user.
    pub user_id: Arc<str>,
    /// The end of the token.
    pub end: Time,
    /// The rest.
    pub past: Past,
}

/// All tokens that are kept in mind.
#[derive(Debug)]
pub struct Watch {
    config: Config,
    jitter: Jitter,
    began: Time,
    calls: BTreeMap<Name, Call>,
    /// How many seats each user has.
    users: HashMap<Arc<str>, u32>,
    seats: usize,
    /// By [`Whose`].
    sweeps: [Sweep; 2],
    /// The first sweep was brought forward, for those who were restored.
    hurries: bool,
    /// Those who are dealt with apart from sweeps.
    singles: BTreeMap<Key, Single>,
    /// Calls to the SFU under way.
    calling: usize,
    /// Those that wait: for removals, and for the rest.
    removals: VecDeque<Output>,
    looks: VecDeque<Output>,
}

#[derive(Debug, Default)]
struct Sweep {
    /// The last call that it has come to; none while it has not begun.
    cursor: Option<Option<Name>>,
    /// When it began, or the next one will; none where there is nobody to ask about.
    at: Option<Time>,
    /// Questions under way.
    asking: usize,
    /// Those who are dealt with apart and wait.
    due: BTreeSet<(Time, Key)>,
}

/// A room on the SFU.
#[derive(Debug)]
struct Call {
    room_id: Arc<str>,
    /// By identity.
    seats: Vec<Seat>,
    /// By [`Whose`].
    questions: [Questions; 2],
    /// Who is in it is being asked, or waits to be.
    listing: bool,
}

#[derive(Clone, Copy, Default, Debug)]
struct Questions {
    /// One about all of them is under way.
    asking: bool,
    /// How rarely they are asked about, and how many sweeps they still let pass.
    idle: u8,
    pass: u8,
}

#[derive(Debug)]
struct Seat {
    identity: Name,
    user: Arc<str>,
    end: Time,
    /// When somebody was last known to sit there.
    seen: Option<Time>,
    /// When the last yes was asked for; none makes them unknown.
    joined: Option<Time>,
    /// When the last no was asked for that counts.
    left: Option<Time>,
    /// Nobody was seen leaving since; perhaps they were not seen coming, either.
    inside: bool,
    /// The SFU is being asked about this seat alone, or will be.
    looking: bool,
    /// To be removed if they turn out to be there.
    wanted: bool,
    /// Being removed, or about to be.
    removing: bool,
}

/// One who came back, or whose removal failed.
#[derive(Debug)]
struct Single {
    /// When it goes on; none while something is under way.
    due: Option<Time>,
    failures: u8,
    until: Time,
    /// They came back while they were being removed.
    again: bool,
}

impl Seat {
    /// When it may be forgotten.
    fn end_of_use(&self) -> Time {
        let end = self.end.after(LEEWAY);
        self.seen.map_or(end, |seen| end.max(seen.after(RENEWED_FOR)))
    }

    const fn is_busy(&self) -> bool {
        self.looking || self.wanted || self.removing
    }

    fn may_be_removed(&self, now: Time) -> bool {
        self.left.is_some_and(|asked| now.since(asked) <= FRESH)
    }
}

impl Call {
    fn find(&self, identity: &Name) -> Result<usize, usize> {
        self.seats.binary_search_by(|seat| seat.identity.cmp(identity))
    }

    fn seat(&mut self, identity: &Name) -> Option<&mut Seat> {
        self.find(identity).ok().and_then(|place| self.seats.get_mut(place))
    }

    /// The homeserver has just said that a user is joined: that holds for all of their devices.
    fn joins(&mut self, room: &Name, user_id: &str, now: Time, out: &mut Vec<Output>) {
        for seat in self.seats.iter_mut().filter(|seat| &*seat.user == user_id) {
            if seat.joined.replace(now).is_none() | seat.left.take().is_some() {
                out.push(Output::Persist(Key {
                    room: room.clone(),
                    identity: seat.identity.clone(),
                }));
            }
        }
    }

    fn has_members(&self, whose: Whose, own: &str) -> bool {
        let mut seats = self.seats.iter().filter(|seat| seat.joined.is_some());
        seats.any(|seat| whose_is(&seat.user, own) == whose)
    }
}

impl Watch {
    /// Nobody yet.
    #[must_use]
    pub fn new(config: Config, seed: u64, now: Time) -> Self {
        Self {
            config,
            jitter: Jitter::new(seed),
            began: now,
            calls: BTreeMap::new(),
            users: HashMap::new(),
            seats: 0,
            sweeps: <[Sweep; 2]>::default(),
            hurries: false,
            singles: BTreeMap::new(),
            calling: 0,
            removals: VecDeque::new(),
            looks: VecDeque::new(),
        }
    }

    /// How many tokens are kept in mind.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.seats
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.seats == 0
    }

    /// A token was issued. `None` where there are too many to keep it in mind, or its texts are longer than Matrix allows.
    #[must_use]
    pub fn issued(&mut self, token: &Token<'_>, now: Time) -> Option<Vec<Output>> {
        let key = Key::new(token.room, token.identity);
        let (seat, new) = self.enter(&key, token)?;
        seat.end = seat.end.max(token.end);
        seat.inside = true;
        if new {
            self.plan(now.after(self.config.interval));
        }
        let mut out = vec![Output::Persist(key.clone())];
        if let Some(call) = self.calls.get_mut(&key.room) {
            for questions in &mut call.questions {
                (questions.idle, questions.pass) = (0, 0);
            }
            if token.checked {
                call.joins(&key.room, token.user_id, now, &mut out);
            }
        }
        self.go_on(&mut out, now);
        Some(out)
    }

    /// A record from before the start. A seat that is known by now is newer.
    pub fn restore(&mut self, token: &Token<'_>, past: Past, now: Time) {
        let key = Key::new(token.room, token.identity);
        if self.calls.get(&key.room).is_some_and(|call| call.find(&key.identity).is_ok()) {
            return;
        }
        let Some((seat, _)) = self.enter(&key, token) else { return };
        // What was known then is older than any question from now on.
        seat.seen = past.seen.map(|seen| seen.min(now));
        seat.joined = (past.member || past.left).then_some(Time::EARLIEST);
        seat.left = past.left.then_some(Time::EARLIEST);
        // Who left while nobody watched has been inside for long enough.
        if !std::mem::replace(&mut self.hurries, true) {
            for sweep in self.sweeps.iter_mut().filter(|sweep| sweep.cursor.is_none()) {
                sweep.at = Some(now.after(BREATH));
            }
        }
        self.plan(now.after(self.config.interval));
    }

    /// Somebody came into a room.
    #[must_use]
    pub fn came(&mut self, room: &str, identity: &str, now: Time) -> Vec<Output> {
        let mut out = Vec::new();
        let key = Key::new(room, identity);
        let Some(seat) = self.seat(&key) else { return out };
        seat.seen = Some(now);
        seat.inside = true;
        let busy = seat.wanted || seat.removing;
        if seat.left.is_some() {
            match self.singles.get_mut(&key) {
                // It may have been carried out before they came.
                Some(single) => single.again |= busy,
                None => {
                    let due = (!busy).then_some(now);
                    self.single(key, due, busy, now);
                }
            }
        }
        self.go_on(&mut out, now);
        out
    }

    /// Somebody went out of a room. Late news of an older session do no harm: the SFU is asked before anything is forgotten.
    pub fn went(&mut self, room: &str, identity: &str, now: Time) {
        if let Some(seat) = self.seat(&Key::new(room, identity)) {
            seat.seen = Some(now);
            seat.inside = false;
        }
    }

    /// A room has ended.
    pub fn ended(&mut self, room: &str, now: Time) {
        if let Some(call) = self.calls.get_mut(&Name::from(room)) {
            for seat in call.seats.iter_mut().filter(|seat| seat.inside) {
                seat.seen = Some(now);
                seat.inside = false;
            }
        }
    }

    /// What the homeserver said of those about whom `said` has an answer, and of itself.
    #[must_use]
    pub fn answered(&mut self, about: &About, said: &dyn Fn(&str) -> Option<Said>, own_is_in: Option<bool>, now: Time) -> Vec<Output> {
        let mut out = Vec::new();
        let room = about.room();
        let Some(call) = self.calls.get_mut(room) else { return out };
        let settles = SETTLES.min(self.config.interval);
        let mut gone = Vec::new();
        for (place, seat) in call.seats.iter_mut().enumerate() {
            let Some(Said { joined, asked }) = said(&seat.user) else { continue };
            let (was_member, had_left) = (seat.joined.is_some(), seat.left.is_some());
            if joined {
                seat.joined = seat.joined.max(Some(asked));
                seat.left = seat.left.filter(|no| *no > asked);
            } else {
                let counts = own_is_in == Some(true) || whose_is(&seat.user, &self.config.own) == Whose::Own;
                if !counts || seat.joined.is_none_or(|yes| asked < yes.after(settles)) {
                    continue;
                }
                seat.left = seat.left.max(Some(asked));
                gone.push(place);
            }
            if (seat.joined.is_some(), seat.left.is_some()) != (was_member, had_left) {
                out.push(Output::Persist(Key {
                    room: room.clone(),
                    identity: seat.identity.clone(),
                }));
            }
        }
        // Those who wait for their next try are left to it.
        gone.retain(|&place| {
            call.seats.get(place).is_some_and(|seat| {
                let key = Key {
                    room: room.clone(),
                    identity: seat.identity.clone(),
                };
                !seat.wanted && !seat.removing && self.singles.get(&key).is_none_or(|single| single.due.is_none())
            })
        });
        if let [place] = *gone {
            if let Some(seat) = call.seats.get_mut(place) {
                seat.removing = true;
                self.removals.push_back(Output::Remove(Key {
                    room: room.clone(),
                    identity: seat.identity.clone(),
                }));
            }
        } else if !gone.is_empty() {
            for place in gone {
                if let Some(seat) = call.seats.get_mut(place) {
                    seat.wanted = true;
                }
            }
            if !std::mem::replace(&mut call.listing, true) {
                self.removals.push_back(Output::List(room.clone()));
            }
        }
        self.go_on(&mut out, now);
        out
    }

    /// The homeserver was asked, whatever it said.
    #[must_use]
    pub fn over(&mut self, about: &About, now: Time) -> Vec<Output> {
        let sweep = self.sweep(about.whose());
        sweep.asking = sweep.asking.saturating_sub(1);
        match about {
            About::All(room, whose) => {
                if let Some(call) = self.calls.get_mut(room) {
                    let members = call.has_members(*whose, &self.config.own);
                    let questions = &mut call.questions[*whose as usize];
                    questions.asking = false;
                    questions.idle = if members { 0 } else { (questions.idle + 1).min(IDLE) };
                    questions.pass = (1 << questions.idle) - 1;
                }
                self.tidy(room);
            }
            About::One(key, _) => {
                let busy = self.seat(key).is_some_and(|seat| seat.wanted || seat.removing);
                let waits = self.singles.get(key).is_some_and(|single| single.due.is_some());
                // No clear answer, or they are joined: the sweeps go on.
                if !busy && !waits {
                    self.singles.remove(key);
                }
            }
        }
        let mut out = Vec::new();
        self.go_on(&mut out, now);
        out
    }

    /// Who is in a room, as the SFU said when it was asked; nothing where it did not say it.
    #[must_use]
    pub fn listed(&mut self, room: &Name, is_there: Option<&dyn Fn(&Name) -> bool>, asked: Time, now: Time) -> Vec<Output> {
        self.calling = self.calling.saturating_sub(1);
        let mut out = Vec::new();
        let (mut absent, mut settled, mut failed) = (Vec::new(), Vec::new(), Vec::new());
        if let Some(call) = self.calls.get_mut(room) {
            call.listing = false;
            for seat in &mut call.seats {
                let wanted = std::mem::take(&mut seat.wanted);
                let key = || Key {
                    room: room.clone(),
                    identity: seat.identity.clone(),
                };
                match is_there.map(|is_there| is_there(&seat.identity)) {
                    None if wanted => failed.push(key()),
                    None => {}
                    Some(true) => {
                        if wanted && !seat.removing {
                            seat.removing = true;
                            self.removals.push_back(Output::Remove(key()));
                        }
                        seat.seen = seat.seen.max(Some(asked));
                        seat.inside = true;
                    }
                    Some(false) => {
                        if wanted {
                            settled.push(key());
                        }
                        absent.push(key());
                    }
                }
            }
        }
        for key in settled {
            self.settle(&key, now);
        }
        for key in failed {
            self.try_again(&key, now);
        }
        for key in absent {
            self.is_absent(&key, asked, &mut out);
        }
        self.tidy(room);
        self.go_on(&mut out, now);
        out
    }

    /// Whether somebody is there, as the SFU said when it was asked; nothing where it did not say it.
    #[must_use]
    pub fn got(&mut self, key: &Key, is_there: Option<bool>, asked: Time, now: Time) -> Vec<Output> {
        self.calling = self.calling.saturating_sub(1);
        let mut out = Vec::new();
        if let Some(seat) = self.seat(key) {
            seat.looking = false;
            match is_there {
                Some(true) => {
                    seat.seen = seat.seen.max(Some(asked));
                    seat.inside = true;
                }
                Some(false) => self.is_absent(key, asked, &mut out),
                None => {}
            }
        }
        self.go_on(&mut out, now);
        out
    }

    /// What became of a removal that was asked for at `asked`.
    #[must_use]
    pub fn removed(&mut self, key: &Key, outcome: Outcome, asked: Time, now: Time) -> Vec<Output> {
        self.calling = self.calling.saturating_sub(1);
        let mut out = Vec::new();
        if let Some(seat) = self.seat(key) {
            seat.removing = false;
            if outcome == Outcome::Removed {
                seat.seen = Some(now);
                seat.inside = false;
            }
        }
        match outcome {
            Outcome::Removed => self.settle(key, now),
            Outcome::NotThere => {
                self.settle(key, now);
                self.is_absent(key, asked, &mut out);
            }
            Outcome::Failed => self.try_again(key, now),
            Outcome::Refused => self.drop_single(key),
        }
        self.go_on(&mut out, now);
        out
    }

    /// The moment of [`Self::next_deadline`] has come.
    #[must_use]
    pub fn time(&mut self, now: Time) -> Vec<Output> {
        let mut out = Vec::new();
        self.go_on(&mut out, now);
        out
    }

    /// When there is something to be done next.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Time> {
        // While all lanes are taken, answers keep it going.
        let free = self.sweeps.iter().filter(|sweep| sweep.asking < LANES);
        free.filter_map(|sweep| {
            let single = sweep.due.first().map(|(due, _)| *due);
            let next = if sweep.cursor.is_some() { Some(Time::EARLIEST) } else { sweep.at };
            single.into_iter().chain(next).min()
        })
        .min()
    }

    /// What is to be stored of a seat.
    #[must_use]
    pub fn row(&self, key: &Key) -> Option<Row> {
        let call = self.calls.get(&key.room)?;
        let seat = call.seats.get(call.find(&key.identity).ok()?)?;
        Some(Row {
            room_id: call.room_id.clone(),
            user_id: seat.user.clone(),
            end: seat.end,
            past: Past {
                member: seat.joined.is_some(),
                left: seat.left.is_some(),
                seen: seat.seen,
            },
        })
    }

    /// The seat of a token, and whether it is a new one.
    fn enter(&mut self, key: &Key, token: &Token<'_>) -> Option<(&mut Seat, bool)> {
        let known = self.calls.get(&key.room).is_some_and(|call| call.find(&key.identity).is_ok());
        let of_user = self.users.get(token.user_id).copied().unwrap_or(0);
        let is_full = self.seats >= self.config.most || of_user >= self.config.most_per_user;
        if !known && (is_full || token.text_bytes() > MAX_TEXT) {
            return None;
        }
        let user = self.users.get_key_value(token.user_id).map(|(user, _)| user.clone());
        let user: Arc<str> = user.unwrap_or_else(|| token.user_id.into());
        let call = self.calls.entry(key.room.clone()).or_insert_with(|| Call {
            room_id: token.room_id.into(),
            seats: Vec::new(),
            questions: <[Questions; 2]>::default(),
            listing: false,
        });
        let (place, before) = match call.find(&key.identity) {
            Ok(place) => {
                let seat = call.seats.get_mut(place)?;
                let before = std::mem::replace(&mut seat.user, user.clone());
                if before != user {
                    // Two users can be named so that they share a plain identity. What is known is not known of this one.
                    (seat.joined, seat.left) = (None, None);
                }
                (place, Some(before))
            }
            Err(place) => {
                // Room for an eighth more: these lists are most of what is kept.
                if call.seats.len() == call.seats.capacity() {
                    call.seats.reserve_exact(1 + call.seats.len() / 8);
                }
                // Another device, or another name of the same one: what is known of the user is known of it.
                let same = call.seats.iter().find(|seat| seat.user == user);
                let (joined, left) = same.map_or((None, None), |seat| (seat.joined, seat.left));
                let seat = Seat {
                    identity: key.identity.clone(),
                    user: user.clone(),
                    end: token.end,
                    seen: None,
                    joined,
                    left,
                    inside: true,
                    looking: false,
                    wanted: false,
                    removing: false,
                };
                call.seats.insert(place, seat);
                self.seats += 1;
                (place, None)
            }
        };
        if before.as_ref() != Some(&user) {
            *self.users.entry(user).or_insert(0) += 1;
            if let Some(before) = &before {
                give_back(&mut self.users, before);
            }
        }
        let seat = self.calls.get_mut(&key.room)?.seats.get_mut(place)?;
        Some((seat, before.is_none()))
    }

    fn sweep(&mut self, whose: Whose) -> &mut Sweep {
        &mut self.sweeps[whose as usize]
    }

    /// Where nothing is planned yet.
    fn plan(&mut self, at: Time) {
        for sweep in &mut self.sweeps {
            sweep.at.get_or_insert(at);
        }
    }

    fn seat(&mut self, key: &Key) -> Option<&mut Seat> {
        self.calls.get_mut(&key.room)?.seat(&key.identity)
    }

    fn single(&mut self, key: Key, due: Option<Time>, again: bool, now: Time) {
        let own = self.config.own.clone();
        if let Some(due) = due
            && let Some(seat) = self.seat(&key)
        {
            let whose = whose_is(&seat.user, &own);
            self.sweep(whose).due.insert((due, key.clone()));
        }
        let single = Single {
            due,
            failures: 0,
            until: now.after(RETRIED_FOR),
            again,
        };
        self.singles.insert(key, single);
    }

    fn drop_single(&mut self, key: &Key) {
        if let Some(single) = self.singles.remove(key)
            && let Some(due) = single.due
        {
            for sweep in &mut self.sweeps {
                sweep.due.remove(&(due, key.clone()));
            }
        }
    }

    /// A removal is done with, unless they came back meanwhile.
    fn settle(&mut self, key: &Key, now: Time) {
        let again = self.singles.get(key).is_some_and(|single| single.again);
        self.drop_single(key);
        if again {
            self.single(key.clone(), Some(now), false, now);
        }
    }

    /// A removal failed; after a pause the homeserver is asked again, and then it is tried again.
    fn try_again(&mut self, key: &Key, now: Time) {
        let before = self.singles.get(key);
        let failures = before.map_or(1, |single| single.failures.saturating_add(1));
        let until = before.map_or_else(|| now.after(RETRIED_FOR), |single| single.until);
        self.drop_single(key);
        if let Some(due) = Schedule::SEND.next_try(failures, None, now, until, &mut self.jitter) {
            self.single(key.clone(), Some(due), false, now);
            if let Some(single) = self.singles.get_mut(key) {
                (single.failures, single.until) = (failures, until);
            }
        }
    }

    /// The no is too old for the removal that it led to.
    fn ask_again(&mut self, key: &Key, now: Time) {
        let before = self.singles.get(key);
        let failures = before.map_or(0, |single| single.failures);
        let until = before.map_or_else(|| now.after(RETRIED_FOR), |single| single.until);
        self.drop_single(key);
        if now < until {
            self.single(key.clone(), Some(now), false, now);
            if let Some(single) = self.singles.get_mut(key) {
                (single.failures, single.until) = (failures, until);
            }
        }
    }

    /// Nobody sat there at that time.
    fn is_absent(&mut self, key: &Key, asked: Time, out: &mut Vec<Output>) {
        let Some(seat) = self.seat(key) else { return };
        // They came after the question.
        if seat.seen.is_some_and(|seen| seen > asked) {
            return;
        }
        if seat.inside {
            seat.inside = false;
            seat.seen = Some(asked);
        } else if seat.end_of_use() <= asked && !seat.is_busy() {
            self.forget(key, out);
        }
    }

    fn forget(&mut self, key: &Key, out: &mut Vec<Output>) {
        let Some(call) = self.calls.get_mut(&key.room) else { return };
        let Ok(place) = call.find(&key.identity) else { return };
        let seat = call.seats.remove(place);
        give_back(&mut self.users, &seat.user);
        self.seats -= 1;
        self.drop_single(key);
        self.tidy(&key.room);
        out.push(Output::Forget(key.clone()));
    }

    fn tidy(&mut self, room: &Name) {
        if let Some(call) = self.calls.get_mut(room) {
            if call.seats.is_empty() && !call.questions.iter().any(|questions| questions.asking) && !call.listing {
                self.calls.remove(room);
            } else if call.seats.len() < call.seats.capacity() / 2 {
                call.seats.shrink_to_fit();
            }
        }
    }

    /// Fills the free lanes.
    fn go_on(&mut self, out: &mut Vec<Output>, now: Time) {
        while self.calling < LANES
            && let Some(output) = self.removals.pop_front().or_else(|| self.looks.pop_front())
        {
            if let Output::Remove(key) = &output
                && !self.is_still_to_be_removed(key, now)
            {
                continue;
            }
            self.calling += 1;
            out.push(output);
        }
        for whose in Whose::BOTH {
            let mut turns = 0;
            while self.sweep(whose).asking < LANES {
                if self.next_single(whose, out, now) {
                    continue;
                }
                if turns == TURNS || !self.next_turn(whose, out, now) {
                    break;
                }
                turns += 1;
            }
        }
        // A turn may have found tokens that are over.
        while self.calling < LANES
            && let Some(output) = self.looks.pop_front()
        {
            self.calling += 1;
            out.push(output);
        }
    }

    fn is_still_to_be_removed(&mut self, key: &Key, now: Time) -> bool {
        let Some(seat) = self.seat(key) else { return false };
        if seat.may_be_removed(now) {
            return true;
        }
        seat.removing = false;
        if seat.left.is_some() {
            self.ask_again(key, now);
        } else {
            self.drop_single(key);
        }
        false
    }

    /// Asks about the next one who is dealt with apart.
    fn next_single(&mut self, whose: Whose, out: &mut Vec<Output>, now: Time) -> bool {
        let due = &mut self.sweep(whose).due;
        if due.first().is_none_or(|(due, _)| *due > now) {
            return false;
        }
        let Some((_, key)) = due.pop_first() else { return false };
        let room_id = self.calls.get(&key.room).map(|call| call.room_id.clone());
        let person = self.seat(&key).map(|seat| Person {
            user_id: seat.user.clone(),
            doubtful: whose == Whose::Other && seat.joined.is_some(),
        });
        let (Some(room_id), Some(person)) = (room_id, person) else {
            self.singles.remove(&key);
            return true;
        };
        if let Some(single) = self.singles.get_mut(&key) {
            single.due = None;
        }
        self.sweep(whose).asking += 1;
        out.push(Output::Ask(Question {
            about: About::One(key, whose),
            room_id,
            people: vec![person],
        }));
        true
    }

    /// Goes on to the sweep's next call; `false` when there is none, or no sweep.
    fn next_turn(&mut self, whose: Whose, out: &mut Vec<Output>, now: Time) -> bool {
        let interval = self.config.interval;
        let sweep = &mut self.sweeps[whose as usize];
        if sweep.cursor.is_none() {
            if sweep.at.is_none_or(|at| at > now) {
                return false;
            }
            sweep.at = Some(now);
            sweep.cursor = Some(None);
        }
        let cursor = sweep.cursor.as_ref().and_then(Option::as_ref);
        let after = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        let next = self.calls.range::<Name, _>((after, Bound::Unbounded)).next();
        if let Some((room, _)) = next {
            let room = room.clone();
            sweep.cursor = Some(Some(room.clone()));
            if whose == Whose::Own {
                self.turn(&room, out, now);
            }
            self.ask_about(&room, whose, out);
            return true;
        }
        sweep.cursor = None;
        let next = sweep.at.map(|began| began.after(interval).max(now.after(BREATH)));
        sweep.at = next.filter(|_| !self.calls.is_empty());
        false
    }

    /// Looks after the tokens that are over.
    fn turn(&mut self, room: &Name, out: &mut Vec<Output>, now: Time) {
        let Some(call) = self.calls.get_mut(room) else { return };
        let (mut expired, mut to_look_at) = (Vec::new(), Vec::new());
        for seat in &call.seats {
            let end_of_use = seat.end_of_use();
            if end_of_use > now || seat.is_busy() {
                continue;
            }
            if now.since(end_of_use.max(self.began)) >= UNCLEAR_FOR {
                expired.push(seat.identity.clone());
            } else {
                to_look_at.push(seat.identity.clone());
            }
        }
        if let [identity] = to_look_at.as_slice() {
            if let Some(seat) = call.seat(identity) {
                seat.looking = true;
            }
            self.looks.push_back(Output::Get(Key {
                room: room.clone(),
                identity: identity.clone(),
            }));
        } else if !to_look_at.is_empty() && !std::mem::replace(&mut call.listing, true) {
            self.looks.push_back(Output::List(room.clone()));
        }
        for identity in expired {
            let room = room.clone();
            self.forget(&Key { room, identity }, out);
        }
    }

    fn ask_about(&mut self, room: &Name, whose: Whose, out: &mut Vec<Output>) {
        let Some(call) = self.calls.get_mut(room) else { return };
        let questions = &mut call.questions[whose as usize];
        if questions.asking {
            return;
        }
        if questions.pass > 0 {
            questions.pass -= 1;
            return;
        }
        let mut people = BTreeMap::new();
        let seats = call.seats.iter();
        for seat in seats.filter(|seat| whose_is(&seat.user, &self.config.own) == whose) {
            let doubtful = people.entry(seat.user.clone()).or_insert(false);
            *doubtful |= whose == Whose::Other && seat.joined.is_some();
        }
        if people.is_empty() {
            return;
        }
        questions.asking = true;
        self.sweeps[whose as usize].asking += 1;
        out.push(Output::Ask(Question {
            about: About::All(room.clone(), whose),
            room_id: call.room_id.clone(),
            people: people.into_iter().map(|(user_id, doubtful)| Person { user_id, doubtful }).collect(),
        }));
    }
}

impl Key {
    /// The seat of an identity in a room.
    #[must_use]
    pub fn new(room: &str, identity: &str) -> Self {
        Self {
            room: room.into(),
            identity: identity.into(),
        }
    }
}

fn whose_is(user_id: &str, own: &str) -> Whose {
    match user_id.split_once(':') {
        Some((_, domain)) if domain == own => Whose::Own,
        Some(_) | None => Whose::Other,
    }
}

fn give_back(users: &mut HashMap<Arc<str>, u32>, user: &str) {
    if let Some(count) = users.get_mut(user) {
        *count -= 1;
        if *count == 0 {
            users.remove(user);
        }
    }
}

#[cfg(test)]
mod tests;
