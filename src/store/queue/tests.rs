use super::*;
use crate::store::{Failure, RedisError};
use proptest::prelude::*;

fn change(field: &str, value: Option<&str>) -> Change {
    Change {
        field: field.into(),
        value: value.map(Into::into),
    }
}

fn fields(batch: &[Change]) -> Vec<(&str, Option<&str>)> {
    batch.iter().map(|change| (&*change.field, change.value.as_deref())).collect()
}

/// Everything that waits, batch after batch.
fn drain(state: &mut State) {
    while let batch = state.batch(BATCH_CHANGES, false)
        && !batch.is_empty()
    {
        state.settle(&batch, &[]);
    }
}

#[test]
fn the_latest_change_of_a_field_takes_the_place_of_the_first() {
    let mut state = State::default();
    for (field, value) in [("a", Some("1")), ("b", Some("1")), ("a", Some("2")), ("c", None), ("b", None)] {
        state.push(change(field, value));
    }
    assert_eq!((state.waiting.len(), state.removals), (3, 2 * (REMOVAL_BYTES + 1)));
    let batch = state.batch(BATCH_CHANGES, false);
    assert_eq!(fields(&batch), [("b", None), ("c", None), ("a", Some("2"))], "removals first");
    // Meanwhile `b` is put again; then the batch fails.
    state.push(change("b", Some("3")));
    state.push(change("d", Some("1")));
    assert_eq!((state.waiting.len(), state.removals), (4, REMOVAL_BYTES + 1));
    let again = state.batch(BATCH_CHANGES, false);
    assert_eq!(fields(&again), [("c", None), ("a", Some("2")), ("b", Some("3")), ("d", Some("1"))]);
    // Had it not failed, the newer change would still wait.
    state.settle(&batch, &[]);
    assert_eq!(fields(&state.batch(BATCH_CHANGES, false)), [("b", Some("3")), ("d", Some("1"))]);
    assert_eq!(state.removals, 0);
}

#[tokio::test(start_paused = true)]
async fn those_who_wait_for_an_old_value_are_told_of_the_new_one() {
    let shared = Arc::new(Shared::default());
    let changes = Changes(shared.clone());
    let batch = || shared.state.lock().batch(BATCH_CHANGES, false);
    let timeout = Duration::from_secs(3);
    let first = tokio::spawn(changes.make("a".into(), Some("1".into())).within(timeout));
    let other = tokio::spawn(changes.make("b".into(), Some("1".into())).within(timeout));
    let old = batch();
    let second = tokio::spawn(changes.make("a".into(), Some("2".into())).within(timeout));
    tokio::task::yield_now().await;
    shared.settle(&old, &[1]);
    tokio::task::yield_now().await;
    assert!(!first.is_finished() && !second.is_finished(), "the old value is not what counts");
    shared.settle(&batch(), &[]);
    assert!(first.await.unwrap() && second.await.unwrap());
    assert!(!other.await.unwrap(), "it was refused");
    let too_large = "x".repeat(MAX_BYTES + 1);
    assert!(!changes.make("c".into(), Some(too_large)).within(timeout).await);
}

#[test]
fn nothing_grows_without_bound_while_the_store_is_away() {
    let mut state = State::default();
    let (sender, _parts) = mpsc::channel(1);
    state.begin_reading(&sender);
    for n in 0..1000 {
        state.push(change(&(n % 7).to_string(), Some("x")));
    }
    assert_eq!((state.waiting.len(), state.touched.len()), (7, 7));
    let (long, bytes) = ("x".repeat(1000), REMOVAL_BYTES + 1000 + 6);
    let most = MAX_REMOVAL_BYTES.div_ceil(bytes);
    for n in 0..most + 10 {
        state.push(change(&format!("{long}{n:06}"), None));
    }
    assert_eq!((state.removals, state.waiting.len()), (most * bytes, most + 7));
    // A removal of what waits to be written is no new one.
    state.push(change("0", None));
    assert_eq!(state.waiting.len(), most + 7);
    state.push(change("0", Some("x")));
    assert_eq!(state.removals, most * bytes);
    drain(&mut state);
    assert_eq!((state.removals, state.places.len()), (0, 0));
}

#[test]
fn batches_are_bounded() {
    let mut state = State::default();
    let large = "x".repeat(MAX_BYTES);
    for n in 0..100 {
        state.push(change(&n.to_string(), Some(&large)));
    }
    assert_eq!(state.batch(BATCH_CHANGES, false).len(), 16);
    for n in 0..5000 {
        state.push(change(&format!("s{n}"), Some("x")));
    }
    while !state.waiting.is_empty() {
        let batch = state.batch(BATCH_CHANGES, false);
        assert!((1..=BATCH_CHANGES).contains(&batch.len()));
        state.settle(&batch, &[]);
    }
}

#[test]
fn pauses_grow_to_two_seconds() {
    let pauses: Vec<_> = [1, 2, 3, 6, 7, 99, u32::MAX]
        .map(|failures| {
            let trouble = Trouble {
                failures,
                ..Trouble::of(Table::Jobs)
            };
            trouble.backoff().as_millis()
        })
        .into();
    assert_eq!(pauses, [100, 200, 400, 2000, 2000, 2000, 2000]);
}

#[tokio::test(start_paused = true)]
async fn without_a_store_everything_is_written_at_once() {
    let (changes, mut entries) = Changes::start(Store::memory());
    let read = |_: &[u8], _: &[u8]| Ok::<(), &str>(());
    assert!(entries.next(read).await.is_none() && !changes.are_kept());
    changes.make("a".into(), Some("1".into()));
    assert!(changes.make("a".into(), Some("2".into())).within(Duration::ZERO).await);
    changes.make("a".into(), None);
    assert_eq!((changes.waiting(), changes.stop(Instant::now()).await), (0, 0));
}

#[test]
fn what_can_do_without_a_store_does_when_it_is_denied() {
    let denied = || {
        let (command, code) = ("HSET", "NOPERM".into());
        StoreError(Failure::Redis("redis".into(), RedisError::Refused { command, code }))
    };
    let away = StoreError(Failure::Redis("redis".into(), RedisError::Timeout));
    for (table, error, given_up) in [
        (Table::Jobs, denied(), false),
        (Table::Tokens, away, false),
        (Table::Tokens, denied(), true),
    ] {
        let shared = Arc::new(Shared {
            table,
            ..Shared::default()
        });
        shared.state.lock().push(change("a", Some("1")));
        assert_eq!(shared.gives_up(&error), given_up);
        assert_eq!(shared.state.lock().waiting.len(), usize::from(!given_up));
        let later = Changes(shared).make("b".into(), Some("1".into()));
        assert_eq!(matches!(later.0, Way::Done), given_up);
    }
}

proptest! {
    /// A store that takes whole batches, first parts of batches, or nothing.
    #[test]
    fn a_store_that_fails_at_any_place_ends_with_the_latest_of_all(
        steps in prop::collection::vec((0..5u8, prop::option::of(0..100u8), prop::option::of(0..3usize)), 0..60)
    ) {
        let mut state = State::default();
        let (mut latest, mut stored) = (BTreeMap::new(), BTreeMap::new());
        let apply = |stored: &mut BTreeMap<String, Arc<str>>, batch: &[Change]| {
            for change in batch {
                match &change.value {
                    Some(value) => stored.insert(change.field.to_string(), value.clone()),
                    None => stored.remove(&*change.field),
                };
            }
        };
        let mut under_way: Option<Vec<Change>> = None;
        for (field, value, fails_after) in steps {
            let (field, value) = (field.to_string(), value.map(|value| value.to_string()));
            state.push(change(&field, value.as_deref()));
            match value {
                Some(value) => latest.insert(field, Arc::<str>::from(value)),
                None => latest.remove(&field),
            };
            match (under_way.take(), fails_after) {
                (Some(batch), Some(done)) => apply(&mut stored, &batch[..done.min(batch.len())]),
                (Some(batch), None) => {
                    apply(&mut stored, &batch);
                    state.settle(&batch, &[]);
                }
                (None, _) => under_way = Some(state.batch(BATCH_CHANGES, false)),
            }
        }
        let batch = state.batch(BATCH_CHANGES, false);
        apply(&mut stored, &batch);
        state.settle(&batch, &[]);
        prop_assert_eq!(stored, latest);
        prop_assert_eq!((state.waiting.len(), state.places.len(), state.removals), (0, 0, 0));
    }
}

#[test]
fn what_is_refused_keeps_nothing_else_back() {
    let shared = Shared::default();
    let push = |field: &str, value: Option<&str>| shared.state.lock().push(change(field, value));
    for field in ["a", "b", "c"] {
        push(field, Some("1"));
    }
    let batch = shared.state.lock().batch(BATCH_CHANGES, false);
    assert!(!shared.settle(&batch, &[0, 2]), "two are refused");
    push("d", None);
    push("e", Some("1"));
    let batch = shared.state.lock().batch(BATCH_CHANGES, false);
    assert_eq!(fields(&batch), [("d", None), ("e", Some("1"))], "they wait for their time");
    assert!(!shared.settle(&batch, &[]));
    // A newer change of the same field is tried at once.
    push("c", None);
    let batch = shared.state.lock().batch(BATCH_CHANGES, false);
    assert_eq!(fields(&batch), [("c", None)]);
    assert!(!shared.settle(&batch, &[]));
    let batch = shared.state.lock().batch(BATCH_CHANGES, true);
    assert_eq!(fields(&batch), [("a", Some("1"))]);
    assert!(shared.settle(&batch, &[]));
    assert!(shared.state.lock().waiting.is_empty());
}

#[test]
fn what_waits_or_is_being_written_when_a_reading_begins_is_newer_than_what_it_reads() {
    let (sender, parts) = mpsc::channel(1);
    let mut state = State::default();
    let touched = |state: &State| {
        let is_touched = |field: &&str| state.touched.contains(&state.hasher.hash_one(field.as_bytes()));
        ["a", "b", "c", "d"].into_iter().filter(is_touched).collect::<Vec<_>>()
    };
    state.push(change("d", None));
    drain(&mut state);
    state.push(change("a", None));
    let batch = state.batch(BATCH_CHANGES, false);
    state.push(change("b", None));
    state.begin_reading(&sender);
    state.settle(&batch, &[]);
    drain(&mut state);
    state.push(change("c", None));
    assert_eq!(touched(&state), ["a", "b", "c"]);
    // A second one begins before the end of the first was taken.
    state.begin_reading(&sender);
    state.end_reading();
    assert_eq!(touched(&state), ["a", "b", "c"]);
    state.end_reading();
    assert_eq!(state.touched.len(), 0);
    // Nothing is remembered for nobody.
    drop(parts);
    state.begin_reading(&sender);
    assert_eq!((state.readings, state.touched.len()), (0, 0));
}
