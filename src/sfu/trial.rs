//! Tries the SFU for `doctor` and for the page of users: each part by itself, with rooms of its own.

use super::Sfu;
use super::refusal::SfuError;
use crate::secret::Secret;

impl Sfu {
    /// Time that the SFU's clock shows, in seconds since 1970, whatever it thinks of the key.
    pub async fn clock(&self) -> Option<i64> {
        self.api.clock().await
    }

    /// Whether joining a room that does not exist would open it; `None` where the SFU does not say.
    pub async fn opens_rooms_by_joining(&self) -> Option<bool> {
        self.api.opens_rooms_by_joining().await
    }

    /// Opens a small room that ends by itself soon.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn open_small_room(&self, room: &str) -> Result<(), SfuError> {
        self.seen(self.api.open_small_room(room).await)
    }

    /// Ends a room and the sessions in it.
    ///
    /// # Errors
    /// When the SFU refused, or did not answer in time.
    pub async fn delete_room(&self, room: &str) -> Result<(), SfuError> {
        self.seen(self.api.delete_room(room).await)
    }

    /// Token of a minute for [`VISITOR`](crate::token::VISITOR), who joins `room`, is not seen in it and sends nothing. Without `can_subscribe` the SFU waits
    /// for the client to offer a connection for media; with it the SFU offers one.
    ///
    /// # Errors
    /// When none can be made.
    pub fn visitor(&self, room: &str, can_subscribe: bool) -> Result<Secret, SfuError> {
        self.api.visitor(room, can_subscribe)
    }
}
