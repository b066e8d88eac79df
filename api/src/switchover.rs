//! `understudy switchover` and `promote`: the standby runs the guest from now on.

use std::time::Duration;

use crate::cli::{SocketOptions, SwitchoverOptions};
use crate::client::{self, ClientError, Method};
use crate::server::Switchover;

/// How long the two sides may take.
const PATIENCE: Duration = Duration::from_mins(1);

/// Orders it, waits until it is done, and prints what it cost.
///
/// # Errors
/// [`ClientError`]: also why the guest was not handed over.
pub fn switchover(options: &SwitchoverOptions) -> Result<(), ClientError> {
    let done: Switchover = client::put(&options.api_sock, "/mirror/switchover", PATIENCE)?;
    if options.json {
        println!("{}", serde_json::json!(done));
    } else {
        println!("the standby runs the guest; it stood still for {:.1} ms", done.pause_us as f64 / 1000.0);
    }
    Ok(())
}

/// Lets a standby whose primary is lost run the guest.
///
/// # Errors
/// [`ClientError`]: also why it does not.
pub fn promote(options: &SocketOptions) -> Result<(), ClientError> {
    client::send(&options.api_sock, Method::PUT, "/mirror/failover", &(), PATIENCE)?;
    println!("the guest runs here");
    Ok(())
}
