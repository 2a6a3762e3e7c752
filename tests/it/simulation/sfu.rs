//! The model SFU: rooms and who is in them, on nodes with clocks of their own. It says what it shows; how that gets through is the
//! world's.

use std::collections::BTreeMap;

/// What wall clocks show when a world begins, in milliseconds since 1970.
pub(crate) const WALL: i64 = 1_700_000_000_000;
const EMPTY_TIMEOUT_MS: u64 = 60_000;
const DEPARTURE_TIMEOUT_MS: u64 = 20_000;
/// Counts of participants are brought up to date this often.
const COUNTED_EVERY_MS: u64 = 5_000;

#[derive(Clone, Debug)]
pub(crate) struct Guest {
    pub(crate) sid: String,
    pub(crate) joined_at_ms: u64,
    pub(crate) active: bool,
}

#[derive(Clone, Debug)]
pub(crate) struct Room {
    pub(crate) sid: String,
    pub(crate) node: usize,
    pub(crate) guests: BTreeMap<String, Guest>,
    idle_since: u64,
    entered: bool,
    counted: (u64, u32),
}

pub(crate) struct Sfu {
    pub(crate) rooms: BTreeMap<String, Room>,
    nodes: Vec<i64>,
    sids: u64,
    restarts: usize,
}

impl Sfu {
    pub(crate) const fn new(nodes: Vec<i64>) -> Self {
        Self {
            rooms: BTreeMap::new(),
            nodes,
            sids: 0,
            restarts: 0,
        }
    }

    pub(crate) fn unix_millis(&self, node: usize, now: u64) -> i64 {
        WALL + i64::try_from(now).unwrap() + self.nodes[node]
    }

    /// Whether nodes differ so much that events cannot be placed by their clocks.
    pub(crate) fn is_skewed(&self) -> bool {
        self.nodes.len() > 1
    }

    pub(crate) fn a_node(&self, any: u64) -> usize {
        usize::try_from(any).unwrap() % self.nodes.len()
    }

    fn sid(&mut self, kind: &str) -> String {
        self.sids += 1;
        format!("{kind}_{}", self.sids)
    }

    pub(crate) fn restart(&mut self) {
        self.rooms.clear();
        self.restarts += 1;
    }

    /// Creates a room, unless it is there. Whether it was created.
    pub(crate) fn open(&mut self, name: &str, now: u64) -> bool {
        if self.rooms.contains_key(name) {
            return false;
        }
        let sid = self.sid("RM");
        // After a restart a room may be on another node.
        let node = (name.bytes().map(usize::from).sum::<usize>() + self.restarts) % self.nodes.len();
        let room = Room {
            sid,
            node,
            guests: BTreeMap::new(),
            idle_since: now,
            entered: false,
            counted: (now, 0),
        };
        self.rooms.insert(name.into(), room);
        true
    }

    /// Lets somebody in: the new session, and the one that it replaces.
    pub(crate) fn enter(&mut self, name: &str, identity: &str, now: u64) -> Option<Option<Guest>> {
        let sid = self.sid("PA");
        let node = self.rooms.get(name)?.node;
        let joined_at_ms = u64::try_from(self.unix_millis(node, now)).unwrap();
        let room = self.rooms.get_mut(name)?;
        room.count(now);
        room.entered = true;
        let guest = Guest {
            sid,
            joined_at_ms,
            active: false,
        };
        Some(room.guests.insert(identity.into(), guest))
    }

    pub(crate) fn remove(&mut self, name: &str, identity: &str, now: u64) -> Option<Guest> {
        let room = self.rooms.get_mut(name)?;
        room.count(now);
        let guest = room.guests.remove(identity)?;
        if room.guests.is_empty() {
            room.idle_since = now;
        }
        Some(guest)
    }

    /// Ends the rooms in which nobody has been for long enough, and says which.
    pub(crate) fn expire(&mut self, now: u64) -> Vec<(String, Room)> {
        let is_over = |room: &Room| {
            let timeout = if room.entered { DEPARTURE_TIMEOUT_MS } else { EMPTY_TIMEOUT_MS };
            room.guests.is_empty() && now >= room.idle_since + timeout
        };
        let over: Vec<_> = self
            .rooms
            .iter()
            .filter(|(_, room)| is_over(room))
            .map(|(name, _)| name.clone())
            .collect();
        over.into_iter()
            .map(|name| (name.clone(), self.rooms.remove(&name).unwrap()))
            .collect()
    }
}

impl Room {
    /// Keeps the count of the last moment at which it was brought up to date.
    fn count(&mut self, now: u64) {
        if self.counted.0 / COUNTED_EVERY_MS != now / COUNTED_EVERY_MS {
            self.counted = (now, self.guests.len() as u32);
        }
    }

    /// How many are in it, as far as `ListRooms` knows.
    pub(crate) fn shown(&self, now: u64) -> u32 {
        if self.counted.0 / COUNTED_EVERY_MS == now / COUNTED_EVERY_MS {
            self.counted.1
        } else {
            self.guests.len() as u32
        }
    }
}
