//! Kick on leave (decision A8): whoever is in a call and leaves its Matrix room, or is banned from it, is removed from the LiveKit
//! room, and again when they come back with the old token, which the SFU goes on accepting.
//!
//! Fails open: nobody is removed without a clear no of our own homeserver about somebody of whom it had said yes.
//!
//! ```text
//! membership.rs   who is in the call and has left the Matrix room, pure: facts in, actions out; the rules are there
//! shares.rs       how many tokens are watched, and whose, pure
//! name.rs         names on the SFU, kept in little space, pure
//! driver.rs       the only clock: makes the calls and feeds back what they brought
//! ```
//!
//! * Only ever one participant is removed, never a room: users of other homeservers publish in it too.
//! * A removal is told at `info`, with the LiveKit room. Names of Matrix users and rooms are told at `debug` only.

mod driver;
pub mod membership;
pub mod name;
pub mod shares;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::homeserver::OwnHomeserver;
use crate::identity::Seat;
use crate::sfu::Sfu;
use crate::sfu::webhook::Webhook;
use crate::store::token;
use driver::Driver;

/// Told of a LiveKit room and an identity in it.
pub type EndDelegatedLeave = Box<dyn Fn(&str, &str) + Send + Sync>;

/// What kick on leave works with.
pub struct Settings {
    /// Our homeserver, which knows who is joined.
    pub own: Arc<OwnHomeserver>,
    /// The SFU.
    pub sfu: Arc<Sfu>,
    /// Where tokens are stored.
    pub store: token::Queue,
    /// From one sweep to the next.
    pub interval: Duration,
    /// Tokens that are watched at most.
    pub max_tokens: usize,
    /// Told of who left the Matrix room: there is no leave to send for them (decision L6).
    pub end_delegated_leave: EndDelegatedLeave,
}

/// The handle to all tokens that are watched.
#[derive(Clone)]
pub struct KickOnLeave(Arc<Driver>);

impl KickOnLeave {
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

    /// A token for `seat` is about to be issued; `checked` where our homeserver had said, just before, that the user is joined. `false`
    /// where it cannot be watched, so that its holder could not be removed.
    #[must_use]
    pub fn on_token(&self, room_id: &str, user_id: &str, seat: &Seat, ttl: Duration, checked: bool) -> bool {
        self.0.on_token(room_id, user_id, seat, ttl, checked)
    }

    /// Takes in a verified webhook of the SFU.
    pub fn handle_webhook(&self, webhook: &Webhook) {
        self.0.handle_webhook(webhook);
    }

    /// Takes in who is in a LiveKit room, as the SFU said when somebody else asked it then.
    pub fn handle_list(&self, room: &str, identities: &[&str], asked: Instant) {
        self.0.handle_list(room, identities, asked);
    }

    /// Writes what is not written yet, until `deadline`; the last thing to be done.
    pub async fn close_store(&self, deadline: Instant) {
        self.0.close_store(deadline).await;
    }
}
