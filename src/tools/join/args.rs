//! The flags of `netprobe join`.

use std::path::PathBuf;

use crate::run::output::OutputArgs;
use crate::run::rotate::RotateArgs;
use crate::tools::report::args::FilterArgs;

/// Follow packets from one recorded host to another.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Recording of one host, or of one network namespace (netprobe record, of the same time)
    #[arg(value_name = "A")]
    pub a: PathBuf,

    /// Recording of the other
    #[arg(value_name = "B")]
    pub b: PathBuf,

    /// Show each packet's whole way, not only of those that were lost
    #[arg(long, help_heading = "Output")]
    pub packets: bool,

    /// Print JSON, one object a line
    #[arg(long, help_heading = "Output")]
    pub output_json: bool,

    /// Write to FILE instead of stdout
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub output_file: Option<PathBuf>,

    #[command(flatten)]
    pub filter: FilterArgs,
}

impl Args {
    pub fn output(&self) -> OutputArgs {
        OutputArgs {
            output_json: self.output_json,
            otlp: None,
            output_file: self.output_file.clone(),
            rotate: RotateArgs::never(),
            output_limit_lines: 0,
            ready_file: None,
        }
    }
}
