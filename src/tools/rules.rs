//! The rules of `explain` on the command line: --rules and --explain, for the tools that say what a drop means.

use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::explain::Rules;
use crate::kernel::btf::Btf;
use crate::run::output::{Output, OutputArgs};
use crate::usage::usage;

/// The built-in rules, with those of a file before them.
pub fn load(file: Option<&Path>) -> Result<Rules> {
    match file {
        Some(path) => Rules::with(path),
        None => Ok(Rules::builtin().clone()),
    }
}

/// `--explain`: what a reason means, or all that this kernel has.
pub fn explain(rules: &Rules, reason: &str, args: &OutputArgs) -> Result<()> {
    let mut out = Output::open(args)?;
    let names: Vec<String> = if reason == "all" {
        let btf = Btf::vmlinux(None)?;
        let values = btf.enum_values("skb_drop_reason").into_iter();
        let names = values.filter(|(value, _)| *value > 1);
        names
            .filter_map(|(_, name)| Some(name.strip_prefix("SKB_DROP_REASON_")?.to_owned()))
            .filter(|name| name != "MAX" && name != "SUBSYS_MASK")
            .collect()
    } else {
        vec![reason.trim_start_matches("SKB_DROP_REASON_").to_owned()]
    };
    for name in &names {
        let Some(meaning) = rules.reason(name) else {
            return Err(usage(format!(
                "--explain {name}: no rule says what this reason means (--rules FILE adds one)"
            )));
        };
        out.line(|b| {
            let _ = write!(b, "{name}: {} ({})", meaning.what, meaning.class);
            if !meaning.change.is_empty() {
                let _ = write!(b, ". {}", meaning.change);
            }
        })?;
    }
    out.flush().context("failed to print the rules")
}
