//! MatrixRTC authorization service.
#![forbid(unsafe_code)]

pub mod access;
pub mod bind;
pub mod config;
pub mod secret;
pub mod server_name;
