//! The lines of `netprobe skb`: text columns and JSON.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::Write;

use anyhow::Result;

use crate::event::tuple::Tuple;
use crate::kernel::clock::WallClock;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::functions::ByAddress;
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::kernel::process::SocketHolders;
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::{Again, pad, push_time_of_day};
use crate::text::escape::{escaped, push_escaped};
use crate::text::format::{self, Hex, push_dec, push_hex};

use super::args::{Args, Timestamp};
use super::decode::{Event, Meta, Owner};
use super::drops::Drop;
use super::extras::{Extras, Shown, cb_words};
use super::json::{Frame, MapRow, OwnerRow, ProgramRow, Row, packet_name};
use super::json_again::{Tails, When};
use super::members::Members;
use super::netfilter::Who;
use super::programs::{Kind, Program};
use super::since::LastSeen;

/// Turns events into lines. Columns grow to what they have held, so that lines below each other line up.
pub struct Presenter {
    meta: bool,
    tuple: bool,
    timestamp: Timestamp,
    clock: WallClock,
    names: ByAddress<String>,
    /// functions of netfilter's hooks whose entries are seen
    hooks: HashSet<String>,
    /// tc and XDP programs by the id that stands in their events for an address
    programs: HashMap<u64, Program>,
    reasons: DropReasons,
    drops: bool,
    track: bool,
    tcp_flags: bool,
    caller: bool,
    tunnel: bool,
    extras: Extras,
    /// of sk_buffs, of XDP packets
    members: [Members; 2],
    holders: Option<SocketHolders>,
    symbols: KernelSymbols,
    last_seen: LastSeen,
    widths: Widths,
    last: Last,
    tails: Tails,
}

/// What the last events had: those of a CPU are mostly of one packet, which differs in little from function to function.
#[derive(Default)]
struct Last {
    process: Again<([u8; 16], u32), usize>,
    meta: Again<Meta, Widths>,
    tuple: Again<Option<Tuple>, usize>,
}

/// Paths, and what was there; `None` behind a NULL pointer.
type MemberValues<'a> = Vec<(&'a str, Option<i128>)>;

/// Widths of the columns that grow.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Widths {
    process: usize,
    packet: usize,
    owner: usize,
    netns: usize,
    iface: usize,
    tuple: usize,
    tunnel: usize,
}

impl Presenter {
    pub fn new(
        args: &Args,
        names: ByAddress<String>,
        reasons: DropReasons,
        members: [Members; 2],
    ) -> Result<Self> {
        Ok(Self {
            meta: args.output_meta,
            tuple: args.output_tuple,
            timestamp: args.timestamp(),
            clock: WallClock::new()?,
            names,
            hooks: HashSet::new(),
            programs: HashMap::new(),
            reasons,
            drops: args.drops,
            track: args.track(),
            tcp_flags: args.output_tcp_flags,
            caller: args.output_caller,
            extras: Extras::new(args)?,
            members,
            tunnel: args.output_tunnel,
            holders: args.output_owner.then(SocketHolders::look),
            symbols: KernelSymbols::default(),
            last_seen: LastSeen::default(),
            widths: Widths {
                process: 16,
                packet: 6,
                owner: 16,
                netns: 10,
                iface: 10,
                tuple: 36,
                tunnel: 36,
            },
            last: Last::default(),
            tails: Tails::default(),
        })
    }

    /// To be called now and then.
    pub fn tick(&mut self) -> Result<()> {
        self.clock.refresh()
    }

    /// Entries of these functions of netfilter's hooks are seen.
    pub fn hooks(&mut self, hooks: &HashSet<String>) {
        self.hooks.clone_from(hooks);
    }

    /// From now on events of these programs may come.
    pub fn programs(&mut self, programs: Vec<Program>) {
        for program in programs {
            self.names.insert(program.id.into(), program.name.clone());
            self.programs.insert(program.id.into(), program);
        }
    }

    /// The header line of the text form.
    pub fn header(&self, out: &mut Output) -> Result<()> {
        if out.json() {
            return Ok(());
        }
        let w = self.widths;
        let time = match self.timestamp {
            Timestamp::None => "",
            Timestamp::Absolute => "TIME            ",
            Timestamp::Relative => "TIME(us)    ",
            Timestamp::Current => "TIME(s)          ",
        };
        let mut line = format!(
            "{:<18} {:<3} {:<pw$} {time}",
            "SKB",
            "CPU",
            "PROCESS",
            pw = w.process
        );
        if self.track {
            line += &format!("{:<kw$} ", "PACKET", kw = w.packet);
        }
        if self.holders.is_some() {
            line += &format!("{:<ow$} ", "OWNER", ow = w.owner);
        }
        if self.meta {
            line += &format!(
                "{:<10} {:<8} {:<iw$} {:<6} {:<5} {:<5} ",
                "NETNS",
                "MARK/x",
                "IFACE",
                "PROTO",
                "MTU",
                "LEN",
                iw = w.iface
            );
        }
        if self.tuple {
            line += &format!("{:<tw$} ", "TUPLE", tw = w.tuple);
        }
        if self.tunnel {
            line += &format!("{:<tw$} ", "INNER", tw = w.tunnel);
        }
        line += match (self.drops, self.caller) {
            (true, _) => "REASON AT",
            (false, true) => "FUNC CALLER",
            (false, false) => "FUNC",
        };
        out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        out.flush()
    }

    /// One event.
    pub fn event(&mut self, out: &mut Output, event: &Event, late: bool) -> Result<Flow> {
        if let Some(stack) = &event.stack {
            self.symbols.resolve(stack)?;
        }
        if let Some(caller) = event.caller {
            self.symbols.resolve(&[caller])?;
        }
        if let Some(nft) = &event.nft {
            self.symbols.resolve(&nft.addresses())?;
        }
        if let Some(drop) = &event.drop {
            self.symbols.resolve(&drop.addresses())?;
        }
        if event.dropped {
            self.symbols.resolve(&[event.func])?;
        } else if !self.names.contains_key(&event.func) {
            self.symbols.resolve(&[event.func])?;
            let name = match self.symbols.get(event.func) {
                Some(s) => s.name.clone(),
                None => format!("{:#x}", event.func),
            };
            self.names.insert(event.func, name);
        }
        let since = self.since_last(event);
        let shown = self.extras.show(event)?;
        if out.json() {
            return self.json(out, event, late, since, shown);
        }
        out.event(|line| self.text(line, event, late, since, &shown))
    }

    fn json(
        &mut self,
        out: &mut Output,
        event: &Event,
        late: bool,
        since: Option<u64>,
        shown: Shown,
    ) -> Result<Flow> {
        // A namespace may get its name later.
        let known = self.tails.of(event).filter(|_| !self.extras.names_netns());
        if let Some(tail) = known {
            let wall = self.clock.wall(event.head.ts);
            let when = When { wall, since, late };
            let name = self.name(event.func);
            return out.event(|line| tail.push(line, event, when, name));
        }
        let mut tails = std::mem::take(&mut self.tails);
        let row = self.row(event, late, since, shown);
        let flow = out.json_event_seen(&row, |line| tails.learn(event, line));
        self.tails = tails;
        flow
    }

    /// See [`LastSeen::since`].
    fn since_last(&mut self, event: &Event) -> Option<u64> {
        if self.timestamp != Timestamp::Relative {
            return None;
        }
        let xdp = self.programs.get(&event.func).map(|p| p.kind) == Some(Kind::Xdp);
        Some(self.last_seen.since(event, xdp))
    }

    fn text(
        &mut self,
        line: &mut Vec<u8>,
        event: &Event,
        late: bool,
        since: Option<u64>,
        shown: &Shown,
    ) {
        let start = line.len();
        line.extend_from_slice(b"0x");
        push_hex(line, event.skb, 1);
        format::pad(line, start, 18);
        number(line, event.head.cpu.into(), 3);
        let like = event.like();
        let (head, width) = (&event.head, &mut self.widths.process);
        self.last
            .process
            .push(line, like, (head.comm, head.tgid), width, |line, width| {
                let start = line.len();
                head.push_process(line);
                pad(line, start, width);
            });
        self.time(line, event.head.ts, since);
        if let Some(packet) = event.packet {
            let start = line.len();
            line.extend_from_slice(packet_name(packet).as_bytes());
            pad(line, start, &mut self.widths.packet);
        }
        if let Some(owner) = &event.owner {
            let start = line.len();
            match owner.as_ref().map(|o| self.process(o)) {
                None => line.push(b'-'),
                Some(None) => line.push(b'?'),
                Some(Some((pid, comm))) => {
                    let _ = write!(line, "{comm}:{pid}");
                }
            }
            pad(line, start, &mut self.widths.owner);
        }
        if self.holders.is_some() && event.owner.is_none() {
            line.resize(line.len() + self.widths.owner + 1, b' ');
        }
        if let (true, Some(m)) = (self.meta, &event.meta) {
            match self.extras.netns(m.netns) {
                Some(name) => push_meta(line, m, Some(name), &mut self.widths),
                None => {
                    let push = |line: &mut _, widths: &mut _| push_meta(line, m, None, widths);
                    (self.last.meta).push(line, like, m.clone(), &mut self.widths, push);
                }
            }
        }
        if self.meta && event.meta.is_none() {
            let blank = self.widths.netns + self.widths.iface + 8 + 6 + 5 + 5 + 6;
            line.resize(line.len() + blank, b' ');
        }
        if self.tuple && event.tuple.is_none() {
            line.resize(line.len() + self.widths.tuple + 1, b' ');
        }
        if let (true, Some(tuple)) = (self.tuple, &event.tuple) {
            let (flags, width) = (self.tcp_flags, &mut self.widths.tuple);
            (self.last.tuple).push(line, like, *tuple, width, |line, width| {
                let start = line.len();
                push_tuple(line, tuple.as_ref(), flags);
                pad(line, start, width);
            });
        }
        if self.tunnel && event.tunnel.is_none() {
            line.resize(line.len() + self.widths.tunnel + 1, b' ');
        }
        if let Some(inner) = &event.tunnel {
            let start = line.len();
            push_tuple(line, inner.as_ref(), self.tcp_flags);
            pad(line, start, &mut self.widths.tunnel);
        }
        self.place(line, event);
        self.push_members(line, event);
        if let Some(tag) = event.meta.as_ref().and_then(|meta| meta.vlan) {
            let _ = write!(line, " vlan={},p={}", tag & 0xfff, tag >> 13);
        }
        if late {
            line.extend_from_slice(b" [late]");
        }
        if let Some(map) = &event.map {
            let _ = write!(line, "\n    {}", MapRow::new(map));
        }
        if let Some(cb) = &event.cb {
            let _ = write!(line, "\n    cb: {}", cb_words(cb).join(" "));
        }
        for text in [&shown.skb, &shown.shared_info].into_iter().flatten() {
            line.extend_from_slice(b"\n    ");
            line.extend_from_slice(text.as_bytes());
        }
        for &addr in event.stack.iter().flatten() {
            line.extend_from_slice(b"\n    ");
            self.push_address(line, addr);
        }
    }

    /// The members that were read, and whether they are of an XDP packet.
    fn members(&self, event: &Event) -> Option<(MemberValues<'_>, bool)> {
        let read = event.members?;
        let program = self.programs.get(&event.func);
        let xdp = event.program.is_some() && program.is_some_and(|p| p.kind == Kind::Xdp);
        let values = self.members[usize::from(xdp)].values(read);
        Some((values.collect(), xdp))
    }

    fn push_members(&self, line: &mut Vec<u8>, event: &Event) {
        for (path, value) in self.members(event).iter().flat_map(|(values, _)| values) {
            let _ = match value {
                Some(number) => write!(line, " {path}={number}"),
                None => write!(line, " {path}=-"),
            };
        }
    }

    fn time(&self, line: &mut Vec<u8>, ts: u64, since: Option<u64>) {
        let _ = match self.timestamp {
            Timestamp::None => Ok(()),
            Timestamp::Current => {
                let text = format!("{}.{:09}", ts / 1_000_000_000, ts % 1_000_000_000);
                write!(line, "{text:<16} ")
            }
            Timestamp::Relative => {
                let ns = since.unwrap_or(0);
                let text = format!("{}.{:03}", ns / 1000, ns % 1000);
                write!(line, "{text:<11} ")
            }
            Timestamp::Absolute => {
                push_time_of_day(line, self.clock.wall(ts));
                line.push(b' ');
                Ok(())
            }
        };
    }

    fn name(&self, func: u64) -> &str {
        self.names.get(&func).map_or("?", String::as_str)
    }

    /// The function with its drop reason and its caller, or the reason and the place of a drop; the rule that dropped it.
    fn place(&mut self, line: &mut Vec<u8>, event: &Event) {
        self.function(line, event);
        if let Some(who) = self.who(event) {
            let _ = write!(line, " {who}");
        }
        if let Some(drop) = &event.drop {
            drop.push(line, self.place_name(event));
        }
    }

    /// Who in netfilter dropped the packet.
    fn who(&self, event: &Event) -> Option<Who> {
        let place = event
            .dropped
            .then(|| self.symbols.get(self.drop_place(event)));
        let place = place.map(|symbol| symbol.map_or("?", |s| &s.name));
        (event.nft.as_ref()?).who(place, &self.symbols, &self.hooks)
    }

    fn reason_number(&self, event: &Event) -> Option<u32> {
        let at = self.symbols.get(event.func).map_or("?", |s| &s.name);
        let own = event.drop.as_ref().and_then(|d| d.qdisc(at));
        own.or(event.reason)
    }

    /// Why a packet is freed: in the kernel's words, or in ours where it has none.
    fn reason(&mut self, event: &Event) -> Option<String> {
        let reason = self.reason_number(event).filter(|_| self.reasons.any());
        let name = reason.map(|reason| self.reasons.name(reason));
        let own = event.drop.as_ref().and_then(|d| d.reason(name.as_deref()));
        own.map(str::to_owned).or(name)
    }

    /// Where a packet was dropped: not in a function that frees for others.
    fn drop_place(&self, event: &Event) -> u64 {
        let place = |d: &Drop| d.place(event.func, &self.symbols);
        event.drop.as_ref().map_or(event.func, place)
    }

    fn place_name(&self, event: &Event) -> &str {
        let symbol = self.symbols.get(self.drop_place(event));
        symbol.map_or("?", |s| &s.name)
    }

    fn function(&mut self, line: &mut Vec<u8>, event: &Event) {
        if event.dropped {
            if let Some(reason) = self.reason(event) {
                line.extend_from_slice(DropReasons::shortened(&reason).as_bytes());
                line.push(b' ');
            }
            self.push_address(line, self.drop_place(event));
            return;
        }
        let reason = self.reason(event);
        line.extend_from_slice(self.name(event.func).as_bytes());
        if let Some(reason) = reason {
            let _ = write!(line, "({reason})");
        }
        if let Some(value) = event.retval {
            let _ = write!(line, " = {value}");
        }
        if let Some(program) = self.program(event) {
            let _ = write!(line, "[{}:{}]", program.kind, program.id);
            if let Some(verdict) = program.verdict {
                let _ = write!(line, " = {verdict}");
            }
        }
        if let Some(caller) = event.caller {
            line.push(b' ');
            self.push_address(line, caller);
        }
    }

    /// The program of an event that is not of a function.
    fn program(&self, event: &Event) -> Option<ProgramRow> {
        let point = event.program?;
        let program = self.programs.get(&event.func)?;
        Some(ProgramRow::new(program, point))
    }

    /// An event in words, for the comment of its packet in a capture file: `FUNC(REASON) skb 0x… cpu 1 curl:123 …`.
    pub fn comment(&mut self, event: &Event) -> String {
        let mut line = Vec::new();
        self.place(&mut line, event);
        let _ = write!(line, " skb {:#x} cpu {} ", event.skb, event.head.cpu);
        event.head.push_process(&mut line);
        if let Some(packet) = event.packet {
            let _ = write!(line, " packet {}", packet_name(packet));
        }
        if let Some(Some(owner)) = &event.owner {
            if let Some((pid, comm)) = self.process(owner) {
                let _ = write!(line, " owner {comm}:{pid}");
            }
        }
        if let Some(m) = &event.meta {
            let _ = write!(line, " netns {} mark {:#x}", m.netns, m.mark);
        }
        String::from_utf8(line).unwrap_or_default()
    }

    fn push_address(&self, line: &mut Vec<u8>, addr: u64) {
        match self.symbols.get(addr) {
            Some(s) => push_symbol(line, s),
            None => {
                let _ = write!(line, "{addr:#018x}");
            }
        }
    }

    /// Who owns a socket: as the trace saw it, else who holds it open; the name is escaped.
    fn process(&mut self, owner: &Owner) -> Option<(u32, String)> {
        if owner.pid != 0 {
            return Some((owner.pid, escaped(&owner.comm)));
        }
        let holder = self.holders.as_mut()?.of(owner.inode)?;
        Some((holder.pid, escaped(holder.comm.as_bytes())))
    }

    fn frame(&self, addr: u64) -> Frame<'_> {
        Frame {
            addr: Hex(addr),
            symbol: self.symbols.get(addr),
        }
    }

    fn row<'a>(
        &'a mut self,
        event: &'a Event,
        late: bool,
        since: Option<u64>,
        shown: Shown,
    ) -> Row<'a> {
        let reason = self.reason(event);
        let owner = event.owner.as_ref().map(|owner| {
            let owner = owner.as_ref()?;
            Some(OwnerRow::new(owner, self.process(owner)))
        });
        let netns = event.meta.as_ref().and_then(|m| self.extras.netns(m.netns));
        let netns = netns.map(|name| escaped(name.as_bytes()));
        let mut row = Row {
            netns_name: netns,
            sk_buff: shown.skb,
            shared_info: shown.shared_info,
            wall_ns: self.clock.wall(event.head.ts),
            since_ns: since,
            late,
            reason,
            subsystem: self
                .reason_number(event)
                .and_then(|r| self.reasons.subsystem(r)),
            owner,
            program: self.program(event),
            skb_metadata: None,
            xdp_metadata: None,
            ..Row::new(event)
        };
        if event.dropped {
            row.location = Some(self.frame(self.drop_place(event)));
        } else {
            row.func = Some(self.name(event.func));
        }
        match self.members(event) {
            Some((values, true)) => row.xdp_metadata = Some(values.into_iter().collect()),
            Some((values, false)) => row.skb_metadata = Some(values.into_iter().collect()),
            None => {}
        }
        if let Some(drop) = &event.drop {
            row.copy = drop.copies(self.place_name(event));
        }
        match self.who(event) {
            Some(Who::Nft(nft)) => row.nft = Some(nft),
            Some(Who::Legacy(legacy)) => row.iptables = Some(legacy),
            Some(Who::Hook(hook)) => row.netfilter = Some(Some(hook)),
            Some(Who::Unknown) => row.netfilter = Some(None),
            None => {}
        }
        row.caller = event.caller.map(|addr| self.frame(addr));
        let stack = event.stack.as_ref();
        row.stack = stack.map(|s| s.iter().map(|&addr| self.frame(addr)).collect());
        row
    }
}

/// The columns from NETNS to LEN; `name`: that of the namespace, where it is shown in place of its inode.
fn push_meta(line: &mut Vec<u8>, m: &Meta, name: Option<&str>, widths: &mut Widths) {
    let start = line.len();
    match name {
        Some(name) => push_escaped(line, name.as_bytes()),
        None => push_dec(line, m.netns.into()),
    }
    pad(line, start, &mut widths.netns);
    let start = line.len();
    push_hex(line, m.mark.into(), 1);
    format::pad(line, start, 8);
    let start = line.len();
    if m.ifindex != 0 {
        push_escaped(line, &m.ifname);
        line.push(b':');
        push_dec(line, m.ifindex.into());
    } else {
        line.push(b'-');
    }
    pad(line, start, &mut widths.iface);
    line.extend_from_slice(b"0x");
    push_hex(line, m.protocol.into(), 4);
    line.push(b' ');
    number(line, m.mtu.into(), 5);
    number(line, m.len.into(), 5);
}

fn push_tuple(line: &mut Vec<u8>, tuple: Option<&Tuple>, tcp_flags: bool) {
    let Some(t) = tuple else {
        line.push(b'-');
        return;
    };
    t.push(line);
    if tcp_flags && t.proto == 6 && !t.fragment {
        // Behind the protocol, within its bracket.
        line.pop();
        let _ = write!(line, ",{})", TcpFlags(t.tcp_flags));
    }
}

/// A number in a column of `width`.
fn number(line: &mut Vec<u8>, value: u64, width: usize) {
    let start = line.len();
    push_dec(line, value);
    format::pad(line, start, width);
}

/// `name+0x1f [module]`
fn push_symbol(line: &mut Vec<u8>, s: &Symbol) {
    push_escaped(line, s.name.as_bytes());
    let _ = write!(line, "+{:#x}", s.offset);
    if let Some(module) = &s.module {
        let _ = write!(line, " [{}]", escaped(module.as_bytes()));
    }
}

/// `SYN|ACK`
struct TcpFlags(u8);

impl fmt::Display for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // From bit 0 on, RFC 9293 section 3.1.
        const NAMES: [&str; 8] = ["FIN", "SYN", "RST", "PSH", "ACK", "URG", "ECE", "CWR"];
        let mut first = true;
        for (bit, name) in NAMES.iter().enumerate() {
            if self.0 & (1 << bit) != 0 {
                f.write_str(if first { "" } else { "|" })?;
                f.write_str(name)?;
                first = false;
            }
        }
        if first { f.write_str("-") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_by_name() {
        assert_eq!(TcpFlags(0x12).to_string(), "SYN|ACK");
        assert_eq!(TcpFlags(0).to_string(), "-");
        assert_eq!(TcpFlags(0xff).to_string().split('|').count(), 8);
    }
}
