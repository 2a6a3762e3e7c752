//! The one way to a store: a queue of changes that never blocks those who make them.
//!
//! Of each field only the latest change waits, in the place of the one that it replaces, so that the queue is as long as
//! there are records while the store is away, whatever happens to them. Removals go before records, so that a full store gets
//! emptier; a change that is refused goes to the end. One task writes batch after batch; what is not known to be written is
//! written again, which changes nothing. Another one reads: at the start, and again where the store is shared or was away.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Display;
use std::hash::BuildHasher as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::select;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::{Change, MAX_TOKEN_BYTES, Part, Store, StoreError, Table, homeservers};
use crate::log_throttle::LogThrottle;
use crate::metrics::{METRICS, Neighbour};
use crate::state::Age;
use crate::store::record::MAX_BYTES;

/// Most changes that are written at once.
const BATCH: usize = 1024;
/// Bytes written at once, or one change of any size.
const BATCH_BYTES: usize = 256 * 1024;
/// How much smaller a batch is that follows a failure: a change that breaks the connection is alone soon, and goes to the end.
const BATCH_STEP: usize = 32;
/// Bytes of removals that wait. One that is not noted leaves a record behind that expires by itself.
const MAX_REMOVAL_BYTES: usize = 40 * 1024 * 1024;
/// Counted for each removal besides its field: what it takes in the queue.
const REMOVAL: usize = 160;
/// Fields that are remembered as changed until all records are read.
const MAX_TOUCHED: usize = 1_000_000;
/// Records that wait to be taken.
const PARTS: usize = 64;
/// Between two tries, at most: what is missing in a store that is back has to be found soon.
const MAX_PAUSE: Duration = Duration::from_secs(2);
/// Before a change is tried again that seems to end the connection.
const LONG_PAUSE: Duration = Duration::from_secs(10);
/// Between two tries while stopping.
const HURRIED_PAUSE: Duration = Duration::from_millis(200);
/// When a shared store is read after the start and after each reconnection (decision L11).
const READINGS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_secs(15),
    Duration::from_secs(60),
    Duration::from_secs(180),
    Duration::from_secs(600),
];
/// A connection that is lost more often is read after for the first time when it has lasted for `READINGS[1]`.
const CALM: Duration = Duration::from_secs(60);

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
#[derive(Debug)]
#[must_use]
pub struct Written(Option<oneshot::Receiver<()>>);

struct Shared {
    table: Table,
    state: Mutex<State>,
    wake: Notify,
    reconnected: Notify,
    hasher: RandomState,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    /// In the order in which they are to be written.
    waiting: BTreeMap<Place, Waiting>,
    /// Where in `waiting` a field's change is.
    places: HashMap<Arc<str>, Place>,
    next_number: u64,
    /// Bytes of the waiting changes that are removals.
    removals: usize,
    /// The hashes of the fields that are just being written.
    under_way: Vec<u64>,
    /// Readings that began and whose end was not taken yet.
    readings: u32,
    /// Hashes of fields that were changed since the first of these began: what is read of them is out of date.
    touched: HashSet<u64>,
    /// Whether nobody wants to know what is read.
    unread: bool,
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

struct Waiting {
    change: Change,
    hash: u64,
    waiters: Vec<oneshot::Sender<()>>,
}

impl Waiting {
    /// The bytes that the change counts for among removals.
    fn removal_bytes(&self) -> usize {
        if self.change.value.is_none() {
            REMOVAL + self.change.field.len()
        } else {
            0
        }
    }
}

impl Changes {
    /// Starts to read and to write. A store that keeps nothing costs nothing.
    #[must_use]
    pub fn start(store: Store) -> (Self, Entries) {
        let (sender, parts) = mpsc::channel(PARTS);
        let shared = Arc::new(Shared::of(store.table));
        if store.keeps() {
            // Before anything can be changed.
            shared.lock().begin_reading();
            let store = Arc::new(store);
            tokio::spawn(read(store.clone(), shared.clone(), sender));
            *lock(&shared.task) = Some(tokio::spawn(write(store, shared.clone())));
        } else {
            shared.lock().given_up = true;
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
        !self.0.lock().given_up
    }

    /// Gives a field a value, or removes it, which need not be there.
    pub fn make(&self, field: String, value: Option<String>) {
        self.change(field, value, None);
    }

    /// Makes the change, and tells when that is done.
    pub fn make_and_tell(&self, field: String, value: Option<String>) -> Written {
        if !self.are_kept() {
            return Written::DONE;
        }
        let (sender, receiver) = oneshot::channel();
        self.change(field, value, Some(sender));
        Written(Some(receiver))
    }

    /// How many changes are not known to be in the store.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.lock().unwritten()
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        let shared = &self.0;
        shared.lock().stopping = true;
        shared.wake.notify_one();
        let task = lock(&shared.task).take();
        if let Some(mut task) = task
            && timeout_at(deadline, &mut task).await.is_err()
        {
            task.abort();
        }
        let changes = shared.lock().unwritten();
        let table = shared.table;
        if changes > 0 && table.is_optional() {
            tracing::debug!(changes, "the store did not take all {table} before the end");
        } else if changes > 0 {
            tracing::warn!(
                changes,
                "the store did not take all {table} before the end: the next start restores those as they were before"
            );
        }
        changes
    }

    fn change(&self, field: String, value: Option<String>, waiter: Option<oneshot::Sender<()>>) {
        let shared = &self.0;
        let limit = shared.table.max_bytes();
        if field.len() > limit || value.as_ref().is_some_and(|value| value.len() > limit) {
            let (table, loss) = (shared.table, shared.table.loss());
            TOO_LARGE.log(|count| tracing::warn!(count, "too large to be stored, of the {table}: {loss}"));
            return;
        }
        let hash = shared.hasher.hash_one(field.as_bytes());
        let change = Change {
            field: field.into(),
            value: value.map(Into::into),
        };
        shared.lock().push(change, hash, waiter);
        shared.wake.notify_one();
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
        match self {
            Self::Jobs => false,
            Self::Tokens => error.is_denied(),
            Self::Homeservers => error.is_final(),
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
    /// Written already: where nothing is stored, nothing is waited for.
    pub(super) const DONE: Self = Self(None);

    /// Whether the change, or a later one of the same field, is in the store within that time.
    pub async fn within(self, limit: Duration) -> bool {
        match self.0 {
            None => true,
            Some(receiver) => matches!(timeout(limit, receiver).await, Ok(Ok(()))),
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
                Part::Record(_) => {}
                Part::End { skipped, .. } => self.end(*skipped),
            }
            return Some(part);
        }
    }

    fn end(&mut self, skipped: usize) {
        if self.shared.lock().has_forgotten() {
            tracing::error!("so much has changed while the store could not be read that its records are left alone");
        }
        let records = skipped + std::mem::take(&mut self.unreadable);
        if records > 0 {
            tracing::warn!(
                records,
                "records in the store cannot be read and are left there; if no other service uses them, remove them"
            );
        }
        self.shared.lock().end_reading();
    }

    /// The next record that can be read, until the end of the first reading, which waits for a store that is away.
    pub(super) async fn next<T, E: Display>(&mut self, read: impl Fn(&[u8], &[u8]) -> Result<T, E>) -> Option<T> {
        while let Part::Record(entry) = self.found().await? {
            match read(&entry.field, &entry.value) {
                Ok(record) => return Some(record),
                Err(error) => self.leave(error),
            }
        }
        self.parts.close();
        None
    }

    /// Counts a record that cannot be read and stays where it is.
    pub(super) fn leave(&mut self, error: impl Display) {
        self.unreadable += 1;
        tracing::debug!(error = error.to_string(), "a record cannot be read");
    }

    /// Whether the field was changed since this reading began.
    pub(super) fn is_touched(&self, field: &[u8]) -> bool {
        let hash = self.shared.hasher.hash_one(field);
        let state = self.shared.lock();
        state.touched.contains(&hash) || state.has_forgotten()
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        (state.unread, state.readings, state.touched) = (true, 0, HashSet::new());
    }
}

impl Shared {
    fn of(table: Table) -> Self {
        Self {
            table,
            state: Mutex::default(),
            wake: Notify::new(),
            reconnected: Notify::new(),
            hasher: RandomState::new(),
            task: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Tells those who wait for what was written, and puts what stands at `refused` places back. Returns whether nothing is refused
    /// any more.
    fn settle(&self, batch: Vec<(u64, Waiting)>, refused: &[usize]) -> bool {
        let mut refused = refused.iter().peekable();
        let mut back = Vec::new();
        for (place, change) in batch.into_iter().enumerate() {
            if refused.next_if_eq(&&place).is_some() {
                back.push(change);
            } else {
                for waiter in change.1.waiters {
                    let _ = waiter.send(());
                }
            }
        }
        let mut state = self.lock();
        state.give_back(back, true);
        !state.has_refused()
    }

    /// Whether `error` is for good, so that these records live in memory from now on.
    fn gives_up(&self, error: &StoreError) -> bool {
        if !self.table.gives_up(error) {
            return false;
        }
        let mut state = self.lock();
        let first = !state.given_up;
        *state = State {
            given_up: true,
            unread: true,
            ..State::default()
        };
        drop(state);
        let (reason, remedy, table, loss) = (error.to_string(), error.remedy(), self.table, self.table.loss());
        if first && table.is_optional() {
            tracing::info!(reason, remedy, "{table} are not stored: {loss}");
        } else if first {
            tracing::warn!(reason, remedy, "{table} are not stored: {loss}");
        }
        true
    }
}

impl State {
    fn unwritten(&self) -> usize {
        self.waiting.len() + self.under_way.len()
    }

    /// Begins a reading: what is read from now on is older than what waits to be written.
    fn begin_reading(&mut self) {
        if self.unread {
            return;
        }
        self.readings += 1;
        let waiting = self.waiting.values().map(|waiting| waiting.hash);
        self.touched.extend(waiting.chain(self.under_way.iter().copied()).take(MAX_TOUCHED));
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

    fn push(&mut self, change: Change, hash: u64, waiter: Option<oneshot::Sender<()>>) {
        if self.given_up {
            return;
        }
        if self.readings > 0 && !self.has_forgotten() {
            self.touched.insert(hash);
        }
        let mut waiting = Waiting {
            change,
            hash,
            waiters: waiter.into_iter().collect(),
        };
        let number = match self.remove(&waiting.change.field) {
            Some((number, mut old)) => {
                // Those who have stopped waiting must not pile up while the store is away.
                old.waiters.retain(|waiter| !waiter.is_closed());
                waiting.waiters.append(&mut old.waiters);
                number
            }
            None if waiting.change.value.is_none() && self.removals >= MAX_REMOVAL_BYTES => return,
            None => self.new_number(),
        };
        self.insert(number, waiting, false);
    }

    fn new_number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    fn insert(&mut self, number: u64, waiting: Waiting, refused: bool) {
        let place = Place {
            refused,
            is_record: waiting.change.value.is_some(),
            number,
        };
        self.removals += waiting.removal_bytes();
        self.places.insert(waiting.change.field.clone(), place);
        self.waiting.insert(place, waiting);
    }

    fn remove(&mut self, field: &str) -> Option<(u64, Waiting)> {
        let place = self.places.remove(field)?;
        let waiting = self.waiting.remove(&place)?;
        self.removals -= waiting.removal_bytes();
        Some((place.number, waiting))
    }

    fn has_refused(&self) -> bool {
        self.waiting.last_key_value().is_some_and(|(place, _)| place.refused)
    }

    /// The first changes, in their order; those that were refused before only where it is time for them.
    fn take(&mut self, most: usize, refused: bool) -> Vec<(u64, Waiting)> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < most
            && bytes < BATCH_BYTES
            && let Some(first) = self.waiting.first_entry()
            && (refused || !first.key().refused)
        {
            let (place, waiting) = first.remove_entry();
            bytes += waiting.change.field.len() + waiting.change.value.as_ref().map_or(0, |value| value.len());
            self.removals -= waiting.removal_bytes();
            self.places.remove(&waiting.change.field);
            self.under_way.push(waiting.hash);
            batch.push((place.number, waiting));
        }
        batch
    }

    /// Ends a write. What was taken and not written goes back, but where a newer change has come: to its place, or behind all
    /// others where it was refused.
    fn give_back(&mut self, batch: Vec<(u64, Waiting)>, refused: bool) {
        self.under_way.clear();
        for (number, mut old) in batch {
            old.waiters.retain(|waiter| !waiter.is_closed());
            match self.places.get(&old.change.field) {
                Some(place) => {
                    if let Some(newer) = self.waiting.get_mut(place) {
                        newer.waiters.append(&mut old.waiters);
                    }
                }
                None => {
                    let number = if refused { self.new_number() } else { number };
                    self.insert(number, old, refused);
                }
            }
        }
    }
}

/// Reads all records, again and again where that is worth it, as long as anybody wants them.
async fn read(store: Arc<Store>, shared: Arc<Shared>, parts: mpsc::Sender<Part>) {
    let table = shared.table;
    let mut trouble = Trouble::of(table);
    let (mut since, mut step, mut is_first) = (Instant::now(), 0, true);
    let mut again = false;
    let mut last_again: Option<Instant> = None;
    loop {
        loop {
            let due = READINGS.get(step).map(|after| since + *after);
            select! {
                () = sleep_until(due.unwrap_or(since)), if due.is_some() => break,
                () = shared.reconnected.notified() => {
                    let is_calm = last_again.is_none_or(|at| at.elapsed() >= CALM);
                    (since, step, again) = (Instant::now(), usize::from(!is_calm), true);
                }
                () = parts.closed() => return,
            }
        }
        step += 1;
        if !std::mem::take(&mut is_first) {
            shared.lock().begin_reading();
        }
        let skipped = loop {
            match store.load(&parts).await {
                Ok(skipped) => break skipped,
                Err(error) if shared.gives_up(&error) => return,
                Err(error) => {
                    trouble.warn(&error, format!("the {table} in the store cannot be read; trying again"));
                    if error.is_too_large() {
                        break 0;
                    }
                }
            }
            again = true;
            select! {
                () = sleep(trouble.pause()) => {}
                () = parts.closed() => return,
            }
        };
        if trouble.over(format!("the {table} in the store have been read")) {
            (since, step) = (Instant::now(), 1);
        }
        if again {
            last_again = Some(Instant::now());
        }
        let end = Part::End {
            skipped,
            again: std::mem::take(&mut again),
        };
        if parts.send(end).await.is_err() || !store.is_read_again() {
            return;
        }
    }
}

/// Writes batch after batch, until it is told to stop and nothing is left.
async fn write(store: Arc<Store>, shared: Arc<Shared>) {
    let table = shared.table;
    let mut trouble = Trouble::of(table);
    let (mut most, mut connections) = (BATCH, 0);
    // When something was refused last, and how long it is left alone.
    let (mut refused_at, mut patience) = (Instant::now(), Duration::ZERO);
    loop {
        let (batch, retry_at, is_time) = {
            let mut state = shared.lock();
            let retry_at = refused_at + if state.stopping { HURRIED_PAUSE } else { patience };
            let is_time = Instant::now() >= retry_at;
            let batch = state.take(most, is_time);
            if state.stopping && state.unwritten() == 0 {
                return;
            }
            (batch, retry_at, is_time)
        };
        if batch.is_empty() {
            select! {
                () = shared.wake.notified() => continue,
                () = sleep_until(retry_at), if !is_time => continue,
                () = store.closed(), if store.is_read_again() => {}
            }
        }
        let changes: Vec<_> = batch.iter().map(|(_, waiting)| waiting.change.clone()).collect();
        match store.write(&changes).await {
            Ok(refused) => {
                most = (most * BATCH_STEP).min(BATCH);
                let places = refused.as_ref().map_or(&[][..], |refused| &refused.places);
                let is_calm = shared.settle(batch, places);
                let now = store.connections();
                if now > 1 && now != connections {
                    shared.reconnected.notify_one();
                }
                connections = now;
                match refused {
                    Some(refused) if shared.gives_up(&refused.error) => return,
                    Some(refused) => {
                        trouble.warn(&refused.error, table.unwritten());
                        (refused_at, patience) = (Instant::now(), trouble.pause());
                    }
                    None if is_calm => {
                        trouble.over(format!("the store takes {table} again"));
                    }
                    None => {}
                }
            }
            Err(error) if shared.gives_up(&error) => return,
            Err(error) => {
                most = (most / BATCH_STEP).max(1);
                let is_culprit = changes.len() == 1 && error.broke_off();
                if is_culprit {
                    (refused_at, patience) = (Instant::now(), LONG_PAUSE);
                }
                shared.lock().give_back(batch, is_culprit);
                trouble.warn(&error, table.unwritten());
                let end_of_pause = Instant::now() + trouble.pause();
                while !shared.lock().stopping && timeout_at(end_of_pause, shared.wake.notified()).await.is_ok() {}
                if shared.lock().stopping {
                    sleep(HURRIED_PAUSE).await;
                }
            }
        }
    }
}

/// Failures in a row, and what was said about them.
struct Trouble {
    failures: u32,
    since: Option<Instant>,
    /// Throttle of the warnings; `None` where nobody is warned.
    log: Option<LogThrottle>,
    told: bool,
}

impl Trouble {
    fn of(table: Table) -> Self {
        Self {
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
                tracing::warn!(reason, remedy, count, "{what}");
            });
        }
    }

    /// Whether there was any. Trouble that comes and goes is told of no more often than trouble that stays.
    fn over(&mut self, what: impl Display) -> bool {
        let failures = std::mem::take(&mut self.failures);
        let after = self.since.take().map(|since| since.elapsed()).unwrap_or_default();
        if self.log.is_some() {
            METRICS.is_up(Neighbour::Store, true);
        }
        if std::mem::take(&mut self.told) {
            tracing::info!(failures, "{what}, after {}", Age(after));
        }
        failures > 0
    }

    /// 0.1 s, doubled up to two seconds.
    fn pause(&self) -> Duration {
        Duration::from_millis(100)
            .saturating_mul(1 << self.failures.saturating_sub(1).min(8))
            .min(MAX_PAUSE)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
