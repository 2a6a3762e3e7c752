//! Kick on leave (decision A8): who holds a token and left the Matrix room, or was banned from it, is removed from the LiveKit
//! room, and again when they come back with the old token, which the SFU goes on accepting.
//!
//! Fails open: nobody is removed without a clear no of our own homeserver about somebody of whom it had said yes.
//!
//! ```text
//! watch.rs    who holds a token and who has left, pure: facts in, actions out; the rules are there
//! name.rs     names on the SFU, kept in little space, pure
//! driver.rs   the only clock: makes the calls and feeds back what they brought
//! ```
//!
//! * Only ever one participant is removed, never a room: users of other homeservers publish in it too.
//! * It does not end a delegated leave: for that, the SFU's news of the removal is a departure like any other.
//! * Every call to the SFU is a line in its log: without somebody who has left, it is asked only about tokens that are over.
//! * A removal is told at `info`, with the names on the SFU. Names of Matrix users and rooms are told at `debug` only.

mod driver;
pub mod name;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::homeserver::OwnHomeserver;
use crate::identity::Seat;
use crate::sfu::Sfu;
use crate::sfu::webhook::Webhook;
use crate::store::token;
use driver::Driver;

/// What it works with.
pub struct Settings {
    /// Who is joined.
    pub own: Arc<OwnHomeserver>,
    /// Who is there.
    pub sfu: Arc<Sfu>,
    /// Where tokens are kept.
    pub store: token::Queue,
    /// From one sweep to the next.
    pub interval: Duration,
    /// Tokens that are kept in mind at most.
    pub max_tokens: usize,
}

/// A token that was just issued.
pub struct Issued<'a> {
    /// The Matrix room.
    pub room_id: &'a str,
    /// The Matrix user.
    pub user_id: &'a str,
    /// Where they may sit.
    pub seat: &'a Seat,
    /// How long it lasts.
    pub ttl: Duration,
    /// Our homeserver had said, just before, that the user is joined.
    pub checked: bool,
}

/// The handle to all tokens that are watched.
#[derive(Clone)]
pub struct Removals(Arc<Driver>);

impl Removals {
    /// Starts with nothing; [`Self::restore`] reads the store.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let driver = Arc::new(Driver::new(settings));
        tokio::spawn(driver.clone().keep_time());
        Self(driver)
    }

    /// Takes in what the store has.
    pub fn restore(&self, restored: token::Restored) {
        tokio::spawn(self.0.clone().restore(restored));
    }

    /// A token is about to be issued. `false` where there are too many to keep it in mind: who holds it would not be removed.
    #[must_use]
    pub fn issued(&self, issued: &Issued<'_>) -> bool {
        self.0.issued(issued)
    }

    /// Takes in what the SFU says by itself, once it is verified.
    pub fn told(&self, webhook: &Webhook) {
        self.0.told(webhook);
    }

    /// Writes what is not written yet, until `deadline`; the last thing to be done.
    pub async fn close_store(&self, deadline: Instant) {
        self.0.close_store(deadline).await;
    }
}
