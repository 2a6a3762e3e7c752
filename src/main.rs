//! Arguments -> configuration -> telemetry -> `server::run` -> exit code.
#![expect(clippy::disallowed_methods, reason = "gives the dice to what makes a registration")]
#![forbid(unsafe_code)]

use std::fmt::Display;
use std::io::{self, Write as _};
use std::process::ExitCode;

use lk_jwt_service::cli::{self, Command};
use lk_jwt_service::config::{self, Config, ConfigErrors, LogFormat};
use lk_jwt_service::{healthcheck, registration, run_doctor, runtime, server, telemetry};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;

/// Memory goes back to the system after a burst, which the C libraries' allocators do not do. Settings: `.cargo/config.toml`.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match Command::parse(std::env::args_os().skip(1)) {
        Command::Serve { dev } => serve(dev),
        Command::Help => print(&cli::help()),
        Command::Version => print(&cli::version()),
        Command::CheckConfig { dev } => check_config(dev),
        Command::Healthcheck => healthcheck::run(&config::environment),
        Command::Doctor(options) => run_doctor(&options),
        Command::DoctorHelp => print(cli::DOCTOR_HELP),
        Command::GenerateRegistration { server_name, url } => {
            match registration::generate(server_name, url, &config::environment, &mut rand::random) {
                Ok(text) => print(&text),
                Err(mistake) => fail(&mistake, 2),
            }
        }
        Command::Invalid(mistake) => fail(&mistake, 2),
    }
}

fn serve(dev: bool) -> ExitCode {
    let (config, warnings) = match Config::from_environment(dev) {
        Ok(config) => config,
        Err(mistakes) => return fail_config(&mistakes),
    };
    // Kept to the end, a panic included: what is logged last is what is looked for.
    let _log = match telemetry::init(&config.log, &config.livekit.keys.signing().secret) {
        Ok(log) => log,
        Err(error) => return fail(&error, 1),
    };
    for warning in warnings {
        tracing::warn!(name: "configuration", "{warning}");
    }
    let runtime = match runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error, 1),
    };
    let service = async {
        // Installed before anything else: as PID 1 a signal without a handler is lost.
        let (mut terminate, mut interrupt) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
            (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
            (Err(error), _) | (_, Err(error)) => return fail(&error, 1),
        };
        // SIGHUP would end the process where nobody waits for it (decision P19).
        let (send, reload) = mpsc::channel(1);
        if let Ok(hangup) = signal(SignalKind::hangup()) {
            tokio::spawn(read_again(hangup, dev, send));
        }
        match server::run(config, reload, any_of(&mut terminate, &mut interrupt)).await {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, 1),
        }
    };
    runtime::block_on(&runtime, Box::pin(service))
}

/// Reads the files that the environment names again, each time that it is asked for. What cannot be read is told, and what was
/// there stays.
async fn read_again(mut hangup: Signal, dev: bool, send: mpsc::Sender<Config>) {
    while hangup.recv().await.is_some() {
        // A file may be a pipe, whose writer is waited for.
        match tokio::task::spawn_blocking(move || Config::from_environment(dev)).await {
            Ok(Ok((config, _))) => {
                if send.send(config).await.is_err() {
                    return;
                }
            }
            Ok(Err(mistakes)) => tracing::error!(name: "reload_failed",
                reason = mistakes.to_string(),
                "the files cannot be read again (SIGHUP): what was read before is used on"
            ),
            Err(error) => tracing::error!(name: "reload_failed", reason = error.to_string(), "the files cannot be read again (SIGHUP)"),
        }
    }
}

async fn any_of(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

fn print(text: &str) -> ExitCode {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

/// Prints what a start would say: the mistakes and warnings on stderr, and what the configuration comes to.
fn check_config(dev: bool) -> ExitCode {
    match Config::from_environment(dev) {
        Ok((config, warnings)) => {
            for warning in warnings {
                telemetry::say(&format!("warning: {warning}"));
            }
            print(&config.summary().to_string())
        }
        Err(mistakes) => fail_config(&mistakes),
    }
}

/// To stderr whatever the log level: a start that fails in silence is the worst of all.
fn fail(error: &dyn Display, code: u8) -> ExitCode {
    match config::log_format(&config::environment) {
        LogFormat::Text => telemetry::say(&format!("lk-jwt-service: {error}")),
        LogFormat::Json => telemetry::say_json_error(None, error),
    }
    ExitCode::from(code)
}

/// All mistakes at once, in the format of the log: one object for each in JSON.
fn fail_config(mistakes: &ConfigErrors) -> ExitCode {
    if config::log_format(&config::environment) == LogFormat::Text {
        return fail(mistakes, 1);
    }
    for (variable, text) in mistakes.lines() {
        telemetry::say_json_error(variable, &text);
    }
    ExitCode::from(1)
}
