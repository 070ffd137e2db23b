//! Which nft rule dropped: the programs at nf_tables' functions (src/bpf/drops/drops_nft.bpf.h), and rules by their numbers.

use std::collections::HashSet;

use anyhow::{Context, Result};
use libbpf_rs::skel::Skel;
use libbpf_rs::{Link, ProgramAttachType};

use crate::bpf::drops::types::drop_rule;
use crate::bpf::drops::{DropsSkel, OpenDropsSkel};
use crate::kernel::attach;
use crate::kernel::btf::{self, Btf};
use crate::kernel::features::Features;
use crate::kernel::functions::Span;
use crate::text::escape::escaped;
use crate::tools::skb::hooks::{ENDS, EXPRESSION, Hook, NETFILTER};
use crate::tools::skb::netfilter::{Hooks, Nft, family};

/// The module whose types the programs read.
pub const MODULE: &str = "nf_tables";
/// Its functions' programs that `netprobe drops` has; where in hooks::NETFILTER other tools have more.
const PROGRAMS: [&str; 3] = ["nft_enter", "nft_immediate", EXPRESSION];
/// Rules that are told apart, and expressions that are evaluated at a time.
const RULES: u32 = 4096;
const CALLS: u32 = 1024;

/// Where the types of nf_tables are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Types {
    Kernel,
    Module,
}

impl Types {
    /// `None`: nf_tables is not loaded, or its rules cannot be read on this kernel: stderr says so.
    pub fn find(btf: &Btf, features: &Features) -> Option<Self> {
        if btf.struct_named("nft_chain").is_some() {
            return features.drop_reasons.then_some(Self::Kernel);
        }
        if !is_loaded() {
            return None;
        }
        if !(features.drop_reasons && btf::modules().iter().any(|m| m == MODULE)) {
            eprintln!(
                "netprobe: which nft rule drops is not told: it needs drop reasons and BTF of modules (kernel 5.17)"
            );
            return None;
        }
        if let Some(why) = features.why_no_kprobe() {
            eprintln!("netprobe: which nft rule drops is not told: {why}");
            return None;
        }
        Some(Self::Module)
    }
}

/// nf_tables is there.
fn is_loaded() -> bool {
    std::path::Path::new("/sys/module").join(MODULE).exists()
}

/// The functions that the programs are attached to, as far as this kernel has them.
#[derive(Debug)]
pub struct Rules {
    targets: Vec<(Hook, u64)>,
    multi: bool,
}

impl Rules {
    /// `addresses`: those that kallsyms gives, among others; none where it hides them.
    pub fn new(addresses: &[Span], features: &Features) -> Self {
        let address = |function: &str| {
            let mut found = addresses.iter().filter(|span| span.name == function);
            found.next().map(|span| span.start)
        };
        let hidden = !Self::functions().any(|f| address(f).is_some());
        let targets = NETFILTER.iter().filter(|(p, _)| PROGRAMS.contains(p));
        let targets = targets.filter_map(|hook| match address(hook.1) {
            None if !hidden => None,
            found => Some((*hook, found.unwrap_or(0))),
        });
        Self {
            targets: targets.collect(),
            multi: features.kprobe_multi && !hidden,
        }
    }

    /// Whose addresses are wanted.
    pub fn functions() -> impl Iterator<Item = &'static str> {
        let hooks = NETFILTER.iter().filter(|(p, _)| PROGRAMS.contains(p));
        hooks.map(|(_, name)| *name)
    }

    /// Before the load.
    pub fn prepare(open: &mut OpenDropsSkel<'_>, rules: Option<&Self>, reason: u32) -> Result<()> {
        let rodata = open.maps.rodata_data.as_mut();
        let rodata = rodata.context("the BPF object has no .rodata")?;
        rodata.has_nft = u8::from(rules.is_some());
        rodata.nft_drop_reason = reason;
        let progs = &mut open.progs;
        for program in [
            &mut progs.nft_enter,
            &mut progs.nft_immediate,
            &mut progs.nft_eval,
            &mut progs.nft_eval_end,
        ] {
            program.set_autoload(rules.is_some());
            if rules.is_some_and(|rules| rules.multi) {
                program.set_attach_type(ProgramAttachType::KprobeMulti);
            }
        }
        if rules.is_some() {
            let maps = &mut open.maps;
            maps.nft_knowns.set_max_entries(RULES)?;
            maps.nft_calls.set_max_entries(CALLS)?;
        }
        Ok(())
    }

    /// Attaches to all of them: the ends of expressions first.
    pub fn attach(&self, skel: &DropsSkel<'_>) -> Result<Vec<Link>> {
        let mut links = Vec::new();
        let end = ENDS.iter().find(|(begin, _)| *begin == EXPRESSION);
        let ends = end.map(|(_, end)| (EXPRESSION, *end, true));
        let starts = PROGRAMS.iter().rev().map(|p| (*p, *p, false));
        for (hook, name, returns) in ends.into_iter().chain(starts) {
            let targets = self.targets.iter().filter(|((p, _), _)| *p == hook);
            let targets: Vec<(&str, u64)> = targets.map(|((_, f), at)| (*f, *at)).collect();
            if targets.is_empty() {
                continue;
            }
            let mut programs = skel.object().progs_mut();
            let program = programs.find(|p| p.name() == name);
            let program =
                program.with_context(|| format!("the BPF object has no program {name}"))?;
            if self.multi {
                let addresses: Vec<u64> = targets.iter().map(|(_, at)| *at).collect();
                links.push(attach::kprobe_multi_addrs(&program, &addresses, returns)?);
                continue;
            }
            // A function that a kernel lacks is passed over.
            let of = targets
                .iter()
                .map(|(f, _)| program.attach_kprobe(returns, f));
            links.extend(of.flatten());
        }
        Ok(links)
    }
}

/// What turns the kernel side's rules into words.
pub struct RuleNames {
    /// modules of netfilter that were there at the start
    hooks: Hooks,
    told: bool,
    /// the programs are attached
    attached: bool,
}

impl RuleNames {
    pub fn new(attached: bool) -> Self {
        Self {
            hooks: Hooks::new(HashSet::new()),
            told: attached,
            attached,
        }
    }

    pub fn of(&self, rule: &drop_rule) -> Nft {
        let policy = rule.handle == 0;
        // A rule may have decided by an expression that nobody looks at.
        let unknown = policy && self.hooks.has_more_modules();
        Nft {
            family: family(rule.family),
            table: escaped(&rule.table),
            chain: (!unknown).then(|| escaped(&rule.chain)),
            handle: (!policy).then_some(rule.handle),
            policy: policy && !unknown,
            queue: false,
        }
    }

    /// A firewall's drop has no rule: says why, once, where nf_tables came after the start.
    pub fn missed(&mut self) {
        if !self.told && !self.attached && is_loaded() {
            self.told = true;
            eprintln!(
                "netprobe: which nft rule drops is not told: nf_tables was not loaded when netprobe began"
            );
        }
    }
}

/// `nft inet filter input 12`
pub fn text(nft: &Nft) -> String {
    let begin = format!("nft {} {}", nft.family, nft.table);
    match (&nft.chain, nft.handle) {
        (None, _) => format!("{begin}, rule unknown"),
        (Some(chain), Some(handle)) => format!("{begin} {chain} {handle}"),
        (Some(chain), None) => format!("{begin} {chain} policy"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_program_is_in_the_table_of_hooks() {
        for program in PROGRAMS {
            assert!(NETFILTER.iter().any(|(p, _)| *p == program), "{program}");
        }
        let wants = |name: &str| Rules::functions().any(|f| f == name);
        assert!(wants("nft_do_chain") && !wants("nf_hook_slow"));
    }

    #[test]
    fn rules_and_policies_in_words() {
        let mut nft = Nft {
            family: "inet",
            table: "filter".into(),
            chain: Some("input".into()),
            handle: Some(12),
            policy: false,
            queue: false,
        };
        assert_eq!(text(&nft), "nft inet filter input 12");
        nft.handle = None;
        assert_eq!(text(&nft), "nft inet filter input policy");
        nft.chain = None;
        assert_eq!(text(&nft), "nft inet filter, rule unknown");
    }
}
