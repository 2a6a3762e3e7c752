//! Values by number, with a generation that tells a value from the next one under the same number: what comes late for a value that
//! is gone finds nothing. Pure.
//!
//! Values stand side by side in chunks; a chunk without values takes no memory. Chunks of many values are large: what lives for hours
//! stands in few pieces between others that are gone in a moment.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::marker::PhantomData;
use std::num::NonZeroU32;

/// Bytes that stand side by side, and values at most.
const CHUNK_BYTES: usize = 256 * 1024;
const MAX_CHUNK: usize = 1024;

/// The number of a value. It is never used for another one. `Option<Id>` is as small as `Id`.
pub struct Id<T> {
    slot: u32,
    generation: NonZeroU32,
    kind: PhantomData<fn() -> T>,
}

impl<T> Id<T> {
    /// The least of all ids, for the ends of ranges.
    pub const FIRST: Self = Self::new(0, NonZeroU32::MIN);

    const fn new(slot: u32, generation: NonZeroU32) -> Self {
        Self {
            slot,
            generation,
            kind: PhantomData,
        }
    }

    /// The place of the value among all that are kept now, for tables beside the values.
    pub(crate) const fn slot(self) -> usize {
        self.slot as usize
    }

    /// An id as it might be given, for tests of what only carries ids.
    #[cfg(test)]
    pub(crate) const fn numbered(slot: u32) -> Self {
        Self::new(slot, NonZeroU32::MIN)
    }
}

// Not derived: a derive would ask the same of `T`.
impl<T> Clone for Id<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Id<T> {}

impl<T> PartialEq for Id<T> {
    fn eq(&self, other: &Self) -> bool {
        (self.slot, self.generation) == (other.slot, other.generation)
    }
}

impl<T> Eq for Id<T> {}

impl<T> PartialOrd for Id<T> {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Id<T> {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.slot, self.generation).cmp(&(other.slot, other.generation))
    }
}

impl<T> Hash for Id<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.slot, self.generation).hash(state);
    }
}

impl<T> fmt::Debug for Id<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.slot, self.generation)
    }
}

/// All values of a kind.
#[derive(Debug)]
pub struct Slab<T> {
    /// Of each slot that was ever used.
    generations: Vec<NonZeroU32>,
    chunks: Vec<Chunk<T>>,
    free: Vec<u32>,
    len: usize,
}

#[derive(Debug)]
struct Chunk<T> {
    /// [`Slab::CHUNK`] places, or none where all would be empty.
    places: Box<[Option<T>]>,
    used: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            generations: Vec::new(),
            chunks: Vec::new(),
            free: Vec::new(),
            len: 0,
        }
    }
}

impl<T> Slab<T> {
    const CHUNK: usize = {
        let values = CHUNK_BYTES / size_of::<Option<T>>();
        if values < MAX_CHUNK { values } else { MAX_CHUNK }
    };

    /// How many values there are.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether the slab is empty.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Keeps a value, under a new id.
    pub fn insert(&mut self, value: T) -> Id<T> {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.generations.push(NonZeroU32::MIN);
            u32::try_from(self.generations.len() - 1).unwrap_or(u32::MAX)
        });
        let (chunk, place) = Self::split(slot);
        if chunk >= self.chunks.len() {
            self.chunks.resize_with(chunk + 1, || Chunk {
                places: Box::default(),
                used: 0,
            });
        }
        let chunk = &mut self.chunks[chunk];
        if chunk.places.is_empty() {
            chunk.places = (0..Self::CHUNK).map(|_| None).collect();
        }
        chunk.places[place] = Some(value);
        chunk.used += 1;
        self.len += 1;
        Id::new(slot, self.generations[slot as usize])
    }

    /// Gives a value back. Its id finds nothing from then on.
    pub fn remove(&mut self, id: Id<T>) -> Option<T> {
        self.get(id)?;
        let (chunk, place) = Self::split(id.slot);
        let chunk = self.chunks.get_mut(chunk)?;
        let value = chunk.places.get_mut(place)?.take()?;
        chunk.used -= 1;
        if chunk.used == 0 {
            chunk.places = Box::default();
        }
        self.len -= 1;
        // A slot whose generations are used up is not used again.
        if let Some(next) = id.generation.checked_add(1) {
            self.generations[id.slot as usize] = next;
            self.free.push(id.slot);
        }
        Some(value)
    }

    /// The value, as long as it is kept.
    #[must_use]
    pub fn get(&self, id: Id<T>) -> Option<&T> {
        self.generations.get(id.slot as usize).filter(|&&now| now == id.generation)?;
        let (chunk, place) = Self::split(id.slot);
        self.chunks.get(chunk)?.places.get(place)?.as_ref()
    }

    /// The value, as long as it is kept.
    #[must_use]
    pub fn get_mut(&mut self, id: Id<T>) -> Option<&mut T> {
        self.generations.get(id.slot as usize).filter(|&&now| now == id.generation)?;
        let (chunk, place) = Self::split(id.slot);
        self.chunks.get_mut(chunk)?.places.get_mut(place)?.as_mut()
    }

    /// All values, in the order of their slots.
    pub fn iter(&self) -> impl Iterator<Item = (Id<T>, &T)> {
        let places = self.chunks.iter().enumerate().flat_map(|(chunk, values)| {
            let values = values.places.iter().enumerate();
            values.filter_map(move |(place, value)| value.as_ref().map(|value| (chunk * Self::CHUNK + place, value)))
        });
        places.filter_map(|(slot, value)| {
            let generation = *self.generations.get(slot)?;
            Some((Id::new(u32::try_from(slot).ok()?, generation), value))
        })
    }

    const fn split(slot: u32) -> (usize, usize) {
        (slot as usize / Self::CHUNK, slot as usize % Self::CHUNK)
    }

    /// How many values there is memory for.
    #[cfg(test)]
    pub(crate) fn places(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.places.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_never_used_twice() {
        let mut slab = Slab::default();
        let first = slab.insert("a");
        assert_eq!(slab.remove(first), Some("a"));
        let second = slab.insert("b");
        assert_ne!(first, second);
        assert_eq!((slab.get(first), slab.get(second)), (None, Some(&"b")));
        assert_eq!((slab.remove(first), slab.len()), (None, 1));
        assert_eq!(slab.get_mut(first), None);
    }

    #[test]
    fn memory_goes_back_with_the_last_value_of_a_chunk() {
        let (mut slab, chunk) = (Slab::default(), Slab::<usize>::CHUNK);
        let ids: Vec<_> = (0..3 * chunk).map(|value| slab.insert(value)).collect();
        assert_eq!(
            slab.iter().map(|(_, value)| *value).collect::<Vec<_>>(),
            (0..3 * chunk).collect::<Vec<_>>()
        );
        assert_eq!(slab.places(), 3 * chunk);
        for id in &ids[chunk..] {
            slab.remove(*id);
        }
        assert_eq!((slab.places(), slab.len(), slab.iter().count()), (chunk, chunk, chunk));
    }
}
