//! Writes the man pages of `katavm` and its shells' completions, by the definition of the command line itself:
//! `./just manual FOLDER`.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Command;
use clap_complete::Shell;

/// The shells that have completions.
const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn main() -> ExitCode {
    let Some(folder) = std::env::args_os().nth(1).map(PathBuf::from) else {
        eprintln!("usage: manual FOLDER");
        return ExitCode::FAILURE;
    };
    match write(katavm_runtime::cli::definition(), &folder) {
        Ok(()) => {
            println!("{}", folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("cannot write to {}: {error}", folder.display());
            ExitCode::FAILURE
        }
    }
}

/// A man page for the program and one for each command in `man1`, a file for each shell in `completions`.
fn write(mut program: Command, folder: &Path) -> io::Result<()> {
    let (pages, completions) = (folder.join("man1"), folder.join("completions"));
    fs::create_dir_all(&pages)?;
    fs::create_dir_all(&completions)?;
    clap_mangen::generate_to(program.clone(), &pages)?;
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut program, "katavm", &completions)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visible_options(command: &Command) -> Vec<String> {
        let options = command.get_arguments().filter(|option| !option.is_hide_set());
        options.filter_map(|option| option.get_long()).map(str::to_owned).collect()
    }

    #[test]
    fn every_command_and_option_is_in_the_pages_and_in_the_completions() {
        let folder = tempfile::tempdir().unwrap();
        let mut program = katavm_runtime::cli::definition();
        write(program.clone(), folder.path()).unwrap();
        // Options of all commands are those of each.
        program.build();
        let read = |path: &str| fs::read_to_string(folder.path().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"));
        let shells = ["katavm.bash", "_katavm", "katavm.fish"].map(|file| (file, read(&format!("completions/{file}"))));
        // In a page each hyphen of an option is escaped.
        let page = |name: &str| read(&format!("man1/{name}.1")).replace("\\-", "-");
        let main = page("katavm");
        let mut commands = 0;
        for command in program.get_subcommands().filter(|command| command.get_name() != "help") {
            let name = command.get_name();
            let own = page(&format!("katavm-{name}"));
            assert!(main.contains(&format!("katavm-{name}(1)")), "katavm(1) does not name {name}");
            for (file, text) in &shells {
                assert!(text.contains(name), "{file} does not know the command {name}");
            }
            let options = visible_options(command);
            assert!(options.contains(&"root".to_owned()) && options.contains(&"help".to_owned()), "{options:?}");
            for option in options {
                assert!(own.contains(&format!("--{option}")), "katavm-{name}(1) does not know --{option}");
                for (file, text) in &shells {
                    let written = if *file == "katavm.fish" { format!("-l {option}") } else { format!("--{option}") };
                    assert!(text.contains(&written), "{file} does not know --{option} of {name}");
                }
            }
            // Those of a command have pages of their own, too.
            commands += 1 + command.get_subcommands().filter(|below| below.get_name() != "help").count();
        }
        assert_eq!(fs::read_dir(folder.path().join("man1")).unwrap().count(), commands + 1);
    }
}
