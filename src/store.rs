//! Where jobs and tokens outlive this process: nowhere, in Redis, or in a file.
//!
//! All three know tables of fields and values only. Nobody but `queue.rs` writes, one batch after the other, so that a store
//! that is slow or away holds up nothing but its own queue; each table has one. `jobs.rs` puts delegated leaves into it,
//! `token.rs` tokens, and `homeservers.rs` the homeservers that have verified a token.
#![expect(clippy::disallowed_methods, reason = "an adapter: writes, waits and tries again")]

mod file;
mod homeservers;
mod jobs;
mod queue;
pub mod record;
mod redis;
pub mod shared;
pub mod token;

use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::config;
use crate::dns::Dns;
use crate::tls::Tls;
use file::FileError;
use redis::RedisError;

pub use homeservers::VerifiedHomeservers;
pub use jobs::{Jobs, Seen, Stored, StoredJobs};
pub use queue::{Changes, Entries, Written};
pub use record::{JobRecord, Replaced};

/// The longest field and the longest value of a token's record.
pub const MAX_TOKEN_BYTES: usize = 2 * 1024;

/// A place for the records of one table.
pub struct Store {
    kind: Kind,
    table: Table,
}

/// Tables that are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Table {
    /// Table of delegated leaves.
    #[default]
    Jobs,
    /// Table of tokens that were issued.
    Tokens,
    /// Homeservers that have verified a token. Optional: nothing depends on this table.
    Homeservers,
}

impl Table {
    const ALL: [Self; 3] = [Self::Jobs, Self::Tokens, Self::Homeservers];

    const fn name(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Tokens => "tokens",
            Self::Homeservers => "homeservers",
        }
    }
}

enum Kind {
    Memory,
    Redis(Box<redis::Redis>),
    File(file::File),
}

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name of the field.
    pub field: Box<[u8]>,
    /// Value of the field.
    pub value: Box<[u8]>,
}

/// A change of one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Name of the field.
    pub field: Arc<str>,
    /// New value of the field; `None` removes it, and it need not be there.
    pub value: Option<Arc<str>>,
}

/// A store cannot do what it should.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct StoreError(#[from] Failure);

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("Redis at {0}: {1}")]
    Redis(Box<str>, RedisError),
    #[error("LIVEKIT_STATE_PATH={0}: {1}")]
    File(Box<str>, FileError),
}

impl StoreError {
    /// The command that Redis has refused, and the code of its error.
    fn refusal(&self) -> Option<(&'static str, &str)> {
        match &self.0 {
            Failure::Redis(_, RedisError::Refused { command, code }) => Some((command, code)),
            Failure::Redis(..) | Failure::File(..) => None,
        }
    }

    /// Whether the store is there and does not do what it is told, rather than being away.
    pub(crate) fn is_refusal(&self) -> bool {
        self.refusal().is_some() || matches!(self.0, Failure::File(..))
    }

    /// Whether the connection stood and was ended: perhaps by what was just written.
    const fn broke_off(&self) -> bool {
        matches!(&self.0, Failure::Redis(_, RedisError::Closed | RedisError::Broken(_)))
    }

    /// Advice to the operator.
    #[must_use]
    pub fn remedy(&self) -> &'static str {
        match &self.0 {
            Failure::Redis(_, error) => error.remedy(),
            Failure::File(_, error) => error.remedy(),
        }
    }
}

impl Store {
    const fn jobs(kind: Kind) -> Self {
        Self { kind, table: Table::Jobs }
    }

    /// A store that keeps nothing.
    #[must_use]
    pub const fn memory() -> Self {
        Self::jobs(Kind::Memory)
    }

    /// Another table in the same place. This one is [`Table::Jobs`] at first.
    #[must_use]
    pub fn with(&self, table: Table) -> Self {
        let kind = match &self.kind {
            Kind::Memory => Kind::Memory,
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

    /// The shared keys beside the table of jobs, which is written under a watch only from now on; `None` where this is not Redis.
    pub fn share(&mut self) -> Option<shared::SharedStore> {
        match &mut self.kind {
            Kind::Redis(redis) => Some(redis.share()),
            Kind::Memory | Kind::File(_) => None,
        }
    }

    /// Has later ends than what is written stay: other replicas write them.
    fn keep_later_ends(&mut self) {
        match &mut self.kind {
            Kind::Redis(redis) => redis.keep_later_ends(),
            Kind::Memory | Kind::File(_) => {}
        }
    }

    /// Whether others write this table too, each under its watch: it is read when it is told.
    fn is_shared(&self) -> bool {
        matches!(&self.kind, Kind::Redis(redis) if redis.is_shared())
    }

    /// Whether what is written can be read again.
    #[must_use]
    pub const fn keeps(&self) -> bool {
        match &self.kind {
            Kind::Memory => false,
            Kind::Redis(_) | Kind::File(_) => true,
        }
    }

    /// Whether the store answers.
    ///
    /// # Errors
    /// When it does not.
    pub async fn ping(&self) -> Result<(), StoreError> {
        match &self.kind {
            Kind::Memory => Ok(()),
            Kind::Redis(redis) => redis.ping().await,
            Kind::File(file) => file.ping().await,
        }
    }

    /// The Redis to which others write this table too, and which may lose what was written: so it is worth reading again.
    fn read_again(&self) -> Option<&redis::Redis> {
        match &self.kind {
            Kind::Redis(redis) if matches!(self.table, Table::Jobs | Table::Tokens) && !redis.is_shared() => Some(redis),
            Kind::Memory | Kind::Redis(_) | Kind::File(_) => None,
        }
    }

    /// Hands over all records, and says how many were left out, since they are too long. When it fails, what was
    /// handed over is a part of them.
    ///
    /// # Errors
    /// When not all could be read. Nobody listening any more is no error.
    pub async fn load(&self, parts: &mpsc::Sender<Part>) -> Result<usize, StoreError> {
        match &self.kind {
            Kind::Memory => Ok(0),
            Kind::Redis(redis) => redis.load(parts).await,
            Kind::File(file) => file.load(parts).await,
        }
    }

    /// Makes all `changes`, in their order; with none of them, makes sure that somebody is there. When it fails, any number of
    /// the first of them may have been made, and may be made again.
    ///
    /// # Errors
    /// When not all of the others are known to be made.
    pub async fn write(&self, changes: &[Change]) -> Result<Option<RejectedChanges>, StoreError> {
        match &self.kind {
            Kind::Memory => Ok(None),
            Kind::Redis(redis) => redis.write(changes).await,
            Kind::File(file) => file.write(changes).await.map(|()| None),
        }
    }
}

/// A part of what a reading brings.
#[derive(Debug)]
pub enum Part {
    /// A record that was read.
    Record(Entry),
    /// The reading failed, and begins anew.
    Anew,
    /// The end of a reading: all records were given.
    End {
        /// Number of records that were too long to be handed over.
        skipped: usize,
        /// The store was away before: it may lack what was written.
        again: bool,
    },
}

/// Changes that the store does not take, though it takes others.
#[derive(Debug)]
pub struct RejectedChanges {
    /// Places of the refused changes among those that were to be made, in ascending order.
    pub places: Vec<usize>,
    /// Error for which the first of the changes was refused.
    pub error: StoreError,
}
