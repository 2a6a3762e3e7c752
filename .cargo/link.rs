//! Hands `seldom.ld` to the linker, where that understands it.
#![expect(clippy::print_stdout, reason = "the way in which cargo is told")]

use std::env;

fn main() {
    println!("cargo::rerun-if-changed=.cargo/seldom.ld");
    let is = |variable: &str, value: &str| env::var(variable).is_ok_and(|found| found == value);
    // Others map code in other pieces, or have other linkers.
    if is("CARGO_CFG_TARGET_OS", "linux") && is("CARGO_CFG_TARGET_ARCH", "x86_64") {
        println!(
            "cargo::rustc-link-arg-bins=-Wl,-T,{}/.cargo/seldom.ld",
            env::var("CARGO_MANIFEST_DIR").unwrap_or_default()
        );
    }
}
