//! Arguments -> configuration -> telemetry -> `server::run` -> exit code.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use lk_jwt_service::config::Config;
use lk_jwt_service::server;

fn main() -> ExitCode {
    let (config, _warnings) = match Config::from_environment(false) {
        Ok(x) => x,
        Err(errors) => { eprintln!("{errors}"); return ExitCode::FAILURE; }
    };
    let rt = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    match rt.block_on(server::run(config, async { let _ = tokio::signal::ctrl_c().await; })) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => { eprintln!("{e}"); ExitCode::FAILURE }
    }
}
