//! `understudy switchover` and `promote`: the standby runs the guest from now on.

use crate::cli::{SocketOptions, SwitchoverOptions};
use crate::client::{self, ClientError};

/// What is said of a promotion that came about.
pub(crate) const PROMOTED: &str = "the guest runs here";

/// Orders it, waits until it is done, and prints what it cost.
///
/// # Errors
/// [`ClientError`]: also why the guest was not handed over.
pub fn switchover(options: &SwitchoverOptions) -> Result<(), ClientError> {
    let done = client::switchover(&options.api_sock, options.to.as_ref())?;
    let text = if options.json { serde_json::json!(done).to_string() } else { done.words() };
    println!("{text}");
    Ok(())
}

/// Lets a standby whose primary is lost run the guest.
///
/// # Errors
/// [`ClientError`]: also why it does not.
pub fn promote(options: &SocketOptions) -> Result<(), ClientError> {
    client::promote(&options.api_sock)?;
    println!("{PROMOTED}");
    Ok(())
}
