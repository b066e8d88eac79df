//! Builds the embedded guest, a workspace of its own (its panic strategy and its link script differ from everything else
//! here), by the cargo that builds this.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// The guest is linked alone at a fixed address, without start-up files and without unwinding.
const FLAGS: [&str; 11] = [
    "-Crelocation-model=static",
    "-Cforce-unwind-tables=no",
    "-Cforce-frame-pointers=no",
    "-Clink-arg=-nostartfiles",
    "-Clink-arg=-nostdlib",
    "-Clink-arg=-static",
    "-Clink-arg=-no-pie",
    "-Clink-arg=-Wl,--build-id=none",
    "-Clink-arg=-Wl,--gc-sections",
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
    let output = PathBuf::from(variable("OUT_DIR")?);
    let target = output.join("guest");
    let script = format!("-Clink-arg=-Wl,-T,{}", guest.join("guest.ld").display());
    let mut cargo = Command::new(variable("CARGO")?);
    // What the outer build was told (flags, wrappers such as clippy's, profiles) is not for the guest.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        if (text.starts_with("CARGO") && text != "CARGO_HOME" && !text.starts_with("CARGO_NET"))
            || text.starts_with("RUSTC")
            || text.starts_with("RUSTDOC")
            || text == "RUSTFLAGS"
        {
            cargo.env_remove(name);
        }
    }
    let flags: Vec<&str> = FLAGS.iter().copied().chain([script.as_str()]).collect();
    let status = cargo
        .args(["build", "--release", "--locked", "--quiet", "--target", TARGET])
        .arg("--manifest-path")
        .arg(guest.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .status()
        .map_err(|error| format!("cannot run cargo for the embedded guest: {error}"))?;
    if !status.success() {
        return Err(format!("cargo could not build the embedded guest ({status})"));
    }
    let built = target.join(TARGET).join("release/guest");
    std::fs::copy(&built, output.join("guest.elf"))
        .map(drop)
        .map_err(|error| format!("cannot copy the embedded guest from {}: {error}", built.display()))
}

fn variable(name: &str) -> Result<String, String> {
    env::var(name).map_err(|error| format!("{name} is not set by cargo: {error}"))
}
