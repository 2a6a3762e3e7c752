//! Delegated leave. Its pure core runs here in a simulated world, with a clock that is moved by hand: rules, properties over
//! random inputs, and every recorded scene of a real SFU.

mod properties;
mod replay;
mod rows;
mod rules;
pub(crate) mod world;
