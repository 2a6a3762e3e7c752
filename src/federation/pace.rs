//! How often a homeserver that nobody knows is dialled: once a second (decision T7a), so that nobody is attacked
//! through this service.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

const INTERVAL: Duration = Duration::from_secs(1);

/// The next free second of one homeserver.
pub(super) struct Pace {
    next: Mutex<Option<Instant>>,
    lifted: watch::Sender<bool>,
}

impl Pace {
    pub(super) fn new(known: bool) -> Self {
        Self {
            next: Mutex::new(None),
            lifted: watch::Sender::new(known),
        }
    }

    /// Waits for a free second. Ends at once when the homeserver turns out to be known.
    pub(super) async fn wait(&self) {
        let mut lifted = self.lifted.subscribe();
        if *lifted.borrow() {
            return;
        }
        let slot = {
            let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
            let slot = next.map_or_else(Instant::now, |next| next.max(Instant::now()));
            *next = Some(slot + INTERVAL);
            slot
        };
        tokio::select! {
            () = sleep_until(slot) => {}
            _ = lifted.wait_for(|lifted| *lifted) => {}
        }
    }

    /// The homeserver has verified a token here.
    pub(super) fn lift(&self) {
        self.lifted.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_connection_a_second() {
        let pace = Pace::new(false);
        let start = Instant::now();
        for second in 0..3 {
            pace.wait().await;
            assert_eq!(start.elapsed().as_secs(), second);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_waits_for_a_homeserver_that_is_known() {
        let pace = Pace::new(false);
        let start = Instant::now();
        pace.wait().await;
        tokio::join!(pace.wait(), async { pace.lift() });
        pace.wait().await;
        assert_eq!(start.elapsed(), Duration::ZERO);
    }
}
