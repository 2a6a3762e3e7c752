//! Black-box tests: the real binary, real sockets, fake neighbours.
#![expect(clippy::expect_used, clippy::print_stderr, clippy::unwrap_used, reason = "a failed expectation is a failed test")]

mod support;
