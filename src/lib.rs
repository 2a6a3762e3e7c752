//! MatrixRTC authorization service.
#![forbid(unsafe_code)]

pub mod access;
pub mod bind;
pub mod cli;
pub mod config;
pub mod healthcheck;
pub mod secret;
pub mod server_name;
pub mod telemetry;
