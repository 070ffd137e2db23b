//! An interface's options in Wireshark's dialog: flags of its tool that make sense in a capture.

use std::io::Write;

use anyhow::Result;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

use crate::usage::usage;

use super::Source;

/// By their ids, in the order of the dialog.
const SKB: [&str; 32] = [
    "filter_func",
    "filter_skb_expr",
    "filter_mark",
    "filter_proto",
    "filter_src_ip",
    "filter_dst_ip",
    "filter_src_port",
    "filter_dst_port",
    "filter_netns",
    "filter_ifname",
    "filter_tunnel_pcap_l2",
    "filter_tunnel_pcap_l3",
    "pid",
    "comm",
    "uid",
    "cgroup",
    "container",
    "pod",
    "filter_track_skb",
    "filter_track_skb_by_stackid",
    "track_entries",
    "filter_trace_tc",
    "filter_trace_xdp",
    "filter_xdp_expr",
    "output-owner",
    "output-nft",
    "output-caller",
    "snaplen",
    "backend",
    "kmods",
    "kernel_btf",
    "buffer_pages",
];
const XDP: [&str; 10] = [
    "netns",
    "snaplen",
    "sample",
    "mode",
    "rx_capture",
    "program_names",
    "action",
    "xdp_mode",
    "promiscuous",
    "buffer_pages",
];
/// They conflict with --drops by other flags that they need, or change nothing for the few functions of drops.
const NOT_FOR_DROPS: [&str; 2] = ["filter_xdp_expr", "backend"];
/// Allowed, and not in the dialog: it is for scripts.
const READY_FILE: &str = "ready_file";

/// The flags that the interface has.
fn offered<'c>(source: &Source, command: &'c Command) -> Vec<&'c Arg> {
    let ids: &[&str] = match source {
        Source::Skb | Source::Drops => &SKB,
        Source::Xdp(_) => &XDP,
    };
    let drops = find(command, "drops").filter(|_| *source == Source::Drops);
    let excluded = drops.map_or(Vec::new(), |drops| {
        let of_drops = command.get_arg_conflicts_with(drops);
        // A flag may name what it conflicts with on either side.
        let to_drops = command.get_arguments().filter(|arg| {
            let theirs = command.get_arg_conflicts_with(arg);
            theirs.iter().any(|other| other.get_id() == drops.get_id())
        });
        of_drops.into_iter().chain(to_drops).collect()
    });
    let others: &[&str] = match drops {
        Some(_) => &NOT_FOR_DROPS,
        None => &[],
    };
    let ids = ids.iter().filter(|id| !others.contains(id));
    let args = ids.filter_map(|id| find(command, id));
    args.filter(|arg| excluded.iter().all(|other| other.get_id() != arg.get_id()))
        .collect()
}

fn find<'c>(command: &'c Command, id: &str) -> Option<&'c Arg> {
    command.get_arguments().find(|arg| arg.get_id() == id)
}

/// Writes a line for each option, and one for each of its values.
pub fn print(source: &Source, out: &mut Vec<u8>) -> Result<()> {
    let command = source.command();
    for (number, arg) in offered(source, &command).into_iter().enumerate() {
        let Some(long) = arg.get_long() else {
            continue;
        };
        let values = arg.get_possible_values();
        let default = arg.get_default_values().first();
        let default = default.map(|value| value.to_string_lossy().into_owned());
        let flag = matches!(arg.get_action(), ArgAction::SetTrue);
        let of_list = !flag && !values.is_empty() && default.is_some();
        let several = matches!(arg.get_action(), ArgAction::Append);
        let kind = match () {
            () if flag => "boolflag",
            () if of_list && !several => "selector",
            () if arg.get_value_hint() == ValueHint::AnyPath => "fileselect",
            () if default.as_ref().is_some_and(|d| d.parse::<u64>().is_ok()) => "unsigned",
            () => "string",
        };
        write!(
            out,
            "arg {{number={number}}}{{call=--{long}}}{{display={long}}}{{type={kind}}}"
        )?;
        let mut help = arg.get_help().map_or(String::new(), ToString::to_string);
        if kind == "string" && !values.is_empty() {
            let names: Vec<_> = values.iter().map(|v| v.get_name()).collect();
            help += &format!(": {}", names.join(", "));
        }
        write!(out, "{{tooltip={}}}", value(&help))?;
        if let Some(name) = arg.get_value_names().and_then(|names| names.first()) {
            write!(out, "{{placeholder={}}}", value(name))?;
        }
        if kind == "fileselect" {
            write!(out, "{{mustexist=true}}")?;
        }
        if let (Some(default), "unsigned" | "string") = (&default, kind) {
            write!(out, "{{default={}}}", value(default))?;
        }
        let group = arg.get_help_heading().unwrap_or("Capture");
        writeln!(out, "{{group={}}}", value(group))?;
        for possible in values.iter().filter(|_| kind == "selector") {
            let name = possible.get_name();
            let is_default = default.as_deref() == Some(name);
            let what = possible
                .get_help()
                .map_or(String::new(), |h| format!(": {h}"));
            writeln!(
                out,
                "value {{arg={number}}}{{value={name}}}{{display={name}{}}}{{default={is_default}}}",
                value(&what)
            )?;
        }
    }
    Ok(())
}

/// A value of the protocol, which has no way to write braces.
fn value(text: &str) -> String {
    text.replace('{', "(").replace('}', ")").replace('\n', " ")
}

/// An error for a flag of the tool that the interface does not have.
pub fn refuse_others(source: &Source, matches: &ArgMatches) -> Result<()> {
    let command = source.command();
    let known = offered(source, &command);
    for arg in command.get_arguments().filter(|arg| !arg.is_positional()) {
        let id = arg.get_id().as_str();
        let given = matches.value_source(id) == Some(ValueSource::CommandLine);
        if given && id != READY_FILE && known.iter().all(|other| other.get_id() != id) {
            let flag = arg.get_long().unwrap_or(id);
            return Err(usage(format!(
                "--{flag}: this interface of Wireshark does not have it; --extcap-config lists what it has"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_is_a_flag_of_its_tool() {
        for (source, count) in [
            (Source::Skb, SKB.len()),
            (Source::Xdp("x".into()), XDP.len()),
        ] {
            let command = source.command();
            assert_eq!(offered(&source, &command).len(), count);
            let mut out = Vec::new();
            print(&source, &mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            let args = text.lines().filter(|line| line.starts_with("arg "));
            assert_eq!(args.count(), count, "{text}");
            // Sentences: braces in pairs, and none inside another.
            for line in text.lines() {
                let depth = line.chars().fold(0, |depth: u32, c| match c {
                    '{' => depth + 1,
                    '}' => depth.checked_sub(1).expect(line),
                    _ => depth,
                });
                assert_eq!(depth, 0, "{line}");
            }
        }
        let drops = Source::Drops.command();
        let ids: Vec<_> = offered(&Source::Drops, &drops)
            .iter()
            .map(|a| a.get_id().as_str())
            .collect();
        assert!(
            ids.contains(&"filter_mark") && !ids.contains(&"filter_func"),
            "{ids:?}"
        );
    }
}
