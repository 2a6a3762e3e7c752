//! Delegated leave: watches participants for clients that may vanish.

pub mod record;
pub mod store;
