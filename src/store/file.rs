//! An embedded database in one file, for those who run one container and no Redis.
//!
//! redb: written in Rust alone, transactions that survive a crash, one maintainer since 2021 with releases every month or
//! two and a file format that is declared stable. A batch of changes is one transaction, and on disk when it is done.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use redb::{Builder, Database, ReadableDatabase as _, ReadableTable as _, TableDefinition, TableHandle as _};
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use super::{Change, Entry, Failure, Part, StoreError, Table};
use crate::clock::unix_seconds;
use crate::store::record::MAX_BYTES;

type Definition = TableDefinition<'static, &'static [u8], &'static [u8]>;

/// The file's name where only a directory is given.
const NAME: &str = "lk-jwt-service.redb";
/// Pages kept in memory. The whole process has to fit into a small container.
const CACHE_BYTES: usize = 4 * 1024 * 1024;

/// The file cannot do what it should.
#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error("another process uses this file")]
    InUse,
    #[error("this file is not one that this service made")]
    Foreign,
    #[error("this file was made by another version of the database")]
    Version,
    #[error("this file is damaged")]
    Damaged,
    #[error("{0}")]
    Io(io::Error),
}

impl FileError {
    #[expect(clippy::wildcard_enum_match_arm, reason = "most kinds need no advice of their own")]
    pub(super) fn remedy(&self) -> &'static str {
        match self {
            Self::InUse => "stop the other instance, or give each its own LIVEKIT_STATE_PATH",
            Self::Foreign => "set LIVEKIT_STATE_PATH to a path of its own; the file was left as it is",
            Self::Version => "use the version of this service that made it, or move it away: then what is in it is lost",
            Self::Damaged => "move it away, and restore it from a backup if there is one",
            Self::Io(error) => match error.kind() {
                io::ErrorKind::NotFound => "make the directory; only the file is made here",
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                    "the user of this process must be allowed to write the file and its directory"
                }
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "make room on the disk",
                _ => "check the disk and the system's log",
            },
        }
    }
}

/// The file, and a table in it.
#[derive(Clone)]
pub(super) struct File {
    path: Arc<Path>,
    /// Closed after a failure, since the database wants to be opened again then.
    database: Arc<Mutex<Option<Arc<Database>>>>,
    table: Definition,
}

impl File {
    pub(super) async fn open(path: &Path) -> Result<Self, StoreError> {
        let file = Self {
            path: path.into(),
            database: Arc::default(),
            table: of(Table::Jobs),
        };
        let opened = file.ping().await;
        if is_damaged(&opened) {
            file.run(Self::set_aside).await?;
            file.ping().await?;
        } else {
            opened?;
        }
        Ok(file)
    }

    /// Another table of the same file.
    pub(super) fn with(&self, table: Table) -> Self {
        Self {
            table: of(table),
            ..self.clone()
        }
    }

    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.run(|file| file.opened(&mut file.database.lock()).map(drop)).await
    }

    pub(super) async fn load(&self, parts: &mpsc::Sender<Part>) -> Result<usize, StoreError> {
        let parts = parts.clone();
        let loaded = self.run(move |file| file.load_all(&parts)).await;
        // What could be read has been handed over; the next reading shows that the new file lacks it.
        if is_damaged(&loaded) {
            self.run(Self::set_aside).await?;
        }
        loaded
    }

    /// Takes as long as the disk takes: a write that was given up could still happen, after a newer one.
    pub(super) async fn write(&self, changes: &[Change]) -> Result<(), StoreError> {
        let changes = changes.to_vec();
        self.run(move |file| {
            let mut database = file.database.lock();
            let outcome = file
                .opened(&mut database)
                .and_then(|database| write(&database, file.table, &changes));
            if outcome.is_err() {
                *database = None;
            }
            outcome
        })
        .await
    }

    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Self) -> Result<T, FileError> + Send + 'static) -> Result<T, StoreError> {
        let file = self.clone();
        // A file that was damaged in the right place makes the database panic.
        let outcome = spawn_blocking(move || work(&file)).await.unwrap_or(Err(FileError::Damaged));
        outcome.map_err(|error| Failure::File(self.path.display().to_string().into(), error).into())
    }

    /// Gives the damaged file another name: a safety net must not keep the house shut (decision L10).
    fn set_aside(&self) -> Result<(), FileError> {
        let mut database = self.database.lock();
        *database = None;
        let path = file_of(&self.path);
        let mut aside = path.clone().into_os_string();
        aside.push(format!(".damaged-{}", unix_seconds()));
        fs::rename(&path, &aside).map_err(FileError::Io)?;
        tracing::warn!(name: "state_file_damaged",
            path = %path.display(),
            kept_as = %PathBuf::from(aside).display(),
            remedy = "check the disk; leaves that were delegated before this start may be sent by the homeserver itself, when their delay is over",
            "the state file is damaged: it was set aside, and a new one is used"
        );
        Ok(())
    }

    fn opened(&self, database: &mut Option<Arc<Database>>) -> Result<Arc<Database>, FileError> {
        if let Some(database) = database {
            return Ok(database.clone());
        }
        Ok(database.insert(Arc::new(open(&self.path)?)).clone())
    }

    fn load_all(&self, parts: &mpsc::Sender<Part>) -> Result<usize, FileError> {
        let database = self.opened(&mut self.database.lock())?;
        let table = database.begin_read().map_err(failure)?.open_table(self.table).map_err(failure)?;
        let mut skipped = 0;
        for entry in table.iter().map_err(failure)? {
            let (field, value) = entry.map_err(failure)?;
            let (field, value) = (field.value(), value.value());
            if field.len() > MAX_BYTES || value.len() > MAX_BYTES {
                skipped += 1;
                continue;
            }
            let (field, value) = (field.into(), value.into());
            if parts.blocking_send(Part::Record(Entry { field, value })).is_err() {
                break;
            }
        }
        Ok(skipped)
    }
}

fn is_damaged<T>(outcome: &Result<T, StoreError>) -> bool {
    matches!(outcome, Err(StoreError(Failure::File(_, FileError::Damaged))))
}

const fn of(table: Table) -> Definition {
    TableDefinition::new(table.name())
}

fn file_of(path: &Path) -> PathBuf {
    if path.is_dir() { path.join(NAME) } else { path.to_owned() }
}

fn open(path: &Path) -> Result<Database, FileError> {
    let path = file_of(path);
    if !path.exists() {
        make(&path)?;
        let path = path.display();
        tracing::info!(name: "state_file_made", %path, "a new state file: in a container its directory has to be a volume, or it goes with it");
    }
    open_at(&path)
}

/// Makes the file under another name first: where the disk is full, or the process is killed meanwhile, there is none rather than a half one,
/// of which nobody could say whose it is.
fn make(path: &Path) -> Result<(), FileError> {
    let mut new = path.to_owned().into_os_string();
    // In two containers on one volume all processes have one number.
    new.push(format!(".new-{:016x}", rand::random::<u64>()));
    let new = PathBuf::from(new);
    let made = open_at(&new).and_then(|database| {
        drop(database);
        // Not over what another process has made meanwhile. Some file systems have no links.
        match fs::hard_link(&new, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => fs::rename(&new, path).map_err(FileError::Io),
            Ok(()) | Err(_) => Ok(()),
        }
    });
    // After a rename there is none.
    let _ = fs::remove_file(&new);
    made
}

fn open_at(path: &Path) -> Result<Database, FileError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(FileError::Io)?;
    let database = Builder::new().set_cache_size(CACHE_BYTES).create_file(file).map_err(failure)?;
    let read = database.begin_read().map_err(failure)?;
    let tables: Vec<_> = read.list_tables().map_err(failure)?.collect();
    let has = |table: Table| tables.iter().any(|known| known.name() == table.name());
    if Table::ALL.into_iter().all(has) {
        return Ok(database);
    }
    if !tables.is_empty() && !has(Table::Jobs) {
        return Err(FileError::Foreign);
    }
    // With the tables made, reading never has to ask whether they are there. Earlier versions had fewer.
    let transaction = database.begin_write().map_err(failure)?;
    for table in Table::ALL {
        transaction.open_table(of(table)).map_err(failure)?;
    }
    transaction.commit().map_err(failure)?;
    Ok(database)
}

fn write(database: &Database, table: Definition, changes: &[Change]) -> Result<(), FileError> {
    let transaction = database.begin_write().map_err(failure)?;
    {
        let mut table = transaction.open_table(table).map_err(failure)?;
        for Change { field, value } in changes {
            match value {
                Some(value) => table.insert(field.as_bytes(), value.as_bytes()),
                None => table.remove(field.as_bytes()),
            }
            .map_err(failure)?;
        }
    }
    transaction.commit().map_err(failure)
}

fn failure(error: impl Into<redb::Error>) -> FileError {
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "what else there is are mistakes in the use of the database"
    )]
    match error.into() {
        redb::Error::DatabaseAlreadyOpen => FileError::InUse,
        redb::Error::UpgradeRequired(_) => FileError::Version,
        redb::Error::Corrupted(_) | redb::Error::RepairAborted => FileError::Damaged,
        // What redb says of a file that is not its own.
        redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => FileError::Foreign,
        redb::Error::Io(error) => FileError::Io(error),
        // A database, and not ours.
        redb::Error::TableTypeMismatch { .. } | redb::Error::TableIsMultimap(_) | redb::Error::TypeDefinitionChanged { .. } => {
            FileError::Foreign
        }
        other => FileError::Io(io::Error::other(other.to_string())),
    }
}
