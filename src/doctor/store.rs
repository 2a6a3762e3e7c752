//! The store of delegated leaves: whether it is there, takes what has to be written, and is nobody else's.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use super::check::Sink;
use super::fault::{self, Fault};
use super::{Run, nonce, side_by_side};
use crate::driver::fleet::{FleetReport, NodeReport};
use crate::store::{Change, JobRecord, Part, Store, StoreError, Table};

const ALL: [&str; 3] = ["store", "store-write", "store-records"];
/// How often the fleet is looked at while it changes.
const FLEET_PAUSE: Duration = Duration::from_millis(200);
/// Leaves that are not handed over for so long are a fault.
const GUESTS_FOR_LONG_SECONDS: u64 = 60;
/// Records that wait to be looked at.
const PARTS: usize = 64;

pub(super) async fn check(run: &Run<'_>, sink: &Sink<'_>) {
    let Some(store) = &run.context.store else {
        return sink.skip(&ALL[..1], "the store is at hand for the running service only");
    };
    if !store.keeps() {
        let saw = "neither LIVEKIT_REDIS_URL nor LIVEKIT_STATE_PATH is set";
        return sink.warn("store", &fault::STORE_MEMORY, &saw);
    }
    if let Err((_, why)) = in_time(run, || Box::pin(store.ping())).await {
        return sink.fail_before(&ALL[1..], "store", &fault::STORE_UNREACHABLE, &why);
    }
    sink.ok("store", &"it answers");
    let tables: &[Table] = if run.context.own.is_some() {
        &[Table::Jobs, Table::Tokens]
    } else {
        &[Table::Jobs]
    };
    let mut failed = Vec::new();
    for table in tables {
        let store = store.with(*table);
        // The same one when it is tried again: nothing of ours stays behind.
        let field: Arc<str> = format!("[\"lk-jwt-service-doctor\",\"{}\"]", nonce()).into();
        if let Err((fault, why)) = in_time(run, || Box::pin(try_write(&store, &field))).await {
            failed.push((fault, format!("{table:?}: {why}")));
        }
    }
    match failed.first() {
        None => sink.ok("store-write", &"it takes a record, and lets it be removed"),
        Some((fault, _)) => {
            let all: Vec<_> = failed.iter().map(|(_, why)| why.as_str()).collect();
            sink.fail("store-write", fault, &all.join("; "));
        }
    }
    let failed = failed.first().map(|(fault, _)| *fault);
    check_records(run, &store.with(Table::Jobs), failed, sink).await;
    check_fleet(run, sink).await;
}

/// Whether the replicas that share the store find each other. A takeover is waited for.
async fn check_fleet(run: &Run<'_>, sink: &Sink<'_>) {
    let Some(fleet) = &run.context.fleet else { return };
    let ends = run.soon();
    loop {
        let Some(report) = fleet() else { return };
        if Instant::now() < ends && living(&report).filter(|node| node.watching).count() != 1 {
            sleep(FLEET_PAUSE).await;
            continue;
        }
        for (check, fault, saw) in findings(&report) {
            match fault {
                None => sink.ok(check, &saw),
                Some(fault) if fault.id == fault::FLEET_GUESTS.id => sink.warn(check, fault, &saw),
                Some(fault) => sink.fail(check, fault, &saw),
            }
        }
        return;
    }
}

fn living(report: &FleetReport) -> impl Iterator<Item = &NodeReport> {
    report.nodes.iter().filter(|node| node.state != "dead")
}

/// Findings about the replicas, by check.
fn findings(report: &FleetReport) -> [(&'static str, Option<&'static Fault>, String); 3] {
    let names = |of: fn(&NodeReport) -> bool| {
        let named = living(report)
            .filter(|node| of(node))
            .map(|node| format!("{} ({})", node.node, node.host));
        named.collect::<Vec<_>>().join(", ")
    };
    let (all, watchers, others) = (names(|_| true), names(|node| node.watching), names(|node| !node.alike));
    let watcher = match living(report).filter(|node| node.watching).count() {
        0 => (Some(&fault::FLEET_UNWATCHED), format!("of {all} nobody watches")),
        1 => {
            let seen = report.watcher_seen_ms.unwrap_or(0);
            let sfu = names(|node| node.sfu);
            (None, format!("{watchers} watches, seen {seen} ms ago; the SFU answers {sfu}"))
        }
        _ => (Some(&fault::FLEET_TWO_WATCHERS), format!("{watchers} watch")),
    };
    let nodes = if others.is_empty() {
        (None, format!("{all} serve one SFU"))
    } else {
        (
            Some(&fault::FLEET_DIFFERS),
            format!("{others} serve another SFU or homeserver than this one"),
        )
    };
    let saw = format!(
        "{} leaves wait here to be handed over, for {} s",
        report.guests, report.guests_seconds
    );
    let guests = (report.guests_seconds >= GUESTS_FOR_LONG_SECONDS).then_some(&fault::FLEET_GUESTS);
    [
        ("fleet", watcher.0, watcher.1),
        ("fleet-nodes", nodes.0, nodes.1),
        ("fleet-guests", guests, saw),
    ]
}

type Work<'a> = Pin<Box<dyn Future<Output = Result<(), StoreError>> + Send + 'a>>;

/// Waits for the store as long as for any look, and tries once more where no answer came; what is wrong, and in words with its remedy.
async fn in_time<'a>(run: &Run<'_>, work: impl Fn() -> Work<'a>) -> Result<(), (&'static Fault, String)> {
    let tries = async {
        match work().await {
            Err(error) if !error.is_refusal() => work().await,
            done => done,
        }
    };
    match timeout_at(run.soon(), tries).await {
        Ok(done) => done.map_err(|error| {
            let fault = if error.is_refusal() {
                &fault::STORE_RIGHTS
            } else {
                &fault::STORE_UNREACHABLE
            };
            (fault, format!("{error}; {}", error.remedy()))
        }),
        Err(_) => Err((&fault::STORE_UNREACHABLE, "no answer in time".to_owned())),
    }
}

/// Writes a record that says nothing, and removes it in the same breath.
async fn try_write(store: &Store, field: &Arc<str>) -> Result<(), StoreError> {
    let change = |value: Option<&str>| Change {
        field: field.clone(),
        value: value.map(Arc::from),
    };
    let refused = store.write(&[change(Some("{}")), change(None)]).await?;
    refused.map_or(Ok(()), |refused| Err(refused.error))
}

async fn check_records(run: &Run<'_>, store: &Store, failed: Option<&Fault>, sink: &Sink<'_>) {
    let counts = Mutex::new((0_usize, 0_usize, 0_usize));
    let both = || async {
        let (parts, mut read) = mpsc::channel(PARTS);
        let (mut count, mut unknown) = (0, 0);
        let mut loaded = Ok(0);
        let load = Box::pin(async {
            loaded = store.load(&parts).await;
            drop(parts);
        });
        let counting = Box::pin(async {
            while let Some(part) = read.recv().await {
                let Part::Record(entry) = part else { continue };
                count += 1;
                if let (Some(knows), Ok(job)) = (&run.context.knows, JobRecord::read(&entry.field, &entry.value)) {
                    unknown += usize::from(!knows(&job.room, &job.identity));
                }
            }
        });
        side_by_side(vec![load, counting]).await;
        *counts.lock() = (count, unknown, loaded?);
        Ok(())
    };
    let done = in_time(run, || Box::pin(both())).await;
    let (count, unknown, skipped) = counts.into_inner();
    match done {
        Err((fault, why)) => match failed {
            None => sink.fail("store-records", fault, &why),
            Some(failed) => sink.skip(&["store-records"], failed.id),
        },
        Ok(()) if unknown > 0 => {
            let saw = format_args!("of {count} records, {unknown} are of leaves that this instance does not know");
            sink.fail("store-records", &fault::STORE_SHARED, &saw);
        }
        Ok(()) if skipped > 0 => {
            let saw = format_args!("{count} delegated leaves are kept, and {skipped} records that are too long to be ours");
            sink.warn("store-records", &fault::STORE_SHARED, &saw);
        }
        Ok(()) => sink.ok("store-records", &format_args!("{count} delegated leaves are kept")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str, state: &'static str, watching: bool, alike: bool) -> NodeReport {
        NodeReport {
            node: name.to_owned(),
            host: "host".into(),
            state,
            watching,
            alike,
            sfu: true,
        }
    }

    #[track_caller]
    fn assert_found(nodes: Vec<NodeReport>, guests_seconds: u64, expected: [Option<&'static Fault>; 3]) {
        let report = FleetReport {
            node: "a".to_owned(),
            watcher: "a".to_owned(),
            epoch: 3,
            watches: true,
            redis: true,
            watcher_seen_ms: Some(5),
            guests: 2,
            guests_seconds,
            nodes,
        };
        assert_eq!(findings(&report).map(|(_, fault, _)| fault), expected);
    }

    #[test]
    fn replicas_that_do_not_find_each_other_are_named() {
        let (up, dead) = ("up", "dead");
        let [unwatched, two, differs, guests] = [
            &fault::FLEET_UNWATCHED,
            &fault::FLEET_TWO_WATCHERS,
            &fault::FLEET_DIFFERS,
            &fault::FLEET_GUESTS,
        ];
        assert_found(vec![node("a", up, true, true), node("b", up, false, true)], 59, [None; 3]);
        assert_found(
            vec![node("a", dead, true, true), node("b", up, false, true)],
            0,
            [Some(unwatched), None, None],
        );
        assert_found(
            vec![node("a", up, true, true), node("b", up, true, true)],
            0,
            [Some(two), None, None],
        );
        let waiting = node("b", "waiting", false, false);
        assert_found(vec![node("a", up, true, true), waiting], 60, [None, Some(differs), Some(guests)]);
        assert_found(vec![node("a", up, true, true), node("b", dead, true, false)], 0, [None; 3]);
    }
}
