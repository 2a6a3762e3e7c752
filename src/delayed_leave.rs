//! Delegated delayed leave.
pub mod backoff;
pub mod jobs;
pub mod machine;
pub mod pace;
pub mod rooms;
pub mod time;
pub mod watch;
