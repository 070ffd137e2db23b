//! `netprobe completions`: the script by which a shell completes netprobe's command line. The script asks netprobe itself, so that what
//! is there now is offered too: interfaces, network namespaces, reasons, runs.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::{Arg, Command, ValueEnum};
use clap_complete::engine::{ArgValueCandidates, CompletionCandidate};
use clap_complete::env::{CompleteEnv, Shells};

use crate::explain::Rules;
use crate::kernel::{netdev, netns, pods};
use crate::run::pins;

/// Set by the scripts, to the shell's name, when they ask for candidates.
const VARIABLE: &str = "NETPROBE_COMPLETE";

/// Print the script by which a shell completes netprobe's command line. It goes where the shell looks for such scripts, or is read at once:
/// source <(netprobe completions bash)
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The shell
    #[arg(value_enum)]
    shell: Shell,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub fn run(args: &Args) -> Result<()> {
    let shell = match args.shell {
        Shell::Bash => "bash",
        Shell::Zsh => "zsh",
        Shell::Fish => "fish",
    };
    let shells = Shells::builtins();
    let writer = shells
        .completer(shell)
        .with_context(|| format!("no completion for {shell}"))?;
    let mut script = Vec::new();
    writer.write_registration(VARIABLE, "netprobe", "netprobe", "netprobe", &mut script)?;
    Ok(io::stdout().write_all(&script)?)
}

/// Answers where a shell's script asks, and says so: then there is nothing else to do.
pub fn answer(command: fn() -> Command) -> bool {
    if std::env::var_os(VARIABLE).is_none() {
        return false;
    }
    CompleteEnv::with_factory(move || with_candidates(command()))
        .var(VARIABLE)
        .try_complete(std::env::args_os(), None)
        .unwrap_or_else(|e| e.exit())
}

/// The command with what the values of its arguments can be.
fn with_candidates(command: Command) -> Command {
    command
        .mut_args(|arg| match values(&arg) {
            Some(values) => arg.add(ArgValueCandidates::new(values)),
            None => arg,
        })
        .mut_subcommands(with_candidates)
}

type Values = fn() -> Vec<CompletionCandidate>;

fn values(arg: &Arg) -> Option<Values> {
    Some(match arg.get_id().as_str() {
        "iface" | "filter_ifname" => interfaces,
        "netns" | "filter_netns" => namespaces,
        "explain" => reasons,
        "pod" => running_pods,
        "session" => sessions,
        _ => return None,
    })
}

fn interfaces() -> Vec<CompletionCandidate> {
    let all = netdev::all().unwrap_or_default();
    all.into_iter().map(|(_, name)| name.into()).collect()
}

fn namespaces() -> Vec<CompletionCandidate> {
    let mut names: Vec<_> = netns::names().into_values().collect();
    names.sort_unstable();
    names.into_iter().map(Into::into).collect()
}

fn running_pods() -> Vec<CompletionCandidate> {
    pods::running_names().into_iter().map(Into::into).collect()
}

fn reasons() -> Vec<CompletionCandidate> {
    Rules::builtin().reasons().map(Into::into).collect()
}

fn sessions() -> Vec<CompletionCandidate> {
    let sessions = pins::sessions(Path::new(pins::ROOT)).into_iter();
    let alive = sessions.filter(|session| session.alive);
    alive.map(|session| session.name.into()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_go_to_arguments_at_any_depth() {
        let leaf = Command::new("show").arg(Arg::new("session"));
        let command = Command::new("np")
            .arg(Arg::new("other"))
            .subcommand(Command::new("ctl").subcommand(leaf));
        let command = with_candidates(command);
        let show = command
            .find_subcommand("ctl")
            .and_then(|ctl| ctl.find_subcommand("show"))
            .unwrap();
        let has = |command: &Command| {
            let mut args = command.get_arguments();
            args.any(|arg| arg.get::<ArgValueCandidates>().is_some())
        };
        assert!(has(show));
        assert!(!has(&command));
    }
}
