//! `--filter-track-bpf-helpers` and `--output-bpfmap`: the kernel functions that loaded tc and XDP programs call, found in the programs'
//! own instructions, and probed. A packet's context (by the stack) decides which calls are shown.

use std::collections::{HashMap, HashSet};
use std::os::fd::BorrowedFd;

use anyhow::{Context, Result, bail};
use libbpf_rs::Link;

use crate::bpf::skb::SkbSkel;
use crate::kernel::attach;
use crate::kernel::btf::Btf;
use crate::kernel::functions;
use crate::kernel::ksyms::KernelSymbols;
use crate::kernel::program;

use super::args::{Args, Backend};
use super::attached;

/// A function of a map: which programs of skb_helpers.bpf.h are attached to it, at its entry and at its return.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Probe {
    Helper,
    Lookup,
    /// gives back the element of a hash map, not its value
    LookupElement,
    Update,
    Delete,
}

impl Probe {
    /// By the name of a function that takes a map first.
    fn of_map_function(name: &str) -> Self {
        match name {
            n if n.ends_with("update_elem") => Probe::Update,
            n if n.ends_with("delete_elem") && !n.ends_with("lookup_and_delete_elem") => {
                Probe::Delete
            }
            "__htab_map_lookup_elem" => Probe::LookupElement,
            n if n.ends_with("lookup_elem") => Probe::Lookup,
            _ => Probe::Helper,
        }
    }

    /// Program, and whether it is for the function's return. What sees the return comes first.
    fn programs(self) -> &'static [(&'static str, bool)] {
        match self {
            Probe::Helper => &[("skb_helper", false)],
            Probe::Lookup => &[("skb_map_found", true), ("skb_map_lookup", false)],
            Probe::LookupElement => &[("skb_map_found_elem", true), ("skb_map_lookup", false)],
            Probe::Update => &[("skb_map_update", false)],
            Probe::Delete => &[("skb_map_delete", false)],
        }
    }
}

/// Programs of skb.bpf.c that this module attaches.
pub fn programs(args: &Args) -> Vec<&'static str> {
    let maps: &[Probe] = if args.output_bpfmap {
        &[
            Probe::Lookup,
            Probe::LookupElement,
            Probe::Update,
            Probe::Delete,
        ]
    } else {
        &[]
    };
    let probes = args.filter_track_bpf_helpers.then_some(&Probe::Helper);
    probes
        .into_iter()
        .chain(maps)
        .flat_map(|p| p.programs())
        .map(|(name, _)| *name)
        .collect()
}

/// The functions that are probed.
pub struct Helpers<'a> {
    skel: &'a SkbSkel<'a>,
    backend: Backend,
    /// address of __bpf_call_base: calls are told by their distance from it
    base: u64,
    /// names of functions whose first argument is a map
    of_maps: HashSet<String>,
    symbols: KernelSymbols,
    seen: HashSet<u64>,
    links: Vec<Link>,
    probed: usize,
    refused: usize,
}

impl<'a> Helpers<'a> {
    pub fn new(args: &Args, backend: Backend, btf: &Btf, skel: &'a SkbSkel<'a>) -> Result<Self> {
        let base = functions::address("__bpf_call_base");
        if base == 0 {
            bail!(
                "--filter-track-bpf-helpers: /proc/kallsyms hides its addresses (sysctl kernel.kptr_restrict=0 shows them)"
            );
        }
        let of_maps = if args.output_bpfmap {
            let taking = btf.functions_taking("bpf_map", &[])?;
            let first = taking.into_iter().filter(|f| f.arg == 1);
            first.map(|f| f.name).collect()
        } else {
            HashSet::new()
        };
        Ok(Self {
            skel,
            backend,
            base,
            of_maps,
            symbols: KernelSymbols::default(),
            seen: HashSet::new(),
            links: Vec::new(),
            probed: 0,
            refused: 0,
        })
    }

    /// Probes what a program calls and no program before it called.
    pub fn add(&mut self, program: BorrowedFd<'_>) -> Result<()> {
        let calls = program::calls(program)?;
        let addrs: Vec<u64> = calls
            .into_iter()
            .map(|distance| self.base.wrapping_add_signed(distance.into()))
            .filter(|addr| self.seen.insert(*addr))
            .collect();
        self.symbols.resolve(&addrs)?;
        let mut wanted: HashMap<Probe, Vec<(u64, String)>> = HashMap::new();
        for addr in addrs {
            // What is not the start of a function is no call: a number of another meaning.
            let Some(symbol) = self.symbols.get(addr).filter(|s| s.offset == 0) else {
                continue;
            };
            let probe = match self.of_maps.contains(&symbol.name) {
                true => Probe::of_map_function(&symbol.name),
                false => Probe::Helper,
            };
            let list = wanted.entry(probe).or_default();
            list.push((addr, symbol.name.clone()));
        }
        let mut wanted: Vec<_> = wanted.into_iter().collect();
        wanted.sort();
        for (probe, functions) in wanted {
            for (addr, name) in functions {
                match self.attach(probe, addr, &name) {
                    Ok(links) => {
                        self.links.extend(links);
                        self.probed += 1;
                    }
                    Err(_) => self.refused += 1,
                }
            }
        }
        Ok(())
    }

    fn attach(&self, probe: Probe, addr: u64, name: &str) -> Result<Vec<Link>> {
        attach::make_room(2)?;
        probe
            .programs()
            .iter()
            .map(|(program, at_return)| {
                let program = attached::program(self.skel, program)?;
                match self.backend {
                    Backend::KprobeMulti => {
                        attach::kprobe_multi_addrs(&program, &[addr], *at_return)
                    }
                    Backend::Kprobe => program
                        .attach_kprobe(*at_return, name)
                        .with_context(|| format!("failed to probe {name}")),
                }
            })
            .collect()
    }

    /// One line for stderr.
    pub fn summary(&self) -> String {
        let refused = match self.refused {
            0 => String::new(),
            n => format!(" ({n} more cannot be probed)"),
        };
        format!("{} functions that they call{refused}", self.probed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_maps() {
        for (name, probe) in [
            ("__htab_map_lookup_elem", Probe::LookupElement),
            ("htab_map_lookup_elem", Probe::Lookup),
            ("htab_map_update_elem", Probe::Update),
            ("trie_delete_elem", Probe::Delete),
            ("htab_map_lookup_and_delete_elem", Probe::Helper),
            ("bpf_map_push_elem", Probe::Helper),
        ] {
            assert_eq!(Probe::of_map_function(name), probe, "{name}");
        }
    }
}
