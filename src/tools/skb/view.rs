//! What lines say of events beyond what these carry: names, symbols, reasons, programs, holders of sockets; and the columns' widths. It
//! knows no column.

use std::collections::HashMap;
use std::io::Write;

use anyhow::Result;
use serde::Serialize;

use crate::event::tuple::Tuple;
use crate::kernel::containers::ContainerNames;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::functions::ByAddress;
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::kernel::process::SocketHolders;
use crate::text::columns::TextCache;
use crate::text::escape::{escaped, push_escaped};
use crate::text::format::{self, Hex, push_dec};

use super::drops::Drop;
use super::dump::Dump;
use super::event::{Event, Meta, Owner};
use super::meanings::{Meanings, Words};
use super::members::Members;
use super::netfilter::{Hooks, Who};
use super::netns_names::NetnsNames;
use super::told::Containers;
use super::traced_program::{Kind, ProgramRow, TracedProgram};

/// The widths of a section's columns, as they have grown.
pub type Widths = [usize; 6];

/// Paths, and what was there; `None` behind a NULL pointer.
type MemberValues<'a> = Vec<(&'a str, Option<i128>)>;

#[derive(Default)]
pub struct View {
    pub names: ByAddress<String>,
    pub hooks: Hooks,
    /// tc and XDP programs by the id that stands in their events for an address
    pub programs: HashMap<u64, TracedProgram>,
    pub reasons: DropReasons,
    pub tcp_flags: bool,
    pub skb: Dump,
    pub shared_info: Dump,
    pub netns: NetnsNames,
    /// of sk_buffs, of XDP packets
    pub members: [Members; 2],
    pub holders: Option<SocketHolders>,
    /// `None`: out of a recording, the containers here are not asked
    pub containers: Option<ContainerNames>,
    pub told: Containers,
    pub meanings: Meanings,
    pub symbols: KernelSymbols,
    /// by the section's bit
    pub widths: [Widths; 32],
    /// What the last events had: those of a CPU are mostly of one packet, which differs in little from function to function.
    pub last_meta: TextCache<Meta, Widths>,
    pub last_tuple: TextCache<Option<Tuple>, usize>,
}

/// An address of code.
#[derive(Serialize)]
pub struct Frame<'a> {
    pub addr: Hex,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub symbol: Option<&'a Symbol>,
}

impl View {
    /// The width of a section's only column.
    pub fn width(&mut self, section: u32) -> &mut usize {
        &mut self.widths[section.trailing_zeros() as usize][0]
    }

    pub fn name(&self, func: u64) -> &str {
        self.names.get(&func).map_or("?", String::as_str)
    }

    /// Asks for all that any line of the event may need, shown now or not.
    pub fn ask(&mut self, event: &Event) {
        self.reason(event);
        if let Some(meta) = &event.meta {
            self.netns.find(meta.netns);
        }
        if let Some(Some(owner)) = &event.owner {
            let pid = self.process(owner).map_or(0, |(pid, _)| pid);
            self.container(owner, pid);
        }
        self.who(event);
        self.meaning(event);
    }

    /// Looks up the name of the event's function or the place of its drop.
    pub fn find_name(&mut self, event: &Event) -> Result<()> {
        if event.dropped {
            return self.symbols.resolve(&[event.func]);
        }
        if self.names.contains_key(&event.func) {
            return Ok(());
        }
        self.symbols.resolve(&[event.func])?;
        let name = match self.symbols.get(event.func) {
            Some(s) => s.name.clone(),
            None => format!("{:#x}", event.func),
        };
        self.names.insert(event.func, name);
        Ok(())
    }

    /// The members that were read, and whether they are of an XDP packet.
    pub fn members(&self, event: &Event) -> Option<(MemberValues<'_>, bool)> {
        let read = *event.members.as_deref()?;
        let program = self.programs.get(&event.func);
        let xdp = event.program.is_some() && program.is_some_and(|p| p.kind == Kind::Xdp);
        let values = self.members[usize::from(xdp)].values(read);
        Some((values.collect(), xdp))
    }

    /// Who in netfilter dropped the packet.
    pub fn who(&self, event: &Event) -> Option<Who> {
        let place = event
            .dropped
            .then(|| self.symbols.get(self.drop_place(event)));
        let place = place.map(|symbol| symbol.map_or("?", |s| &s.name));
        (event.nft.as_ref()?).who(place, &self.symbols, &self.hooks)
    }

    pub fn reason_number(&self, event: &Event) -> Option<u32> {
        let of_qdisc = event.drop.as_ref().and_then(|drop| {
            let at = self.symbols.get(event.func);
            drop.qdisc(at.map_or("?", |symbol| &symbol.name))
        });
        of_qdisc.or(event.reason)
    }

    /// Why a packet is freed: in the kernel's words, or in ours where it has none.
    pub fn reason(&mut self, event: &Event) -> Option<String> {
        let reason = self.reason_number(event).filter(|_| self.reasons.any());
        let name = reason.map(|reason| self.reasons.name(reason));
        let drop = event.drop.as_ref();
        let own = drop.and_then(|d| d.reason(name.as_deref(), self.place_name(event)));
        own.map(str::to_owned).or(name)
    }

    /// Where a packet was dropped: not in a function that frees for others.
    pub fn drop_place(&self, event: &Event) -> u64 {
        let place = |d: &Drop| d.place(event.func, &self.symbols);
        event.drop.as_deref().map_or(event.func, place)
    }

    pub fn place_name(&self, event: &Event) -> &str {
        let symbol = self.symbols.get(self.drop_place(event));
        symbol.map_or("?", |s| &s.name)
    }

    /// What a drop means; `None`: the event is none.
    pub fn meaning(&mut self, event: &Event) -> Option<&Words> {
        let facts = event.drop.as_ref()?.facts();
        let reason = self.reason(event).unwrap_or_default();
        let reason = DropReasons::shortened(&reason).to_owned();
        let place = self.place_name(event).to_owned();
        Some(self.meanings.of((reason, place, facts)))
    }

    /// The program of an event that is not of a function.
    pub fn program(&self, event: &Event) -> Option<ProgramRow> {
        let point = event.program?;
        let program = self.programs.get(&event.func)?;
        Some(ProgramRow::new(program, point))
    }

    /// Who owns a socket: as the trace saw it, else who holds it open; the name is escaped.
    pub fn process(&mut self, owner: &Owner) -> Option<(u32, String)> {
        if owner.pid != 0 {
            return Some((owner.pid, escaped(&owner.comm)));
        }
        let holder = self.holders.as_mut()?.of(owner.inode)?;
        Some((holder.pid, escaped(holder.comm.as_bytes())))
    }

    /// The container of a socket's process.
    pub fn container(&mut self, owner: &Owner, pid: u32) -> Option<String> {
        let Some(names) = &mut self.containers else {
            return self.told.of(owner.cgroup, pid);
        };
        let name = names.of(owner.cgroup, pid);
        self.told.note(owner.cgroup, pid, name.as_ref());
        name
    }

    pub fn frame(&self, addr: u64) -> Frame<'_> {
        Frame {
            addr: Hex(addr),
            symbol: self.symbols.get(addr),
        }
    }

    /// `name+0x1f [module]`
    pub fn push_address(&self, line: &mut Vec<u8>, addr: u64) {
        let Some(s) = self.symbols.get(addr) else {
            let _ = write!(line, "{addr:#018x}");
            return;
        };
        push_escaped(line, s.name.as_bytes());
        let _ = write!(line, "+{:#x}", s.offset);
        if let Some(module) = &s.module {
            let _ = write!(line, " [{}]", escaped(module.as_bytes()));
        }
    }
}

/// A number in a column of `width`.
pub fn number(line: &mut Vec<u8>, value: u64, width: usize) {
    let start = line.len();
    push_dec(line, value);
    format::pad(line, start, width);
}
