//! Which functions a kprobe can be put on, and at which address: from ftrace's own records where they can be had, else from tracefs, else
//! kallsyms.

use std::collections::{HashMap, HashSet};
use std::fs;

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
    let text = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    text_symbols(&text, &wanted, |addr, name, _| {
        // 0: hidden (kernel.kptr_restrict).
        if addr != 0 {
            found(addr, name);
        }
    });
}

/// `ADDRESS TYPE NAME[\t[MODULE]]`; text symbols only.
fn text_symbols(
    text: &str,
    wanted: &impl Fn(&str) -> bool,
    mut found: impl FnMut(u64, &str, Option<&str>),
) {
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let (Some(addr), Some("t" | "T" | "w" | "W"), Some(name)) =
            (words.next(), words.next(), words.next())
        else {
            continue;
        };
        if wanted(name) {
            let addr = u64::from_str_radix(addr, 16).unwrap_or(0);
            found(addr, name, words.next());
        }
    }
}

/// Address of a function of the kernel proper; 0 where kallsyms hides it or has none.
pub fn address(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/kallsyms").unwrap_or_default();
    let mut address = 0;
    text_symbols(&text, &|n| n == name, |addr, _, module| {
        if module.is_none() {
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
