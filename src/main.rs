//! Parses the command line, runs the tool, turns its result into an exit code; nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    netprobe::cli::main()
}
