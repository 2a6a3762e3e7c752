//! A memory with a bound, which forgets what was used longest ago. Pure.

use std::hash::Hash;
use std::num::NonZeroUsize;

use lru::LruCache;

/// Makes a memory of at most `most` entries. It grows with what it holds, which `LruCache::new` does not: that takes all of it at once.
pub(crate) fn bounded<K: Hash + Eq, V>(most: NonZeroUsize) -> LruCache<K, V> {
    let mut cache = LruCache::unbounded();
    cache.resize(most);
    cache
}
