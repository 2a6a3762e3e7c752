#![forbid(unsafe_code)]
//! MatrixRTC authorization service.
pub mod access;
pub mod bind;
pub mod config;
pub mod dns;
pub mod exchange;
pub mod federation;
pub mod hold;
pub mod http;
pub mod identity;
pub mod openid;
pub mod secret;
pub mod server;
pub mod server_name;
pub mod sfu;
pub mod tls;
pub mod token;
pub mod wire;
