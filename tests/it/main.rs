//! Black-box tests: the real binary, real sockets, fake neighbours.
#![expect(
    clippy::expect_used,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]

mod coalesce;
mod element_call;
mod get_token;
mod healthcheck;
mod healthz;
mod hold;
mod homeservers;
mod limits;
mod logs;
mod routes;
mod sfu_calls;
mod sfu_get;
mod shutdown;
mod start;
mod support;
mod tarpit;
mod token;
