//! The arrangement most tests need: an SFU, a homeserver with full access, one without, and the service.

use std::sync::Arc;

use super::Shared;
use super::homeserver::Homeserver;
use super::service::{Service, Setup, beside_a_homeserver};
use super::sfu::Sfu;

pub(crate) struct World {
    // Dropped first: its log is judged while its neighbours still stand.
    pub(crate) service: Service,
    pub(crate) sfu: Sfu,
    /// Has full access.
    pub(crate) home: Homeserver,
    /// Has not.
    pub(crate) away: Homeserver,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(|setup| setup)
    }

    /// With a changed set-up of the service.
    pub(crate) fn with(change: impl FnOnce(Setup) -> Setup) -> Self {
        let (sfu, home, away) = (Sfu::start(), Homeserver::start(), Homeserver::start());
        let service = change(Setup::new(&sfu).full_access(&[&home])).start();
        Self { service, sfu, home, away }
    }

    /// One for all tests that run at the moment and neither change it nor count what all do together.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Shared<World> = Shared::new();
        // Kick on leave allows a user twenty tokens that nobody used, and these tests all ask as one user.
        let watches_nobody = |setup: Setup| {
            if beside_a_homeserver() {
                setup.env("LIVEKIT_MEMBERSHIP_CHECK_INTERVAL_SECONDS", "0")
            } else {
                setup
            }
        };
        SHARED.get(|| Self::with(watches_nobody))
    }
}
