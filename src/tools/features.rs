//! `netprobe features`: the preflight as a table, and what it means for each subcommand.

use std::io::Write;

use anyhow::{Context, Result};

use crate::kernel::caps;
use crate::kernel::features::Features;
use crate::run::build::{self, Build};
use crate::text::json;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object
    #[arg(long)]
    output_json: bool,
}

/// What a report of a fault needs.
#[derive(serde::Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    build: Build,
    #[serde(flatten)]
    features: &'a Features,
}

pub fn run(args: &Args) -> Result<()> {
    crate::run::log::init(false);
    let features = Features::detect();
    let mut text = Vec::new();
    if args.output_json {
        let report = Report {
            build: Build::get(),
            features: &features,
        };
        json::push(&mut text, &report).context("failed to write JSON")?;
        text.push(b'\n');
    } else {
        text.extend_from_slice(table(&features).as_bytes());
    }
    std::io::stdout()
        .write_all(&text)
        .context("failed to write to stdout")
}

/// One line a feature: name, yes or no, what it means.
fn table(f: &Features) -> String {
    let caps = f.missing_caps.is_empty();
    let caps_text = if caps {
        "may load and attach BPF programs".to_string()
    } else {
        format!(
            "{} missing: run as root, or with them",
            f.missing_caps.join(", ")
        )
    };
    let optional = f.missing_optional_caps.is_empty();
    let lockdown_ok = f.lockdown.as_deref() != Some("confidentiality");
    let lockdown_text = match f.lockdown.as_deref() {
        None => "not told by this kernel (no /sys/kernel/security/lockdown)".to_string(),
        Some("none") => "off".to_string(),
        Some("integrity") => {
            "integrity: kprobes and XDP allowed, where the kernel has them".to_string()
        }
        Some(mode) => format!("{mode}: kprobes are refused"),
    };
    let rows: Vec<(&str, bool, String)> = vec![
        ("capabilities", caps, caps_text),
        (
            "more-caps",
            optional,
            either(
                optional,
                "nothing is left out for want of one",
                "what the lines below say is left out",
            ),
        ),
        ("lockdown", lockdown_ok, lockdown_text),
        (
            "btf",
            f.btf,
            either(
                f.btf,
                "types of the running kernel",
                "CONFIG_DEBUG_INFO_BTF=y is needed by every subcommand",
            ),
        ),
        (
            "module-btf",
            f.module_btf,
            either(
                f.module_btf,
                "functions of modules too",
                "functions of modules are not traced (kernels from 5.11, with a module loaded)",
            ),
        ),
        (
            "kprobe",
            f.kprobe,
            either(
                f.kprobe,
                "skb, tcpconnect, icmp can trace",
                "CONFIG_KPROBES=y is needed by skb, tcpconnect, icmp",
            ),
        ),
        (
            "kprobe-multi",
            f.kprobe_multi,
            either(
                f.kprobe_multi,
                "all functions attach in about a second",
                "functions attach one by one (kernels from 5.18 with CONFIG_FPROBE have it)",
            ),
        ),
        (
            "perf",
            f.perf && f.perf_open,
            if f.perf && !f.perf_open {
                caps::why_no_perf()
            } else {
                either(
                    f.perf,
                    "perf buffers carry the events",
                    "CONFIG_PERF_EVENTS=y is needed by every subcommand",
                )
            },
        ),
        (
            "bpffs",
            f.bpffs,
            either(
                f.bpffs,
                "maps are pinned under /sys/fs/bpf/netprobe",
                "no pinned maps, so no `netprobe ctl`: mount -t bpf bpf /sys/fs/bpf",
            ),
        ),
        (
            "tracefs",
            f.tracefs,
            either(
                f.tracefs,
                "the kernel lists its traceable functions",
                "functions are guessed from kallsyms: mount -t tracefs tracefs /sys/kernel/tracing",
            ),
        ),
        (
            "rdonly-cast",
            f.rdonly_cast,
            either(
                f.rdonly_cast,
                "kernel memory is read by plain loads",
                "kernel memory is read by helper calls, which costs more (kernels from 6.2 have it)",
            ),
        ),
        (
            "func-ip",
            f.func_ip,
            either(
                f.func_ip,
                "the kernel names the probed function",
                "the function is told from the instruction pointer (kernels from 5.15 have it)",
            ),
        ),
        (
            "drop-reasons",
            f.drop_reasons,
            either(
                f.drop_reasons,
                "drops tell their reason",
                "the caller of kfree_skb stands for the reason (kernels from 5.17 have it)",
            ),
        ),
    ];
    let mut out = format!(
        "netprobe {}\nkernel {}\n\n",
        build::long_version(),
        f.release
    );
    for (name, yes, text) in rows {
        out += &format!("{name:<14} {:<4} {text}\n", if yes { "yes" } else { "no" });
    }
    out += "\n";
    for cap in &f.missing_optional_caps {
        out += &format!("without {}: {}\n", cap.name, cap.without);
    }
    if !optional {
        out += "\n";
    }
    for tool in ["skb", "tcpconnect", "icmp"] {
        out += &tool_line(tool, f.why_no_tracing());
    }
    out += &tool_line("xdpdump", f.why_no_bpf());
    out
}

fn either(yes: bool, if_yes: &str, if_no: &str) -> String {
    (if yes { if_yes } else { if_no }).to_string()
}

fn tool_line(tool: &str, why_not: Option<String>) -> String {
    match why_not {
        None => format!("{tool:<14} runs here\n"),
        Some(why) => format!("{tool:<14} cannot run here: {why}\n"),
    }
}
