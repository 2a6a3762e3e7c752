//! The one way to a store: an ordered queue of changes that never blocks those who make them.
//!
//! Of each field only the latest change waits, in the place of the one that it replaces, so that the queue is as long as
//! there are records while the store is away, whatever happens to them. One task writes batch after batch; what is not known
//! to be written is written again, which changes nothing.

use std::collections::hash_map::{Entry as Slot, RandomState};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::hash::BuildHasher as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::select;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::{Change, Entry, MAX_TOKEN_BYTES, Store, StoreError, Table, homeservers};
use crate::log_throttle::LogThrottle;
use crate::store::record::MAX_BYTES;

/// Changes written at once.
const BATCH: usize = 1024;
/// Bytes written at once, or one change of any size.
const BATCH_BYTES: usize = 256 * 1024;
/// Bytes of removals that wait. One that is not noted leaves a record behind that expires by itself.
const MAX_REMOVAL_BYTES: usize = 40 * 1024 * 1024;
/// Counted for each removal besides its field: what it takes in the queue.
const REMOVAL: usize = 160;
/// Fields that are remembered as changed until all records are read.
const MAX_TOUCHED: usize = 1_000_000;
/// Portions of records that wait to be taken.
const PORTIONS: usize = 4;
/// Between two warnings about the same trouble.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// Between two tries while stopping.
const HURRIED_PAUSE: Duration = Duration::from_millis(200);

static TOO_LARGE: LogThrottle = LogThrottle::once_a_minute();

/// The handle. All clones write to one table.
#[derive(Clone)]
pub struct Changes(Option<Arc<Shared>>);

/// The records that were there at the start. Dropping it ends the reading.
pub struct Entries {
    portions: mpsc::Receiver<Vec<Entry>>,
    portion: std::vec::IntoIter<Entry>,
    shared: Option<Arc<Shared>>,
}

/// A change on its way to the store.
#[derive(Debug)]
#[must_use]
pub struct Written(Way);

#[derive(Debug)]
enum Way {
    Done,
    Waiting(oneshot::Receiver<()>),
}

struct Shared {
    table: Table,
    state: Mutex<State>,
    wake: Notify,
    hasher: RandomState,
    task: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Default)]
struct State {
    /// In the order in which they are to be written.
    waiting: BTreeMap<u64, Waiting>,
    /// Where in `waiting` a field's change is.
    places: HashMap<Arc<str>, u64>,
    next_place: u64,
    /// Bytes of those changes that are removals.
    removals: usize,
    /// Changes that are just being written.
    under_way: usize,
    /// Fields that were changed, by hash, while records are still being read: what is read of them is out of date.
    touched: Option<HashSet<u64>>,
    stopping: bool,
    /// The store does not let us, and these records can do without it.
    given_up: bool,
}

struct Waiting {
    change: Change,
    waiters: Vec<oneshot::Sender<()>>,
}

/// The bytes that a change counts for among removals.
fn removal_bytes(change: &Change) -> usize {
    if change.value.is_none() { REMOVAL + change.field.len() } else { 0 }
}

impl Changes {
    /// Starts to read and to write. A store that keeps nothing costs nothing.
    #[must_use]
    pub fn start(store: Store) -> (Self, Entries) {
        let (sender, portions) = mpsc::channel(PORTIONS);
        let mut entries = Entries {
            portions,
            portion: Vec::new().into_iter(),
            shared: None,
        };
        if !store.keeps() {
            return (Self(None), entries);
        }
        let shared = Arc::new(Shared {
            table: store.table,
            state: Mutex::new(State {
                touched: Some(HashSet::new()),
                ..State::default()
            }),
            wake: Notify::new(),
            hasher: RandomState::new(),
            task: Mutex::new(None),
        });
        let store = Arc::new(store);
        tokio::spawn(read(store.clone(), shared.clone(), sender));
        *lock(&shared.task) = Some(tokio::spawn(write(store, shared.clone())));
        entries.shared = Some(shared.clone());
        (Self(Some(shared)), entries)
    }

    /// Whether anything is stored at all. If not, changes need not be made.
    #[must_use]
    pub fn are_kept(&self) -> bool {
        self.0.as_ref().is_some_and(|shared| !shared.lock().given_up)
    }

    /// Gives a field a value, or removes it, which need not be there.
    pub fn make(&self, field: String, value: Option<String>) {
        self.change(field, value, None);
    }

    /// The same, and tells when that is done.
    pub fn make_and_tell(&self, field: String, value: Option<String>) -> Written {
        if !self.are_kept() {
            return Written::DONE;
        }
        let (sender, receiver) = oneshot::channel();
        self.change(field, value, Some(sender));
        Written(Way::Waiting(receiver))
    }

    /// How many changes are not known to be in the store.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.0.as_ref().map_or(0, |shared| shared.lock().unwritten())
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        let Some(shared) = &self.0 else { return 0 };
        shared.lock().stopping = true;
        shared.wake.notify_one();
        let task = lock(&shared.task).take();
        if let Some(mut task) = task
            && timeout_at(deadline, &mut task).await.is_err()
        {
            task.abort();
        }
        let left = shared.lock().unwritten();
        if left > 0 && shared.table.is_optional() {
            tracing::debug!(changes = left, "{}", shared.table.words().left);
        } else if left > 0 {
            tracing::warn!(changes = left, "{}", shared.table.words().left);
        }
        left
    }

    fn change(&self, field: String, value: Option<String>, waiter: Option<oneshot::Sender<()>>) {
        let Some(shared) = &self.0 else { return };
        let limit = shared.table.max_bytes();
        if field.len() > limit || value.as_ref().is_some_and(|value| value.len() > limit) {
            TOO_LARGE.log(|count| tracing::warn!(count, "{}", shared.table.words().too_large));
            return;
        }
        let touched = shared.hasher.hash_one(field.as_bytes());
        let change = Change {
            field: field.into(),
            value: value.map(Into::into),
        };
        shared.lock().push(change, touched, waiter);
        shared.wake.notify_one();
    }
}

/// What is said of a table.
struct Words {
    read: &'static str,
    unread: &'static str,
    written: &'static str,
    unwritten: &'static str,
    left: &'static str,
    too_large: &'static str,
    given_up: &'static str,
}

impl Table {
    const fn words(self) -> Words {
        match self {
            Self::Jobs => Words {
                read: "the jobs in the store have been read",
                unread: "the jobs in the store cannot be read; trying again",
                written: "the store takes jobs again",
                unwritten: "jobs cannot be stored; they go on, and are stored when the store is back",
                left: "the store did not take everything before the end: the next start restores those jobs as they were before",
                too_large: "a job is too large to be stored: it will not survive a restart of this service",
                given_up: "jobs are not stored: they will not survive a restart of this service",
            },
            Self::Tokens => Words {
                read: "the tokens in the store have been read",
                unread: "the tokens in the store cannot be read; trying again",
                written: "the store takes tokens again",
                unwritten: "tokens cannot be stored; their holders are watched all the same, and they are stored when the store is back",
                left: "the store did not take all tokens before the end: the next start restores those as they were before",
                too_large: "a token's record is too large to be stored: after a restart its holder is not watched",
                given_up: "tokens are not stored: after a restart of this service their holders are not watched",
            },
            Self::Homeservers => Words {
                read: "the verified homeservers in the store have been read",
                unread: "the verified homeservers in the store cannot be read; trying again",
                written: "the store takes verified homeservers again",
                unwritten: "verified homeservers cannot be stored; they are when the store is back",
                left: "the store did not take all verified homeservers before the end: after the next start those count as strangers at first",
                too_large: "the name of a verified homeserver is too long to be stored",
                given_up: "verified homeservers are not stored: after a restart of this service they count as strangers until they verify again",
            },
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
        match self {
            Self::Jobs | Self::Tokens => false,
            Self::Homeservers => true,
        }
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
    /// Nothing is stored, so nothing is waited for.
    pub(super) const DONE: Self = Self(Way::Done);

    /// Whether the change, or a later one of the same field, is in the store within that time.
    pub async fn within(self, limit: Duration) -> bool {
        match self.0 {
            Way::Done => true,
            Way::Waiting(receiver) => matches!(timeout(limit, receiver).await, Ok(Ok(()))),
        }
    }
}

impl Entries {
    /// The next record; none when all were read, which waits for a store that is away. A record may come twice; one whose
    /// field was changed since the start does not come any more.
    pub async fn next(&mut self) -> Option<Entry> {
        let shared = self.shared.clone()?;
        loop {
            if let Some(entry) = self.portion.find(|entry| !shared.is_touched(&entry.field)) {
                return Some(entry);
            }
            match self.portions.recv().await {
                Some(portion) if !shared.has_forgotten() => self.portion = portion.into_iter(),
                Some(_) => {
                    tracing::error!("so much has changed while the store could not be read that its records are left alone");
                    self.end();
                    return None;
                }
                None => {
                    self.end();
                    return None;
                }
            }
        }
    }

    /// What could not be read stays where it is.
    pub fn tell_unreadable(records: usize) {
        if records > 0 {
            tracing::warn!(
                records,
                "records in the store cannot be read and are left there; if no other service uses them, remove them"
            );
        }
    }

    fn end(&mut self) {
        if let Some(shared) = self.shared.take() {
            shared.lock().touched = None;
        }
        self.portions.close();
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        if let Some(shared) = &self.shared {
            shared.lock().touched = None;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Whether `error` is for good, so that these records live in memory from now on.
    fn gives_up(&self, error: &StoreError) -> bool {
        if !self.table.gives_up(error) {
            return false;
        }
        let mut state = self.lock();
        let first = !std::mem::replace(&mut state.given_up, true);
        state.waiting = BTreeMap::new();
        state.places = HashMap::new();
        (state.removals, state.under_way) = (0, 0);
        drop(state);
        if first {
            let (reason, remedy) = (error.to_string(), error.remedy());
            match self.table {
                Table::Jobs | Table::Tokens => tracing::warn!(reason, remedy, "{}", self.table.words().given_up),
                Table::Homeservers => tracing::info!(reason, remedy, "{}", self.table.words().given_up),
            }
        }
        true
    }

    fn is_touched(&self, field: &[u8]) -> bool {
        let hash = self.hasher.hash_one(field);
        self.lock().touched.as_ref().is_some_and(|touched| touched.contains(&hash))
    }

    /// Whether so many fields were changed that not all are remembered.
    fn has_forgotten(&self) -> bool {
        self.lock().touched.as_ref().is_some_and(|touched| touched.len() >= MAX_TOUCHED)
    }
}

impl State {
    fn unwritten(&self) -> usize {
        self.waiting.len() + self.under_way
    }

    fn push(&mut self, change: Change, touched: u64, waiter: Option<oneshot::Sender<()>>) {
        if self.given_up {
            return;
        }
        if let Some(fields) = self.touched.as_mut().filter(|fields| fields.len() < MAX_TOUCHED) {
            fields.insert(touched);
        }
        match self.places.entry(change.field.clone()) {
            Slot::Occupied(place) => {
                if let Some(waiting) = self.waiting.get_mut(place.get()) {
                    self.removals += removal_bytes(&change);
                    self.removals -= removal_bytes(&waiting.change);
                    waiting.change.value = change.value;
                    // Those who have stopped waiting must not pile up while the store is away.
                    waiting.waiters.retain(|waiter| !waiter.is_closed());
                    waiting.waiters.extend(waiter);
                }
            }
            Slot::Vacant(_) if change.value.is_none() && self.removals >= MAX_REMOVAL_BYTES => {}
            Slot::Vacant(place) => {
                self.removals += removal_bytes(&change);
                place.insert(self.next_place);
                let waiters = waiter.into_iter().collect();
                self.waiting.insert(self.next_place, Waiting { change, waiters });
                self.next_place += 1;
            }
        }
    }

    /// The first changes, in their order.
    fn take(&mut self) -> Vec<(u64, Waiting)> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while batch.len() < BATCH
            && bytes < BATCH_BYTES
            && let Some((place, waiting)) = self.waiting.pop_first()
        {
            bytes += waiting.change.field.len() + waiting.change.value.as_ref().map_or(0, |value| value.len());
            self.removals -= removal_bytes(&waiting.change);
            self.places.remove(&waiting.change.field);
            batch.push((place, waiting));
        }
        self.under_way = batch.len();
        batch
    }

    /// What was taken and not written goes back to its place, but where a newer change has come.
    fn give_back(&mut self, batch: Vec<(u64, Waiting)>) {
        self.under_way = 0;
        for (old_place, mut old) in batch {
            old.waiters.retain(|waiter| !waiter.is_closed());
            match self.places.entry(old.change.field.clone()) {
                Slot::Occupied(place) => {
                    if let Some(newer) = self.waiting.get_mut(place.get()) {
                        newer.waiters.append(&mut old.waiters);
                    }
                }
                Slot::Vacant(place) => {
                    self.removals += removal_bytes(&old.change);
                    place.insert(old_place);
                    self.waiting.insert(old_place, old);
                }
            }
        }
    }
}

/// Reads all records, until that has worked once or nobody wants them any more.
async fn read(store: Arc<Store>, shared: Arc<Shared>, portions: mpsc::Sender<Vec<Entry>>) {
    let words = shared.table.words();
    let mut trouble = Trouble::of(shared.table);
    loop {
        match store.load(&portions).await {
            Ok(()) => return trouble.over(words.read),
            Err(error) if shared.gives_up(&error) => return,
            Err(error) => trouble.warn(&error, words.unread),
        }
        select! {
            () = sleep(trouble.pause()) => {}
            () = portions.closed() => return,
        }
    }
}

/// Writes batch after batch, until it is told to stop and nothing is left.
async fn write(store: Arc<Store>, shared: Arc<Shared>) {
    let words = shared.table.words();
    let mut trouble = Trouble::of(shared.table);
    loop {
        let (batch, stopping) = {
            let mut state = shared.lock();
            (state.take(), state.stopping)
        };
        if batch.is_empty() {
            if stopping {
                return;
            }
            shared.wake.notified().await;
            continue;
        }
        let changes: Vec<_> = batch.iter().map(|(_, waiting)| waiting.change.clone()).collect();
        match store.write(&changes).await {
            Ok(()) => {
                trouble.over(words.written);
                shared.lock().under_way = 0;
                for waiter in batch.into_iter().flat_map(|(_, waiting)| waiting.waiters) {
                    let _ = waiter.send(());
                }
            }
            Err(error) if shared.gives_up(&error) => return,
            Err(error) => {
                shared.lock().give_back(batch);
                trouble.warn(&error, words.unwritten);
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
#[derive(Default)]
struct Trouble {
    failures: u32,
    since: Option<Instant>,
    warned: Option<Instant>,
    /// Whether this row was warned about.
    told: bool,
    /// Nobody is warned.
    quiet: bool,
}

impl Trouble {
    fn of(table: Table) -> Self {
        Self {
            quiet: table.is_optional(),
            ..Self::default()
        }
    }

    fn warn(&mut self, error: &StoreError, what: &'static str) {
        self.failures = self.failures.saturating_add(1);
        self.since.get_or_insert_with(Instant::now);
        let (reason, remedy) = (error.to_string(), error.remedy());
        if !self.quiet && self.warned.is_none_or(|warned| warned.elapsed() >= WARN_EVERY) {
            self.warned = Some(Instant::now());
            self.told = true;
            tracing::warn!(reason, remedy, failures = self.failures, "{what}");
        } else {
            tracing::debug!(reason, failures = self.failures, "{what}");
        }
    }

    /// Trouble that comes and goes is told of no more often than trouble that stays.
    fn over(&mut self, what: &'static str) {
        if let Some(since) = self.since.take() {
            let after_seconds = since.elapsed().as_secs();
            if std::mem::take(&mut self.told) {
                tracing::info!(after_seconds, failures = self.failures, "{what}");
            } else {
                tracing::debug!(after_seconds, failures = self.failures, "{what}");
            }
            self.failures = 0;
        }
    }

    /// 0.1 s, doubled up to 5 s.
    fn pause(&self) -> Duration {
        Duration::from_millis(100)
            .saturating_mul(1 << self.failures.saturating_sub(1).min(8))
            .min(Duration::from_secs(5))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
