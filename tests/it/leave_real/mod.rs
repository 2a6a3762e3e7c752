//! Delegated leave against real neighbours: Synapse with delayed events, livekit-server, LiveKit's Python SDK and
//! livekit-client in headless Chromium.
//!
//! Most of these scenes wait most of their time, for half a minute and more. So the first test that runs starts all that
//! were selected, side by side, and each test waits for its own. Some measure a tenth of a second on a machine that these
//! scenes alone keep busy: they come first, together, and the others start when those have measured ([`calm`]).
//!
//! `LK_TESTS_SCENES_AT_ONCE` changes how many run at once. `LK_TESTS_DUMP=1` keeps all that was logged also where nothing
//! failed, below `target/tmp/leave_real`.

mod browsers;
mod calm;
mod clients;
mod clock;
mod homeserver;
mod long;
mod sfu;
mod stage;
pub(crate) mod steered;
mod stores;
mod takes;
mod webhooks;

use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::Instant;

use crate::support::lateness;
use crate::support::process::{real_neighbours, say};

/// Scenes at once, on two cores: enough that waiting is shared, few enough that the times which they measure hold.
const AT_ONCE: usize = 12;

struct Scene {
    name: &'static str,
    play: fn(),
    /// Whether it takes part in the calm.
    calm: bool,
}

/// In the order in which they start: the long ones first.
macro_rules! scenes {
    (calm { $($calm:ident::$early:ident,)* } then { $($module:ident::$name:ident,)* }) => {
        const SCENES: &[Scene] = &[
            $(Scene { name: stringify!($early), play: $calm::$early, calm: true },)*
            $(Scene { name: stringify!($name), play: $module::$name, calm: false },)*
        ];
        scenes!(tests $($early)* $($name)*);
    };
    (tests $($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                wait_for(stringify!($name));
            }
        )*
    };
}

scenes! {
    calm {
        homeserver::twelve_stay_two_minutes_under_default_limits_and_leave,
        stores::service_and_sfu_killed_together_with_redis,
        sfu::an_sfu_that_is_back_after_20_s,
        sfu::an_sfu_that_is_back_after_3_s,
        sfu::an_sfu_that_is_back_after_1_s,
    }
    then {
        webhooks::nobody_wired_the_webhooks,
        homeserver::a_slow_homeserver_reports_nobody_gone,
        stores::redis_stopped_for_30_s,
        browsers::full_reconnect_is_no_leave,
        browsers::resume_reconnect_is_no_leave,
        browsers::signal_reconnect_is_no_leave,
        browsers::migration_is_no_leave,
        browsers::node_failure_is_no_leave,
        clients::a_client_that_is_killed,
        browsers::a_browser_that_is_killed,
        stores::the_service_is_killed_between_the_steps_with_redis,
        stores::the_service_is_killed_between_the_steps_with_a_file,
        webhooks::webhooks_while_the_service_was_down,
        webhooks::webhooks_while_the_service_was_stopped,
        clients::the_same_identity_twice,
        clients::a_second_delegation_of_the_same_identity,
        browsers::a_page_is_reloaded,
        homeserver::a_cancelled_event_ends_the_job,
        homeserver::an_unknown_event_ends_the_job,
        clients::a_goodbye,
        clients::a_goodbye_after_the_delegate_route,
        browsers::server_leave_is_a_leave,
        browsers::a_tab_is_closed,
        long::a_round_of_the_long_run,
    }
}

/// The results so far.
struct Hall {
    results: Mutex<HashMap<&'static str, Result<(), String>>>,
    changed: Condvar,
}

/// Waits for the result of one scene.
#[track_caller]
fn wait_for(name: &str) {
    if !real_neighbours() {
        return;
    }
    static HALL: OnceLock<Arc<Hall>> = OnceLock::new();
    let hall = HALL.get_or_init(open_hall);
    let results = hall.results.lock().unwrap();
    let mut results = hall.changed.wait_while(results, |results| !results.contains_key(name)).unwrap();
    if let Err(why) = results.remove(name).expect("just seen") {
        drop(results);
        panic!("{why}");
    }
}

fn open_hall() -> Arc<Hall> {
    note_panics();
    lateness::measure();
    let hall = Arc::new(Hall {
        results: Mutex::default(),
        changed: Condvar::new(),
    });
    let at_once = std::env::var("LK_TESTS_SCENES_AT_ONCE")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(AT_ONCE);
    let next = Arc::new(AtomicUsize::new(0));
    let selected: Arc<Vec<_>> = Arc::new(SCENES.iter().filter(|scene| is_selected(scene.name)).collect());
    let calm = selected.iter().filter(|scene| scene.calm).count();
    calm::expect(calm);
    for _ in 0..at_once.max(calm) {
        let (hall, next, selected) = (hall.clone(), next.clone(), selected.clone());
        std::thread::spawn(move || {
            while let Some(scene) = selected.get(next.fetch_add(1, Relaxed)) {
                if scene.calm {
                    calm::enter();
                } else {
                    calm::wait_end();
                }
                let began = Instant::now();
                let result = catch_unwind(AssertUnwindSafe(scene.play)).map_err(|_| PANIC.take());
                if scene.calm {
                    calm::leave();
                }
                let end = if result.is_ok() { "ok" } else { "FAILED" };
                say(&format!("scene {}: {end} in {:.1} s", scene.name, began.elapsed().as_secs_f64()));
                hall.results.lock().unwrap().insert(scene.name, result);
                hall.changed.notify_all();
            }
        });
    }
    hall
}

thread_local! {
    /// Message and place of this thread's first panic.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

fn note_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANIC.with_borrow_mut(|noted| {
            if noted.is_empty() {
                *noted = info.to_string();
            }
        });
        usual(info);
    }));
}

/// Whether the arguments of the test harness select this test.
fn is_selected(name: &str) -> bool {
    let path = format!("{}::{name}", module_path!().split_once("::").map_or("", |(_, path)| path));
    let (mut filters, mut skipped, mut exact) = (Vec::new(), Vec::new(), false);
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--exact" => exact = true,
            "--skip" => skipped.extend(arguments.next()),
            // Those whose value is an argument of its own.
            "--test-threads" | "--format" | "--color" | "--logfile" | "-Z" | "--report-time" | "--shuffle-seed" => {
                arguments.next();
            }
            other if other.starts_with('-') => {}
            _ => filters.push(argument),
        }
    }
    let fits = |filter: &String| if exact { path == *filter } else { path.contains(filter.as_str()) };
    (filters.is_empty() || filters.iter().any(fits)) && !skipped.iter().any(fits)
}
