//! A token as it is stored: one field of a table and its value, in JSON. Pure, but for the queue at its end.
//!
//! The field is spelled like that of a delegated leave. No key of the value but the room, the user and the end is required,
//! and keys that nobody knows are ignored, so that more can be added. The token itself is not in it.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::store::record::{Unreadable, field};
use crate::store::{Changes, Entries, MAX_TOKEN_BYTES, Part, Store, Table};

/// A token that was issued.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct StoredToken<'a> {
    /// The room on the SFU.
    #[serde(skip)]
    pub room: Cow<'a, str>,
    /// Identity of the participant in the room.
    #[serde(skip)]
    pub identity: Cow<'a, str>,
    /// Id of the Matrix room.
    pub room_id: Cow<'a, str>,
    /// The Matrix user.
    pub user_id: Cow<'a, str>,
    /// The end of the token, in milliseconds since 1970.
    pub expires_at: i64,
    /// When somebody was last known to sit there, in milliseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_seen: Option<i64>,
    /// The homeserver has said once that the user is joined.
    #[serde(default)]
    pub member: bool,
    /// Whether the user has left the Matrix room.
    #[serde(default)]
    pub left: bool,
}

impl StoredToken<'static> {
    /// Reads a record.
    ///
    /// # Errors
    /// When it is not one.
    pub fn read(field: &[u8], value: &[u8]) -> Result<Self, Unreadable> {
        const NONE: Unreadable = Unreadable("it is no record of a token");
        if field.len() > MAX_TOKEN_BYTES || value.len() > MAX_TOKEN_BYTES {
            return Err(NONE);
        }
        let (room, identity): (String, String) = serde_json::from_slice(field).map_err(|_| NONE)?;
        let token = Self {
            room: room.into(),
            identity: identity.into(),
            ..serde_json::from_slice(value).map_err(|_| NONE)?
        };
        let names = [&token.room, &token.identity, &token.room_id, &token.user_id];
        if names.iter().any(|name| name.is_empty()) {
            Err(NONE)
        } else {
            Ok(token)
        }
    }
}

/// The way to the store. All clones write to one table.
#[derive(Clone)]
pub struct Queue(Changes);

/// The records that are there. Dropping it ends the reading.
pub struct Restored {
    entries: Entries,
    is_once: bool,
}

/// A part of what is there.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A token's record.
    Token(StoredToken<'static>),
    /// The reading failed, and begins anew.
    Anew,
    /// End of a reading: what comes from now on was written meanwhile, by the instance that this one follows.
    All {
        /// The store may lack what was written to it.
        again: bool,
    },
}

impl Queue {
    /// Starts to read and to write the tokens beside the jobs of `store`.
    #[must_use]
    pub fn start(store: &Store) -> (Self, Restored) {
        Self::of(store.with(Table::Tokens))
    }

    /// Starts where several replicas write: the end of a record that is later than what is written, or than now, stays.
    #[must_use]
    pub fn start_shared(store: &Store) -> (Self, Restored) {
        let mut tokens = store.with(Table::Tokens);
        tokens.keep_later_ends();
        Self::of(tokens)
    }

    fn of(tokens: Store) -> (Self, Restored) {
        let (changes, entries) = Changes::start(tokens);
        (Self(changes), Restored { entries, is_once: false })
    }

    /// Stores a token as it is now.
    pub fn put(&self, token: &StoredToken<'_>) {
        if self.0.are_kept() {
            // Texts, numbers and switches always serialise.
            let value = serde_json::to_string(token).unwrap_or_default();
            self.0.make(field(&token.room, &token.identity), Some(value));
        }
    }

    /// Removes a token's record. It need not be there.
    pub fn remove(&self, room: &str, identity: &str) {
        if self.0.are_kept() {
            self.0.make(field(room, identity), None);
        }
    }

    /// Writes what is waiting, until `deadline`. Says how many changes were not written.
    pub async fn stop(&self, deadline: Instant) -> usize {
        self.0.stop(deadline).await
    }
}

impl Restored {
    /// Ends with the first reading.
    #[must_use]
    pub fn once(self) -> Self {
        Self { is_once: true, ..self }
    }

    /// The next record, or that all were read, which waits for a store that is away; none when nothing will be read any more. One whose
    /// participant has got a new token since the reading began does not come. What cannot be read stays where it is.
    pub async fn next(&mut self) -> Option<Found> {
        loop {
            match self.entries.found().await? {
                Part::Record(entry) => match StoredToken::read(&entry.field, &entry.value) {
                    Ok(stored) => return Some(Found::Token(stored)),
                    Err(error) => self.entries.leave(error),
                },
                Part::Anew => return Some(Found::Anew),
                Part::End { again, .. } => {
                    if self.is_once {
                        self.entries.close();
                    }
                    // Nobody else says that a store that several replicas share has lost something.
                    let again = again || self.is_once;
                    return Some(Found::All { again });
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
