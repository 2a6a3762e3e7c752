use super::*;
use crate::store::{Failure, RedisError};
use proptest::prelude::*;

fn change(field: &str, value: Option<&str>) -> Change {
    Change {
        field: field.into(),
        value: value.map(Into::into),
    }
}

fn fields(batch: &[(u64, Waiting)]) -> Vec<(&str, Option<&str>)> {
    batch
        .iter()
        .map(|(_, waiting)| (&*waiting.change.field, waiting.change.value.as_deref()))
        .collect()
}

#[test]
fn the_latest_change_of_a_field_takes_the_place_of_the_first() {
    let mut state = State::default();
    for (field, value) in [("a", Some("1")), ("b", Some("1")), ("a", Some("2")), ("c", None), ("b", None)] {
        state.push(change(field, value), 0, None);
    }
    assert_eq!((state.unwritten(), state.removals), (3, 2 * (REMOVAL + 1)));
    let batch = state.take(BATCH, false);
    assert_eq!(fields(&batch), [("b", None), ("c", None), ("a", Some("2"))], "removals first");
    assert_eq!((state.unwritten(), state.removals), (3, 0));
    // Meanwhile `b` is put again; then the batch fails.
    state.push(change("b", Some("3")), 0, None);
    state.push(change("d", Some("1")), 0, None);
    state.give_back(batch, false);
    assert_eq!((state.unwritten(), state.removals), (4, REMOVAL + 1));
    assert_eq!(
        fields(&state.take(BATCH, false)),
        [("c", None), ("a", Some("2")), ("b", Some("3")), ("d", Some("1"))]
    );
}

#[test]
fn those_who_wait_for_an_old_value_are_told_of_the_new_one() {
    let mut state = State::default();
    let (first, mut first_told) = oneshot::channel();
    let (second, mut second_told) = oneshot::channel();
    state.push(change("a", Some("1")), 0, Some(first));
    let batch = state.take(BATCH, false);
    state.push(change("a", Some("2")), 0, Some(second));
    state.give_back(batch, false);
    let batch = state.take(BATCH, false);
    assert_eq!(fields(&batch), [("a", Some("2"))]);
    for waiter in batch.into_iter().flat_map(|(_, waiting)| waiting.waiters) {
        waiter.send(()).unwrap();
    }
    assert!(first_told.try_recv().is_ok() && second_told.try_recv().is_ok());
}

#[test]
fn nothing_grows_without_bound_while_the_store_is_away() {
    let mut state = State::default();
    state.begin_reading();
    for n in 0..1000 {
        let (waiter, gone) = oneshot::channel();
        drop(gone);
        state.push(change("a", Some("x")), n % 7, Some(waiter));
    }
    assert_eq!(state.waiting.values().next().unwrap().waiters.len(), 1);
    assert_eq!(state.touched.len(), 7);
    let (long, bytes) = ("x".repeat(1000), REMOVAL + 1000 + 6);
    let most = MAX_REMOVAL_BYTES.div_ceil(bytes);
    for n in 0..most + 10 {
        state.push(change(&format!("{long}{n:06}"), None), 0, None);
    }
    assert_eq!((state.removals, state.waiting.len()), (most * bytes, most + 1));
    // A removal of what waits to be written is no new one.
    state.push(change("a", None), 0, None);
    assert_eq!(state.waiting.len(), most + 1);
    state.push(change("a", Some("x")), 0, None);
    assert_eq!(state.removals, most * bytes);
    while !state.take(BATCH, false).is_empty() {}
    assert_eq!(state.removals, 0);
}

#[test]
fn batches_are_bounded() {
    let mut state = State::default();
    let large = "x".repeat(MAX_BYTES);
    for n in 0..100 {
        state.push(change(&n.to_string(), Some(&large)), 0, None);
    }
    assert_eq!(state.take(BATCH, false).len(), 16);
    for n in 0..5000 {
        state.push(change(&format!("s{n}"), Some("x")), 0, None);
    }
    while !state.waiting.is_empty() {
        assert!(state.take(BATCH, false).len() <= BATCH);
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
            trouble.pause().as_millis()
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
    assert!(changes.make_and_tell("a".into(), Some("2".into())).within(Duration::ZERO).await);
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
        let shared = Shared::of(table);
        shared.lock().push(change("a", Some("1")), 0, None);
        assert_eq!(shared.gives_up(&error), given_up);
        shared.lock().push(change("b", Some("1")), 0, None);
        assert_eq!(shared.lock().unwritten(), if given_up { 0 } else { 2 });
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
        let apply = |stored: &mut BTreeMap<String, Arc<str>>, batch: &[(u64, Waiting)]| {
            for (_, Waiting { change, .. }) in batch {
                match &change.value {
                    Some(value) => stored.insert(change.field.to_string(), value.clone()),
                    None => stored.remove(&*change.field),
                };
            }
        };
        let mut under_way: Option<Vec<(u64, Waiting)>> = None;
        for (field, value, fails_after) in steps {
            let (field, value) = (field.to_string(), value.map(|value| value.to_string()));
            state.push(change(&field, value.as_deref()), 0, None);
            match value {
                Some(value) => latest.insert(field, Arc::<str>::from(value)),
                None => latest.remove(&field),
            };
            match (under_way.take(), fails_after) {
                (Some(batch), Some(done)) => {
                    apply(&mut stored, &batch[..done.min(batch.len())]);
                    state.give_back(batch, false);
                }
                (Some(batch), None) => {
                    apply(&mut stored, &batch);
                    state.under_way.clear();
                }
                (None, _) => under_way = Some(state.take(BATCH, false)),
            }
        }
        if let Some(batch) = under_way {
            state.give_back(batch, false);
        }
        apply(&mut stored, &state.take(BATCH, false));
        prop_assert_eq!(stored, latest);
        prop_assert_eq!((state.waiting.len(), state.places.len(), state.removals), (0, 0, 0));
    }
}

#[test]
fn what_is_refused_keeps_nothing_else_back() {
    let shared = Shared::of(Table::Jobs);
    for field in ["a", "b", "c"] {
        shared.lock().push(change(field, Some("1")), 0, None);
    }
    let batch = shared.lock().take(BATCH, false);
    assert!(!shared.settle(batch, &[0, 2]), "two are refused");
    shared.lock().push(change("d", None), 0, None);
    shared.lock().push(change("e", Some("1")), 0, None);
    let batch = shared.lock().take(BATCH, false);
    assert_eq!(fields(&batch), [("d", None), ("e", Some("1"))], "they wait for their time");
    assert!(!shared.settle(batch, &[]));
    // A newer change of the same field is tried at once.
    shared.lock().push(change("c", None), 0, None);
    let batch = shared.lock().take(BATCH, false);
    assert_eq!(fields(&batch), [("c", None)]);
    assert!(!shared.settle(batch, &[]));
    let batch = shared.lock().take(BATCH, true);
    assert_eq!(fields(&batch), [("a", Some("1"))]);
    assert!(shared.settle(batch, &[]));
    assert_eq!(shared.lock().unwritten(), 0);
}

#[test]
fn what_waits_or_is_being_written_when_a_reading_begins_is_newer_than_what_it_reads() {
    let mut state = State::default();
    state.push(change("a", None), 1, None);
    let batch = state.take(BATCH, false);
    state.push(change("b", None), 2, None);
    state.begin_reading();
    state.under_way.clear();
    drop(batch);
    while !state.take(BATCH, false).is_empty() {}
    state.push(change("c", None), 3, None);
    assert_eq!(state.touched, HashSet::from([1, 2, 3]));
    // A second one begins before the end of the first was taken.
    state.begin_reading();
    state.end_reading();
    assert_eq!(state.touched, HashSet::from([1, 2, 3]));
    state.end_reading();
    assert_eq!(state.touched, HashSet::new());
}
