//! Benchmarks of Understudy. Figures of one run are to be compared with each other, not between machines.

mod figures;
mod pause;
mod seed;

fn main() {
    println!("{}", serde_json::to_string_pretty(&seed::measure()).unwrap());
    println!("{}", serde_json::to_string_pretty(&pause::measure()).unwrap());
}
