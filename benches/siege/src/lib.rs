//! What a siege and a soak have in common: the fakes that say what is true, those who ask, and the cgroup of the service.

pub mod cage;
pub mod dns;
pub mod figures;
pub mod honest;
pub mod http;
pub mod places;
pub mod tls;
pub mod world;
