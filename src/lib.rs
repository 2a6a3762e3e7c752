//! MatrixRTC authorization service: exchanges a Matrix OpenID token for a LiveKit token.
//!
//! # Layout
//!
//! ```text
//! main.rs                 arguments -> configuration -> telemetry -> server::run -> exit code
//! bin/healthcheck.rs      lk-jwt-service-healthcheck, the same code as `lk-jwt-service healthcheck`
//! cli.rs healthcheck.rs   the command line
//! config.rs + config/     every LIVEKIT_* variable: default, check, error, --help line
//! bind.rs                 addresses to listen on
//! telemetry.rs + telemetry/
//!                         log level and format, escaping, who is shown; the thread that writes it
//! request_line.rs         one line of the log for each request
//! outcome.rs              the one vocabulary: how a request ended, on which route
//! metrics.rs              what is counted, as Prometheus reads it
//! state.rs                whether a neighbour can be used, since when; one line for each change
//! server.rs + server/     accept, drain with a deadline; wiring: build once
//! reload.rs               keys and tokens that SIGHUP reads again
//! connections.rs          what each connection holds, and who gives way
//! limits.rs               how much there is room for: memory limit, file descriptors
//! http.rs                 the route table, state and limits
//! http/<url>.rs           a file per URL
//! http/appservice/        the same for the endpoints behind our homeserver
//! http/edge.rs            around every request: id, path, CORS, error bodies
//! http/path.rs            the one spelling of a path, without the prefix that a proxy left
//! http/body.rs            request bodies, bounded
//! http/place.rs           places for complete requests
//! http/report.rs          the error table: error + route -> status, errcode, text, reason; log level, message, remedy
//! wire.rs + wire/         request and reply JSON, parsed into types that cannot be empty
//! exchange.rs             THE PIPELINE: who is asking -> what they may do -> room -> token
//! app_service.rs          the same behind our homeserver, which has settled who is asking
//! openid.rs               1. who is asking: userinfo over federation
//! federation.rs + federation/
//!                         server discovery, its bounded memory, the guard on addresses
//! members.rs              who is in which Matrix room, remembered for a moment
//! admission.rs + admission/
//!                         whose request may go on: classes, shares, turns
//! access.rs               2. what they may do: full or restricted, publish rights
//! sfu.rs + sfu/           3. LiveKit: open the room, remember it, explain a refusal
//! token.rs                4. the LiveKit JWT
//! identity.rs             names on the SFU: room alias, participant identity
//! server_name.rs          the grammar of server names
//! secret.rs               values that are never printed
//! homeserver.rs + homeserver/
//!                         the C-S API: base URL, delayed events; our own homeserver, with the as_token
//! registration.rs         generate-registration
//! presence.rs + presence/ the SFU as it is known, pure: who is there, which rooms stand, who must be asked next
//! delayed_leave.rs + delayed_leave/
//!                         delegated leaves, pure: one event, the table of all, whose call to a homeserver is next
//! fleet.rs + fleet/       several replicas on one Redis, pure: who lives, who watches, whose turn it is
//! driver.rs + driver/     the one driver of both: facts in, calls out, the only clock; the handle to all leaves
//! doctor.rs + doctor/     `lk-jwt-service doctor`: what is wrong around the service, and the remedy
//! check.rs + check/       the page "Why does my call not work?": its files, its tickets, its rooms
//! kick.rs + kick/         who left the Matrix room leaves the call: the handle, its calls and clock; below it the pure core
//! store.rs + store/       jobs, tokens and verified homeservers in Redis, in a file or nowhere: records, one ordered queue
//! time.rs timers.rs backoff.rs slab.rs cache.rs text.rs livekit.rs delayed_event.rs
//!                         moments, pauses, numbered values, bounded memories, texts; LiveKit's and MSC4140's words
//! clock.rs dns.rs tls.rs retry.rs log_throttle.rs single_flight.rs
//!                         time, names, certificates, deadlines and retries, how often something is logged, shared calls
//! internals.rs            what the tests in tests/ look into; all else that is `pub` here, main.rs needs
//! ```
//!
//! A module uses only what is below it (`tests/it/layers.rs` reads all imports):
//!
//! ```text
//! delivery   main -> server -> reload -> http/*
//! use cases  check ; doctor ; app_service ; exchange ; driver ; kick ; members
//! adapters   openid ; sfu ; homeserver ; store ; federation
//! pure       presence ; delayed_leave ; fleet ; driver::core ; kick::{membership, shares, name} ; store::record ; sfu::{room_memory, refusal, webhook} ;
//!            federation::guard ; admission (but its waiting)
//! tools      config ; dns ; tls ; retry ; clock ; telemetry ; request_line ; connections ; limits ; log_throttle ; single_flight ; state
//! values     outcome ; metrics ; wire ; token ; access ; identity ; server_name ; secret ; livekit ; delayed_event ; time ; backoff ; slab ; cache ; text
//! ```
#![forbid(unsafe_code)]

mod access;
mod admission;
mod app_service;
mod backoff;
mod bind;
mod cache;
mod check;
pub mod cli;
mod clock;
pub mod config;
mod connections;
mod delayed_event;
mod delayed_leave;
mod dns;
mod doctor;
mod driver;
mod exchange;
mod federation;
mod fleet;
pub mod healthcheck;
mod homeserver;
mod http;
mod identity;
#[doc(hidden)]
pub mod internals;
mod kick;
mod limits;
mod livekit;
mod log_throttle;
mod members;
mod metrics;
mod openid;
mod outcome;
mod presence;
pub mod registration;
mod reload;
mod request_line;
mod retry;
pub mod secret;
pub mod server;
mod server_name;
mod sfu;
mod single_flight;
mod slab;
mod state;
mod store;
pub mod telemetry;
mod text;
mod time;
mod timers;
mod tls;
mod token;
mod wire;

pub use doctor::command as run_doctor;
