//! The page "Why does my call not work?": what it is made of, and the tickets by which it may try media.
//!
//! Without a ticket the page is nothing but files: it looks from the user's browser at what any visitor sees. With one, which
//! `doctor --link` makes for one user, it gets a token for a room of its own, in which nobody can do anything; the room ends after a minute.
//! Nothing here touches the rooms, places or memory of calls, and no address that is called comes from whoever asks.
//!
//! * pure: `uses.rs` how often tickets are used, `report.rs` what a user sends to the operator
//! * `page/` the files of the page; `page/livekit-client.js.br` is made by `tests/tools/browser/bundle.mjs`
#![expect(clippy::disallowed_methods, reason = "a use case that drives: ends rooms when their time is over")]

mod report;
mod uses;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{sleep, timeout_at};

pub use report::{MAX_REPORT_BYTES, Report};
use uses::{Entered, MAX_USES, Refusal, Uses};

use crate::clock::unix_seconds;
use crate::doctor::{TicketKey, Use};
use crate::secret::Secret;
use crate::sfu::{Sfu, SfuError};
use crate::telemetry::{self, CHECK};
use crate::token::VISITOR;

/// How long a room stands, from the moment at which its token was asked for: as long as the token is good. The SFU would take it for a
/// minute longer, for clocks that differ, and renews the tokens of those inside.
const ROOM_LIFE: Duration = Duration::from_secs(60);
/// Pauses between attempts to end a room, and how many there are.
const END_RETRY_PAUSE: Duration = Duration::from_secs(10);
const MAX_END_TRIES: usize = 30;

/// Tickets and the rooms that are tried with them.
pub struct Check {
    sfu: Arc<Sfu>,
    uses: Arc<Mutex<Uses>>,
    /// The secret may be known to everybody (`--dev`): only callers on this machine count.
    only_loopback: bool,
}

/// Leave to try media.
pub struct Admitted {
    /// Name of the ticket.
    pub jti: String,
    /// Room that was opened for it.
    pub room: String,
    /// Token that joins that room and does nothing else.
    pub token: Secret,
    /// Uses of the ticket that are left in this process.
    pub uses_left: u8,
}

/// Refusal of a ticket.
#[derive(Debug)]
pub enum Denied {
    /// There is no valid ticket.
    NotProven,
    /// The ticket was used as often as it may be, or was not used when it has to be.
    UsedUp,
    /// The ticket is good, and there is something to wait for, for so many seconds.
    Later(u32),
    /// The room could not be opened.
    Sfu(SfuError),
}

impl Check {
    /// Tries media on `sfu`; with `only_loopback`, for callers on this machine.
    #[must_use]
    pub fn new(sfu: Arc<Sfu>, only_loopback: bool) -> Self {
        Self {
            sfu,
            uses: Arc::default(),
            only_loopback,
        }
    }

    /// Opens the room of a ticket under `secret`. The room that an earlier use of it opened ends.
    ///
    /// # Errors
    /// When the caller may not, or has to wait, or the SFU does not open the room.
    pub async fn begin(&self, ticket: &str, secret: &Secret, is_loopback: bool) -> Result<Admitted, Denied> {
        let now = unix_seconds();
        let (jti, ends) = self.verify(ticket, secret, is_loopback, now)?;
        let entered = self.uses.lock().enter(&jti, ends, now);
        let Entered { number, replaces } = entered.map_err(|refusal| match refusal {
            Refusal::UsedUp => Denied::UsedUp,
            Refusal::Later(seconds) => Denied::Later(seconds),
        })?;
        let _beginning = Beginning(&self.uses, &jti);
        let room = room_of(&jti);
        // The end is certain from here on, whoever goes away meanwhile.
        tokio::spawn(end_in_time(self.sfu.clone(), self.uses.clone(), jti.clone(), number));
        if replaces {
            // What could not be ended now is ended with the room of this use.
            let _ = end(&self.sfu, &room).await;
        }
        self.sfu.open_small_room(&room).await.map_err(Denied::Sfu)?;
        let token = self.sfu.visitor(&room, false).map_err(Denied::Sfu)?;
        let uses_left = MAX_USES.saturating_sub(number);
        Ok(Admitted {
            jti: jti.clone(),
            room,
            token,
            uses_left,
        })
    }

    /// Lets a report in, once a use; the name of the ticket.
    ///
    /// # Errors
    /// When the caller may not send one.
    pub fn admit_report(&self, ticket: &str, secret: &Secret, is_loopback: bool) -> Result<String, Denied> {
        let (jti, _) = self.verify(ticket, secret, is_loopback, unix_seconds())?;
        if self.uses.lock().may_report(&jti) {
            Ok(jti)
        } else {
            Err(Denied::UsedUp)
        }
    }

    /// Ends the rooms that stand, until `deadline`.
    pub async fn stop(&self, deadline: tokio::time::Instant) {
        let rooms = self.uses.lock().take_rooms();
        let all = async {
            for jti in &rooms {
                let _ = end(&self.sfu, &room_of(jti)).await;
            }
        };
        let _ = timeout_at(deadline, all).await;
    }

    fn verify(&self, ticket: &str, secret: &Secret, is_loopback: bool, now: u64) -> Result<(String, u64), Denied> {
        let claims = TicketKey::of_links(secret).verify(ticket, Use::Link, now);
        let claims = claims.filter(|_| is_loopback || !self.only_loopback);
        claims.map(|claims| (claims.jti.clone(), claims.ends())).ok_or(Denied::NotProven)
    }
}

/// Writes the report of the ticket `jti` as one line.
pub fn tell(jti: &str, report: &Report) {
    let report = report.text(telemetry::hides_people());
    tracing::info!(name: "check_report", target: CHECK, jti, report, "a user sent what the page found");
}

/// A use that has not begun yet.
struct Beginning<'a>(&'a Mutex<Uses>, &'a str);

impl Drop for Beginning<'_> {
    fn drop(&mut self) {
        self.0.lock().begun(self.1);
    }
}

fn room_of(jti: &str) -> String {
    format!("check-{jti}")
}

/// Ends the room of a use when its time is over, unless another use has it by then.
async fn end_in_time(sfu: Arc<Sfu>, uses: Arc<Mutex<Uses>>, jti: String, number: u8) {
    sleep(ROOM_LIFE).await;
    if !uses.lock().is_over(&jti, number) {
        return;
    }
    let room = room_of(&jti);
    for _ in 0..MAX_END_TRIES {
        match end(&sfu, &room).await {
            Ok(()) => return,
            Err(error) => {
                tracing::debug!(name: "check_room_not_ended", room, reason = error.to_string(), "a room of the page could not be ended yet")
            }
        }
        sleep(END_RETRY_PAUSE).await;
    }
    tracing::warn!(name: "check_room_stays", room, "a room of the page could not be ended: the SFU did not answer");
}

/// Removes whoever is in the room, and the room.
async fn end(sfu: &Sfu, room: &str) -> Result<(), SfuError> {
    // It says so where nobody is there.
    let _ = sfu.remove(room, VISITOR).await;
    match sfu.delete_room(room).await {
        Ok(()) | Err(SfuError::NotFound) => Ok(()),
        Err(error) => Err(error),
    }
}
