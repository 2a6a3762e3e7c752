//! Several replicas on one Redis. `scenes`, `rolls`, `sentinels`, `splits` and `trouble` run real processes on a real Redis, `scripts` compares the
//! scripts with a model of them, `cores` tries each rule of the pure core on that model, and `simulation` lets a whole fleet (`node`) and
//! what is around it (`outside`) live through faults.

mod cluster;
mod cores;
mod events;
mod length;
mod link;
mod model;
mod node;
mod outside;
mod rolls;
mod scenes;
mod scripts;
mod sentinels;
mod simulation;
mod splits;
mod stage;
mod standin;
mod trouble;
