//! What the drill on two virtual hosts needs of the world outside of them: clients of the Redis in the guest, an ear at the
//! ports of both hosts, and the judgement of what both got to hear.

mod clock;
mod frames;
mod judge;
mod load;

use std::process::ExitCode;

const USAGE: &str = "usage:
  redis-drill load ADDRESS PREFIX HISTORY STOP
      asks the Redis at ADDRESS by several connections, with keys that begin with PREFIX, until the file STOP is there; then
      reads each key once more. Every request goes to HISTORY, a line each
  redis-drill recovered ADDRESS HISTORY READS
      reads each key of HISTORY from another Redis, which has the files of the first, and writes that to READS
  redis-drill answered HISTORY SINCE_US
      succeeds if a request that was sent later than that has been answered
  redis-drill watch MAC FRAMES PORT=INTERFACE...
      writes to FRAMES when a frame of MAC comes from which port, until it is killed
  redis-drill clock
      prints the microseconds of this machine's clock
  redis-drill offset ADDRESS
      prints by how many microseconds this machine's clock is ahead of the one that `virtual-host clock` tells at ADDRESS
  redis-drill judge FOLDER
      prints what is to be said of the run whose records are in FOLDER; fails if a promise is broken";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match &words[..] {
        ["load", address, prefix, history, stop] => {
            load::load(address, prefix, history.as_ref(), stop.as_ref())
        }
        ["recovered", address, history, reads] => load::recovered(address, history.as_ref(), reads.as_ref()),
        ["answered", history, since] => since
            .parse()
            .map_err(std::io::Error::other)
            .and_then(|since_us| load::answered(history.as_ref(), since_us)),
        ["watch", mac, frames, ports @ ..] if !ports.is_empty() => frames::watch(mac, frames.as_ref(), ports),
        ["clock"] => {
            println!("{}", mirror::report::monotonic_us());
            Ok(true)
        }
        ["offset", address] => clock::print_offset(address),
        ["judge", folder] => judge::judge(folder.as_ref()),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("redis-drill {}: {error}", arguments.join(" "));
            ExitCode::FAILURE
        }
    }
}
