//! A time in which nothing starts, for what is measured in milliseconds.
//!
//! The scenes of the calm prepare everything, then [`begin`] together; the other scenes wait until all have measured.

use std::cell::Cell;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Longer than any preparation takes.
const PATIENCE: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Default)]
struct State {
    preparing: usize,
    measuring: usize,
}

static STATE: Mutex<State> = Mutex::new(State {
    preparing: 0,
    measuring: 0,
});
static CHANGED: Condvar = Condvar::new();

#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    Preparing,
    Measuring,
    Over,
}

thread_local! {
    static PART: Cell<Part> = const { Cell::new(Part::Over) };
}

fn change(change: impl FnOnce(&mut State)) {
    change(&mut STATE.lock().unwrap_or_else(PoisonError::into_inner));
    CHANGED.notify_all();
}

fn wait_while(within: Duration, go_on: impl Fn(State) -> bool) {
    let state = STATE.lock().unwrap_or_else(PoisonError::into_inner);
    drop(CHANGED.wait_timeout_while(state, within, |state| go_on(*state)));
}

/// So many scenes will take part.
pub(super) fn expect(scenes: usize) {
    change(|state| state.preparing = scenes);
}

/// This thread now plays one of them.
pub(super) fn enter() {
    PART.set(Part::Preparing);
}

/// This scene is prepared: waits until all are. In a further take it goes on measuring.
pub(super) fn begin() {
    match PART.replace(Part::Measuring) {
        Part::Preparing => change(|state| {
            state.preparing -= 1;
            state.measuring += 1;
        }),
        // A round of the long run, where nobody waits for the calm.
        Part::Over => change(|state| state.measuring += 1),
        Part::Measuring => {}
    }
    wait_while(PATIENCE, |state| state.preparing > 0);
    // What the last one did is done.
    std::thread::sleep(Duration::from_secs(1));
}

/// This scene has measured, or has come to its end.
pub(super) fn leave() {
    match PART.replace(Part::Over) {
        Part::Preparing => change(|state| state.preparing -= 1),
        Part::Measuring => change(|state| state.measuring -= 1),
        Part::Over => {}
    }
}

/// Waits until no scene measures any more.
pub(super) fn wait_end() {
    wait_while(3 * PATIENCE, |state| state.preparing + state.measuring > 0);
}
