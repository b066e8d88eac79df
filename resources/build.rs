//! Builds the embedded guest: one call of the compiler, no second workspace (its panic strategy and link script differ
//! from everything else here).

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

/// The guest is linked alone at a fixed address, without start-up files, without unwinding, without a red zone (ring 0
/// would write over it).
const OPTIONS: [&str; 19] = [
    "--edition=2024",
    "--crate-type=bin",
    "--crate-name=guest",
    "-Copt-level=s",
    "-Cpanic=abort",
    "-Clto=fat",
    "-Ccodegen-units=1",
    "-Cstrip=debuginfo",
    "-Crelocation-model=static",
    "-Cno-redzone=yes",
    "-Cforce-unwind-tables=no",
    "-Coverflow-checks=no",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,-z,max-page-size=4096",
    "-Clink-arg=-Wl,-z,noexecstack",
];

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=guest");
    match build_guest() {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            println!("cargo::error={message}");
            ExitCode::FAILURE
        }
    }
}

fn build_guest() -> Result<(), String> {
    let guest = Path::new(&variable("CARGO_MANIFEST_DIR")?).join("guest");
    let output = PathBuf::from(variable("OUT_DIR")?).join("guest.elf");
    let status = Command::new(variable("RUSTC")?)
        .args(OPTIONS)
        .arg("--target=x86_64-unknown-linux-gnu")
        .arg(format!("-Clink-arg=-Wl,-T,{}", guest.join("guest.ld").display()))
        .arg("-o")
        .arg(&output)
        .arg(guest.join("src/main.rs"))
        .status()
        .map_err(|error| format!("cannot run rustc for the embedded guest: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("rustc could not build the embedded guest ({status})"))
    }
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name} is not set by cargo: {error}"))
}
