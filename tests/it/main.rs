//! Black-box tests: the real binary, real sockets, fake neighbours; `real`: real ones.
#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test; tests run by the clock, and bound how long they wait"
)]

mod appservice;
mod check_page;
mod coalesce;
mod contrib;
mod crowd;
mod delayed_events;
mod delegate_delayed_leave;
mod discovery;
mod docs;
mod doctor;
mod element_call;
mod environments;
mod evidence;
mod fairness;
mod faults;
mod fleet;
mod floods;
mod get_token;
mod greedy;
mod half_closed;
mod healing;
mod healthcheck;
mod healthz;
mod homeservers;
mod kick;
mod layers;
mod leave;
mod leave_real;
mod limits;
mod logs;
mod policy;
mod pressure;
mod real;
mod recorded_webhooks;
mod retry;
mod routes;
mod says;
mod second_look;
mod sfu_calls;
mod sfu_get;
mod sfu_moves;
mod sfu_webhook;
mod shutdown;
mod simulation;
mod ssrf;
mod start;
mod store;
mod support;
mod tarpit;
mod token;
mod token_source;
mod unreadable;
mod vocabulary;
