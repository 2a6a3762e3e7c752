//! Where jobs and tokens outlive this process: nowhere, in Redis, or in a file.
//!
//! All three know tables of fields and values only. Nobody but `queue.rs` writes, one batch after the other, so that a store
//! that is slow or away holds up nothing but its own queue; each table has one. `jobs.rs` puts delegated leaves into it,
//! `token.rs` tokens, and `homeservers.rs` the homeservers that have verified a token.
//!
//! One instance owns all jobs of a store today. When several share them, a store will also have to tell an instance that
//! another one has news for a job of its own (a webhook that arrived there, a delegation that replaces it): that is a
//! stream of fields beside [`Store::load`], which a store without company never yields anything on.

mod file;
mod homeservers;
mod jobs;
mod memory;
mod queue;
pub mod record;
mod redis;
pub mod token;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::config;
use crate::dns::Dns;
use crate::tls::Tls;

pub use file::FileError;
pub use homeservers::{RestoredHomeservers, VerifiedHomeservers};
pub use jobs::{Queue, Restored, RestoredJob};
pub use queue::{Changes, Entries, Written};
pub use redis::RedisError;

/// The longest field and the longest value of a token's record.
pub const MAX_TOKEN_BYTES: usize = 2 * 1024;

/// A place for the records of one table.
pub struct Store {
    kind: Kind,
    table: Table,
}

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// Delegated leaves.
    Jobs,
    /// Tokens that were issued.
    Tokens,
    /// Homeservers that have verified a token. Optional: nothing depends on this table.
    Homeservers,
}

enum Kind {
    Memory(memory::Memory),
    Redis(Box<redis::Redis>),
    File(file::File),
}

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The field.
    pub field: Box<[u8]>,
    /// Its value.
    pub value: Box<[u8]>,
}

/// What is to be done to one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The field.
    pub field: Arc<str>,
    /// Its new value; `None` removes it, and it need not be there.
    pub value: Option<Arc<str>>,
}

/// A store cannot do what it should.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Redis.
    #[error("Redis at {0}: {1}")]
    Redis(Box<str>, RedisError),
    /// The file.
    #[error("LIVEKIT_STATE_PATH={0}: {1}")]
    File(Box<str>, FileError),
}

impl StoreError {
    /// Whether it knows us and does not let us.
    fn is_denied(&self) -> bool {
        matches!(self, Self::Redis(_, RedisError::Refused { code, .. }) if &**code == "NOPERM")
    }

    /// Whether the same is to be expected of the next try: this table's key is not for us, or not on this server.
    fn is_final(&self) -> bool {
        matches!(self, Self::Redis(_, RedisError::Refused { command: "HGETALL" | "HSET" | "HDEL", code })
            if matches!(&**code, "NOPERM" | "WRONGTYPE" | "ERR" | "MOVED" | "CROSSSLOT"))
    }

    /// What the operator can do.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match self {
            Self::Redis(_, error) => error.remedy(),
            Self::File(_, error) => error.remedy(),
        }
    }
}

impl Store {
    const fn jobs(kind: Kind) -> Self {
        Self { kind, table: Table::Jobs }
    }

    /// Keeps nothing.
    #[must_use]
    pub const fn memory() -> Self {
        Self::jobs(Kind::Memory(memory::Memory))
    }

    /// Another table in the same place. This one is [`Table::Jobs`] at first.
    #[must_use]
    pub fn with(&self, table: Table) -> Self {
        let kind = match &self.kind {
            Kind::Memory(_) => Kind::Memory(memory::Memory),
            Kind::Redis(redis) => Kind::Redis(Box::new(redis.with(table))),
            Kind::File(file) => Kind::File(file.with(table)),
        };
        Self { kind, table }
    }

    /// Redis. Nothing is connected yet, so this does not fail.
    #[must_use]
    pub fn redis(settings: config::Redis, tls: Arc<Tls>, dns: Arc<Dns>) -> Self {
        Self::jobs(Kind::Redis(Box::new(redis::Redis::new(settings, tls, dns))))
    }

    /// The file at `path`, made if it is not there; in a directory, a file of our name.
    ///
    /// # Errors
    /// When it cannot be used, and another program's file is left as it is.
    pub async fn file(path: &Path) -> Result<Self, StoreError> {
        Ok(Self::jobs(Kind::File(file::File::open(path).await?)))
    }

    /// Whether what is written can be read again.
    #[must_use]
    pub const fn keeps(&self) -> bool {
        match &self.kind {
            Kind::Memory(_) => false,
            Kind::Redis(_) | Kind::File(_) => true,
        }
    }

    /// Whether the store answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Memory(_) => Ok(()),
            Kind::Redis(redis) => redis.ping().await,
            Kind::File(file) => file.ping().await,
        }
    }

    /// Hands over all records in portions. When it fails, what was handed over is a part of them.
    ///
    /// # Errors
    /// When not all could be read. Nobody listening any more is no error.
    pub async fn load(&self, portions: &mpsc::Sender<Vec<Entry>>) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Memory(_) => Ok(()),
            Kind::Redis(redis) => redis.load(portions).await,
            Kind::File(file) => file.load(portions).await,
        }
    }

    /// Makes all `changes`, in their order. When it fails, any number of the first of them may have been made, and may
    /// be made again.
    ///
    /// # Errors
    /// When not all of them are known to be made.
    pub async fn write(&self, changes: &[Change]) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Memory(_) => Ok(()),
            Kind::Redis(redis) => redis.write(changes).await,
            Kind::File(file) => file.write(changes).await,
        }
    }
}

/// Collects records until there are enough to be handed over.
#[derive(Default)]
struct Portion {
    entries: Vec<Entry>,
    bytes: usize,
}

impl Portion {
    const ENTRIES: usize = 256;
    const BYTES: usize = 256 * 1024;

    fn push(&mut self, entry: Entry) {
        self.bytes += entry.field.len() + entry.value.len();
        self.entries.push(entry);
    }

    fn is_full(&self) -> bool {
        self.entries.len() >= Self::ENTRIES || self.bytes >= Self::BYTES
    }

    fn take(&mut self) -> Vec<Entry> {
        self.bytes = 0;
        std::mem::take(&mut self.entries)
    }
}
