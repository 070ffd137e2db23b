//! Which functions a kprobe can be put on, and at which address: from ftrace's own records where they can be had, else from tracefs, else
//! kallsyms.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{BufRead, BufReader};

use anyhow::Result;
use rustc_hash::FxHashMap;

use super::btf::Btf;
use super::ftrace;

/// A map from addresses of the kernel, which nobody chooses in order to make them collide. A look-up happens once an event.
pub type ByAddress<V> = FxHashMap<u64, V>;

/// A traceable function.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Traceable {
    /// 0 where the kernel does not tell
    pub addr: u64,
    pub module: Option<String>,
}

/// Traceable functions by name; several where static functions share one.
#[derive(Debug, Default)]
pub struct TraceableSet {
    by_name: HashMap<String, Vec<Traceable>>,
    /// the list is the kernel's own; else it is a guess, and an attach may be refused
    pub exact: bool,
}

const TRACEFS: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];

impl TraceableSet {
    /// Reads the list; keeps only the functions of these names.
    pub fn load(btf: &Btf, names: &HashSet<&str>) -> Self {
        Self::of_ftrace(btf, names).unwrap_or_else(|_| Self::printed(names))
    }

    /// Out of ftrace's own records. An error: this kernel does not let it be done so.
    pub fn of_ftrace(btf: &Btf, names: &HashSet<&str>) -> Result<Self> {
        let mut set = Self {
            exact: true,
            ..Self::default()
        };
        for found in ftrace::traceable(btf, names)? {
            set.add(&found.name, found.addr, found.module.as_deref());
        }
        Ok(set)
    }

    /// As the kernel prints it.
    pub fn printed(names: &HashSet<&str>) -> Self {
        let wanted = |name: &str| names.contains(name);
        // available_filter_functions_addrs: kernels from 6.5.
        for file in [
            "available_filter_functions_addrs",
            "available_filter_functions",
        ] {
            for dir in TRACEFS {
                if let Ok(text) = fs::read_to_string(format!("{dir}/{file}")) {
                    let set = Self::parse(&text, file.ends_with("addrs"), &wanted);
                    if !set.by_name.is_empty() {
                        return set;
                    }
                }
            }
        }
        Self::kallsyms(
            &fs::read_to_string("/proc/kallsyms").unwrap_or_default(),
            &wanted,
        )
    }

    /// `[ADDRESS ]NAME[ [MODULE]]`
    pub(crate) fn parse(text: &str, addrs: bool, wanted: &impl Fn(&str) -> bool) -> Self {
        let mut set = Self {
            exact: true,
            ..Self::default()
        };
        for line in text.lines() {
            // Some 60,000 lines, most of them not wanted: the name is cut out and asked for before anything else.
            let (addr, rest) = match line.split_once(' ') {
                Some((addr, rest)) if addrs => (addr, rest),
                _ => ("", line),
            };
            let (name, module) = match rest.split_once([' ', '\t']) {
                Some((name, module)) => (name, Some(module.trim())),
                None => (rest, None),
            };
            if wanted(name) {
                set.add(name, u64::from_str_radix(addr, 16).unwrap_or(0), module);
            }
        }
        set
    }

    /// Text symbols of /proc/kallsyms.
    fn kallsyms(text: &str, wanted: &impl Fn(&str) -> bool) -> Self {
        let mut set = Self::default();
        text_symbols(text, wanted, |addr, name, module| {
            set.add(name, addr, module);
        });
        set
    }

    fn add(&mut self, name: &str, addr: u64, module: Option<&str>) {
        self.by_name
            .entry(name.to_string())
            .or_default()
            .push(Traceable {
                addr,
                module: module.map(|m| m.trim_matches(['[', ']']).to_string()),
            });
    }

    /// All functions called `name`, of the kernel proper and of any module.
    pub fn everywhere(&self, name: &str) -> &[Traceable] {
        self.by_name.get(name).map_or(&[], Vec::as_slice)
    }

    /// All functions called `name` in `module`.
    pub fn get(&self, name: &str, module: Option<&str>) -> Vec<&Traceable> {
        self.by_name
            .get(name)
            .into_iter()
            .flatten()
            .filter(|t| t.module.as_deref() == module)
            .collect()
    }
}

/// Tells `found` the address and the name of each function in /proc/kallsyms whose name is `wanted`.
pub fn addresses(wanted: impl Fn(&str) -> bool, mut found: impl FnMut(u64, &str)) {
    each_symbol(|addr, name, _| {
        if wanted(name) {
            found(addr, name);
        }
    });
}

/// Where a function begins and ends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    pub start: u64,
    pub end: u64,
    pub name: String,
}

/// The functions of the kernel and its modules whose names begin with one of `heads` (three bytes at least) and are
/// `wanted`, by address.
pub fn spans<'a>(
    btf: &Btf,
    heads: impl Iterator<Item = &'a str>,
    wanted: impl Fn(&str) -> bool,
) -> Vec<Span> {
    let mut spans = match ftrace::spans(btf, heads, &wanted) {
        Ok(found) => found
            .into_iter()
            .map(|(f, end)| Span {
                start: f.addr,
                end,
                name: f.name,
            })
            .collect(),
        Err(_) => spans_printed(wanted),
    };
    spans.sort_unstable();
    spans
}

/// The same by /proc/kallsyms.
fn spans_printed(wanted: impl Fn(&str) -> bool) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    // The list is in order of addresses: a function ends where the next one begins.
    let mut open: Vec<(u64, String)> = Vec::new();
    each_symbol(|addr, name, _| {
        if open.first().is_some_and(|(start, _)| *start < addr) {
            let ended = open.drain(..).map(|(start, name)| Span {
                start,
                end: addr,
                name,
            });
            spans.extend(ended);
        }
        if wanted(name) {
            open.push((addr, name.to_owned()));
        }
    });
    spans
}

/// A function of the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    pub addr: u64,
    pub name: String,
    pub module: Option<String>,
}

/// The functions that these addresses lie in; none for one before the first function.
pub fn around(addrs: &[u64]) -> Vec<Option<Function>> {
    let mut found = vec![None; addrs.len()];
    each_symbol(|addr, name, module| {
        for (at, wanted) in addrs.iter().enumerate() {
            let best: &mut Option<Function> = &mut found[at];
            if addr <= *wanted && best.as_ref().is_none_or(|f| f.addr < addr) {
                *best = Some(Function {
                    addr,
                    name: name.to_owned(),
                    module: module.map(|m| m.trim_matches(['[', ']']).to_owned()),
                });
            }
        }
    });
    found
}

/// Tells `found` each function in /proc/kallsyms, line by line: the whole file takes 10 MB. Nothing where it hides the addresses
/// (kernel.kptr_restrict).
fn each_symbol(mut found: impl FnMut(u64, &str, Option<&str>)) {
    let Ok(file) = fs::File::open("/proc/kallsyms") else {
        return;
    };
    let mut lines = BufReader::with_capacity(16 * 1024, file);
    let mut line = String::new();
    while let Ok(1..) = lines.read_line(&mut line) {
        if let Some((addr @ 1.., name, module)) = symbol(&line) {
            found(addr, name, module);
        }
        line.clear();
    }
}

/// `ADDRESS TYPE NAME[\t[MODULE]]` of a text symbol.
fn symbol(line: &str) -> Option<(u64, &str, Option<&str>)> {
    let mut words = line.split_ascii_whitespace();
    let (addr, kind, name) = (words.next()?, words.next()?, words.next()?);
    let addr = u64::from_str_radix(addr, 16).unwrap_or(0);
    matches!(kind, "t" | "T" | "w" | "W").then(|| (addr, name, words.next()))
}

/// Text symbols whose names are `wanted`.
fn text_symbols(
    text: &str,
    wanted: &impl Fn(&str) -> bool,
    mut found: impl FnMut(u64, &str, Option<&str>),
) {
    for (addr, name, module) in text.lines().filter_map(symbol) {
        if wanted(name) {
            found(addr, name, module);
        }
    }
}

/// Address of a function of the kernel proper; 0 where kallsyms hides it or has none.
pub fn address(name: &str) -> u64 {
    let mut address = 0;
    each_symbol(|addr, found, module| {
        if module.is_none() && found == name {
            address = addr;
        }
    });
    address
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_the_tracefs_list() {
        let set = TraceableSet::parse(
            "ffffffff81000010 ip_rcv\nffffffffc0000020 nft_do_chain [nf_tables]\nffffffff81000030 dup\nffffffff81000040 dup\n",
            true,
            &|_| true,
        );
        assert!(set.exact);
        assert_eq!(set.get("ip_rcv", None)[0].addr, 0xffff_ffff_8100_0010);
        assert_eq!(set.get("nft_do_chain", None).len(), 0);
        assert_eq!(set.get("nft_do_chain", Some("nf_tables")).len(), 1);
        assert_eq!(set.get("dup", None).len(), 2);
        let set = TraceableSet::parse("ip_rcv\nother\n", false, &|n| n == "ip_rcv");
        assert_eq!(set.get("ip_rcv", None)[0].addr, 0);
        assert!(set.get("other", None).is_empty());
    }

    #[test]
    fn spans_and_what_lies_in_them() {
        let wanted = |name: &str| name == "kfree_skb_list_reason" || name == "consume_skb";
        // Addresses may be hidden here.
        for Span { start, end, name } in spans_printed(wanted) {
            assert!(wanted(&name));
            assert!(start < end);
            let found = around(&[start, end - 1, 1]);
            assert_eq!(found[0], found[1]);
            assert!(found[0].is_some() && found[2].is_none());
        }
    }

    #[test]
    fn kallsyms_gives_text_symbols() {
        let set = TraceableSet::kallsyms(
            "ffffffff81000010 T ip_rcv\nffffffff82000000 D ip_data\nffffffffc0000020 t f\t[m]\n",
            &|_| true,
        );
        assert!(!set.exact);
        assert_eq!(set.get("ip_rcv", None).len(), 1);
        assert!(set.get("ip_data", None).is_empty());
        assert_eq!(set.get("f", Some("m")).len(), 1);
    }
}
