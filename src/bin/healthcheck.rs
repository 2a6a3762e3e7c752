//! `lk-jwt-service-healthcheck`: for images without a shell.

use std::process::ExitCode;

use lk_jwt_service::{config, healthcheck};

fn main() -> ExitCode {
    healthcheck::run(&config::environment)
}
