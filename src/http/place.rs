//! Places for complete requests (decision H7). Who gets one, and who gives one up, `admission::room` decides.

use std::sync::Arc;

use parking_lot::Mutex;

use super::App;
use super::report::{ApiError, busy};
use crate::admission::room::{Entered, Room, Ticket};
use crate::connections::Connection;
use crate::metrics::Limit;
use crate::request_line::note;
use crate::server_name::ServerName;

/// The waiting room of complete requests.
pub(super) struct Waiting {
    room: Mutex<Room<Arc<Connection>>>,
}

impl Waiting {
    pub(super) fn new(most: usize) -> Self {
        Self {
            room: Mutex::new(Room::new(most)),
        }
    }
}

/// A place among the requests in flight, given back when it is dropped.
pub(super) struct Place<'a> {
    waiting: &'a Waiting,
    ticket: Option<Ticket>,
    connection: &'a Connection,
}

impl<'a> Place<'a> {
    /// For a complete request about a homeserver. One that is not dealt with, or no name at all, waits for nobody, and needs none.
    pub(super) fn take(app: &'a App, connection: &'a Arc<Connection>, unverified_server_name: &str) -> Result<Self, ApiError> {
        let waiting = &app.waiting;
        let mut ticket = None;
        if let Ok(server) = ServerName::parse(unverified_server_name) {
            note(|line| line.server = Some(server.as_str().into()));
            if !app.exchange.policy.admits(&server) {
                return Ok(Self {
                    waiting,
                    ticket,
                    connection,
                });
            }
            let who = app.exchange.openid.who(&server);
            note(|line| line.class = Some(who.class));
            let entered = waiting.room.lock().enter(who, connection.clone());
            ticket = Some(match entered {
                Entered::In(ticket) => ticket,
                Entered::InsteadOf(ticket, other) => {
                    connection.crowded(Limit::RequestsInFlight);
                    other.answer_busy();
                    ticket
                }
                Entered::Full => {
                    connection.crowded(Limit::RequestsInFlight);
                    return Err(busy("the places for requests are taken, and nobody in them has to give way"));
                }
            });
        }
        Ok(Self {
            waiting,
            ticket,
            connection,
        })
    }

    /// The user is known: from now on nobody pushes this request out.
    pub(super) fn keep(&self) {
        if let Some(ticket) = self.ticket {
            self.waiting.room.lock().keep(ticket);
        }
    }

    /// Does `work` unless the place is lost before it is done.
    pub(super) async fn hold<T>(&self, work: impl Future<Output = T>) -> Result<T, ApiError> {
        tokio::select! {
            biased;
            done = work => Ok(done),
            () = self.connection.told_to_answer_busy() => Err(busy("the places for requests are taken, and it gave way to another one")),
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            self.waiting.room.lock().leave(ticket);
        }
    }
}
