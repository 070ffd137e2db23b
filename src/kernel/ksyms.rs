//! Kernel addresses to names, by blazesym: in batches, each address asked for once.

use std::collections::HashMap;

use anyhow::{Context, Result};
use blazesym::MaybeDefault;
use blazesym::symbolize::source::{Kernel, Source};
use blazesym::symbolize::{Input, Symbolized, Symbolizer};
use serde::Serialize;

/// A name for an address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Symbol {
    pub name: String,
    /// bytes from the start of the function
    pub offset: u64,
    /// the kernel module it is in
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// Symbolizes kernel addresses and remembers the answers. The first question reads kallsyms (some 90 ms).
pub struct KernelSymbols {
    symbolizer: Symbolizer,
    source: Source<'static>,
    cache: HashMap<u64, Option<Symbol>>,
}

impl Default for KernelSymbols {
    fn default() -> Self {
        Self {
            symbolizer: Symbolizer::builder()
                .enable_code_info(false)
                .enable_inlined_fns(false)
                .build(),
            source: Source::Kernel(Kernel {
                vmlinux: MaybeDefault::None,
                debug_syms: false,
                ..Kernel::default()
            }),
            cache: HashMap::new(),
        }
    }
}

impl KernelSymbols {
    /// Looks up those of `addrs` that are not known yet, in one batch.
    pub fn resolve(&mut self, addrs: &[u64]) -> Result<()> {
        let mut new: Vec<u64> = addrs
            .iter()
            .copied()
            .filter(|a| !self.cache.contains_key(a))
            .collect();
        new.sort_unstable();
        new.dedup();
        if new.is_empty() {
            return Ok(());
        }
        let found = self
            .symbolizer
            .symbolize(&self.source, Input::AbsAddr(&new))
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
        Ok(())
    }

    /// The name of an address that [`KernelSymbols::resolve`] was given; `None` where the kernel has none.
    pub fn get(&self, addr: u64) -> Option<&Symbol> {
        self.cache.get(&addr)?.as_ref()
    }
}
