//! Where jobs are kept: by number, with a generation that tells a job from the next one under the same number.

use crate::delayed_leave::{
    machine::{Machine, Wish},
    pace::HomeserverId,
    rooms::RoomId,
    time::Time,
};
use std::sync::Arc;

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
    pub(super) user: Arc<str>,
    pub(super) identity: Box<str>,
    pub(super) delay_id: Box<str>,
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
        &self.user
    }

    /// The participant's identity on the SFU.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Whether the room may be created for its user's sake.
    #[must_use]
    pub fn creates_room(&self) -> bool {
        self.creates_room
    }

    /// The delayed event.
    #[must_use]
    pub fn delay_id(&self) -> &str {
        &self.delay_id
    }

    /// Whether calls carry the as_token and the user.
    #[must_use]
    pub fn is_as_user(&self) -> bool {
        self.as_user
    }
}

#[derive(Debug)]
struct Slot {
    generation: u32,
    job: Option<Box<Job>>,
}

/// All jobs by number.
#[derive(Debug, Default)]
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    len: usize,
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn insert(&mut self, job: Job) -> JobId {
        self.len += 1;
        let job = Some(Box::new(job));
        if let Some(slot) = self.free.pop() {
            let place = &mut self.slots[slot as usize];
            place.job = job;
            JobId {
                slot,
                generation: place.generation,
            }
        } else {
            self.slots.push(Slot { generation: 0, job });
            JobId {
                slot: self.slots.len() as u32 - 1,
                generation: 0,
            }
        }
    }

    pub(super) fn remove(&mut self, id: JobId) -> Option<Box<Job>> {
        let place = self
            .slots
            .get_mut(id.slot as usize)
            .filter(|place| place.generation == id.generation)?;
        let job = place.job.take()?;
        self.len -= 1;
        if let Some(next) = place.generation.checked_add(1) {
            place.generation = next;
            self.free.push(id.slot);
        }
        Some(job)
    }

    pub(super) fn get(&self, id: JobId) -> Option<&Job> {
        self.slots
            .get(id.slot as usize)
            .filter(|place| place.generation == id.generation)?
            .job
            .as_deref()
    }

    pub(super) fn get_mut(&mut self, id: JobId) -> Option<&mut Job> {
        self.slots
            .get_mut(id.slot as usize)
            .filter(|place| place.generation == id.generation)?
            .job
            .as_deref_mut()
    }

    pub(super) fn in_slot(&self, slot: u32) -> Option<(JobId, &Job)> {
        let place = self.slots.get(slot as usize)?;
        place.job.as_deref().map(|job| {
            (
                JobId {
                    slot,
                    generation: place.generation,
                },
                job,
            )
        })
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = JobId> {
        self.slots
            .iter()
            .enumerate()
            .filter(|(_, place)| place.job.is_some())
            .map(|(slot, place)| JobId {
                slot: slot as u32,
                generation: place.generation,
            })
    }
}

#[cfg(test)]
impl JobId {
    pub(crate) fn numbered(slot: u32) -> Self {
        Self { slot, generation: 0 }
    }
}
