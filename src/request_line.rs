//! The log line of each request, written when the request's guard is dropped: so a client or a proxy that gave up
//! leaves its line, too.
//!
//! What a request is about becomes known in many places on its way, and none of them needs it for anything else. So the line
//! goes with the task and not through their arguments: [`note`] adds to the line of the request at hand, and does nothing
//! where there is none.

#![expect(clippy::disallowed_methods, reason = "measures what a request waits for")]

use std::cell::RefCell;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use http::{HeaderValue, Method};
use parking_lot::Mutex;
use tokio::task_local;
use tracing::Level;

use crate::admission::Class;
use crate::metrics::METRICS;
use crate::outcome::{Outcome, Route, words};
use crate::telemetry::{self, Line, REQUEST};

task_local! {
    static CURRENT: RefCell<Box<RequestLine>>;
}

/// Lines a second of each kind of refusals to those who are not verified; the others are counted.
const MAX_LINES_PER_SECOND: u32 = 10;
const SECOND: Duration = Duration::from_secs(1);
/// Remedy where the client did not wait for a neighbour that is asked again.
const GAVE_UP: &str = "see to that neighbour; a proxy that gave up must wait for 25 s at least (nginx: proxy_read_timeout)";
/// Bytes of texts that others wrote.
const MAX_TEXT_BYTES: usize = 512;
/// Longest method that is written; none that anybody needs is longer.
const MAX_METHOD_BYTES: usize = 32;

words! {
    /// Step that a request waits for.
    Step {
        /// The homeserver says whose token it is.
        Verify = "verify",
        /// Earlier requests of the user, or of the homeserver, were too many.
        Rate = "rate_limit",
        /// Our homeserver says who is in the room.
        Members = "members",
        /// The SFU opens the room.
        Sfu = "sfu",
        /// The store takes the delegated leave.
        Store = "store",
    }
}

impl Step {
    /// The name of its duration.
    const fn field(self) -> &'static str {
        match self {
            Self::Verify => "verify_ms",
            Self::Rate => "rate_limit_ms",
            Self::Members => "members_ms",
            Self::Sfu => "sfu_ms",
            Self::Store => "store_ms",
        }
    }
}

/// Why a request is refused, in words.
#[derive(Debug, Clone)]
pub struct ErrorReport {
    /// Level of the line, by whose fault the refusal is (decision P12).
    pub level: Level,
    /// Message: what happened.
    pub message: &'static str,
    /// Details of what happened.
    pub detail: Option<Box<str>>,
    /// Remedy for the operator.
    pub remedy: Option<&'static str>,
}

/// The line of one request.
#[derive(Debug)]
pub struct RequestLine {
    began: Instant,
    id: HeaderValue,
    route: Route,
    method: Method,
    client: Option<IpAddr>,
    path: Option<Box<str>>,
    answer: Option<(u16, Outcome)>,
    /// Set once the sender has proved who they are.
    pub is_proven: bool,
    /// How well the homeserver is known.
    pub class: Option<Class>,
    /// The verified user.
    pub user: Option<Box<str>>,
    /// The homeserver that is asked about the user.
    pub server: Option<Box<str>>,
    /// The Matrix room.
    pub matrix_room: Option<Box<str>>,
    /// The room on the SFU.
    pub livekit_room: Option<Box<str>>,
    /// The token opens rooms.
    pub opens_rooms: Option<bool>,
    /// The token publishes.
    pub publishes: Option<bool>,
    /// A delayed leave comes with it.
    pub delegated: Option<bool>,
    refused: Option<ErrorReport>,
    steps: [Option<Duration>; Step::ALL.len()],
    waits: Option<(Step, Instant)>,
    /// Last answer of a neighbour that has to be asked again.
    said: Option<Box<str>>,
}

impl RequestLine {
    /// The line of a request that came now. Its path is shown where it is none of ours.
    #[must_use]
    pub fn begin(id: HeaderValue, method: Method, path: &str, client: Option<IpAddr>) -> Box<Self> {
        METRICS.requests_in_flight.up();
        let route = Route::of(path);
        Box::new(Self {
            began: Instant::now(),
            id,
            route,
            method,
            client,
            path: (route == Route::Other).then(|| path.into()),
            answer: None,
            is_proven: false,
            class: None,
            user: None,
            server: None,
            matrix_room: None,
            livekit_room: None,
            opens_rooms: None,
            publishes: None,
            delegated: None,
            refused: None,
            steps: [None; Step::ALL.len()],
            waits: None,
            said: None,
        })
    }

    /// The line is written when `work` is over or dropped. Pinned, as for [`step`].
    pub async fn around<T>(self: Box<Self>, work: impl Future<Output = T> + Unpin) -> T {
        CURRENT.scope(RefCell::new(self), work).await
    }

    /// The request is answered so.
    pub const fn set_answer(&mut self, status: u16, outcome: Outcome) {
        self.answer = Some((status, outcome));
    }

    /// Why it is refused.
    pub fn refuse(&mut self, refused: ErrorReport) {
        self.refused = Some(refused);
    }

    fn outcome(&self) -> Outcome {
        self.answer.map_or(Outcome::ClientGone, |(_, outcome)| outcome)
    }

    /// Level of the line: what machines ask all the time is of interest only where it goes wrong.
    fn level(&self, outcome: Outcome) -> Level {
        match &self.refused {
            Some(refused) => refused.level,
            None if outcome == Outcome::InternalError => Level::ERROR,
            None if self.method == Method::OPTIONS || (self.route.is_for_anybody() && outcome == Outcome::Ok) => Level::DEBUG,
            None => Level::INFO,
        }
    }

    fn write(&self, line: &mut Line<'_>, outcome: Outcome, took: Duration) {
        line.message(match (&self.refused, outcome) {
            (Some(refused), _) => refused.message,
            (None, Outcome::Ok) => "answered",
            (None, Outcome::ClientGone) => "the client gave up",
            (None, _) => "refused",
        });
        line.text("request_id", self.id.to_str().unwrap_or_default());
        line.word("route", self.route.word());
        line.word("method", beginning(self.method.as_str(), MAX_METHOD_BYTES));
        if let Some((status, _)) = self.answer {
            line.number("status", status.into());
        }
        line.word("outcome", outcome.word());
        if let Some(path) = self.path.as_deref().filter(|_| !line.hides_people()) {
            let most = if is_wanted(Level::DEBUG) { usize::MAX } else { MAX_TEXT_BYTES };
            line.text("path", beginning(path, most));
        }
        for (name, text) in [
            ("user", &self.user),
            ("server", &self.server),
            ("matrix_room", &self.matrix_room),
            ("livekit_room", &self.livekit_room),
        ] {
            if let Some(text) = text.as_deref().filter(|text| !text.is_empty()) {
                line.text(name, beginning(text, MAX_TEXT_BYTES));
            }
        }
        for (name, flag) in [
            ("opens_rooms", self.opens_rooms),
            ("publishes", self.publishes),
            ("delegated", self.delegated),
        ] {
            if let Some(flag) = flag {
                line.flag(name, flag);
            }
        }
        if let Some(client) = self.client {
            line.client(client);
        }
        line.number("total_ms", millis(took));
        for (step, took) in Step::ALL.iter().zip(self.steps) {
            if let Some(took) = took {
                line.number(step.field(), millis(took));
            }
        }
        if let (None, Some((step, since))) = (self.answer, self.waits) {
            line.word("waited_for", step.word());
            line.number(step.field(), millis(since.elapsed()));
        }
        // Old news once there is an answer.
        if let (None, Some(said)) = (self.answer, &self.said) {
            line.text("neighbour_said", beginning(said, MAX_TEXT_BYTES));
            line.text("remedy", GAVE_UP);
        }
        if let Some(ErrorReport { detail, remedy, .. }) = &self.refused {
            if let Some(detail) = detail {
                line.text("detail", beginning(detail, MAX_TEXT_BYTES));
            }
            if let Some(remedy) = remedy {
                line.text("remedy", remedy);
            }
        }
    }
}

impl Drop for RequestLine {
    fn drop(&mut self) {
        let (outcome, took) = (self.outcome(), self.began.elapsed());
        METRICS.requests_in_flight.down();
        METRICS.request(self.route, outcome, took);
        let level = self.level(outcome);
        if !is_wanted(level) {
            return;
        }
        // Whoever asks too often can do so as often as he likes.
        let is_proven = self.is_proven && (outcome != Outcome::RateLimited || self.class == Some(Class::Listed));
        let is_bounded = outcome != Outcome::Ok && !is_proven && level <= Level::INFO && !is_wanted(Level::DEBUG);
        if is_bounded && !Bucket::of(self.class, level).has_room(outcome) {
            return;
        }
        telemetry::request(level, |line| self.write(line, outcome, took));
    }
}

/// Adds to the line of the request at hand.
pub fn note(add: impl FnOnce(&mut RequestLine)) {
    // Nothing that is added asks for the line again.
    let _ = CURRENT.try_with(|line| {
        if let Ok(mut line) = line.try_borrow_mut() {
            add(&mut line);
        }
    });
}

/// Notes what a neighbour said that is asked again: of interest where the client does not wait for its answer.
pub fn neighbour_said(said: &str) {
    note(|line| line.said = Some(said.into()));
}

/// Measures a step of the request at hand. Pinned: a future that is moved into another one is there twice, and every request would
/// allocate and copy both.
pub async fn step<T>(step: Step, work: impl Future<Output = T> + Unpin) -> T {
    let began = Instant::now();
    note(|line| line.waits = Some((step, began)));
    let done = work.await;
    let took = began.elapsed();
    note(|line| {
        line.waits = None;
        let all = line.steps[step as usize].unwrap_or_default() + took;
        line.steps[step as usize] = Some(all);
    });
    done
}

/// The counts of refusals that were not shown yet; for the end of the process.
pub fn tell_suppressed() {
    for bucket in &BUCKETS {
        bucket.tell();
    }
}

/// Refusals of those who are not verified, of one kind: who makes homeservers up neither fills the log nor hides the lines about
/// those that the operator wrote down, and junk for a listed homeserver does not hide that a neighbour does not do its part.
struct Bucket {
    name: &'static str,
    state: Mutex<Counts>,
}

struct Counts {
    began: Option<Instant>,
    shown: u32,
    suppressed: u64,
    by_outcome: [u64; Outcome::COUNT],
    is_timed: bool,
}

static BUCKETS: [Bucket; 4] = [
    Bucket::new("listed"),
    Bucket::new("neighbours"),
    Bucket::new("verified"),
    Bucket::new("strangers"),
];

impl Bucket {
    const fn new(name: &'static str) -> Self {
        let state = Counts {
            began: None,
            shown: 0,
            suppressed: 0,
            by_outcome: [0; Outcome::COUNT],
            is_timed: false,
        };
        Self {
            name,
            state: Mutex::new(state),
        }
    }

    fn of(class: Option<Class>, level: Level) -> &'static Self {
        let [listed, neighbours, verified, strangers] = &BUCKETS;
        match class {
            Some(Class::Listed) if level <= Level::WARN => neighbours,
            Some(Class::Listed) => listed,
            Some(Class::Verified) => verified,
            Some(Class::Stranger) | None => strangers,
        }
    }

    /// Whether there is room for one more line; else it is counted, and the count is told within a second.
    fn has_room(&'static self, outcome: Outcome) -> bool {
        let mut counts = self.state.lock();
        let now = Instant::now();
        if counts.began.is_none_or(|began| now.saturating_duration_since(began) >= SECOND) {
            (counts.began, counts.shown) = (Some(now), 0);
        }
        if counts.shown < MAX_LINES_PER_SECOND {
            counts.shown += 1;
            return true;
        }
        counts.suppressed += 1;
        counts.by_outcome[outcome as usize] += 1;
        if !counts.is_timed
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            counts.is_timed = true;
            drop(runtime.spawn(async {
                tokio::time::sleep(SECOND).await;
                self.tell();
            }));
        }
        false
    }

    fn tell(&self) {
        let mut counts = self.state.lock();
        counts.is_timed = false;
        let suppressed = std::mem::take(&mut counts.suppressed);
        let by_outcome = std::mem::replace(&mut counts.by_outcome, [0; Outcome::COUNT]);
        drop(counts);
        if suppressed == 0 {
            return;
        }
        telemetry::request(Level::INFO, |line| {
            line.message("refusals that are not shown");
            line.word("of", self.name);
            line.number("suppressed", suppressed);
            for (outcome, count) in Outcome::ALL.iter().zip(by_outcome) {
                if count > 0 {
                    line.number(outcome.word(), count);
                }
            }
        });
    }
}

fn is_wanted(level: Level) -> bool {
    match level {
        Level::ERROR => tracing::enabled!(target: REQUEST, Level::ERROR),
        Level::WARN => tracing::enabled!(target: REQUEST, Level::WARN),
        Level::INFO => tracing::enabled!(target: REQUEST, Level::INFO),
        Level::DEBUG => tracing::enabled!(target: REQUEST, Level::DEBUG),
        Level::TRACE => tracing::enabled!(target: REQUEST, Level::TRACE),
    }
}

fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

fn beginning(text: &str, bytes: usize) -> &str {
    if text.len() <= bytes {
        return text;
    }
    let end = (0..=bytes).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_between_characters() {
        for (text, expected) in [
            ("", ""),
            ("abc", "abc"),
            ("abcd", "abcd"),
            ("abcde", "abcd"),
            ("abcä", "abc"),
            ("ää", "ää"),
        ] {
            assert_eq!(beginning(text, 4), expected, "{text}");
        }
    }

    #[test]
    fn ten_refusals_a_second_are_shown_and_the_others_counted() {
        static BUCKET: Bucket = Bucket::new("test");
        let shown = (0..1000).filter(|_| BUCKET.has_room(Outcome::TokenRejected)).count();
        let counts = BUCKET.state.lock();
        assert!(shown.is_multiple_of(10) && shown < 100, "{shown}");
        assert_eq!(counts.suppressed, 1000 - shown as u64);
        assert_eq!(counts.by_outcome[Outcome::TokenRejected as usize], counts.suppressed);
    }
}
