//! Which functions `netprobe skb` attaches to, by which program, and how.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, anyhow, bail};
use crossbeam_channel::Receiver;
use libbpf_rs::ProgramAttachType;
use libbpf_rs::skel::OpenSkel;
use nix::sys::signal::Signal;
use regex::Regex;

use crate::bpf::skb::{OpenSkbSkel, SkbSkel};
use crate::kernel::attach;
use crate::kernel::btf::{self, Btf};
use crate::kernel::btf_functions::Function;
use crate::kernel::features::Features;
use crate::kernel::functions::{self, TraceableSet};
use crate::run::heartbeat;
use crate::run::progress::Progress;
use crate::tools::who::{self, WhoWants};
use crate::usage::usage;

use super::args::{Args, Backend};
use super::attached::{Attached, Prog, Target, program};
use super::helpers;
use super::hooks::{self, Hook};
use super::trigger::Kinds;

/// Programs that no plan knows: attached by [`Plan::attach`] itself, or not at all.
const DROPS: Prog = "skb_dropped";
/// Attached to the return of functions.
const RETURN: Prog = "skb_return";
/// For functions without an skb.
const NEAR: Prog = "skb_near";

/// The program that shows hits of a function.
fn program_of(f: &Function) -> Prog {
    // Others that take a reason (skb_release_data) do so for every skb, a dropped one or not.
    let drops = f.name.contains("kfree_skb") || f.name.contains("drop");
    match (f.arg, f.reason_arg) {
        (1, Some(2)) if drops => "skb_drop_1",
        (2, Some(3)) if drops => "skb_drop_2",
        (1, _) => "skb_1",
        (2, _) if f.sock_first => "skb_sk_2",
        (2, _) => "skb_2",
        (3, _) => "skb_3",
        (4, _) => "skb_4",
        _ => "skb_5",
    }
}

/// What a run needs beside the functions that it shows.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wants {
    pub track: bool,
    /// where the lives of sk_buffs end
    pub lives: bool,
    pub owner: bool,
    /// the tracepoint of drops in place of functions
    pub drops: bool,
    /// with drops and tracking: no function is shown in which a packet could match
    pub begins: bool,
    /// handshakes that listening sockets lose
    pub listens: bool,
    /// the sockets that packets are on their way to
    pub receivers: bool,
    /// who refuses packets, where drops have no reasons
    pub refusals: bool,
    /// what functions return
    pub returns: bool,
    /// XDP programs
    pub xdp: bool,
    /// the nft rules that drop
    pub nft: bool,
    /// the ICMP errors that this kernel sends
    pub icmp: bool,
    /// routes that processes look for in vain
    pub routes: bool,
    /// whose packets they are
    pub who: WhoWants,
    /// what processes change in the network
    pub changes: bool,
    /// what may trigger the flight recorder
    pub triggers: Kinds,
}

/// What is to be attached.
#[derive(Debug)]
pub struct Plan {
    backend: Backend,
    targets: BTreeMap<Prog, Vec<Target>>,
    /// functions attached to for tracking and owners, without events
    hooks: BTreeMap<Prog, Vec<Target>>,
    /// functions whose return is shown
    returns: BTreeMap<Prog, Vec<Target>>,
    /// programs that are loaded, and attached by others
    loaded: Vec<Prog>,
    drops: bool,
    triggers: Kinds,
    who: WhoWants,
    /// functions to a link of kprobe.multi; 0: all
    batch: usize,
    count: usize,
    /// functions with an skb that the kernel does not let one trace
    untraceable: usize,
}

impl Plan {
    /// The stacks of functions lack their callers (src/bpf/skb/skb_event.bpf.h).
    pub fn stack_lacks_caller(&self) -> bool {
        cfg!(target_arch = "aarch64") && self.backend == Backend::Kprobe
    }

    /// Functions that take an skb, from BTF, that `pattern` matches, and that the kernel lets one trace.
    pub fn make(
        btf: &Btf,
        features: &Features,
        args: &Args,
        pattern: Option<&Regex>,
        wants: Wants,
    ) -> Result<Self> {
        let backend = choose(features, args.backend)?;
        if args.filter_kprobe_batch > 0 && backend == Backend::Kprobe {
            return Err(usage(
                "--filter-kprobe-batch: only kprobe-multi attaches many functions at a time",
            ));
        }
        if wants.returns && !features.func_ip {
            bail!(
                "--output-retval needs kernel 5.15 (bpf_get_func_ip); this is {}",
                features.release
            );
        }
        let mut functions = btf.functions_taking("sk_buff", &modules(args)?)?;
        let all = functions.len();
        if let Some(pattern) = pattern {
            functions.retain(|f| pattern.is_match(&f.name));
        }
        if functions.is_empty() {
            return Err(usage(format!(
                "--filter-func {}: none of the {all} functions with an skb has such a name (the whole name must match: try .*NAME.*)",
                args.filter_func.as_deref().unwrap_or_default()
            )));
        }
        let mut plan = Self::empty(backend, wants);
        plan.batch = args.filter_kprobe_batch;
        plan.loaded = helpers::programs(args);
        plan.take(&functions, &args.filter_non_skb_funcs, btf, wants)?;
        if plan.count == 0 {
            bail!(
                "none of the {} functions asked for can be traced on this kernel (they are inlined, or marked notrace)",
                functions.len()
            );
        }
        Ok(plan)
    }

    /// Functions by name, of which a kernel has some only, and what `wants` says.
    pub fn of_names(
        btf: &Btf,
        features: &Features,
        backend: Option<Backend>,
        is_wanted: impl Fn(&str) -> bool,
        wants: Wants,
    ) -> Result<Self> {
        let mut functions = btf.functions_taking("sk_buff", &btf::modules())?;
        functions.retain(|f| is_wanted(&f.name));
        let mut plan = Self::empty(choose(features, backend)?, wants);
        plan.take(&functions, &[], btf, wants)?;
        Ok(plan)
    }

    /// `functions` are shown, and those without an skb that are `near` one; with what `wants` needs.
    fn take(
        &mut self,
        functions: &[Function],
        near: &[String],
        btf: &Btf,
        wants: Wants,
    ) -> Result<()> {
        let hooks = self.hooks_wanted(wants);
        let netfilter = netfilter_hooks(btf, wants)?;
        let names: HashSet<&str> = functions
            .iter()
            .map(|f| f.name.as_str())
            .chain(hooks.iter().map(|(_, f)| *f))
            .chain(netfilter.iter().map(String::as_str))
            .chain(near.iter().map(String::as_str))
            .collect();
        let traceable = self.traceable(btf, &names);
        for name in near {
            self.add_near(name, &traceable)?;
        }
        for f in functions {
            self.add(f, &traceable, wants);
        }
        self.add_hooks(&hooks, &traceable);
        self.add_netfilter(&netfilter, &traceable);
        self.add_ends();
        Ok(())
    }

    /// The tracepoint of drops alone, with what `wants` says beside it.
    pub fn drops(
        btf: &Btf,
        features: &Features,
        backend: Option<Backend>,
        wants: Wants,
    ) -> Result<Self> {
        let mut plan = Self::empty(choose(features, backend)?, wants);
        let hooks = plan.hooks_wanted(wants);
        if !hooks.is_empty() {
            let netfilter = netfilter_hooks(btf, wants)?;
            let names = hooks.iter().map(|(_, f)| *f);
            let names = names.chain(netfilter.iter().map(String::as_str)).collect();
            let traceable = plan.traceable(btf, &names);
            plan.add_hooks(&hooks, &traceable);
            plan.add_netfilter(&netfilter, &traceable);
            plan.add_ends();
        }
        Ok(plan)
    }

    fn empty(backend: Backend, wants: Wants) -> Self {
        Self {
            backend,
            targets: BTreeMap::new(),
            hooks: BTreeMap::new(),
            returns: BTreeMap::new(),
            loaded: Vec::new(),
            drops: wants.drops,
            triggers: wants.triggers,
            who: wants.who,
            batch: 0,
            count: 0,
            untraceable: 0,
        }
    }

    fn hooks_wanted(&self, wants: Wants) -> Vec<Hook> {
        let track = (wants.track || wants.lives).then_some(&hooks::TRACK[..]);
        let owner = wants.owner.then_some(&hooks::OWNER[..]);
        let xdp = (wants.xdp && wants.track).then_some(&hooks::XDP[..]);
        let nft = wants.nft.then_some(&hooks::NETFILTER[..]);
        let listens = wants.listens.then_some(&hooks::LISTEN[..]);
        let begins =
            (wants.drops && wants.track && wants.begins).then_some(&hooks::DROP_BEGINS[..]);
        let time_wait = wants.listens.then_some(&hooks::TIME_WAIT[..]);
        let receivers = wants.receivers.then_some(&hooks::RECEIVERS[..]);
        let refusals = wants.refusals.then_some(&hooks::REFUSALS[..]);
        let routes = wants.routes.then_some(&hooks::ROUTES[..]);
        let icmp = wants.icmp.then_some(&hooks::ICMP[..]);
        let who = wants.who.any.then_some(&hooks::WHO[..]);
        let users = wants.who.processes.then_some(&hooks::WHO_PROCESSES[..]);
        let changes = wants.changes.then_some(&hooks::CHANGES[..]);
        let rules = match wants.nft {
            true => &hooks::CHANGES_NFT[..],
            false => &hooks::CHANGES_NFT_SOME[..],
        };
        let rules = wants.changes.then_some(rules);
        let rst = wants.triggers.rst.then_some(&hooks::TRIGGER_RST[..]);
        let connect = (wants.triggers.connect).then_some(&hooks::TRIGGER_CONNECT[..]);
        let tables = [
            track, owner, xdp, nft, listens, begins, time_wait, receivers, refusals, icmp, routes,
            who, users, changes, rules, rst, connect,
        ]
        .into_iter()
        .flatten();
        let all = tables.flatten().copied();
        all.filter(|hook| wants.track || hooks::is_of_life(hook))
            .collect()
    }

    /// Of these functions, those that can be traced. A single kprobe goes to a name, and the kernel's list without addresses does.
    fn traceable(&self, btf: &Btf, names: &HashSet<&str>) -> TraceableSet {
        match self.backend {
            Backend::KprobeMulti => TraceableSet::load(btf, names),
            Backend::Kprobe => TraceableSet::printed(names),
        }
    }

    /// A function without an skb.
    fn add_near(&mut self, name: &str, traceable: &TraceableSet) -> Result<()> {
        match traceable.everywhere(name) {
            [] => Err(usage(format!(
                "--filter-non-skb-funcs {name}: the kernel has no such function that can be traced"
            ))),
            [place] => {
                self.count += 1;
                self.targets.entry(NEAR).or_default().push(Target {
                    name: name.to_string(),
                    addr: place.addr,
                });
                Ok(())
            }
            places => Err(usage(format!(
                "--filter-non-skb-funcs {name}: the kernel has {} functions of this name",
                places.len()
            ))),
        }
    }

    fn add_hooks(&mut self, hooks: &[Hook], traceable: &TraceableSet) {
        for (prog, name) in hooks {
            let done = hooks::shown(prog)
                .and_then(|shown| self.targets.get(shown))
                .is_some_and(|targets| targets.iter().any(|t| t.name == *name));
            // Several of one name, or in a module: none of these is.
            if let ([place], false) = (traceable.everywhere(name), done) {
                self.hooks.entry(prog).or_default().push(Target {
                    name: (*name).to_string(),
                    addr: place.addr,
                });
            }
        }
    }

    /// The functions of netfilter's hooks, and the ends of the expressions that are watched.
    fn add_netfilter(&mut self, names: &[String], traceable: &TraceableSet) {
        for name in names {
            let places = traceable.everywhere(name).iter();
            // By its name alone one of several cannot be meant.
            let targets = places.map(|place| Target {
                name: name.clone(),
                addr: place.addr,
            });
            let targets: Vec<Target> = targets.collect();
            if targets.len() == 1 || targets.iter().all(|t| t.addr != 0) {
                let hooks = self.hooks.entry(hooks::NETFILTER_HOOK).or_default();
                hooks.extend(targets);
            }
        }
    }

    /// The programs at the returns of hooks.
    fn add_ends(&mut self) {
        if let Some(found) = self.hooks.remove(hooks::FOUND) {
            self.returns.insert(hooks::FOUND, found);
        }
        for (begin, end) in hooks::ENDS {
            if let Some(targets) = self.hooks.get(begin) {
                let ends = self.returns.entry(end).or_default();
                ends.extend(targets.iter().cloned());
            }
        }
    }

    fn add(&mut self, f: &Function, traceable: &TraceableSet, wants: Wants) {
        let places = traceable.get(&f.name, f.module.as_deref());
        let by_addr = places.iter().all(|p| p.addr != 0);
        let found: Vec<Target> = places
            .iter()
            .map(|p| Target {
                name: f.name.clone(),
                addr: p.addr,
            })
            .collect();
        // A name that several functions share cannot be attached to by name; by address it can, many at once.
        // The kernel proper comes first: its function is the one that a name stands for which a module has too.
        let by_name =
            found.len() == 1 && (f.module.is_none() || traceable.everywhere(&f.name).len() == 1);
        let usable = match self.backend {
            Backend::KprobeMulti if by_addr => found,
            _ if by_name => found,
            _ => Vec::new(),
        };
        if usable.is_empty() {
            self.untraceable += 1;
        }
        self.count += usable.len();
        if !usable.is_empty() {
            let mut prog = program_of(f);
            if (wants.track || wants.lives) && prog == "skb_1" {
                let hook = hooks::TRACK.iter().find(|(_, name)| *name == f.name);
                prog = hook.and_then(|(p, _)| hooks::shown(p)).unwrap_or(prog);
            }
            if wants.returns && f.returns_number {
                self.count += usable.len();
                let returns = self.returns.entry(RETURN).or_default();
                returns.extend(usable.iter().cloned());
            }
            self.targets.entry(prog).or_default().extend(usable);
        }
    }

    /// Programs at tracepoints.
    fn tracepoints(&self) -> impl Iterator<Item = (Prog, &'static str)> {
        let drops = self.drops.then_some((DROPS, "kfree_skb"));
        let forks = self.who.forks.then_some(&who::FORKS[..]);
        drops
            .into_iter()
            .chain(forks.into_iter().flatten().copied())
            .chain(self.triggers.tracepoints())
    }

    /// Addresses of the functions by which the older iptables is in hooks of netfilter; 0: it is not there.
    pub fn legacy_tables(&self) -> [u64; 3] {
        const NAMES: [&str; 3] = ["ipt_do_table", "ip6t_do_table", "arpt_do_table"];
        let hooks = self.hooks.get(hooks::NETFILTER_HOOK);
        let there: Vec<&Target> = hooks
            .into_iter()
            .flatten()
            .filter(|t| NAMES.contains(&t.name.as_str()))
            .collect();
        let mut addrs =
            NAMES.map(|name| there.iter().find(|t| t.name == name).map_or(0, |t| t.addr));
        if there.iter().any(|t| t.addr == 0) {
            let wanted = |name: &str| there.iter().any(|t| t.name == name);
            functions::addresses(wanted, |addr, found| {
                let mut all = NAMES.iter().zip(&mut addrs);
                if let Some((_, to)) = all.find(|(name, _)| **name == found) {
                    *to = addr;
                }
            });
        }
        addrs
    }

    /// Tells the open object which programs to load, and for which kind of probe.
    pub fn prepare(&self, open: &mut OpenSkbSkel<'_>) {
        for mut p in open.open_object_mut().progs_mut() {
            let name = p.name().to_string_lossy().into_owned();
            let used = self.targets.contains_key(name.as_str())
                || self.hooks.contains_key(name.as_str())
                || self.returns.contains_key(name.as_str())
                || self.loaded.contains(&name.as_str())
                || self.tracepoints().any(|(prog, _)| prog == name)
                || name == heartbeat::PROGRAM;
            p.set_autoload(used);
            let is_probe = p.section().to_string_lossy().starts_with("kprobe");
            if self.backend == Backend::KprobeMulti && is_probe {
                p.set_attach_type(ProgramAttachType::KprobeMulti);
            }
        }
    }

    /// Attaches everything. A function that the kernel refuses is left out and counted.
    pub fn attach(&self, skel: &SkbSkel<'_>, stop: &Receiver<Signal>) -> Result<Attached> {
        let mut attached = Attached::new(self.backend, self.drops, self.batch);
        let hooks = self.hooks.values().map(Vec::len).sum::<usize>();
        if self.backend == Backend::Kprobe {
            attach::make_room(self.count + hooks)?;
        }
        let mut progress = Progress::new("netprobe: attaching", self.count + hooks);
        // Hooks first: a packet must not be seen before its end can be.
        for (prog, targets) in &self.hooks {
            attached.of_netfilter = *prog == hooks::NETFILTER_HOOK;
            attached.group(skel, prog, targets, &mut progress, stop)?;
        }
        attached.of_netfilter = false;
        if self.triggers.rst && !self.hooks.contains_key("flight_answers") {
            eprintln!(
                "netprobe: --trigger rst: this kernel lets one trace neither tcp_v4_send_reset nor tcp_v6_send_reset: only resets that \
                 sockets send and receive trigger"
            );
        }
        attached.at_return = true;
        for (prog, targets) in &self.returns {
            attached.group(skel, prog, targets, &mut progress, stop)?;
        }
        attached.at_return = false;
        // Only functions that are shown count as traced.
        (attached.functions, attached.refused) = (0, self.untraceable);
        for (prog, targets) in &self.targets {
            attached.group(skel, prog, targets, &mut progress, stop)?;
        }
        if attached.names().is_empty() {
            // A list without addresses (kernels before 6.5): one pass over kallsyms.
            let wanted: HashSet<&str> = self
                .targets
                .values()
                .flatten()
                .map(|t| t.name.as_str())
                .collect();
            functions::addresses(|n| wanted.contains(n), |addr, n| attached.name_at(addr, n));
        }
        for (prog, tracepoint) in self.tracepoints() {
            let program = program(skel, prog)?;
            let link = program
                .attach_raw_tracepoint(tracepoint)
                .with_context(|| format!("failed to attach to the tracepoint {tracepoint}"))?;
            attached.add(&program, link);
        }
        if !self.drops && attached.functions == 0 {
            bail!(
                "the kernel refused a probe on each of the {} functions ({})",
                self.count,
                attached.refusal.as_deref().unwrap_or_default()
            );
        }
        Ok(attached)
    }
}

/// Modules whose functions are traced too.
fn modules(args: &Args) -> Result<Vec<String>> {
    let loaded = btf::modules();
    match &args.kmods {
        Some(wanted) => {
            if let Some(missing) = wanted.iter().find(|w| !loaded.contains(w)) {
                let why = if loaded.is_empty() {
                    "this kernel has no BTF of modules (it needs 5.11)".to_string()
                } else {
                    format!(
                        "it is not loaded, or has no BTF (there are: {})",
                        loaded.join(", ")
                    )
                };
                return Err(usage(format!("--kmods {missing}: {why}")));
            }
            Ok(wanted.clone())
        }
        None if args.all_kmods && loaded.is_empty() => Err(anyhow!(
            "--all-kmods: this kernel has no BTF of modules (it needs 5.11), or no module is loaded"
        )),
        None => Ok(loaded),
    }
}

/// The functions that netfilter's hooks may have, where they are to be watched.
fn netfilter_hooks(btf: &Btf, wants: Wants) -> Result<Vec<String>> {
    if !wants.nft {
        return Ok(Vec::new());
    }
    btf.functions_like_hooks(&btf::modules())
}

/// The backend asked for, or the better one that the kernel has.
fn choose(features: &Features, backend: Option<Backend>) -> Result<Backend> {
    match backend {
        Some(Backend::KprobeMulti) if !features.kprobe_multi => bail!(
            "kernel {} has no kprobe.multi (it needs 5.18 with CONFIG_FPROBE=y): use --backend kprobe",
            features.release
        ),
        Some(b) => Ok(b),
        None if features.kprobe_multi => Ok(Backend::KprobeMulti),
        None => Ok(Backend::Kprobe),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By its name alone a function is the kernel proper's, where that has one of this name.
    #[test]
    fn a_name_that_the_kernel_and_a_module_share() {
        let list = "0f rcv\n1f rcv [m]\n2f of_m [m]\n3f twice\n4f twice\n";
        let traceable = TraceableSet::parse(list, true, &|_| true);
        let count = |backend, name: &str, module: Option<&str>| {
            let mut plan = Plan::empty(backend, Wants::default());
            let function = Function {
                name: name.to_string(),
                module: module.map(str::to_string),
                arg: 1,
                reason_arg: None,
                returns_number: false,
                sock_first: false,
            };
            plan.add(&function, &traceable, Wants::default());
            (plan.count, plan.untraceable)
        };
        assert_eq!(count(Backend::Kprobe, "rcv", None), (1, 0));
        assert_eq!(count(Backend::Kprobe, "rcv", Some("m")), (0, 1));
        assert_eq!(count(Backend::Kprobe, "of_m", Some("m")), (1, 0));
        assert_eq!(count(Backend::Kprobe, "twice", None), (0, 1));
        assert_eq!(count(Backend::KprobeMulti, "rcv", Some("m")), (1, 0));
        assert_eq!(count(Backend::KprobeMulti, "twice", None), (2, 0));
    }
}
