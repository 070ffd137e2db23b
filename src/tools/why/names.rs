//! Names for what events carry as numbers: functions, places of drops, reasons, processes, namespaces.

use std::collections::{HashMap, HashSet};

use anyhow::Result;

use crate::event::head::Head;
use crate::kernel::containers::ContainerNames;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::functions::ByAddress;
use crate::kernel::ksyms::KernelSymbols;
use crate::kernel::netns;
use crate::kernel::process::{Process, SocketHolders};
use crate::text::escape::escaped;
use crate::tools::skb::event::{Event, Owner};
use crate::tools::skb::netfilter::{Hooks, Who};

use super::rule_texts::RuleTexts;

/// The function that decided about a drop.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Place {
    pub function: String,
    pub offset: u64,
}

pub struct Names {
    functions: ByAddress<String>,
    symbols: KernelSymbols,
    reasons: DropReasons,
    hooks: Hooks,
    holders: Option<SocketHolders>,
    netns: HashMap<u32, String>,
    containers: ContainerNames,
    pub rules: RuleTexts,
}

impl Names {
    pub fn new(functions: ByAddress<String>, reasons: DropReasons, hooks: HashSet<String>) -> Self {
        Self {
            functions,
            symbols: KernelSymbols::default(),
            reasons,
            hooks: Hooks::new(hooks),
            holders: None,
            netns: netns::names(),
            containers: ContainerNames::default(),
            rules: RuleTexts::default(),
        }
    }

    /// The function at this address.
    pub fn function(&mut self, addr: u64) -> Result<String> {
        if let Some(name) = self.functions.get(&addr) {
            return Ok(name.clone());
        }
        self.symbols.resolve(&[addr])?;
        let symbol = self.symbols.get(addr);
        Ok(symbol.map_or_else(|| format!("{addr:#x}"), |s| s.name.clone()))
    }

    /// Where a drop was decided.
    pub fn place(&mut self, event: &Event) -> Result<Place> {
        let mut addrs = vec![event.func];
        if let Some(drop) = &event.drop {
            addrs.extend(drop.addresses().iter().filter(|a| **a != 0));
        }
        self.symbols.resolve(&addrs)?;
        let drop = event.drop.as_ref();
        let at = drop.map_or(event.func, |d| d.place(event.func, &self.symbols));
        Ok(match self.symbols.get(at) {
            Some(symbol) => Place {
                function: symbol.name.clone(),
                offset: symbol.offset,
            },
            None => Place {
                function: format!("{at:#x}"),
                offset: 0,
            },
        })
    }

    /// The name of a drop's reason; empty where the kernel gives none.
    pub fn reason(&mut self, event: &Event, place: &Place) -> String {
        let drop = event.drop.as_ref();
        let value = match drop.and_then(|d| d.qdisc(&place.function)) {
            Some(qdisc) => Some(qdisc),
            None => event.reason,
        };
        let kernel = value
            .filter(|v| *v != 0 && self.reasons.any())
            .map(|v| self.reasons.name(v));
        let own = drop.and_then(|d| d.reason(kernel.as_deref(), &place.function));
        match (own, kernel) {
            (Some(own), _) => own.to_owned(),
            (None, Some(name)) => DropReasons::shortened(&name).to_owned(),
            (None, None) => String::new(),
        }
    }

    /// Who in netfilter dropped it.
    pub fn who(&mut self, event: &Event, place: &Place) -> Result<Option<Who>> {
        let Some(decision) = &event.nft else {
            return Ok(None);
        };
        let addrs = decision.addresses();
        let addrs: Vec<u64> = addrs.into_iter().filter(|a| *a != 0).collect();
        self.symbols.resolve(&addrs)?;
        Ok(decision.who(Some(&place.function), &self.symbols, &self.hooks))
    }

    /// The process of a socket: who made or connected it, else who holds it now.
    pub fn process(&mut self, owner: &Owner) -> Option<Process> {
        let (pid, comm) = if owner.pid != 0 {
            (owner.pid, escaped(&owner.comm))
        } else {
            let holders = self.holders.get_or_insert_with(SocketHolders::look);
            let holder = holders.of(owner.inode)?;
            (holder.pid, escaped(holder.comm.as_bytes()))
        };
        Some(Process {
            pid,
            comm,
            container: self.containers.of(owner.cgroup, pid),
        })
    }

    /// The process that runs when an event is made.
    pub fn current(&mut self, head: &Head) -> Process {
        Process {
            pid: head.tgid,
            comm: escaped(&head.comm),
            container: self.containers.of(0, head.tgid),
        }
    }

    /// A namespace's name under /run/netns, or its inode.
    pub fn netns(&mut self, inode: u32) -> String {
        if !self.netns.contains_key(&inode) {
            self.netns.extend(netns::names());
        }
        let name = self.netns.entry(inode).or_insert_with(|| inode.to_string());
        escaped(name.as_bytes())
    }
}
