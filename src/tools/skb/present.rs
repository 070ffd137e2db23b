//! The lines of `netprobe skb`: text columns and JSON.

use std::collections::HashSet;
use std::io::Write;

use anyhow::Result;

use crate::explain::Rules;
use crate::kernel::btf::Btf;
use crate::kernel::clock::WallClock;
use crate::kernel::containers::ContainerNames;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::functions::ByAddress;
use crate::kernel::process::SocketHolders;
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::{TextCache, pad, push_time_of_day};
use crate::text::format::{self, push_hex};

use super::args::Args;
use super::columns::packet::packet_name;
use super::columns::{self, Column};
use super::dump::Dump;
use super::event::{
    Event, SECTION_CALLER, SECTION_DROP, SECTION_NFT, SECTION_OWNER, SECTION_SHINFO, SECTION_SKB,
};
use super::json::{self, When};
use super::json_tails::Tails;
use super::meanings::{Hidden, Meanings, Words};
use super::members::Members;
use super::netfilter::Hooks;
use super::netns_names::NetnsNames;
use super::since::LastSeen;
use super::style::{Style, Timestamp};
use super::traced_program::{Kind, TracedProgram};
use super::view::{View, number};

/// What stands behind the name of a function is a part of its place, too, in the comments of a capture file.
const OF_PLACE: u32 = SECTION_CALLER | SECTION_NFT | SECTION_DROP;

/// Turns events into lines. Columns grow to what they have held, so that lines below each other line up.
pub struct Presenter {
    /// those that events may have
    columns: Vec<&'static Column>,
    /// those that show something, in the order in which they do: in front of the function's name, behind it, below the line
    before: Vec<&'static Column>,
    behind: Vec<&'static Column>,
    below: Vec<&'static Column>,
    /// sections that something must be looked up for, or that have lines below
    prepared: u32,
    timestamp: Timestamp,
    pub(super) clock: WallClock,
    drops: bool,
    pub(super) view: View,
    last_seen: LastSeen,
    process_width: usize,
    last_process: TextCache<([u8; 16], u32), usize>,
    tails: Tails,
    /// --all
    all: bool,
    pub(super) hidden: Hidden,
}

impl Presenter {
    pub fn new(
        args: &Args,
        names: ByAddress<String>,
        reasons: DropReasons,
        members: [Members; 2],
    ) -> Result<Self> {
        let dump = |section: u32, name| match args.asks(section) {
            true => Dump::new(&Btf::vmlinux(args.types.kernel_btf.as_deref())?, name),
            false => Ok(Dump::default()),
        };
        let style = args.style();
        let view = View {
            names,
            reasons,
            skb: dump(SECTION_SKB, "sk_buff")?,
            shared_info: dump(SECTION_SHINFO, "skb_shared_info")?,
            netns: match args.output_netns_names || args.recorded {
                true => NetnsNames::look(style.netns_names),
                false => NetnsNames::default(),
            },
            members,
            holders: args.asks(SECTION_OWNER).then(SocketHolders::look),
            containers: Some(ContainerNames::default()),
            ..View::default()
        };
        Ok(Self::with(&style, view, WallClock::new()?))
    }

    /// With what is known already.
    pub fn with(style: &Style, view: View, clock: WallClock) -> Self {
        let shown = style.shown;
        let of = |which: fn(&Column) -> bool| -> Vec<&'static Column> {
            let all = columns::ALL.iter();
            all.filter(|c| shown & c.section != 0 && which(c)).collect()
        };
        let mut behind = of(|c| c.behind.is_some());
        behind.sort_by_key(|c| c.behind.map(|(rank, _)| rank));
        let view = View {
            tcp_flags: style.tcp_flags,
            ..view
        };
        let mut presenter = Self {
            columns: of(|_| true),
            before: of(|c| c.before.is_some()),
            behind,
            below: of(|c| c.below.is_some()),
            prepared: columns::sections(|c| c.prepare.is_some() || c.below.is_some()),
            timestamp: style.timestamp,
            clock,
            drops: style.drops,
            view,
            last_seen: LastSeen::default(),
            process_width: 16,
            last_process: TextCache::default(),
            tails: Tails::default(),
            all: style.all,
            hidden: Hidden::default(),
        };
        for column in &presenter.before {
            let titles = column.before.iter().flat_map(|before| before.titles);
            let widths = &mut presenter.view.widths[column.bit()];
            for (width, (_, least)) in widths.iter_mut().zip(titles) {
                *width = *least;
            }
        }
        presenter
    }

    /// ns since 1970 of a time stamp.
    pub fn wall(&self, ts: u64) -> u64 {
        self.clock.wall(ts)
    }

    /// To be called now and then.
    pub fn tick(&mut self) -> Result<()> {
        self.clock.refresh()
    }

    /// Entries of these functions of netfilter's hooks are seen.
    pub fn hooks(&mut self, hooks: &HashSet<String>) {
        self.view.hooks = Hooks::new(hooks.clone());
    }

    /// What drops mean.
    pub fn rules(&mut self, rules: Rules) {
        self.view.meanings = Meanings::new(rules);
    }

    /// The event is a normal free, which is counted and not shown.
    pub fn hides(&mut self, event: &Event) -> Result<bool> {
        if self.all || event.drop.is_none() {
            return Ok(false);
        }
        self.prepare(event)?;
        let Some(words) = self.view.meaning(event).filter(|words| words.is_expected()) else {
            return Ok(false);
        };
        self.hidden.add(&words.what);
        Ok(true)
    }

    /// From now on events of these programs may come.
    pub fn programs(&mut self, programs: Vec<TracedProgram>) {
        for program in programs {
            let (id, name) = (program.id.into(), program.name.clone());
            self.view.names.insert(id, name);
            self.view.programs.insert(id, program);
        }
    }

    /// The header line of the text form.
    pub fn header(&self, out: &mut Output) -> Result<()> {
        if out.json() {
            return Ok(());
        }
        let time = match self.timestamp {
            Timestamp::None => "",
            Timestamp::Absolute => "TIME            ",
            Timestamp::Relative => "TIME(us)    ",
            Timestamp::Current => "TIME(s)          ",
        };
        let process = format!("{:<w$}", "PROCESS", w = self.process_width);
        let mut line = format!("{:<18} {:<3} {process} {time}", "SKB", "CPU");
        for column in &self.before {
            let titles = column.before.iter().flat_map(|before| before.titles);
            for (title, width) in titles {
                line += &format!("{title:<width$} ");
            }
        }
        let caller = self.behind.iter().any(|c| c.section == SECTION_CALLER);
        line += match (self.drops, caller) {
            (true, _) => "REASON AT",
            (false, true) => "FUNC CALLER",
            (false, false) => "FUNC",
        };
        out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        out.flush()
    }

    /// Looks up what lines of the event show.
    pub fn prepare(&mut self, event: &Event) -> Result<()> {
        if event.sections & self.prepared != 0 {
            for column in &self.columns {
                if let (true, Some(prepare)) =
                    (event.sections & column.section != 0, column.prepare)
                {
                    prepare(&mut self.view, event)?;
                }
            }
        }
        self.view.find_name(event)
    }

    /// One event.
    pub fn event(&mut self, out: &mut Output, event: &Event, late: bool) -> Result<Flow> {
        self.prepare(event)?;
        let since = self.since_last(event);
        if out.json() {
            return self.json(out, event, late, since);
        }
        out.event(|line| self.text(line, event, late, since))
    }

    fn json(
        &mut self,
        out: &mut Output,
        event: &Event,
        late: bool,
        since: Option<u64>,
    ) -> Result<Flow> {
        let wall = self.clock.wall(event.head.ts);
        let when = When { wall, since, late };
        // A namespace may get its name later.
        let known = self.tails.of(event).filter(|_| !self.view.netns.wanted());
        if let Some(tail) = known {
            let name = self.view.name(event.func);
            return out.event(|line| tail.push(line, event, when, name));
        }
        out.json_made(|line| {
            let start = line.len();
            json::push(line, &mut self.view, event, when, &self.columns)?;
            self.tails.learn(event, &line[start..]);
            Ok(())
        })
    }

    /// See [`LastSeen::since`].
    fn since_last(&mut self, event: &Event) -> Option<u64> {
        if self.timestamp != Timestamp::Relative {
            return None;
        }
        let program = self.view.programs.get(&event.func);
        let xdp = program.map(|p| p.kind) == Some(Kind::Xdp);
        Some(self.last_seen.since(event, xdp))
    }

    fn text(&mut self, line: &mut Vec<u8>, event: &Event, late: bool, since: Option<u64>) {
        let start = line.len();
        line.extend_from_slice(b"0x");
        push_hex(line, event.skb, 1);
        format::pad(line, start, 18);
        number(line, event.head.cpu.into(), 3);
        let (head, width) = (&event.head, &mut self.process_width);
        let key = (head.comm, head.tgid);
        (self.last_process).push(line, event.like, key, width, |line, width| {
            let start = line.len();
            head.push_process(line);
            pad(line, start, width);
        });
        self.time(line, event.head.ts, since);
        for column in &self.before {
            match &column.before {
                Some(before) if event.sections & column.section != 0 => {
                    (before.text)(&mut self.view, event, line);
                }
                Some(before) => {
                    let widths = self.view.widths[column.bit()].iter();
                    let blank: usize = widths.take(before.titles.len()).map(|w| w + 1).sum();
                    line.resize(line.len() + blank, b' ');
                }
                None => {}
            }
        }
        self.place(line, event, u32::MAX);
        if late {
            line.extend_from_slice(b" [late]");
        }
        if event.sections & self.prepared != 0 {
            for column in &self.below {
                if let (true, Some(text)) = (event.sections & column.section != 0, column.below) {
                    text(&mut self.view, event, line);
                }
            }
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

    /// The function with its drop reason, or the reason and the place of a drop; and what the columns of these sections put behind it.
    fn place(&mut self, line: &mut Vec<u8>, event: &Event, sections: u32) {
        self.function(line, event);
        let sections = event.sections & sections;
        for column in &self.behind {
            if let (true, Some((_, text))) = (sections & column.section != 0, column.behind) {
                text(&mut self.view, event, line);
            }
        }
    }

    fn function(&mut self, line: &mut Vec<u8>, event: &Event) {
        let view = &mut self.view;
        let reason = view.reason(event);
        if event.dropped {
            if let Some(reason) = reason {
                line.extend_from_slice(DropReasons::shortened(&reason).as_bytes());
                line.push(b' ');
            }
            view.push_address(line, view.drop_place(event));
            if let Some(Words { class, what, .. }) = view.meaning(event) {
                let _ = write!(line, " ({class}: {what})");
            }
            return;
        }
        line.extend_from_slice(view.name(event.func).as_bytes());
        if let Some(reason) = reason {
            let _ = write!(line, "({reason})");
        }
        if let Some(value) = event.retval {
            let _ = write!(line, " = {value}");
        }
        if let Some(program) = view.program(event) {
            let _ = write!(line, "[{}:{}]", program.kind, program.id);
            if let Some(verdict) = program.verdict {
                let _ = write!(line, " = {verdict}");
            }
        }
    }

    /// An event in words, for the comment of its packet in a capture file: `FUNC(REASON) skb 0x… cpu 1 curl:123 …`.
    pub fn comment(&mut self, event: &Event) -> String {
        let mut line = Vec::new();
        self.place(&mut line, event, OF_PLACE);
        let _ = write!(line, " skb {:#x} cpu {} ", event.skb, event.head.cpu);
        event.head.push_process(&mut line);
        if let Some(packet) = event.packet {
            let _ = write!(line, " packet {}", packet_name(packet));
        }
        if let Some(Some(owner)) = &event.owner {
            if let Some((pid, comm)) = self.view.process(owner) {
                let _ = write!(line, " owner {comm}:{pid}");
            }
        }
        if let Some(m) = &event.meta {
            let _ = write!(line, " netns {} mark {:#x}", m.netns, m.mark);
        }
        String::from_utf8(line).unwrap_or_default()
    }
}
