//! Who in netfilter has dropped a packet (--output-nft): out of what the kernel side saw of one run of a hook, and of the evaluation
//! of nft in it. Where it did not see enough the answer is "unknown".

use std::cell::Cell;
use std::collections::HashSet;
use std::fmt::{self, Write as _};
use std::fs;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::bpf::skb::types::{nf_decided, nf_decision};
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::text::escape::escaped;

/// NF_DECIDED_* of src/bpf/skb/netfilter.h
const RULE: u8 = nf_decided::NF_DECIDED_RULE.0 as u8;
const POLICY: u8 = nf_decided::NF_DECIDED_POLICY.0 as u8;
const NFT: u8 = nf_decided::NF_DECIDED_NFT.0 as u8;
const PASSED: u8 = nf_decided::NF_DECIDED_PASSED.0 as u8;
const ACCEPTED: u8 = nf_decided::NF_DECIDED_ACCEPTED.0 as u8;
/// NFPROTO_BRIDGE, NFPROTO_NETDEV; NF_QUEUE
const BRIDGE: u8 = 7;
const NETDEV: u8 = 5;
const QUEUE: u8 = 3;

/// `struct nf_decision`
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Decision {
    known: u8,
    /// NFPROTO_*
    family: u8,
    at: u8,
    verdict: u8,
    handle: Option<u64>,
    table: String,
    chain: String,
    hook: u64,
    following: [u64; 2],
    run: u32,
    /// see NF_DECIDED_ACCEPTED
    tables: Vec<String>,
}

/// A run of a hook that let the packet pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Passed {
    /// tells one run from the next
    pub run: u32,
    /// as iptables calls its built-in chain
    pub hook: &'static str,
    /// the last nft chain in it; a rule where one accepted, else its policy
    pub nft: Option<Nft>,
    /// the last tables of the older iptables that it went through
    pub tables: Vec<String>,
}

impl Decision {
    /// Nothing where the kernel side knew nothing.
    pub fn new(n: &nf_decision) -> Option<Self> {
        let passed = n.known == ACCEPTED;
        (n.known != 0).then(|| Self {
            known: n.known,
            family: n.family,
            at: n.at,
            verdict: n.verdict,
            handle: (n.handle != 0).then_some(n.handle),
            table: escaped(&n.table),
            chain: escaped(&n.chain),
            hook: if passed { 0 } else { n.hook },
            following: if passed { [0; 2] } else { n.following },
            run: n.run,
            tables: match passed {
                true => tables([n.hook, n.following[0], n.following[1]]),
                false => Vec::new(),
            },
        })
    }

    /// A hook that the packet has passed.
    pub fn passed(&self) -> Option<Passed> {
        let nft = Nft {
            family: family(self.family),
            table: self.table.clone(),
            chain: Some(self.chain.clone()),
            handle: self.handle,
            policy: self.handle.is_none(),
            queue: false,
        };
        (self.known == ACCEPTED).then(|| Passed {
            run: self.run,
            hook: hook(self.family, self.at),
            nft: (!self.chain.is_empty()).then_some(nft),
            tables: self.tables.clone(),
        })
    }

    /// The rule, where it is known that a rule has decided.
    pub fn rule(&self) -> Option<Nft> {
        (self.known == RULE).then(|| Nft {
            family: family(self.family),
            table: self.table.clone(),
            chain: Some(self.chain.clone()),
            handle: self.handle,
            policy: false,
            queue: false,
        })
    }

    /// The hook, as iptables calls its built-in chain.
    pub fn at(&self) -> &'static str {
        hook(self.family, self.at)
    }

    /// Addresses that [`Decision::who`] asks for by their symbols.
    pub fn addresses(&self) -> [u64; 3] {
        [self.hook, self.following[0], self.following[1]]
    }

    /// Who it was. `place`: the function that freed the packet, where it is known.
    pub fn who(&self, place: Option<&str>, symbols: &KernelSymbols, hooks: &Hooks) -> Option<Who> {
        let queue = self.verdict == QUEUE;
        let by_hook = place.is_none_or(|p| matches!(p, "nf_hook_slow" | "nft_do_chain"));
        let by_queue = place.is_some_and(|p| {
            ["nf_queue", "__nf_queue", "nf_reinject", "nfqnl_"]
                .iter()
                .any(|known| p.starts_with(known))
        });
        if !(by_hook || queue && by_queue) {
            return None;
        }
        let of_nft = |chain: Option<String>| Nft {
            family: family(self.family),
            table: self.table.clone(),
            chain,
            handle: None,
            policy: false,
            queue: false,
        };
        Some(match self.known {
            RULE => Who::Nft(Nft {
                handle: self.handle,
                queue,
                ..of_nft(Some(self.chain.clone()))
            }),
            // A rule may have decided by an expression that nobody looks at.
            POLICY if hooks.has_more_modules() => Who::Nft(of_nft(None)),
            POLICY => Who::Nft(Nft {
                policy: true,
                ..of_nft(Some(self.chain.clone()))
            }),
            NFT => Who::Nft(of_nft(None)),
            _ => self.function(symbols, &hooks.probed),
        })
    }

    /// The function of a hook that is no nft chain.
    fn function(&self, symbols: &KernelSymbols, probed: &HashSet<String>) -> Who {
        let [first, second] = self.following;
        let seen = |addr| addr == 0 || symbols.get(addr).is_some_and(|s| probed.contains(&s.name));
        let passed = self.hook == 0 || self.known == PASSED;
        let addr = match (passed, first) {
            (false, _) if seen(first) => self.hook,
            (true, 1..) if !seen(first) && seen(second) => first,
            _ => return Who::Unknown,
        };
        let Some(symbol) = symbols.get(addr) else {
            return Who::Unknown;
        };
        // The table mangle has functions of its own, which call these.
        let legacy = [
            "ipt_do_table",
            "ip6t_do_table",
            "arpt_do_table",
            "iptable_mangle_hook",
            "ip6table_mangle_hook",
        ];
        if legacy.contains(&&*symbol.name) && addr == self.hook {
            return Who::Legacy(Legacy {
                family: family(self.family),
                table: self.table.clone(),
                hook: hook(self.family, self.at),
            });
        }
        Who::Hook(Hook::new(symbol))
    }
}

/// Names of tables, 8 bytes each.
fn tables(words: [u64; 3]) -> Vec<String> {
    let names = words.map(|word| escaped(&word.to_ne_bytes()));
    names.into_iter().filter(|name| !name.is_empty()).collect()
}

/// What of netfilter is looked at.
#[derive(Debug, Default)]
pub struct Hooks {
    /// Functions of hooks whose entries are seen.
    probed: HashSet<String>,
    /// Modules of netfilter that were there then.
    modules: HashSet<String>,
    /// Whether there are others now, and when that was asked.
    more: Cell<(bool, Option<Instant>)>,
    /// out of a recording: no kernel is asked
    recorded: bool,
}

/// The kernel's list of modules is read again when this old: events come later than that.
const FRESH: Duration = Duration::from_millis(10);

impl Hooks {
    pub fn new(probed: HashSet<String>) -> Self {
        Self {
            probed,
            modules: modules(),
            more: Cell::default(),
            recorded: false,
        }
    }

    /// What a recording says: `more` as [`Hooks::has_more_modules`].
    pub fn recorded(probed: HashSet<String>, more: bool) -> Self {
        Self {
            probed,
            modules: HashSet::new(),
            more: Cell::new((more, None)),
            recorded: true,
        }
    }

    /// Functions whose entries are seen, and whether there were more modules when that was asked last.
    pub fn known(&self) -> (Vec<String>, bool) {
        let mut probed: Vec<_> = self.probed.iter().cloned().collect();
        probed.sort_unstable();
        (probed, self.more.get().0)
    }

    /// [`Hooks::known`] is so, without the list.
    pub fn has_more(&self) -> bool {
        self.more.get().0
    }

    /// Whether a module of netfilter was loaded since: its functions are not probed.
    pub fn has_more_modules(&self) -> bool {
        let (more, asked) = self.more.get();
        if more || self.recorded || asked.is_some_and(|then| then.elapsed() < FRESH) {
            return more;
        }
        let more = !modules().is_subset(&self.modules);
        self.more.set((more, Some(Instant::now())));
        more
    }
}

/// The loaded modules that may have expressions of nft, or targets of iptables that nft calls.
fn modules() -> HashSet<String> {
    const NAMES: [&str; 7] = ["nft_", "nf_", "xt_", "ipt_", "ip6t_", "ebt_", "arpt_"];
    let text = fs::read_to_string("/proc/modules").unwrap_or_default();
    let names = text.lines().filter_map(|line| line.split(' ').next());
    names
        .filter(|name| NAMES.iter().any(|begin| name.starts_with(begin)))
        .map(str::to_owned)
        .collect()
}

/// Who dropped a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    Nft(Nft),
    Legacy(Legacy),
    Hook(Hook),
    Unknown,
}

/// A rule of nft or the policy of a base chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize)]
pub struct Nft {
    pub family: &'static str,
    pub table: String,
    /// null where it is not known which
    pub chain: Option<String>,
    /// of the rule; null where there is none, or it is not known
    pub handle: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub policy: bool,
    /// the rule gave it to a queue, whose program dropped it or which has none
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub queue: bool,
}

/// A table of the older iptables, and the hook at which it was asked: which of its chains and rules it was is not known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Legacy {
    pub family: &'static str,
    pub table: String,
    pub hook: &'static str,
}

/// Another function that netfilter calls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Hook {
    pub function: String,
    /// what is known of this function
    #[serde(skip_serializing_if = "Option::is_none")]
    pub what: Option<&'static str>,
}

impl Hook {
    fn new(symbol: &Symbol) -> Self {
        let name = &*symbol.name;
        let of = |part: &str| name.contains(part);
        let what = if of("defrag") {
            Some("reassembly")
        } else if of("conntrack")
            || of("nf_confirm")
            || name == "ipv4_confirm"
            || name == "ipv6_confirm"
        {
            Some("connection tracking")
        } else if of("nf_nat") {
            Some("address translation")
        } else if name.starts_with("br_nf") {
            Some("bridge netfilter")
        } else if name.starts_with("ip_vs") {
            Some("IPVS")
        } else if name.starts_with("selinux") || name.starts_with("apparmor") {
            Some("security module")
        } else {
            None
        };
        Self {
            function: symbol.name.clone(),
            what,
        }
    }
}

/// As a line's end has it: `[nft ip filter input handle 4]`.
impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Who::Nft(nft) => {
                write!(f, "[nft {} {}", nft.family, nft.table)?;
                let Some(chain) = &nft.chain else {
                    return f.write_str(", chain and rule unknown: what decided was not seen]");
                };
                write!(f, " {chain}")?;
                match nft.handle {
                    _ if nft.policy => f.write_str(" policy")?,
                    Some(handle) => write!(f, " handle {handle}")?,
                    None => f.write_str(", rule unknown")?,
                }
                f.write_str(if nft.queue { " queue]" } else { "]" })
            }
            Who::Legacy(legacy) => {
                let Legacy {
                    family,
                    table,
                    hook,
                } = legacy;
                write!(
                    f,
                    "[iptables {family} {table}, hook {hook}, chain and rule unknown: legacy tables do not show them]"
                )
            }
            Who::Hook(hook) => {
                f.write_str("[netfilter ")?;
                f.write_str(&hook.function)?;
                if let Some(what) = hook.what {
                    write!(f, ": {what}")?;
                }
                f.write_char(']')
            }
            Who::Unknown => f.write_str("[netfilter, hook unknown: its function was not seen]"),
        }
    }
}

/// A family as nft(8) calls it; enum in include/uapi/linux/netfilter.h.
pub fn family(number: u8) -> &'static str {
    match number {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        NETDEV => "netdev",
        BRIDGE => "bridge",
        10 => "ip6",
        _ => "?",
    }
}

/// A hook as iptables calls its built-in chain.
fn hook(family: u8, number: u8) -> &'static str {
    const INET: [&str; 6] = [
        "PREROUTING",
        "INPUT",
        "FORWARD",
        "OUTPUT",
        "POSTROUTING",
        "INGRESS",
    ];
    const ARP: [&str; 3] = ["INPUT", "OUTPUT", "FORWARD"];
    const DEVICE: [&str; 2] = ["INGRESS", "EGRESS"];
    let names = match family {
        3 => &ARP[..],
        NETDEV => &DEVICE[..],
        _ => &INET[..],
    };
    names.get(usize::from(number)).copied().unwrap_or("?")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decision(known: u8) -> Decision {
        Decision {
            known,
            family: 2,
            at: 3,
            table: "t".into(),
            chain: "c".into(),
            handle: Some(7),
            ..Decision::default()
        }
    }

    fn said(decision: &Decision, place: Option<&str>) -> String {
        let hooks = Hooks::new(HashSet::new());
        let who = decision.who(place, &KernelSymbols::default(), &hooks);
        who.map_or_else(String::new, |who| who.to_string())
    }

    #[test]
    fn modules_that_came_later() {
        let later = Hooks {
            more: Cell::new((true, None)),
            ..Hooks::default()
        };
        let place = Some("nft_do_chain");
        let who = |known| decision(known).who(place, &KernelSymbols::default(), &later);
        let said = |known| who(known).map_or_else(String::new, |who| who.to_string());
        assert_eq!(
            said(POLICY),
            "[nft ip t, chain and rule unknown: what decided was not seen]"
        );
        assert_eq!(said(RULE), "[nft ip t c handle 7]");
    }

    #[test]
    fn rules_and_policies() {
        let place = Some("nft_do_chain");
        assert_eq!(said(&decision(RULE), place), "[nft ip t c handle 7]");
        assert_eq!(said(&decision(POLICY), place), "[nft ip t c policy]");
        assert_eq!(
            said(&decision(NFT), place),
            "[nft ip t, chain and rule unknown: what decided was not seen]"
        );
        let long = Decision {
            handle: None,
            ..decision(RULE)
        };
        assert_eq!(said(&long, None), "[nft ip t c, rule unknown]");
        assert_eq!(said(&decision(RULE), Some("ip_rcv_core")), "");
        assert_eq!(said(&decision(RULE), Some("nf_queue")), "");
        let queue = Decision {
            verdict: QUEUE,
            ..decision(RULE)
        };
        assert_eq!(
            said(&queue, Some("nf_queue")),
            "[nft ip t c handle 7 queue]"
        );
    }

    #[test]
    fn tables_of_the_older_iptables() {
        let word = |name: &[u8; 8]| u64::from_ne_bytes(*name);
        let words = [0, word(b"mangle\0\0"), word(b"security")];
        let passed = Decision {
            tables: tables(words),
            chain: String::new(),
            ..decision(ACCEPTED)
        };
        let names = vec!["mangle".to_owned(), "security".to_owned()];
        assert_eq!(passed.passed().unwrap().tables, names);
        assert!(decision(ACCEPTED).passed().unwrap().tables.is_empty());
    }

    #[test]
    fn no_function_is_guessed() {
        // No symbols: nobody would have seen the function.
        let hook = Decision {
            hook: 1,
            following: [2, 0],
            ..decision(4)
        };
        assert_eq!(
            said(&hook, Some("nf_hook_slow")),
            "[netfilter, hook unknown: its function was not seen]"
        );
    }
}
