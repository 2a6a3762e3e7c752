//! Several replicas on one Redis. `scenes` runs real processes on a real Redis, `scripts` compares the scripts with a model of them,
//! `cores` lets the pure cores of a fleet live through faults on that model.

mod cores;
mod link;
mod model;
mod scenes;
mod scripts;
mod stage;
