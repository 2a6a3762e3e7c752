//! The store of delegated leaves: whether it is there, takes what has to be written, and is nobody else's.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio::time::timeout_at;

use super::check::Sink;
use super::fault;
use super::{Context, Run, nonce};
use crate::store::{Change, JobRecord, Part, Store, StoreError, Table};

const ALL: [&str; 3] = ["store", "store-write", "store-records"];
/// Records that wait to be looked at.
const PARTS: usize = 64;

pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>) {
    let Some(store) = &run.context.store else {
        return sink.skip(&ALL[..1], "the store is at hand for the running service only");
    };
    if !store.keeps() {
        return sink.warn(
            "store",
            &fault::STORE_MEMORY,
            "neither LIVEKIT_REDIS_URL nor LIVEKIT_STATE_PATH is set",
        );
    }
    if let Err(why) = in_time(run, told(store.ping())).await {
        sink.fail("store", &fault::STORE_UNREACHABLE, why);
        return sink.skip(&ALL[1..], fault::STORE_UNREACHABLE.id);
    }
    sink.ok("store", "it answers");
    let tables: &[Table] = if run.context.own.is_some() {
        &[Table::Jobs, Table::Tokens]
    } else {
        &[Table::Jobs]
    };
    let mut refused = Vec::new();
    for table in tables {
        refused.extend(
            in_time(run, told(try_write(&store.with(*table))))
                .await
                .err()
                .map(|why| format!("{table:?}: {why}")),
        );
    }
    if refused.is_empty() {
        sink.ok("store-write", "it takes a record, and lets it be removed");
    } else {
        sink.fail("store-write", &fault::STORE_RIGHTS, refused.join("; "));
    }
    check_records(run, &store.with(Table::Jobs), refused.is_empty(), sink).await;
}

async fn in_time<T>(run: &Run<'_>, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    timeout_at(run.soon(), work)
        .await
        .unwrap_or_else(|_| Err("no answer in time".to_owned()))
}

/// The error in words, with its remedy.
async fn told<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, String> {
    work.await.map_err(|error| format!("{error}; {}", error.remedy()))
}

/// Writes a record that says nothing, and removes it in the same breath.
async fn try_write(store: &Store) -> Result<(), StoreError> {
    let field: Arc<str> = format!("[\"lk-jwt-service-doctor\",\"{}\"]", nonce()).into();
    let change = |value: Option<&str>| Change {
        field: field.clone(),
        value: value.map(Arc::from),
    };
    let refused = store.write(&[change(Some("{}")), change(None)]).await?;
    refused.map_or(Ok(()), |refused| Err(refused.error))
}

async fn check_records(run: &Run<'_>, store: &Store, may_write: bool, sink: &Sink<'_>) {
    let (parts, mut read) = mpsc::channel(PARTS);
    let context: &Context = run.context;
    let count = async {
        let (mut count, mut unknown) = (0_usize, 0_usize);
        while let Some(part) = read.recv().await {
            let Part::Record(entry) = part else { continue };
            count += 1;
            if let (Some(knows), Ok(job)) = (&context.knows, JobRecord::read(&entry.field, &entry.value)) {
                unknown += usize::from(!knows(&job.room, &job.identity));
            }
        }
        (count, unknown)
    };
    let load = async {
        let loaded = told(store.load(&parts)).await;
        drop(parts);
        loaded
    };
    let both = async {
        let (loaded, counted) = tokio::join!(load, count);
        loaded.map(|skipped| (counted, skipped))
    };
    match in_time(run, both).await {
        Err(why) if may_write => sink.fail("store-records", &fault::STORE_RIGHTS, why),
        Err(_) => sink.skip(&["store-records"], fault::STORE_RIGHTS.id),
        Ok(((count, 0), 0)) => sink.ok("store-records", format!("{count} delegated leaves are kept")),
        Ok(((count, 0), skipped)) => {
            let saw = format!("{count} delegated leaves are kept, and {skipped} records that are too long to be ours");
            sink.warn("store-records", &fault::STORE_SHARED, saw);
        }
        Ok(((count, unknown), _)) => {
            let saw = format!("of {count} records, {unknown} are of leaves that this instance does not know");
            sink.fail("store-records", &fault::STORE_SHARED, saw);
        }
    }
}
