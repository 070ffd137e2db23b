//! Kernel addresses to names, by blazesym: in batches, each address asked for once.

use std::collections::HashMap;

use anyhow::{Context, Result};
use blazesym::MaybeDefault;
use blazesym::symbolize::source::{Kernel, Source};
use blazesym::symbolize::{Input, Symbolized, Symbolizer};
use serde::{Deserialize, Serialize};

use super::functions;

/// A name for an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Symbol {
    pub name: String,
    /// bytes from the start of the function
    pub offset: u64,
    /// the kernel module it is in
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// A function that a probe puts on top of the stack that it sees: a BPF program, or what leads to one. Some have no
/// name (net.core.bpf_jit_kallsyms).
pub fn is_of_a_probe(function: &str) -> bool {
    [
        "bpf_prog_",
        "bpf_trampoline_",
        "bpf_trace_run",
        "__bpf_trace_",
        "__traceiter_",
        "arch_rethook_",
        "rethook_",
    ]
    .iter()
    .any(|start| function.starts_with(start))
}

/// Names of kernel addresses by a pass over kallsyms for each question, for who asks seldom: it keeps nothing but the answers, where
/// [`KernelSymbols`] keeps all symbols (10 MB).
#[derive(Debug, Default)]
pub struct FewSymbols {
    cache: HashMap<u64, Option<Symbol>>,
}

impl FewSymbols {
    /// Looks up those of `addrs` that are not known yet.
    pub fn resolve(&mut self, addrs: &[u64]) {
        let mut new = addrs.to_vec();
        new.retain(|addr| !self.cache.contains_key(addr));
        new.sort_unstable();
        new.dedup();
        if new.is_empty() {
            return;
        }
        for (addr, function) in new.iter().zip(functions::around(&new)) {
            let symbol = function.map(|f| Symbol {
                offset: addr - f.addr,
                name: f.name,
                module: f.module,
            });
            self.cache.insert(*addr, symbol);
        }
    }

    /// The name of an address that [`FewSymbols::resolve`] was given; `None` where the kernel has none.
    pub fn get(&self, addr: u64) -> Option<&Symbol> {
        self.cache.get(&addr)?.as_ref()
    }
}

/// Symbolizes kernel addresses and remembers the answers. The first question reads kallsyms (some 90 ms).
pub struct KernelSymbols {
    /// `None`: nothing is asked of this kernel ([`KernelSymbols::recorded`])
    kernel: Option<(Symbolizer, Source<'static>)>,
    cache: HashMap<u64, Option<Symbol>>,
    /// addresses that were looked up since [`KernelSymbols::news`], where somebody asks for that
    new: Option<Vec<u64>>,
}

impl Default for KernelSymbols {
    fn default() -> Self {
        let symbolizer = Symbolizer::builder()
            .enable_code_info(false)
            .enable_inlined_fns(false)
            .build();
        let source = Source::Kernel(Kernel {
            vmlinux: MaybeDefault::None,
            debug_syms: false,
            ..Kernel::default()
        });
        Self {
            kernel: Some((symbolizer, source)),
            cache: HashMap::new(),
            new: None,
        }
    }
}

impl KernelSymbols {
    /// Knows only what it is taught, and asks no kernel.
    pub fn recorded() -> Self {
        Self {
            kernel: None,
            cache: HashMap::new(),
            new: None,
        }
    }

    /// The name of an address, from a recording.
    pub fn learn(&mut self, addr: u64, symbol: Option<Symbol>) {
        self.cache.insert(addr, symbol);
    }

    /// Every answer so far. From now on [`KernelSymbols::news`] has the later ones.
    pub fn all(&mut self) -> Vec<(u64, Option<Symbol>)> {
        self.new = Some(Vec::new());
        let answers = self.cache.iter();
        answers.map(|(addr, s)| (*addr, s.clone())).collect()
    }

    /// The answers since the last call.
    pub fn news(&mut self) -> Vec<(u64, Option<Symbol>)> {
        let new = match &mut self.new {
            Some(new) if !new.is_empty() => std::mem::take(new),
            _ => return Vec::new(),
        };
        let answer = |addr: u64| (addr, self.get(addr).cloned());
        new.into_iter().map(answer).collect()
    }

    /// Looks up those of `addrs` that are not known yet, in one batch.
    pub fn resolve(&mut self, addrs: &[u64]) -> Result<()> {
        let mut new: Vec<u64> = addrs
            .iter()
            .copied()
            .filter(|a| !self.cache.contains_key(a))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        let Some((symbolizer, source)) = &self.kernel else {
            return Ok(());
        };
        new.sort_unstable();
        new.dedup();
        let found = symbolizer
            .symbolize(source, Input::AbsAddr(&new))
            .context("failed to symbolize kernel addresses")?;
        for (addr, symbolized) in new.iter().zip(found) {
            let symbol = match symbolized {
                Symbolized::Sym(sym) => Some(Symbol {
                    name: sym.name.into_owned(),
                    offset: sym.offset as u64,
                    module: sym.module.map(|m| m.to_string_lossy().into_owned()),
                }),
                Symbolized::Unknown(_) => None,
            };
            self.cache.insert(*addr, symbol);
        }
        if let Some(noted) = &mut self.new {
            noted.extend(new);
        }
        Ok(())
    }

    /// The name of an address that [`KernelSymbols::resolve`] was given; `None` where the kernel has none.
    pub fn get(&self, addr: u64) -> Option<&Symbol> {
        self.cache.get(&addr)?.as_ref()
    }
}
