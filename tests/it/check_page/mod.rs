//! The page "Why does my call not work?" (`/check`): what it finds, in Chromium, on a real deployment; who may use a ticket of it, and
//! what for.

mod files;
mod places;
mod rights;
mod states;
mod tickets;
