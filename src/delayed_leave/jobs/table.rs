//! Where jobs are kept: by number, with a generation that tells a job from the next one under the same number.
//!
//! They stand side by side in chunks, with their names in them.

use crate::delayed_leave::machine::{Machine, Wish};

use crate::delayed_leave::pace::HomeserverId;

use crate::delayed_leave::rooms::RoomId;

use crate::text::Text;

use crate::time::Time;

/// Jobs that stand side by side.
const CHUNK: usize = 512;
/// A hash, Synapse's ids of delayed events, and most user ids.
const NAMES: usize = 102;

/// A job's number. It is never used for another job: a result that comes late finds nobody.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct JobId {
    slot: u32,
    generation: u32,
}

impl JobId {
    pub(crate) const FIRST: Self = Self { slot: 0, generation: 0 };

    pub(super) fn slot(self) -> u32 {
        self.slot
    }
}

/// A job and what it belongs to.
#[derive(Debug)]
pub struct Job {
    pub(super) machine: Machine,
    pub(super) room: RoomId,
    pub(super) homeserver: HomeserverId,
    pub(super) names: Names,
    pub(super) arrived: Time,
    pub(super) timer: Option<Time>,
    pub(super) in_line: Option<Wish>,
    pub(super) creates_room: bool,
    pub(super) as_user: bool,
    /// Replaced jobs live on until their event is cancelled, but nothing is routed to them.
    pub(super) current: bool,
}

impl Job {
    /// The pure part.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// The room.
    #[must_use]
    pub fn room(&self) -> RoomId {
        self.room
    }

    /// The homeserver.
    #[must_use]
    pub fn homeserver(&self) -> HomeserverId {
        self.homeserver
    }

    /// The Matrix user.
    #[must_use]
    pub fn user(&self) -> &str {
        self.names.user()
    }

    /// The participant's identity on the SFU.
    #[must_use]
    pub fn identity(&self) -> &str {
        self.names.identity()
    }

    /// Whether the room may be created for its user's sake.
    #[must_use]
    pub fn creates_room(&self) -> bool {
        self.creates_room
    }

    /// The delayed event.
    #[must_use]
    pub fn delay_id(&self) -> &str {
        self.names.delay_id()
    }

    /// Whether calls carry the as_token and the user.
    #[must_use]
    pub fn is_as_user(&self) -> bool {
        self.as_user
    }
}

/// Whose job it is: the participant's identity, the delayed event, and the Matrix user.
#[derive(Debug)]
pub(super) struct Names {
    text: Text<NAMES>,
    delay_id: u32,
    user: u32,
}

impl Names {
    pub(super) fn new(identity: &str, delay_id: &str, user: &str) -> Self {
        // Nothing that long passes the bounds on requests and records; if it did, the name would be found empty.
        let offset = |at: usize| u32::try_from(at).unwrap_or(u32::MAX);
        Self {
            text: Text::new(&[identity, delay_id, user].concat()),
            delay_id: offset(identity.len()),
            user: offset(identity.len() + delay_id.len()),
        }
    }

    pub(super) fn identity(&self) -> &str {
        self.text.as_str().get(..self.delay_id as usize).unwrap_or_default()
    }

    pub(super) fn delay_id(&self) -> &str {
        self.text
            .as_str()
            .get(self.delay_id as usize..self.user as usize)
            .unwrap_or_default()
    }

    pub(super) fn user(&self) -> &str {
        self.text.as_str().get(self.user as usize..).unwrap_or_default()
    }
}

/// All jobs by number.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// Of each number that was ever given.
    generations: Vec<u32>,
    chunks: Vec<Chunk>,
    free: Vec<u32>,
    len: usize,
}

#[derive(Debug, Default)]
struct Chunk {
    /// All of them or, where there is no job, none.
    places: Box<[Option<Job>]>,
    jobs: usize,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn insert(&mut self, job: Job) -> JobId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.generations.push(0);
            self.generations.len() as u32 - 1
        });
        let (chunk, place) = split(slot);
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, Chunk::default);
        }
        let chunk = &mut self.chunks[chunk];
        if chunk.places.is_empty() {
            chunk.places = (0..CHUNK).map(|_| None).collect();
        }
        chunk.places[place] = Some(job);
        chunk.jobs += 1;
        self.len += 1;
        JobId {
            slot,
            generation: self.generations[slot as usize],
        }
    }

    pub(super) fn remove(&mut self, id: JobId) -> Option<Job> {
        let generation = self
            .generations
            .get_mut(id.slot as usize)
            .filter(|generation| **generation == id.generation)?;
        let (chunk, place) = split(id.slot);
        let chunk = self.chunks.get_mut(chunk)?;
        let job = chunk.places.get_mut(place)?.take()?;
        chunk.jobs -= 1;
        if chunk.jobs == 0 {
            chunk.places = Box::default();
        }
        self.len -= 1;
        if let Some(next) = generation.checked_add(1) {
            *generation = next;
            self.free.push(id.slot);
        }
        Some(job)
    }

    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.in_slot(id.slot).filter(|&(found, _)| found == id).map(|(_, job)| job)
    }

    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut Job> {
        self.generations
            .get(id.slot as usize)
            .filter(|&&generation| generation == id.generation)?;
        let (chunk, place) = split(id.slot);
        self.chunks.get_mut(chunk)?.places.get_mut(place)?.as_mut()
    }

    pub(super) fn in_slot(&self, slot: u32) -> Option<(JobId, &Job)> {
        let generation = *self.generations.get(slot as usize)?;
        let (chunk, place) = split(slot);
        let job = self.chunks.get(chunk)?.places.get(place)?.as_ref()?;
        Some((JobId { slot, generation }, job))
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = JobId> {
        (0..self.generations.len() as u32).filter_map(|slot| self.in_slot(slot).map(|(id, _)| id))
    }
}

fn split(slot: u32) -> (usize, usize) {
    (slot as usize / CHUNK, slot as usize % CHUNK)
}

#[cfg(test)]
impl JobId {
    pub(crate) fn numbered(slot: u32) -> Self {
        Self { slot, generation: 0 }
    }
}

#[cfg(test)]
impl Table {
    pub(super) fn places(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.places.len()).sum()
    }
}
