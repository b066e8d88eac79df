//! `understudy completions` and `man`: from the definitions of the command line themselves.

use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;

/// Prints what lets `shell` complete the command line.
pub fn completions(shell: Shell) {
    clap_complete::generate(shell, &mut Cli::command(), "understudy", &mut io::stdout());
}

/// Prints the manual page, or writes one for each subcommand to `folder`.
///
/// # Errors
/// The folder or stdout cannot be written to.
pub fn man(folder: Option<&Path>) -> io::Result<()> {
    match folder {
        None => clap_mangen::Man::new(Cli::command()).render(&mut io::stdout()),
        Some(folder) => {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(Cli::command(), folder)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_subcommand_that_is_shown_has_a_page() {
        let folder = tempfile::tempdir().unwrap();
        man(Some(folder.path())).unwrap();
        for command in Cli::command().get_subcommands() {
            let page = folder.path().join(format!("understudy-{}.1", command.get_name()));
            assert!(page.exists(), "{}", page.display());
        }
        let main = std::fs::read_to_string(folder.path().join("understudy.1")).unwrap();
        assert!(main.contains("understudy\\-attach(1)"), "{main}");
    }

    #[test]
    fn every_shell_completes_the_subcommands() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "understudy", &mut script);
            let script = String::from_utf8(script).unwrap();
            assert!(script.contains("switchover") && script.contains("api-sock"), "{shell}");
        }
    }
}
