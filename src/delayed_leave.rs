//! Delegated delayed leave: a client hands over its delayed leave event
//! ([MSC4140](https://github.com/matrix-org/matrix-spec-proposals/pull/4140)); the service watches the participant on the
//! SFU, keeps restarting the event while the participant is there, and sends it when the participant is gone.
//!
//! Two promises (decision L1): a participant who is gone is reported; a participant who is there never is.
//!
//! ```text
//! machine.rs   one job, pure: facts in, actions out; the state chart is there
//! jobs.rs      all jobs, pure: route, replace, restore, bound; one timer queue
//! rooms.rs     what is known of each room on the SFU, pure
//! watch.rs     whether the SFU answers, pure
//! pace.rs      whose call to a homeserver is next, pure
//! driver.rs    the only clock: makes the calls and feeds back what they brought
//! ```

mod driver;
pub mod jobs;
pub mod machine;
pub mod pace;
pub mod rooms;
pub mod watch;

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

pub use driver::Settings;
pub use jobs::Refusal;

use crate::identity::Seat;
use crate::log_throttle::LogThrottle;
use crate::sfu::webhook::{Verified, Webhook};
use crate::store::StoredJobs;
use crate::time::Delay;
use driver::Driver;

/// How long the answer to a delegation waits for its record to be written (decision L10).
const WRITTEN_WITHIN: Duration = Duration::from_secs(3);

static UNWRITTEN: LogThrottle = LogThrottle::once_a_minute();

/// A delegation whose checks are done.
pub struct Delegation<'a> {
    /// The participant that is watched.
    pub seat: &'a Seat,
    /// The Matrix user.
    pub user: &'a str,
    /// Its homeserver.
    pub homeserver: &'a str,
    /// The delayed event.
    pub delay_id: &'a str,
    /// Its delay.
    pub delay: Delay,
    /// When the request arrived.
    pub received: Instant,
    /// Calls about it are made in the user's name, with the `as_token`.
    pub as_user: bool,
}

/// The handle to all delegated leaves.
#[derive(Clone)]
pub struct Leaves(Arc<Driver>);

impl Leaves {
    /// Starts with nothing; [`Self::restore`] reads the store.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let driver = Arc::new(Driver::new(settings));
        tokio::spawn(driver.clone().keep_time());
        tokio::spawn(driver.clone().notice_closing());
        Self(driver)
    }

    /// Takes in what the store has; from then on, but after five seconds in any case, webhooks and delegations are taken.
    pub fn restore(&self, stored: StoredJobs) {
        tokio::spawn(self.0.clone().restore(stored));
    }

    /// Waits until jobs are restored, or given up waiting for.
    pub async fn restored(&self) {
        self.0.open().await;
    }

    /// Whether webhooks can be acted upon: not while jobs are not restored yet, nor while the service is stopping.
    #[must_use]
    pub fn takes_webhooks(&self) -> bool {
        self.0.is_open()
    }

    /// Waits until delegations are taken; `false` when that does not happen before `deadline`.
    pub async fn ready(&self, deadline: Instant) -> bool {
        timeout_at(deadline, self.0.open()).await.is_ok() && self.0.is_open()
    }

    /// Whether the delegation would be taken: to be asked before anything is done for it.
    ///
    /// # Errors
    /// When there are too many.
    pub fn admit(&self, delegation: &Delegation<'_>) -> Result<(), Refusal> {
        self.0.admit(delegation)
    }

    /// Takes a delegation, and waits a little for its record to be written.
    ///
    /// # Errors
    /// When there are too many.
    pub async fn delegate(&self, delegation: &Delegation<'_>) -> Result<(), Refusal> {
        if let Some(written) = self.0.delegate(delegation)?
            && !written.within(WRITTEN_WITHIN).await
        {
            UNWRITTEN.log(|count| {
                tracing::warn!(count, "the store is slow or away: a delegation lives in memory until it answers");
            });
        }
        Ok(())
    }

    /// Acts upon a verified webhook.
    pub fn webhook(&self, verified: Verified, webhook: &Webhook) {
        self.0.webhook(verified, webhook);
    }

    /// Restarts or sends what has to be before the end, until `deadline`.
    pub async fn stop(&self, deadline: Instant) {
        self.0.stop(deadline).await;
    }

    /// Writes what is not written yet, until `deadline`; the last thing to be done.
    pub async fn close_store(&self, deadline: Instant) {
        self.0.close_store(deadline).await;
    }
}
