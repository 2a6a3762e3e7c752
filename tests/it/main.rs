//! Black-box tests: the real binary, real sockets, fake neighbours; `real`: real ones.
#![expect(
    clippy::expect_used,
    clippy::print_stderr,
    clippy::unwrap_used,
    reason = "a failed expectation is a failed test"
)]

mod coalesce;
mod discovery;
mod element_call;
mod floods;
mod get_token;
mod healthcheck;
mod healthz;
mod hold;
mod homeservers;
mod limits;
mod logs;
mod real;
mod routes;
mod sfu_calls;
mod sfu_get;
mod shutdown;
mod ssrf;
mod start;
mod support;
mod tarpit;
mod token;
