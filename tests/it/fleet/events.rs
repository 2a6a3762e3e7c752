//! Delayed events as a homeserver has them: each runs until its delay is over, or until it is sent or cancelled, once.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::stage::{Person, within};
use crate::support::bucket::Bucket;
use crate::support::client_api::{ClientApi, done, not_found};
use crate::support::neighbour::Reply;

/// All events of one homeserver.
#[derive(Clone)]
pub(super) struct Events(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    events: HashMap<String, Event>,
    faults: Vec<String>,
    limit: Option<Bucket>,
}

struct Event {
    /// Room and identity.
    seat: (String, String),
    delay: Duration,
    restarted: Instant,
    is_over: bool,
    is_sent: bool,
}

impl Event {
    fn runs(&self) -> bool {
        // A machine that stands still for seconds restarts nothing meanwhile.
        !self.is_over && self.restarted.elapsed() < within(self.delay, self.restarted)
    }
}

impl Events {
    /// From now on the homeserver manages those that are scheduled, and knows no others.
    pub(super) fn of(api: &ClientApi) -> Self {
        let state = Arc::<Mutex<State>>::default();
        let managed = state.clone();
        api.answer(move |call, _| managed.lock().unwrap().manage(&call.delay_id, &call.what));
        Self(state)
    }

    /// From now on so many calls a second are answered as they should be.
    pub(super) fn limit(&self, per_second: f64, burst: f64) {
        self.0.lock().unwrap().limit = Some(Bucket::new(per_second, burst));
    }

    /// How many ran out: neither sent nor cancelled in time.
    pub(super) fn ran_out(&self) -> usize {
        let state = self.0.lock().unwrap();
        state.events.values().filter(|event| !event.is_over && !event.runs()).count()
    }

    /// Somebody has an event from now on.
    pub(super) fn schedule(&self, person: &Person) {
        let event = Event {
            seat: seat(person),
            delay: person.delay,
            restarted: Instant::now(),
            is_over: false,
            is_sent: false,
        };
        self.0.lock().unwrap().events.insert(person.delay_id.clone(), event);
    }

    /// The events of this seat that run.
    pub(super) fn living(&self, person: &Person) -> Vec<String> {
        self.of_seat(person, Event::runs)
    }

    /// The events of this seat that were sent.
    pub(super) fn sent(&self, person: &Person) -> Vec<String> {
        self.of_seat(person, |event| event.is_sent)
    }

    fn of_seat(&self, person: &Person, which: impl Fn(&Event) -> bool) -> Vec<String> {
        let (state, seat) = (self.0.lock().unwrap(), seat(person));
        let found = state.events.iter().filter(|(_, event)| event.seat == seat && which(event));
        found.map(|(delay_id, _)| delay_id.clone()).collect()
    }

    /// Nobody's only living event was cancelled.
    #[track_caller]
    pub(super) fn assert_well(&self) {
        assert_eq!(self.0.lock().unwrap().faults, Vec::<String>::new());
    }
}

fn seat(person: &Person) -> (String, String) {
    (person.alias.clone(), person.identity.clone())
}

impl State {
    fn manage(&mut self, delay_id: &str, what: &str) -> Reply {
        if let Some(refusal) = self.limit.as_ref().and_then(Bucket::refuses) {
            return refusal;
        }
        let Some(seat) = self
            .events
            .get(delay_id)
            .filter(|event| event.runs())
            .map(|event| event.seat.clone())
        else {
            return not_found();
        };
        let lives_on = self
            .events
            .iter()
            .any(|(id, event)| id != delay_id && event.seat == seat && event.runs());
        if what == "cancel" && !lives_on {
            self.faults
                .push(format!("{delay_id} is cancelled, the only living event of {seat:?}"));
        }
        if let Some(event) = self.events.get_mut(delay_id) {
            match what {
                "restart" => event.restarted = Instant::now(),
                _ => (event.is_over, event.is_sent) = (true, what == "send"),
            }
        }
        done()
    }
}
