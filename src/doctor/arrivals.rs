//! Arrivals at this service while `doctor` waits for it: webhooks of its own rooms, those that were refused or came to
//! another path, and requests that our homeserver forwards.
#![expect(clippy::disallowed_methods, reason = "notes when something arrived")]

use std::collections::VecDeque;
use std::time::Instant;

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::sfu::webhook::WebhookAuthError;

/// How the rooms of `doctor` begin: on the SFU, and as Matrix rooms that do not exist.
pub(super) const ROOM: &str = "lk-jwt-service-doctor-";
/// Arrivals that are kept.
const KEPT: usize = 8;
/// Longest path that is kept, in bytes.
const MAX_PATH_BYTES: usize = 200;

/// Faults of webhooks that were seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Astray {
    /// A webhook was refused.
    Refused(WebhookAuthError),
    /// A webhook came to this path, which is none of ours.
    Path(Box<str>),
}

impl Astray {
    fn is_of_an_sfu(&self) -> bool {
        matches!(self, Self::Refused(error) if error.is_of_an_sfu())
    }
}

/// Arrivals, the last ones of each kind.
#[derive(Default)]
pub struct Arrivals {
    seen: Mutex<Seen>,
    arrived: Notify,
}

#[derive(Default)]
struct Seen {
    /// Rooms of ours that the SFU told of.
    rooms: VecDeque<Box<str>>,
    /// Made-up Matrix rooms about which our homeserver asked.
    forwarded: VecDeque<Box<str>>,
    /// The last one without a token of an SFU, and the last with one.
    astray: [Option<(Instant, Astray)>; 2],
}

impl Arrivals {
    /// A verified webhook told of this room.
    pub fn told_of(&self, room: &str) {
        if room.starts_with(ROOM) {
            keep(&mut self.lock().rooms, room);
            self.arrived.notify_waiters();
        }
    }

    /// Our homeserver forwarded a request about this Matrix room.
    pub fn forwarded(&self, room_id: &str) {
        if room_id.strip_prefix('!').is_some_and(|room| room.starts_with(ROOM)) {
            keep(&mut self.lock().forwarded, room_id);
            self.arrived.notify_waiters();
        }
    }

    /// A webhook came, and could not be used.
    pub fn astray(&self, astray: Astray) {
        let astray = match astray {
            Astray::Path(path) => Astray::Path(path.chars().take(MAX_PATH_BYTES).collect::<String>().into()),
            refused @ Astray::Refused(_) => refused,
        };
        let place = usize::from(astray.is_of_an_sfu());
        self.lock().astray[place] = Some((Instant::now(), astray));
        self.arrived.notify_waiters();
    }

    /// Waits until the SFU has told of `room`; false when it has not until `deadline`.
    pub async fn is_told_of(&self, room: &str, deadline: tokio::time::Instant) -> bool {
        self.wait(deadline, |seen| &seen.rooms, room).await
    }

    /// Waits until our homeserver has forwarded a request about `room_id`; false when it has not until `deadline`.
    pub async fn is_forwarded(&self, room_id: &str, deadline: tokio::time::Instant) -> bool {
        self.wait(deadline, |seen| &seen.forwarded, room_id).await
    }

    /// The last webhook since `since` that could not be used; one without a token of an SFU where there is no other.
    #[must_use]
    pub fn astray_since(&self, since: Instant) -> Option<Astray> {
        let seen = self.lock();
        let mut all = seen.astray.iter().rev().flatten();
        all.find(|(at, _)| *at >= since).map(|(_, astray)| astray.clone())
    }

    async fn wait(&self, deadline: tokio::time::Instant, kept: fn(&Seen) -> &VecDeque<Box<str>>, name: &str) -> bool {
        let waiting = async {
            loop {
                let arrived = self.arrived.notified();
                let mut arrived = std::pin::pin!(arrived);
                arrived.as_mut().enable();
                if kept(&self.lock()).iter().any(|seen| **seen == *name) {
                    return;
                }
                arrived.await;
            }
        };
        timeout_at(deadline, waiting).await.is_ok()
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock()
    }
}

fn keep(kept: &mut VecDeque<Box<str>>, name: &str) {
    if kept.len() >= KEPT {
        kept.pop_front();
    }
    kept.push_back(name.into());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn what_arrives_is_waited_for_and_bounded() {
        let arrivals = Arrivals::default();
        let since = Instant::now();
        let soon = || tokio::time::Instant::now() + Duration::from_secs(3);
        let room = format!("{ROOM}1");
        let (told, ()) = tokio::join!(arrivals.is_told_of(&room, soon()), async { arrivals.told_of(&room) });
        assert!(told);
        assert!(!arrivals.is_told_of("lk-jwt-service-doctor-2", soon()).await);
        for other in ["other", &format!("!{ROOM}1")] {
            arrivals.told_of(other);
        }
        (0..1000).for_each(|n| arrivals.forwarded(&format!("!{ROOM}{n}:example.com")));
        assert!(arrivals.is_forwarded(&format!("!{ROOM}999:example.com"), soon()).await);
        assert_eq!(arrivals.lock().rooms.len(), 1);
        assert_eq!(arrivals.lock().forwarded.len(), KEPT);
        assert_eq!(arrivals.astray_since(since), None);
        arrivals.astray(Astray::Path("/x".repeat(1000).into()));
        let Some(Astray::Path(path)) = arrivals.astray_since(since) else {
            panic!()
        };
        assert_eq!(path.len(), MAX_PATH_BYTES);
        assert_eq!(arrivals.astray_since(Instant::now()), None);
        // Whoever comes by chance does not hide what the SFU does.
        for error in [
            WebhookAuthError::UnknownKey,
            WebhookAuthError::Missing,
            WebhookAuthError::NotWebhook,
        ] {
            arrivals.astray(Astray::Refused(error));
            assert_eq!(arrivals.astray_since(since), Some(Astray::Refused(WebhookAuthError::UnknownKey)));
        }
    }
}
