//! How many tokens are watched, and who may have how many of them (decision A8). Pure.
//!
//! ```text
//!  local users     half of all places
//!  remote users    the other half; a homeserver has 10,000 of them at most and never more than a quarter, 2,000 in one Matrix room.
//!                  Where the operator listed other homeservers, half of it at most are for those that are not listed
//!  every user      500, and 20 on which nobody was seen yet
//! ```
//!
//! A homeserver is known by its name here: a token says nothing about the address that was dialled for it (H7a).

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

const MAX_PER_HOMESERVER: u32 = 10_000;
const MAX_PER_ROOM_AND_HOMESERVER: u32 = 2_000;
const MAX_PER_USER: u32 = 500;
/// Tokens of one user on which nobody was seen on the SFU.
pub(super) const MAX_UNSEEN_PER_USER: u32 = 20;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Origin {
    /// A user of our homeserver.
    Local,
    /// A user of another homeserver.
    Remote,
}

impl Origin {
    /// All origins, local users first.
    pub(super) const BOTH: [Self; 2] = [Self::Local, Self::Remote];
}

/// Why a token cannot be watched.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub(super) enum CapacityError {
    #[error("there are too many tokens in all")]
    Total,
    #[error("the users of this homeserver hold too many tokens")]
    Homeserver,
    #[error("the users of this homeserver hold too many tokens for this Matrix room")]
    Room,
    #[error("this user holds too many tokens")]
    User,
    #[error("this user holds too many tokens that were never used")]
    Unseen,
    #[error("the names are too long")]
    NameTooLong,
}

/// Whether the operator listed this homeserver (decision H7a).
pub type IsListed = Box<dyn Fn(&str) -> bool + Send + Sync>;

pub(super) struct Shares {
    own: Box<str>,
    /// `None` where no other homeserver than our own is listed: nobody needs to be told from others.
    is_listed: Option<IsListed>,
    /// Places for local users, and as many for remote ones.
    half: u32,
    taken: BTreeMap<Share, u32>,
}

impl fmt::Debug for Shares {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shares").field("taken", &self.taken).finish_non_exhaustive()
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Share {
    Total(Origin),
    Unlisted,
    Homeserver(Arc<str>),
    Room(Arc<str>, Arc<str>),
    User(Arc<str>),
    Unseen(Arc<str>),
}

impl Shares {
    pub(super) fn new(own: Box<str>, is_listed: Option<IsListed>, max: usize) -> Self {
        Self {
            own,
            is_listed,
            half: u32::try_from(max / 2).unwrap_or(u32::MAX),
            taken: BTreeMap::new(),
        }
    }

    pub(super) fn origin(&self, user_id: &str) -> Origin {
        if server(user_id) == &*self.own {
            Origin::Local
        } else {
            Origin::Remote
        }
    }

    /// The shares that a token takes a place in, with how many each has, and those on which nobody was seen.
    fn of(&self, room_id: &Arc<str>, user_id: &Arc<str>) -> Vec<(Share, u32, CapacityError)> {
        let origin = self.origin(user_id);
        let mut shares = vec![
            (Share::Total(origin), self.half, CapacityError::Total),
            (Share::User(user_id.clone()), MAX_PER_USER, CapacityError::User),
        ];
        if origin == Origin::Remote {
            let server: Arc<str> = server(user_id).into();
            if self.is_listed.as_ref().is_some_and(|is_listed| !is_listed(&server)) {
                shares.push((Share::Unlisted, self.half / 2, CapacityError::Total));
            }
            let max = MAX_PER_HOMESERVER.min(self.half / 4).max(1);
            shares.push((Share::Homeserver(server.clone()), max, CapacityError::Homeserver));
            shares.push((
                Share::Room(room_id.clone(), server),
                MAX_PER_ROOM_AND_HOMESERVER,
                CapacityError::Room,
            ));
        }
        shares.push((Share::Unseen(user_id.clone()), MAX_UNSEEN_PER_USER, CapacityError::Unseen));
        shares
    }

    /// Whether there is a place for a token on which nobody was seen yet. One that was `restored` had its place before.
    pub(super) fn check(&self, room_id: &Arc<str>, user_id: &Arc<str>, restored: bool) -> Result<(), CapacityError> {
        self.none_is_full(&self.of(room_id, user_id), restored)
    }

    fn none_is_full(&self, shares: &[(Share, u32, CapacityError)], restored: bool) -> Result<(), CapacityError> {
        let is_full = |(share, max, _): &&(Share, u32, CapacityError)| {
            let is_exempt = restored && matches!(share, Share::Unseen(_) | Share::Unlisted);
            !is_exempt && self.taken.get(share).copied().unwrap_or(0) >= *max
        };
        shares.iter().find(is_full).map_or(Ok(()), |(_, _, error)| Err(*error))
    }

    /// Takes that place, if there is one. Of what was `restored` nobody knows whether somebody was seen on it: it counts as if.
    pub(super) fn take(&mut self, room_id: &Arc<str>, user_id: &Arc<str>, restored: bool) -> Result<(), CapacityError> {
        let shares = self.of(room_id, user_id);
        self.none_is_full(&shares, restored)?;
        let taken = shares
            .into_iter()
            .filter(|(share, ..)| !(restored && matches!(share, Share::Unseen(_))));
        for (share, ..) in taken {
            *self.taken.entry(share).or_default() += 1;
        }
        Ok(())
    }

    /// Notes that somebody was seen on a token of `user_id` for the first time.
    pub(super) fn seen(&mut self, user_id: &Arc<str>) {
        self.release(&Share::Unseen(user_id.clone()));
    }

    pub(super) fn give_back(&mut self, room_id: &Arc<str>, user_id: &Arc<str>, was_seen: bool) {
        for (share, ..) in self.of(room_id, user_id) {
            if !(was_seen && matches!(share, Share::Unseen(_))) {
                self.release(&share);
            }
        }
    }

    fn release(&mut self, share: &Share) {
        if let Some(taken) = self.taken.get_mut(share) {
            *taken -= 1;
            if *taken == 0 {
                self.taken.remove(share);
            }
        }
    }
}

pub(super) fn server(user_id: &str) -> &str {
    user_id.split_once(':').map_or("", |(_, server)| server)
}

#[cfg(test)]
mod tests;
