//! The kernel side of `netprobe drops`: loaded, attached, and its counts read.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result};
use libbpf_rs::skel::{OpenSkel, Skel};
use libbpf_rs::{Link, MapCore, MapFlags, OpenObject};

use crate::bpf::drops::types::{
    drop_count, drop_example, drop_key, drop_rule, drop_slot, drop_slots,
};
use crate::bpf::drops::{DropsSkel, DropsSkelBuilder};
use crate::bpf::{bytes_of, read};
use crate::filter::{Filters, set_filter};
use crate::kernel::bpf_object;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::features::Features;
use crate::kernel::frees::{self, only_frees};
use crate::kernel::functions::{self, Span};
use crate::run::object;
use crate::tools::skb::hooks::{ENDS, Hook, WHO, WHO_PROCESSES};
use crate::tools::who::{self, FORKS, Who, WhoWants};

use super::args::Args;
use super::device;
use super::nft::Rules;

/// A row as the kernel counts it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    pub packets: u64,
    pub bytes: u64,
}

/// A row as it was taken out of the kernel.
#[derive(Debug, Clone)]
pub struct Taken {
    pub key: drop_key,
    pub count: Count,
    /// its first packet
    pub example: Option<drop_example>,
    /// the nft rule that dropped it, or the devlink trap
    pub rule: Option<drop_rule>,
}

/// The functions whose addresses [`Programs::begin`] asks for. `nft`: those of nf_tables, too.
pub fn spans(btf: &Btf, nft: bool) -> Vec<Span> {
    let of_nft = || Rules::functions().filter(move |_| nft);
    let wanted = |name: &str| only_frees(name) || of_nft().any(|function| function == name);
    functions::spans(btf, frees::heads().chain(of_nft()), wanted)
}

/// The programs and what is attached; dropping it detaches.
pub struct Programs<'a> {
    pub skel: DropsSkel<'a>,
    links: Vec<Link>,
    /// the one that the programs write to
    book: Cell<u32>,
}

impl<'a> Programs<'a> {
    /// Loads and attaches. Without kprobes, full listening sockets are not seen: stderr says so.
    pub fn begin(
        args: &Args,
        features: &Features,
        (filters, who): (&Filters, &Who),
        (core, nft, spans): (&CoreBtf, Option<u32>, &[Span]),
        storage: &'a mut MaybeUninit<OpenObject>,
    ) -> Result<Self> {
        let mut open = object::open(DropsSkelBuilder::default(), Some(core.path()), storage)?;
        let rodata = open
            .maps
            .rodata_data
            .as_mut()
            .context("the BPF object has no .rodata")?;
        rodata.use_cast = u8::from(features.rdonly_cast);
        rodata.has_reasons = u8::from(features.drop_reasons);
        rodata.has_rx_sock = u8::from(features.drop_sock);
        rodata.has_qdisc_drop = u8::from(features.qdisc_drop);
        rodata.by = args.by();
        rodata.np_translations = u8::from(filters.translations);
        let rules = nft.map(|_| Rules::new(spans, features));
        rodata.frees_start.fill(u64::MAX);
        let frees = spans.iter().filter(|span| only_frees(&span.name));
        for (i, span) in frees.take(rodata.frees_start.len()).enumerate() {
            rodata.frees_start[i] = span.start;
            rodata.frees_end[i] = span.end;
        }
        set_filter!(rodata, filters.on(features.skb_fields));
        rodata.who_on = who.on;
        rodata.who_uid = who.uid;
        rodata.who_cgroup = who.cgroup;
        rodata.who_comm = who.comm;
        Rules::prepare(&mut open, rules.as_ref(), nft.unwrap_or(0))?;
        device::prepare(&mut open, features)?;
        open.progs.drops_qdisc.set_autoload(features.qdisc_drop);
        let no_kprobe = features.why_no_kprobe();
        if no_kprobe.is_some() {
            open.progs.drops_listen.set_autoload(false);
            open.progs.drops_time_wait.set_autoload(false);
        }
        let hooks = hooks(who.wants(), features);
        for mut program in open.open_object_mut().progs_mut() {
            let name = program.name().to_string_lossy().into_owned();
            if name.starts_with("who_") {
                program.set_autoload(hooks.iter().any(|(p, _)| *p == name));
            }
        }
        who::prepare!(who, &mut open.maps, 0)?;
        filters.prepare(open.open_object_mut(), features)?;
        let skel = object::load(open)?;
        // Sockets first: a drop must not be seen before its socket can be known.
        let mut links = attach(&skel, &hooks)?;
        if let Some(rules) = &rules {
            links.extend(rules.attach(&skel)?);
        }
        if features.qdisc_drop {
            let said = skel.progs.drops_qdisc.attach_raw_tracepoint("qdisc_drop");
            links.push(said.context("failed to attach to the tracepoint qdisc:qdisc_drop")?);
        }
        links.extend(device::attach(&skel, features)?);
        let freed = skel
            .progs
            .drops_freed
            .attach_raw_tracepoint("kfree_skb")
            .context("failed to attach to the tracepoint skb:kfree_skb")?;
        links.push(freed);
        let kprobes = [
            (
                &skel.progs.drops_listen,
                "tcp_conn_request",
                "full queues of listening sockets are not seen",
            ),
            (
                &skel.progs.drops_time_wait,
                "tcp_timewait_state_process",
                "segments for connections in TIME-WAIT count as lost",
            ),
        ];
        for (program, function, without) in kprobes {
            if let Some(why) = &no_kprobe {
                eprintln!("netprobe: {without}: {why}");
                continue;
            }
            match program.attach_kprobe(false, function) {
                Ok(link) => links.push(link),
                Err(e) => eprintln!("netprobe: {without}: {:#}", anyhow::Error::new(e)),
            }
        }
        Ok(Self {
            skel,
            links,
            book: Cell::new(0),
        })
    }

    /// Takes the rows since the last call, over all CPUs, with their examples: `example` says whether there is time for one more.
    pub fn take(&self, mut example: impl FnMut() -> bool) -> Result<Vec<Taken>> {
        let full = self.turn()?;
        let maps = &self.skel.maps;
        let (rows, examples): (&dyn MapCore, &dyn MapCore) = match full {
            0 => (&maps.rows_a, &maps.examples_a),
            _ => (&maps.rows_b, &maps.examples_b),
        };
        let keys: Vec<Vec<u8>> = rows.keys().collect();
        let mut taken = Vec::with_capacity(keys.len());
        for bytes in &keys {
            let Some((key, _)) = read::<drop_key>(bytes) else {
                continue;
            };
            let per_cpu = rows
                .lookup_percpu(bytes, MapFlags::ANY)
                .context("failed to read the counts")?;
            taken.push(Taken {
                key,
                count: sum(per_cpu.unwrap_or_default()),
                example: None,
                rule: self.rule(&key),
            });
            rows.delete(bytes).context("failed to take a row out")?;
        }
        self.take_slots(full, &mut taken)?;
        // The largest rows first: time may not be enough for all examples.
        taken.sort_by_key(|row| std::cmp::Reverse(row.count.packets));
        for row in &mut taken {
            let key = bytes_of(&row.key);
            if example() {
                let found = examples.lookup(key, MapFlags::ANY).ok().flatten();
                row.example = found.and_then(|bytes| Some(read(&bytes)?.0));
            }
            // A row has none where the map of examples was full.
            let _ = examples.delete(key);
        }
        Ok(taken)
    }

    /// Adds what each CPU counted beside the book, and clears it.
    fn take_slots(&self, full: u32, taken: &mut [Taken]) -> Result<()> {
        const SLOTS: u32 = drop_slots::DROP_SLOTS.0;
        let slots = &self.skel.maps.slots;
        for at in full * SLOTS..(full + 1) * SLOTS {
            let at = at.to_ne_bytes();
            let per_cpu = slots
                .lookup_percpu(&at, MapFlags::ANY)
                .context("failed to read the counts")?
                .unwrap_or_default();
            let used = per_cpu
                .iter()
                .filter_map(|bytes| Some(read::<drop_slot>(bytes)?.0));
            let used: Vec<drop_slot> = used.filter(|slot| slot.taken != 0).collect();
            if used.is_empty() {
                continue;
            }
            for slot in used {
                let key = bytes_of(&slot.key);
                let mut rows = taken.iter_mut();
                // A slot's row is in the book since its first packet.
                if let Some(row) = rows.find(|row| bytes_of(&row.key) == key) {
                    row.count.packets += slot.count.packets;
                    row.count.bytes += slot.count.bytes;
                }
            }
            let empty: Vec<Vec<u8>> = per_cpu.iter().map(|bytes| vec![0; bytes.len()]).collect();
            slots
                .update_percpu(&at, &empty, MapFlags::ANY)
                .context("failed to clear the counts")?;
        }
        Ok(())
    }

    /// The nft rule or the devlink trap that dropped the packets of a row.
    fn rule(&self, key: &drop_key) -> Option<drop_rule> {
        if key.decider == 0 || key.qdisc_reason != 0 || device::is_queue(key.reason) {
            return None;
        }
        let rules = &self.skel.maps.rules_seen;
        let found = rules.lookup(&key.decider.to_ne_bytes(), MapFlags::ANY);
        Some(read(&found.ok().flatten()?)?.0)
    }

    /// Lets drops go into the other book; gives the one that nobody writes to any more.
    fn turn(&self) -> Result<u32> {
        let full = self.book.get();
        self.book.set(1 - full);
        let book = &self.skel.maps.data_book;
        book.update(
            &0u32.to_ne_bytes(),
            &self.book.get().to_ne_bytes(),
            MapFlags::ANY,
        )
        .context("failed to turn to the other book")?;
        let inner = self.skel.maps.nothing.as_fd().as_raw_fd();
        let barrier = &self.skel.maps.barrier;
        barrier
            .update(&0u32.to_ne_bytes(), &inner.to_ne_bytes(), MapFlags::ANY)
            .context("failed to wait for the programs")?;
        Ok(full)
    }

    /// Drops that found no room for a row of their own.
    pub fn overflow(&self) -> Result<Count> {
        let per_cpu = self
            .skel
            .maps
            .overflow
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
            .context("failed to read the counts")?;
        Ok(sum(per_cpu.unwrap_or_default()))
    }

    /// Drops that the kernel skipped, since a program of ours ran on the same CPU already.
    pub fn missed(&self) -> u64 {
        let of_programs = bpf_object::missed(self.skel.progs.drops_freed.as_fd().as_raw_fd());
        let of_links = self
            .links
            .iter()
            .map(|l| bpf_object::missed_by_link(l.as_fd().as_raw_fd()));
        of_programs + of_links.sum::<u64>()
    }
}

fn sum(per_cpu: Vec<Vec<u8>>) -> Count {
    let mut sum = Count::default();
    for bytes in per_cpu {
        if let Some((count, _)) = read::<drop_count>(&bytes) {
            sum.packets += count.packets;
            sum.bytes += count.bytes;
        }
    }
    sum
}

/// Programs of src/bpf/common/who.bpf.h, and what they are attached to. Without kprobes, what a socket gets during the run is not seen: stderr says
/// so.
fn hooks(wants: WhoWants, features: &Features) -> Vec<Hook> {
    let mut hooks = Vec::new();
    let no_kprobe = features.why_no_kprobe().filter(|_| wants.any);
    if let Some(why) = no_kprobe {
        eprintln!(
            "netprobe: packets to sockets that are made during the run are not known before they reach them: {why}"
        );
    } else if wants.any {
        hooks.extend(WHO);
        if wants.processes {
            hooks.extend(WHO_PROCESSES);
        }
        let ends = ENDS
            .iter()
            .filter(|(begin, _)| WHO.iter().any(|(p, _)| p == begin));
        let ends = ends.flat_map(|(begin, end)| {
            let of = WHO.iter().filter(move |(p, _)| p == begin);
            of.map(move |(_, function)| (*end, *function))
        });
        hooks.extend(ends);
    }
    if wants.forks {
        hooks.extend(FORKS);
    }
    hooks
}

/// Attaches the programs of whose packets. A function that a kernel lacks is passed over.
fn attach(skel: &DropsSkel<'_>, hooks: &[Hook]) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    for (name, to) in hooks {
        let mut programs = skel.object().progs_mut();
        let program = programs.find(|p| p.name() == *name);
        let program = program.with_context(|| format!("the BPF object has no program {name}"))?;
        if FORKS.contains(&(name, to)) {
            let link = program.attach_raw_tracepoint(to);
            links.push(link.with_context(|| format!("failed to attach to the tracepoint {to}"))?);
        } else if let Ok(link) = program.attach_kprobe(ENDS.iter().any(|(_, end)| end == name), to)
        {
            links.push(link);
        }
    }
    Ok(links)
}
