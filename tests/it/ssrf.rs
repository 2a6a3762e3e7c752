//! SSRF.
