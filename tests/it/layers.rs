//! A module uses only what is below it, and the pure ones make no call and read no clock: all `crate::` paths of the sources are read.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The modules of the library, the lowest first. Each may use those before it.
const FLOORS: &[&str] = &[
    // values
    "outcome",
    "metrics",
    "secret",
    "server_name",
    "identity",
    "time",
    "timers",
    "backoff",
    "slab",
    "cache",
    "text",
    "livekit",
    "delayed_event",
    "access",
    "token",
    "wire",
    "admission",
    // tools
    "bind",
    "limits",
    "clock",
    "log_throttle",
    "single_flight",
    "state",
    "tls",
    "dns",
    "connections",
    "config",
    "telemetry",
    "runtime",
    "request_line",
    "retry",
    "healthcheck",
    "registration",
    "cli",
    // the pure cores
    "presence",
    "delayed_leave",
    "fleet",
    // adapters
    "federation",
    "openid",
    "sfu",
    "store",
    "homeserver",
    // use cases
    "members",
    "kick",
    "driver",
    "exchange",
    "app_service",
    "doctor",
    "check",
    // delivery
    "http",
    "reload",
    "server",
    "internals",
];

/// Files and folders that make no call, read no clock and throw no dice.
const PURE: &[&str] = &[
    "presence",
    "presence.rs",
    "delayed_leave",
    "delayed_leave.rs",
    "fleet",
    "fleet.rs",
    "driver/core.rs",
    "kick/membership.rs",
    "kick/shares.rs",
    "kick/name.rs",
    "store/record.rs",
    "admission/fair_queue.rs",
    "admission/rates.rs",
    "admission/verified.rs",
    "time.rs",
    "timers.rs",
    "backoff.rs",
    "slab.rs",
    "cache.rs",
    "text.rs",
    "livekit.rs",
    "delayed_event.rs",
    "outcome.rs",
    "wire.rs",
    "identity.rs",
    "access.rs",
    "server_name.rs",
    "sfu/room_memory.rs",
    "sfu/webhook.rs",
    "federation/guard.rs",
    "check/uses.rs",
    "check/report.rs",
];

const IMPURE: &[&str] = &["tokio", "tracing", "rand", "reqwest", "hyper", "redb", "rustix"];
const CLOCKS: &[&str] = &["Instant::now", "SystemTime::now"];

fn sources(of: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(of).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().expect("a name").to_string_lossy().into_owned();
        if path.is_dir() && name != "tests" {
            sources(&path, found);
        } else if name.ends_with(".rs") && name != "tests.rs" && name != "fuzz.rs" {
            found.push(path);
        }
    }
}

/// The code of a file: no comments, no tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source");
    let text = text.split("#[cfg(test)]\nmod ").next().expect("a beginning").to_owned();
    let lines = text.lines().filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The first names behind `crate::`, also in a group.
fn used(code: &str) -> Vec<String> {
    let first = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut used = Vec::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            Some(group) => {
                let mut depth = 1;
                let mut start = true;
                for (at, c) in group.char_indices() {
                    match c {
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 1 => start = true,
                        c if start && depth == 1 && c.is_alphabetic() => {
                            used.push(first(&group[at..]));
                            start = false;
                        }
                        _ => {}
                    }
                    if depth == 0 {
                        break;
                    }
                }
            }
            None => used.push(first(rest)),
        }
    }
    used
}

#[test]
fn a_module_uses_only_what_is_below_it() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let floor: BTreeMap<&str, usize> = FLOORS.iter().enumerate().map(|(floor, name)| (*name, floor)).collect();
    let mut files = Vec::new();
    sources(&root, &mut files);
    let mut wrong = Vec::new();
    for path in &files {
        let inside = path.strip_prefix(&root).expect("below the root");
        let module = inside
            .iter()
            .next()
            .expect("a module")
            .to_string_lossy()
            .trim_end_matches(".rs")
            .to_owned();
        if ["lib", "main", "bin"].contains(&module.as_str()) {
            continue;
        }
        let Some(own) = floor.get(module.as_str()) else {
            wrong.push(format!("{module} has no floor"));
            continue;
        };
        for name in used(&code(path)) {
            match floor.get(name.as_str()) {
                Some(other) if other <= own => {}
                Some(_) => wrong.push(format!("{} uses {name}, which is above it", inside.display())),
                None => wrong.push(format!("{} uses {name}, which has no floor", inside.display())),
            }
        }
    }
    assert!(files.len() > 100, "{} sources were found", files.len());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn what_is_pure_makes_no_call_and_reads_no_clock() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for pure in PURE {
        let path = root.join(pure);
        let mut files = Vec::new();
        if path.is_dir() {
            sources(&path, &mut files);
        } else {
            files.push(path);
        }
        for path in files {
            let code = code(&path);
            for word in IMPURE {
                let named = [format!("{word}::"), format!("use {word};")];
                assert!(
                    !named.iter().any(|named| code.contains(named.as_str())),
                    "{} names {word}",
                    path.display()
                );
            }
            for clock in CLOCKS {
                assert!(!code.contains(clock), "{} reads a clock: {clock}", path.display());
            }
        }
    }
}
