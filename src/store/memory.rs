//! No store: jobs and tokens live as long as the process. The default.

/// Keeps nothing.
pub(super) struct Memory;
