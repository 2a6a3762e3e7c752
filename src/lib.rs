//! MatrixRTC authorization service.
#![forbid(unsafe_code)]

pub mod server_name;
