//! Delegated leave against real neighbours: Synapse with delayed events, livekit-server, LiveKit's Python SDK and
//! livekit-client in headless Chromium.
//!
//! Most of these scenes wait most of their time, for half a minute and more: `tests/run` has threads enough that they wait side by
//! side. What they measure is measured against how late this machine is meanwhile ([`lateness`](crate::support::lateness)).
//!
//! `LK_TESTS_DUMP=1` keeps all that was logged also where nothing failed, below `target/tmp/leave_real`.

mod browsers;
mod clients;
mod clock;
mod homeserver;
mod long;
mod replicas;
mod sfu;
mod stage;
pub(crate) mod steered;
mod stores;
mod takes;
mod webhooks;
