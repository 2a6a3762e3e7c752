//! The one way to a store: a queue of changes that never blocks those who make them.
//!
//! Of each field only the latest change waits, in the place of the one that it replaces, so that the queue is as long as
//! there are records while the store is away, whatever happens to them. Removals go before records, so that a full store gets
//! emptier; a change that is refused goes to the end. One task writes batch after batch: a change leaves the queue when it is
//! known to be written, and is written again until then, which changes nothing. Another task reads: at the start, and again
//! where the store is shared or was away.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Display;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::select;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::{Change, MAX_TOKEN_BYTES, Part, Store, StoreError, Table, homeservers};
use crate::backoff::READ_AFTER_SECONDS;
use crate::log_throttle::LogThrottle;
use crate::metrics::{METRICS, Neighbour};
use crate::state::Age;
use crate::store::record::MAX_BYTES;

/// Most changes that are written at once.
const BATCH_CHANGES: usize = 1024;
/// Bytes written at once, or one change of any size.
const BATCH_BYTES: usize = 256 * 1024;
/// How much smaller a batch is that follows a failure: a change that breaks the connection is alone soon, and goes to the end.
const BATCH_STEP: usize = 32;
/// Bytes of removals that wait. One that is not noted leaves a record behind that expires by itself.
const MAX_REMOVAL_BYTES: usize = 40 * 1024 * 1024;
/// Counted for each removal besides its field: what it takes in the queue.
const REMOVAL_BYTES: usize = 160;
/// Fields that are remembered as changed until all records are read.
const MAX_TOUCHED: usize = 1_000_000;
/// Records that wait to be taken.
const MAX_PARTS: usize = 64;
/// Between two tries, at most: what is missing in a store that is back has to be found soon.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Before a change is tried again that seems to end the connection.
const LONG_PAUSE: Duration = Duration::from_secs(10);
/// Between two tries while stopping.
const HURRIED_PAUSE: Duration = Duration::from_millis(200);
/// A connection that is lost more often is read after for the first time when it has lasted for `READ_AFTER_SECONDS[1]`.
const CALM_AFTER: Duration = Duration::from_secs(60);

static TOO_LARGE: LogThrottle = LogThrottle::once_a_minute();

/// The handle. All clones write to one table.
#[derive(Clone)]
pub struct Changes(Arc<Shared>);

/// Entries as they are read from the store. Dropping it ends the reading.
pub struct Entries {
    parts: mpsc::Receiver<Part>,
    shared: Arc<Shared>,
    unreadable: usize,
}

/// A change on its way to the store.
pub struct Written(Way);

enum Way {
    Pending(Arc<Shared>, Arc<str>),
    /// Written already: where nothing is stored, nothing is waited for.
    Done,
    /// The change is too large to be stored.
    Lost,
}

#[derive(Default)]
struct Shared {
    table: Table,
    state: Mutex<State>,
    wake: Notify,
    /// Told when changes were written.
    settled: Notify,
    /// A shared table is to be read.
    read_now: Notify,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    /// Changes that wait, those that are just being written too, in the order in which they are to be written.
    waiting: BTreeMap<Place, Change>,
    /// Where in `waiting` a field's change is.
    places: HashMap<Arc<str>, Place>,
    next_number: u64,
    /// Bytes of the waiting changes that are removals.
    removals: usize,
    /// Readings that began and whose end was not taken yet.
    readings: u32,
    /// Hashes of fields that were changed since the first of these began: what is read of them is out of date.
    touched: HashSet<u64>,
    hasher: RandomState,
    stopping: bool,
    /// There is no store, or it does not let us, and these records can do without it.
    given_up: bool,
}

/// Order of changes: a refused one sorts behind everything else, and removals before records.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    refused: bool,
    is_record: bool,
    number: u64,
}

impl Change {
    fn bytes(&self) -> usize {
        self.field.len() + self.value.as_ref().map_or(0, |value| value.len())
    }

    /// The bytes that the change counts for among removals.
    fn removal_bytes(&self) -> usize {
        if self.value.is_none() {
            REMOVAL_BYTES + self.field.len()
        } else {
            0
        }
    }
}

impl Changes {
    /// Starts to read and to write. A store that keeps nothing costs nothing.
    #[must_use]
    pub fn start(store: Store) -> (Self, Entries) {
        let (sender, parts) = mpsc::channel(MAX_PARTS);
        let shared = Arc::new(Shared {
            table: store.table,
            ..Shared::default()
        });
        if store.keeps() {
            let store = Arc::new(store);
            if store.is_shared() {
                tokio::spawn(read_when_told(store.clone(), shared.clone(), sender));
            } else {
                // Before anything can be changed.
                shared.state.lock().begin_reading(&sender);
                tokio::spawn(read(store.clone(), shared.clone(), sender));
            }
            *shared.task.lock() = Some(tokio::spawn(write(store, shared.clone())));
        } else {
            shared.state.lock().given_up = true;
            // There is room for it.
            let _ = sender.try_send(Part::End { skipped: 0, again: false });
        }
        let entries = Entries {
            parts,
            shared: shared.clone(),
            unreadable: 0,
        };
        (Self(shared), entries)
    }

    /// Whether anything is stored at all. If not, changes need not be made.
    #[must_use]
    pub fn are_kept(&self) -> bool {
        !self.0.state.lock().given_up
    }

    /// Gives a field a value, or removes it, which need not be there.
    pub fn make(&self, field: String, value: Option<String>) -> Written {
        let shared = &self.0;
        let (table, limit) = (shared.table, shared.table.max_bytes());
        if field.len() > limit || value.as_ref().is_some_and(|value| value.len() > limit) {
            TOO_LARGE
                .log(|count| tracing::warn!(name: "record_too_large", count, "too large to be stored, of the {table}: {}", table.loss()));
            return Written(Way::Lost);
        }
        let field: Arc<str> = field.into();
        let change = Change {
            field: field.clone(),
            value: value.map(Into::into),
        };
        let mut state = shared.state.lock();
        if state.given_up {
            return Written::DONE;
        }
        state.push(change);
        drop(state);
        shared.wake.notify_one();
        Written(Way::Pending(shared.clone(), field))
    }

    /// How many changes are not known to be in the store.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.state.lock().waiting.len()
    }

    /// Whether the table is being read.
    #[must_use]
    pub fn is_reading(&self) -> bool {
        self.0.state.lock().readings > 0
    }

    /// Reads a shared table now, or once more, when it is being read.
    pub fn read_now(&self) {
        self.0.read_now.notify_one();
    }

    /// Fields of the changes that are not known to be in the store.
    #[must_use]
    pub fn unwritten(&self) -> Vec<Arc<str>> {
        self.0.state.lock().places.keys().cloned().collect()
    }

    /// Number of the last change that was made, and of the last one before the first that is not known to be in the store; equal where all
    /// are.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let state = self.0.state.lock();
        let first = state.waiting.keys().map(|place| place.number).min();
        (state.next_number, first.map_or(state.next_number, |first| first.saturating_sub(1)))
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        let shared = &self.0;
        shared.state.lock().stopping = true;
        shared.wake.notify_one();
        let task = shared.task.lock().take();
        if let Some(mut task) = task
            && timeout_at(deadline, &mut task).await.is_err()
        {
            task.abort();
        }
        let changes = shared.state.lock().waiting.len();
        let table = shared.table;
        if changes > 0 && table.is_optional() {
            tracing::debug!(changes, "the store did not take all {table} before the end");
        } else if changes > 0 {
            tracing::warn!(name: "store_incomplete",
                changes,
                "the store did not take all {table} before the end: the next start restores those as they were before"
            );
        }
        changes
    }
}

impl Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Jobs | Self::Tokens => self.name(),
            Self::Homeservers => "verified homeservers",
        })
    }
}

impl Table {
    fn unwritten(self) -> String {
        format!("{self} cannot be stored; they go on, and are stored when the store takes them")
    }

    /// Says what it means that a record of this table is not stored.
    const fn loss(self) -> &'static str {
        match self {
            Self::Jobs => "after a restart of this service they are not watched any more",
            Self::Tokens => "after a restart of this service their holders are not watched any more",
            Self::Homeservers => "after a restart of this service they count as strangers until they verify again",
        }
    }

    /// Whether the table's records live in memory only, now that the store has refused them with this error. Jobs are worth
    /// asking for ever.
    fn gives_up(self, error: &StoreError) -> bool {
        let Some((command, code)) = error.refusal() else { return false };
        match self {
            Self::Jobs => false,
            Self::Tokens => code == "NOPERM",
            // The key of this table is not for us, or not on this server.
            Self::Homeservers => {
                matches!(command, "HGETALL" | "HSET" | "HDEL") && matches!(code, "NOPERM" | "WRONGTYPE" | "ERR" | "CROSSSLOT")
            }
        }
    }

    /// Whether operators need not hear of passing trouble: that the store is away is told of the other tables.
    const fn is_optional(self) -> bool {
        matches!(self, Self::Homeservers)
    }

    /// The longest field and the longest value.
    const fn max_bytes(self) -> usize {
        match self {
            Self::Jobs => MAX_BYTES,
            Self::Tokens => MAX_TOKEN_BYTES,
            Self::Homeservers => homeservers::MAX_BYTES,
        }
    }
}

impl Written {
    pub(super) const DONE: Self = Self(Way::Done);

    /// Whether the change, or a later one of the same field, is in the store within that time.
    pub async fn within(self, limit: Duration) -> bool {
        match self.0 {
            Way::Pending(shared, field) => timeout(limit, shared.written(&field)).await.is_ok(),
            Way::Done => true,
            Way::Lost => false,
        }
    }
}

impl Entries {
    /// The next record or the end of a reading; `None` when nothing will be read any more. A record may come twice; one whose
    /// field was changed since its reading began does not come.
    pub(super) async fn found(&mut self) -> Option<Part> {
        loop {
            let part = self.parts.recv().await?;
            match &part {
                Part::Record(entry) if self.is_touched(&entry.field) => continue,
                Part::Record(_) | Part::Anew => {}
                Part::End { skipped, .. } => self.end(*skipped),
            }
            return Some(part);
        }
    }

    fn end(&mut self, skipped: usize) {
        if self.shared.state.lock().has_forgotten() {
            tracing::error!(name: "store_left_alone",
                "so much has changed while the store could not be read that its records are left alone"
            );
        }
        let records = skipped + std::mem::take(&mut self.unreadable);
        if records > 0 {
            tracing::warn!(name: "records_unreadable",
                records,
                "records in the store cannot be read and are left there; if no other service uses them, remove them"
            );
        }
        self.shared.state.lock().end_reading();
    }

    /// The next record that can be read, until the end of the first reading, which waits for a store that is away.
    pub(super) async fn next<T, E: Display>(&mut self, read: impl Fn(&[u8], &[u8]) -> Result<T, E>) -> Option<T> {
        loop {
            match self.found().await? {
                Part::Record(entry) => match read(&entry.field, &entry.value) {
                    Ok(record) => return Some(record),
                    Err(error) => self.leave(error),
                },
                Part::Anew => {}
                Part::End { .. } => {
                    self.close();
                    return None;
                }
            }
        }
    }

    /// Has no other reading begin.
    pub(super) fn close(&mut self) {
        self.parts.close();
    }

    /// Counts a record that cannot be read and stays where it is.
    pub(super) fn leave(&mut self, error: impl Display) {
        self.unreadable += 1;
        tracing::debug!(error = error.to_string(), "a record cannot be read");
    }

    /// Whether the field was changed since this reading began.
    pub(super) fn is_touched(&self, field: &[u8]) -> bool {
        let state = self.shared.state.lock();
        state.touched.contains(&state.hasher.hash_one(field)) || state.has_forgotten()
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // First, so that no other reading begins.
        self.parts.close();
        let mut state = self.shared.state.lock();
        (state.readings, state.touched) = (0, HashSet::new());
    }
}

impl Shared {
    /// Waits until no change of the field waits.
    async fn written(&self, field: &str) {
        loop {
            let settled = self.settled.notified();
            if !self.state.lock().places.contains_key(field) {
                return;
            }
            settled.await;
        }
    }

    /// All of a batch was written but what stands at the `refused` places. Whether nothing is refused any more.
    fn settle(&self, batch: &[Change], refused: &[usize]) -> bool {
        let mut state = self.state.lock();
        state.settle(batch, refused);
        self.settled.notify_waiters();
        !state.has_refused()
    }

    /// Whether `error` is for good, so that these records live in memory from now on.
    fn gives_up(&self, error: &StoreError) -> bool {
        if !self.table.gives_up(error) {
            return false;
        }
        let mut state = self.state.lock();
        let first = !state.given_up;
        *state = State {
            given_up: true,
            ..State::default()
        };
        drop(state);
        let (reason, remedy, table, loss) = (error.to_string(), error.remedy(), self.table, self.table.loss());
        if first && table.is_optional() {
            tracing::info!(name: "not_stored", table = table.name(), reason, remedy, "{table} are not stored: {loss}");
        } else if first {
            tracing::warn!(name: "not_stored", table = table.name(), reason, remedy, "{table} are not stored: {loss}");
        }
        true
    }
}

impl State {
    /// Begins a reading: what is read from now on is older than what waits to be written. Nothing is, where nobody wants to know.
    fn begin_reading(&mut self, parts: &mpsc::Sender<Part>) {
        if parts.is_closed() {
            return;
        }
        self.readings += 1;
        let waiting = self.places.keys().map(|field| self.hasher.hash_one(field.as_bytes()));
        self.touched.extend(waiting.take(MAX_TOUCHED));
    }

    /// Whether so many fields were changed that not all are remembered.
    fn has_forgotten(&self) -> bool {
        self.touched.len() >= MAX_TOUCHED
    }

    fn end_reading(&mut self) {
        self.readings = self.readings.saturating_sub(1);
        if self.readings == 0 {
            self.touched = HashSet::new();
        }
    }

    fn push(&mut self, change: Change) {
        if self.readings > 0 && !self.has_forgotten() {
            self.touched.insert(self.hasher.hash_one(change.field.as_bytes()));
        }
        let number = match self.remove(&change.field) {
            Some(place) => place.number,
            None if change.value.is_none() && self.removals >= MAX_REMOVAL_BYTES => return,
            None => self.new_number(),
        };
        self.insert(change, number, false);
    }

    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn insert(&mut self, change: Change, number: u64, refused: bool) {
        let place = Place {
            refused,
            is_record: change.value.is_some(),
            number,
        };
        self.removals += change.removal_bytes();
        self.places.insert(change.field.clone(), place);
        self.waiting.insert(place, change);
    }

    fn remove(&mut self, field: &str) -> Option<Place> {
        let place = self.places.remove(field)?;
        let change = self.waiting.remove(&place)?;
        self.removals -= change.removal_bytes();
        Some(place)
    }

    fn has_refused(&self) -> bool {
        self.waiting.last_key_value().is_some_and(|(place, _)| place.refused)
    }

    /// The first changes, in their order; those that were refused before only where it is time for them.
    fn batch(&self, most: usize, refused: bool) -> Vec<Change> {
        let mut bytes = 0;
        let due = self.waiting.iter().take_while(|(place, _)| refused || !place.refused);
        due.map(|(_, change)| change)
            .take(most)
            .take_while(|change| {
                let has_room = bytes < BATCH_BYTES;
                bytes += change.bytes();
                has_room
            })
            .cloned()
            .collect()
    }

    /// Ends a write: what was written leaves the queue, and what stands at one of the ascending places goes behind all others, since it was
    /// refused. A newer change stays where it is.
    fn settle(&mut self, batch: &[Change], refused: &[usize]) {
        for (at, change) in batch.iter().enumerate() {
            let place = self.places.get(&change.field);
            if place.and_then(|place| self.waiting.get(place)) != Some(change) {
                continue;
            }
            self.remove(&change.field);
            if refused.binary_search(&at).is_ok() {
                let number = self.new_number();
                self.insert(change.clone(), number, true);
            }
        }
    }
}

/// Reads all records, and tries again while the store is away: how many could not be read, and whether it was away. `None` where nobody
/// wants them any more, or they are not for us.
async fn load(store: &Store, shared: &Shared, parts: &mpsc::Sender<Part>, trouble: &mut Trouble) -> Option<(usize, bool)> {
    let table = shared.table;
    let skipped = loop {
        match store.load(parts).await {
            Ok(skipped) => break skipped,
            Err(error) if shared.gives_up(&error) => return None,
            Err(error) => trouble.warn(&error, format!("the {table} in the store cannot be read; trying again")),
        }
        select! {
            () = sleep(trouble.backoff()) => {}
            () = parts.closed() => return None,
        }
        // What it has brought so far may be in another file by now.
        parts.send(Part::Anew).await.ok()?;
    };
    Some((skipped, trouble.on_success(format!("the {table} in the store have been read"))))
}

/// Reads all records, again and again where that is worth it, as long as anybody wants them.
async fn read(store: Arc<Store>, shared: Arc<Shared>, parts: mpsc::Sender<Part>) {
    let mut trouble = Trouble::of(shared.table);
    let (mut since, mut step) = (Instant::now(), 1);
    // The store was away before this reading, and when one of these ended last.
    let (mut again, mut last_again) = (false, None);
    loop {
        let Some((skipped, was_away)) = load(&store, &shared, &parts, &mut trouble).await else {
            return;
        };
        if was_away {
            (since, step, again) = (Instant::now(), 1, true);
        }
        if again {
            last_again = Some(Instant::now());
        }
        let end = Part::End {
            skipped,
            again: std::mem::take(&mut again),
        };
        if parts.send(end).await.is_err() {
            return;
        }
        let Some(redis) = store.read_again() else { return };
        loop {
            let due = READ_AFTER_SECONDS.get(step).map(|seconds| since + Duration::from_secs(*seconds));
            select! {
                () = sleep_until(due.unwrap_or(since)), if due.is_some() => break,
                () = redis.reconnected() => {
                    let is_calm = last_again.is_none_or(|at: Instant| at.elapsed() >= CALM_AFTER);
                    (since, step, again) = (Instant::now(), usize::from(!is_calm), true);
                }
                () = parts.closed() => return,
            }
        }
        step += 1;
        shared.state.lock().begin_reading(&parts);
    }
}

/// Reads all records each time that this is asked for.
async fn read_when_told(store: Arc<Store>, shared: Arc<Shared>, parts: mpsc::Sender<Part>) {
    let mut trouble = Trouble::of(shared.table);
    loop {
        select! {
            () = shared.read_now.notified() => {}
            () = parts.closed() => return,
        }
        shared.state.lock().begin_reading(&parts);
        let Some((skipped, _)) = load(&store, &shared, &parts, &mut trouble).await else {
            return;
        };
        if parts.send(Part::End { skipped, again: true }).await.is_err() {
            return;
        }
    }
}

/// Writes batch after batch, until it is told to stop and nothing is left.
async fn write(store: Arc<Store>, shared: Arc<Shared>) {
    let table = shared.table;
    let mut trouble = Trouble::of(table);
    let mut most = BATCH_CHANGES;
    // When something was refused last, and how long it is left alone.
    let (mut refused_at, mut pause) = (Instant::now(), Duration::ZERO);
    loop {
        let (batch, retry_at, is_time) = {
            let state = shared.state.lock();
            if state.stopping && state.waiting.is_empty() {
                return;
            }
            let retry_at = refused_at + if state.stopping { HURRIED_PAUSE } else { pause };
            let is_time = Instant::now() >= retry_at;
            (state.batch(most, is_time), retry_at, is_time)
        };
        if batch.is_empty() {
            let closed = async {
                if let Some(redis) = store.read_again() {
                    redis.closed().await;
                }
            };
            select! {
                () = shared.wake.notified() => continue,
                () = sleep_until(retry_at), if !is_time => continue,
                () = closed, if store.read_again().is_some() => {}
            }
        }
        match store.write(&batch).await {
            Ok(refused) => {
                most = (most * BATCH_STEP).min(BATCH_CHANGES);
                let is_calm = shared.settle(&batch, refused.as_ref().map_or(&[], |refused| &refused.places));
                match refused {
                    Some(refused) if shared.gives_up(&refused.error) => return,
                    Some(refused) => {
                        trouble.warn(&refused.error, table.unwritten());
                        (refused_at, pause) = (Instant::now(), trouble.backoff());
                    }
                    None if is_calm => {
                        trouble.on_success(format!("the store takes {table} again"));
                    }
                    None => {}
                }
            }
            Err(error) if shared.gives_up(&error) => return,
            Err(error) => {
                most = (most / BATCH_STEP).max(1);
                if batch.len() == 1 && error.broke_off() {
                    shared.state.lock().settle(&batch, &[0]);
                    (refused_at, pause) = (Instant::now(), LONG_PAUSE);
                }
                trouble.warn(&error, table.unwritten());
                let end_of_pause = Instant::now() + trouble.backoff();
                while !shared.state.lock().stopping && timeout_at(end_of_pause, shared.wake.notified()).await.is_ok() {}
                if shared.state.lock().stopping {
                    sleep(HURRIED_PAUSE).await;
                }
            }
        }
    }
}

/// Failures in a row, and what was said about them.
struct Trouble {
    table: Table,
    failures: u32,
    since: Option<Instant>,
    /// Throttle of the warnings; `None` where nobody is warned.
    log: Option<LogThrottle>,
    told: bool,
}

impl Trouble {
    fn of(table: Table) -> Self {
        Self {
            table,
            failures: 0,
            since: None,
            log: (!table.is_optional()).then(LogThrottle::once_a_minute),
            told: false,
        }
    }

    fn warn(&mut self, error: &StoreError, what: impl Display) {
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert_with(Instant::now);
        METRICS.store_errors.up();
        if self.log.is_some() {
            METRICS.is_up(Neighbour::Store, false);
        }
        let (reason, remedy) = (error.to_string(), error.remedy());
        tracing::debug!(reason, failures = self.failures, "{what}");
        if let Some(log) = &self.log {
            log.log(|count| {
                self.told = true;
                tracing::warn!(name: "store_down", table = self.table.name(), reason, remedy, count, "{what}");
            });
        }
    }

    /// Whether there was any. Trouble that comes and goes is told of no more often than trouble that stays.
    fn on_success(&mut self, what: impl Display) -> bool {
        let failures = std::mem::take(&mut self.failures);
        let after = self.since.take().map(|since| since.elapsed()).unwrap_or_default();
        if self.log.is_some() {
            METRICS.is_up(Neighbour::Store, true);
        }
        if std::mem::take(&mut self.told) {
            tracing::info!(name: "store_back", table = self.table.name(), failures, "{what}, after {}", Age(after));
        }
        failures > 0
    }

    /// 0.1 s, doubled up to two seconds.
    fn backoff(&self) -> Duration {
        Duration::from_millis(100)
            .saturating_mul(1 << self.failures.saturating_sub(1).min(8))
            .min(MAX_PAUSE)
    }
}

#[cfg(test)]
mod tests;
