//! One delegated leave among fakes: a participant, its delayed event, and everything that the service sees of both.

use std::time::{Duration, Instant};

use super::client::Answer;
use super::client_api::ClientApi;
use super::hashes::{self, SLOT};
use super::homeserver::Homeserver;
use super::service::{Service, Setup};
use super::sfu::{Session, Sfu};
use super::{bodies, lateness, unique, unique_room, wait_until, webhook};

/// Longer than anything takes that is not timed by the service itself.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(10);

pub(crate) struct Scene {
    // Dropped first: its log is judged while its neighbours still stand.
    pub(crate) service: Service,
    pub(crate) sfu: Sfu,
    pub(crate) home: Homeserver,
    pub(crate) api: ClientApi,
    /// The Matrix room of the participant, and its LiveKit room.
    pub(crate) room: String,
    pub(crate) alias: String,
    pub(crate) identity: String,
    /// Its delayed event.
    pub(crate) delay_id: String,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self::with(|setup| setup)
    }

    /// With a changed set-up of the service.
    pub(crate) fn with(change: impl FnOnce(Setup) -> Setup) -> Self {
        Self::of(Sfu::start(), change)
    }

    /// The same with this SFU.
    pub(crate) fn of(sfu: Sfu, change: impl FnOnce(Setup) -> Setup) -> Self {
        lateness::measure();
        let (home, api) = (Homeserver::start(), ClientApi::start());
        let setup = Setup::new(&sfu)
            .full_access(&[&home])
            .env("LIVEKIT_CS_API_URL_OVERRIDES", &api.override_of(&home));
        let service = change(setup).start();
        let room = unique_room();
        Self {
            alias: hashes::alias(&room, SLOT),
            identity: hashes::identity(&home.user("alice"), "DEVICE", "member1"),
            delay_id: format!("syd_{}", unique()),
            service,
            sfu,
            home,
            api,
            room,
        }
    }

    /// Hands over the event with this delay.
    #[track_caller]
    pub(crate) fn delegate(&self, delay: Duration) {
        self.delegate_as(&self.delay_id, delay);
    }

    /// The same with another event.
    #[track_caller]
    pub(crate) fn delegate_as(&self, delay_id: &str, delay: Duration) {
        let millis = u64::try_from(delay.as_millis()).expect("a delay");
        let body = bodies::delegate_of(&self.home, "alice", &self.room, delay_id, millis);
        let answer = self.service.post("/delegate_delayed_leave", &body);
        assert_eq!((answer.status, answer.text().as_str()), (200, "{}\n"));
    }

    /// The participant joins, and the SFU says so; returns when its restart has been seen.
    #[track_caller]
    pub(crate) fn joined(&self) -> Session {
        let session = self.join();
        self.wait_restarts(1);
        session
    }

    /// The participant joins, and the SFU says so.
    #[track_caller]
    pub(crate) fn join(&self) -> Session {
        let session = self.sfu.join(&self.alias, &self.identity);
        self.send_webhook(&webhook::joined(&session));
        session
    }

    /// Who had this session is gone, and the SFU says why.
    #[track_caller]
    pub(crate) fn leave(&self, session: &Session, reason: &str) -> Instant {
        self.sfu.leave(&session.room, &session.identity);
        let at = Instant::now();
        self.send_webhook(&webhook::left(session, reason));
        at
    }

    /// Sends a webhook of the SFU, which is taken.
    #[track_caller]
    pub(crate) fn send_webhook(&self, event: &serde_json::Value) {
        let answer = self.tell(event);
        assert_eq!((answer.status, answer.text().as_str()), (200, ""), "{event}");
    }

    pub(crate) fn tell(&self, event: &serde_json::Value) -> Answer {
        webhook::tell(&self.service, &self.sfu, event)
    }

    pub(crate) fn restarts(&self) -> Vec<Instant> {
        self.api.times("restart", &self.delay_id)
    }

    pub(crate) fn sends(&self) -> Vec<Instant> {
        self.api.times("send", &self.delay_id)
    }

    #[track_caller]
    pub(crate) fn wait_restarts(&self, count: usize) {
        wait_until(&format!("{count} restarts"), TIMEOUT * 2, || self.restarts().len() >= count);
    }

    /// Waits until the service has heard that this event was restarted.
    #[track_caller]
    pub(crate) fn wait_restarted(&self, delay_id: &str) {
        wait_until(&format!("{delay_id} to have been restarted"), TIMEOUT, || {
            // The log does not name events: as many as were asked for.
            let done = [("event", "delayed_event_managed"), ("what", "restart"), ("outcome", "Done")];
            let heard = self.service.lines(&done).len();
            self.api.count("restart", delay_id) > 0 && heard >= self.api.restarts()
        });
    }

    /// Waits for the leave; returns when it came.
    #[track_caller]
    pub(crate) fn wait_sent(&self, within: Duration) -> Instant {
        wait_until("the leave to be sent", within, || !self.sends().is_empty());
        self.sends()[0]
    }

    /// Until this moment the participant is there: nothing may be sent, and restarts come as long as the event would run.
    #[track_caller]
    pub(crate) fn stays_until(&self, end: Instant, delay: Duration) {
        wait_until("the time to pass", end.saturating_duration_since(Instant::now()) + TIMEOUT, || {
            assert_eq!(self.sends().len(), 0, "somebody who is there was reported gone");
            Instant::now() >= end
        });
        let restarts = self.restarts();
        let last = *restarts.last().expect("a restart");
        assert!(last + delay > end, "the event ran out");
        for pair in restarts.windows(2) {
            assert!(pair[1] - pair[0] < delay, "the event ran out in between: {:?}", pair[1] - pair[0]);
        }
    }

    /// Waits until the job is over.
    #[track_caller]
    pub(crate) fn wait_over(&self, within: Duration) {
        wait_until("the job to be over", within, || {
            let is_over = |event| !self.service.lines(&[("event", event), ("room", &self.alias)]).is_empty();
            is_over("leave_over") || is_over("leave_given_up")
        });
    }
}
