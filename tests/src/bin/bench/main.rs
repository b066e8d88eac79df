//! Benchmarks of Understudy. Figures of one run are to be compared with each other, not between machines.
//!
//! `cargo run --release -p tests --bin bench -- NAME... | all [--json]`; without a name it says which there are.

mod boot;
mod failover;
mod failover_service;
mod figures;
mod machine;
mod pause;
mod protection;
mod reprotect;
mod seed;
mod service;
mod snapshot;
mod witness;

use std::process::ExitCode;

use serde_json::{Map, Value, json};
use tests::process::{understudy, understudy_as_shipped};

const NAMES: [&str; 10] = [
    "boot",
    "seed",
    "pause",
    "snapshot",
    "service",
    "protection",
    "failover",
    "failover-service",
    "reprotect",
    "witness",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    let names: Vec<&str> = arguments.iter().map(String::as_str).filter(|name| *name != "--json").collect();
    let chosen = match names[..] {
        ["all"] => NAMES.to_vec(),
        [_, ..] if names.iter().all(|name| NAMES.contains(name)) => names,
        _ => {
            eprintln!("usage: bench {}|all ... [--json]", NAMES.join("|"));
            return ExitCode::from(2);
        }
    };
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        eprintln!("SKIPPED: /dev/kvm cannot be opened ({error}), and there is nothing to measure without it");
        return ExitCode::from(77);
    }
    let understudy = understudy();
    let machine = json!(machine::Machine::now());
    if !json {
        print_text("machine", &machine);
    }
    let mut results = Map::from_iter([("machine".into(), machine)]);
    for name in chosen {
        eprintln!("bench: {name}");
        let result = match name {
            "boot" => json!(boot::measure(understudy_as_shipped())),
            "seed" => json!(seed::measure()),
            "pause" => json!(pause::measure()),
            "snapshot" => json!(snapshot::measure()),
            "service" => json!(service::measure(understudy)),
            "protection" => json!(protection::measure()),
            "failover-service" => json!(failover_service::measure(understudy)),
            "reprotect" => json!(reprotect::measure()),
            "failover" => json!(failover::measure(understudy)),
            _ => json!(witness::measure()),
        };
        if !json {
            print_text(name, &result);
        }
        results.insert(name.into(), result);
    }
    if json {
        println!("{}", Value::Object(results));
    }
    ExitCode::SUCCESS
}

fn print_text(name: &str, result: &Value) {
    let rows = result.as_array().map_or_else(|| std::slice::from_ref(result), Vec::as_slice);
    for row in rows {
        println!("{name}");
        for (key, value) in row.as_object().into_iter().flatten() {
            match value.as_f64() {
                Some(figure) => println!("  {key:<30}{figure:>12.2}"),
                None => println!("  {key:<30}{:>12}", value.as_str().unwrap_or_default()),
            }
        }
    }
}
