//! The events of a recording of `netprobe skb`: what `netprobe report` shows. No kernel is asked for anything.

use anyhow::{Result, bail};

use crate::run::Flow;
use crate::run::output::Output;
use crate::text::escape::printable;
use crate::text::json;

use super::decode;
use super::event::Event;
use super::members::Members;
use super::news::News;
use super::present::Presenter;
use super::record::{Head, layout};
use super::style::Style;

/// Shows the events of one recording.
pub struct Recorded {
    presenter: Presenter,
    pub style: Style,
    snap_len: usize,
    /// the last [`News::Dumps`], which is of the event at hand
    pub dumps: Option<Vec<u8>>,
    /// news that make no sense, or are more than a machine has
    odd: u64,
    /// entries of tables that grow
    entries: usize,
}

/// Entries of all tables that a recording may fill.
const ENTRIES: usize = 4_000_000;

impl Recorded {
    /// `style`: how to show them, which may differ from how the live run did.
    pub fn new(head: &Head, style: Style) -> Result<Self> {
        if head.tool != "skb" {
            bail!(
                "it is a recording of netprobe {}, which this netprobe does not know",
                printable(&head.tool)
            );
        }
        if head.layout != layout(head.style.shown) {
            bail!(
                "its events are of netprobe {}, and this is {}: their layout differs",
                printable(&head.netprobe),
                env!("CARGO_PKG_VERSION")
            );
        }
        let [skb, xdp] = head.members.clone().map(Members::recorded);
        Ok(Self {
            presenter: Presenter::recorded(&style, [skb?, xdp?]),
            style,
            snap_len: head.style.snap_len as usize,
            dumps: None,
            odd: 0,
            entries: 0,
        })
    }

    /// Decodes an event into one that is used again; `None`: it cannot be decoded.
    pub fn decode(&self, event: &mut Event, bytes: &[u8]) -> Option<()> {
        decode::decode(event, bytes, self.snap_len)
    }

    /// Takes in news.
    pub fn learn(&mut self, bytes: &[u8]) {
        let Ok(news) = json::read::<News>(bytes) else {
            self.odd += 1;
            return;
        };
        self.entries += news.entries();
        if self.entries > ENTRIES {
            self.odd += 1;
            return;
        }
        if matches!(news, News::Dumps(..)) {
            self.dumps = Some(bytes.to_vec());
        }
        self.presenter.learn(news);
    }

    /// The line above the others.
    pub fn header(&self, out: &mut Output) -> Result<()> {
        self.presenter.header(out)
    }

    /// The line of an event.
    pub fn line(&mut self, out: &mut Output, event: &Event, late: bool) -> Result<Flow> {
        self.presenter.event(out, event, late)
    }

    /// See [`Presenter::hides`].
    pub fn hides(&mut self, event: &Event) -> Result<bool> {
        self.presenter.hides(event)
    }

    /// Tells how many events were hidden.
    pub fn tell_hidden(&mut self) {
        self.presenter.hidden.tell();
    }

    /// The event in words.
    pub fn comment(&mut self, event: &Event) -> Result<String> {
        self.presenter.prepare(event)?;
        Ok(self.presenter.comment(event))
    }

    /// ns since 1970 of a time stamp.
    pub fn wall(&self, ts: u64) -> u64 {
        self.presenter.wall(ts)
    }

    /// The event's function, or the place of its drop.
    pub fn function(&mut self, event: &Event) -> String {
        if self.presenter.prepare(event).is_err() {
            return "?".to_owned();
        }
        let view = &self.presenter.view;
        match event.dropped {
            true => view.place_name(event).to_owned(),
            false => view.name(event.func).to_owned(),
        }
    }

    /// The first of these functions that the run had probed.
    pub fn first_probed(&self, functions: &[&str]) -> Option<usize> {
        let names = &self.presenter.view.names;
        let probed = |f: &&str| names.values().any(|name| name == f);
        functions.iter().position(probed)
    }

    /// Why the packet is freed, if it is dropped.
    pub fn reason(&mut self, event: &Event) -> Option<String> {
        self.presenter.view.reason(event)
    }

    /// The name of a namespace.
    pub fn netns_name(&mut self, inode: u32) -> Option<&str> {
        self.presenter.view.netns.find(inode)
    }

    /// How many of the recording's news were left out.
    pub fn odd(&self) -> u64 {
        self.odd
    }
}
