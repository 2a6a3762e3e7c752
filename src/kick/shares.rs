//! How many tokens are watched, and who may have how many of them (decision A8). Pure.
//!
//! ```text
//!  local users     half of all places; 500 each
//!  remote users    the other half; a homeserver has 10,000 of them at most and never more than a quarter, 2,000 in one Matrix room
//!  every user      20 tokens on which nobody was seen yet
//! ```
//!
//! A homeserver is known by its name here: a token says nothing about the address that was dialled for it (H7a).

use std::collections::BTreeMap;
use std::sync::Arc;

/// Tokens of the users of one remote homeserver.
const MAX_PER_HOMESERVER: u32 = 10_000;
/// Tokens of the users of one remote homeserver for one Matrix room.
const MAX_PER_ROOM_AND_HOMESERVER: u32 = 2_000;
/// Tokens of one user: what many devices need within an hour.
const MAX_PER_USER: u32 = 500;
/// Tokens of one user on which nobody was seen on the SFU.
pub const MAX_UNSEEN_PER_USER: u32 = 20;

/// Whose users.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Origin {
    /// Our homeserver's.
    Local,
    /// Another one's.
    Remote,
}

impl Origin {
    /// Both, local users first.
    pub const BOTH: [Self; 2] = [Self::Local, Self::Remote];
}

/// Why a token cannot be watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CapacityError {
    /// Local or remote users have all the places they may have together.
    #[error("all of these users together hold too many tokens")]
    Total,
    /// The users of one homeserver hold too many.
    #[error("the users of this homeserver hold too many tokens")]
    Homeserver,
    /// The users of one homeserver hold too many for one Matrix room.
    #[error("the users of this homeserver hold too many tokens for this Matrix room")]
    Room,
    /// The user holds too many.
    #[error("this user holds too many tokens")]
    User,
    /// The user holds too many on which nobody was seen on the SFU.
    #[error("this user holds too many tokens that were never used")]
    Unseen,
    /// The names are longer than Matrix allows.
    #[error("the names are too long")]
    NameTooLong,
}

/// Who holds how many tokens.
#[derive(Debug)]
pub(super) struct Shares {
    own: Box<str>,
    /// Places for local and for remote users.
    max: [usize; 2],
    taken: [usize; 2],
    users: BTreeMap<Arc<str>, UserShare>,
    homeservers: BTreeMap<Arc<str>, u32>,
    rooms: BTreeMap<(Arc<str>, Arc<str>), u32>,
}

#[derive(Clone, Copy, Debug, Default)]
struct UserShare {
    tokens: u32,
    unseen: u32,
}

impl Shares {
    /// Shares in `max` places, where `own` is our homeserver.
    pub(super) fn new(own: Box<str>, max: usize) -> Self {
        Self {
            own,
            max: [max - max / 2, max / 2],
            taken: [0, 0],
            users: BTreeMap::new(),
            homeservers: BTreeMap::new(),
            rooms: BTreeMap::new(),
        }
    }

    pub(super) fn origin(&self, user_id: &str) -> Origin {
        if server(user_id) == &*self.own {
            Origin::Local
        } else {
            Origin::Remote
        }
    }

    pub(super) const fn len(&self) -> usize {
        self.taken[0] + self.taken[1]
    }

    /// Whether there is a place for one more token. One that was `restored` had its place before.
    pub(super) fn admit(&self, room_id: &str, user_id: &str, restored: bool) -> Result<(), CapacityError> {
        let origin = self.origin(user_id);
        if self.taken[origin as usize] >= self.max[origin as usize] {
            return Err(CapacityError::Total);
        }
        let user = self.users.get(user_id).copied().unwrap_or_default();
        if user.tokens >= MAX_PER_USER {
            return Err(CapacityError::User);
        }
        if !restored && user.unseen >= MAX_UNSEEN_PER_USER {
            return Err(CapacityError::Unseen);
        }
        if origin == Origin::Local {
            return Ok(());
        }
        let Some((homeserver, tokens)) = self.homeservers.get_key_value(server(user_id)) else {
            return Ok(());
        };
        if *tokens >= self.max_per_homeserver() {
            return Err(CapacityError::Homeserver);
        }
        let here = self.rooms.get(&(room_id.into(), homeserver.clone()));
        if here.is_some_and(|tokens| *tokens >= MAX_PER_ROOM_AND_HOMESERVER) {
            return Err(CapacityError::Room);
        }
        Ok(())
    }

    fn max_per_homeserver(&self) -> u32 {
        let quarter = self.max[Origin::Remote as usize] / 4;
        u32::try_from(quarter).unwrap_or(u32::MAX).clamp(1, MAX_PER_HOMESERVER)
    }

    /// Takes a place for a token on which nobody was seen, and gives the user's name as it is kept.
    pub(super) fn take(&mut self, room_id: &Arc<str>, user_id: &str) -> Arc<str> {
        let origin = self.origin(user_id);
        self.taken[origin as usize] += 1;
        if origin == Origin::Remote {
            let homeserver = interned(&self.homeservers, server(user_id));
            *self.rooms.entry((room_id.clone(), homeserver.clone())).or_insert(0) += 1;
            *self.homeservers.entry(homeserver).or_insert(0) += 1;
        }
        let user = interned(&self.users, user_id);
        let share = self.users.entry(user.clone()).or_default();
        share.tokens += 1;
        share.unseen += 1;
        user
    }

    /// Somebody was seen on a token of `user_id` for the first time.
    pub(super) fn seen(&mut self, user_id: &str) {
        if let Some(share) = self.users.get_mut(user_id) {
            share.unseen -= 1;
        }
    }

    /// Gives a token's place back.
    pub(super) fn give_back(&mut self, room_id: &Arc<str>, user_id: &str, was_seen: bool) {
        let origin = self.origin(user_id);
        self.taken[origin as usize] -= 1;
        if let Some(share) = self.users.get_mut(user_id) {
            share.tokens -= 1;
            share.unseen -= u32::from(!was_seen);
            if share.tokens == 0 {
                self.users.remove(user_id);
            }
        }
        if origin == Origin::Remote {
            let homeserver = interned(&self.homeservers, server(user_id));
            count_down(&mut self.rooms, &(room_id.clone(), homeserver.clone()));
            count_down(&mut self.homeservers, &homeserver);
        }
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0 && self.users.is_empty() && self.homeservers.is_empty() && self.rooms.is_empty()
    }
}

fn server(user_id: &str) -> &str {
    user_id.split_once(':').map_or("", |(_, server)| server)
}

/// The key as the map has it, so that a name is kept once.
pub(super) fn interned<V>(map: &BTreeMap<Arc<str>, V>, name: &str) -> Arc<str> {
    map.get_key_value(name).map_or_else(|| name.into(), |(name, _)| name.clone())
}

fn count_down<K: Ord>(map: &mut BTreeMap<K, u32>, key: &K) {
    if let Some(count) = map.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            map.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
