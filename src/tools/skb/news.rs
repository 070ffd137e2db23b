//! What lines need beyond events, as a recording has it: every answer that the live run got, in front of the first event that needs it.
//! A recording begins with all that is known, and goes on with what becomes known.

use serde::{Deserialize, Serialize};

use crate::kernel::clock::WallClock;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::ksyms::{KernelSymbols, Symbol};
use crate::kernel::process::{Process, SocketHolders};
use crate::text::escape::{printable, printable_lines};

use super::event::{SECTION_SHINFO, SECTION_SKB};
use super::meanings;
use super::netfilter::Hooks;
use super::netns_names::NetnsNames;
use super::present::Presenter;
use super::style::Style;
use super::told::Answer;
use super::traced_program::TracedProgram;
use super::view::View;

/// Entries of one piece of news: larger tables come in several.
const PIECE: usize = 10_000;

/// One thing that has become known. In a file it may be anything.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum News {
    /// functions by address
    Functions(Vec<(u64, String)>),
    Symbols(Vec<(u64, Option<Symbol>)>),
    /// drop reasons, and subsystems that have reasons of their own
    Reasons(Vec<(u32, String)>, Vec<(u32, String)>),
    /// names of network namespaces: all of them
    Netns(Vec<(u32, String)>),
    /// who holds sockets, by inode
    Holders(Vec<(u64, Option<Process>)>),
    /// which containers sockets' processes are in: cgroup, process, name
    Containers(Vec<Answer>),
    /// what drops mean
    Meanings(Vec<meanings::Answer>),
    /// functions of netfilter's hooks that are seen; modules of netfilter were loaded since
    Hooks(Vec<String>, bool),
    /// tc and XDP programs
    Programs(Vec<TracedProgram>),
    /// wall clock minus monotonic clock, ns
    Clock(i64),
    /// the text of a struct sk_buff and of a struct skb_shared_info, of the events from here on
    Dumps(Option<String>, Option<String>),
}

impl News {
    /// Entries of tables that grow with it.
    pub fn entries(&self) -> usize {
        match self {
            News::Functions(list) => list.len(),
            News::Symbols(list) => list.len(),
            News::Holders(list) => list.len(),
            News::Containers(list) => list.len(),
            News::Meanings(list) => list.len(),
            News::Programs(list) => list.len(),
            _ => 0,
        }
    }
}

/// Tells what is new.
#[derive(Debug, Default)]
pub struct Teller {
    clock: i64,
    hooks: (Vec<String>, bool),
    dumps: (Option<String>, Option<String>),
    programs: usize,
    with_dumps: bool,
}

impl Teller {
    /// All that is known now. [`Teller::news`] has what becomes known from here on, and the answers that are given once more.
    pub fn all(&mut self, presenter: &mut Presenter, style: &Style) -> Vec<News> {
        self.with_dumps = style.shown & (SECTION_SKB | SECTION_SHINFO) != 0;
        self.clock = presenter.clock.offset();
        let view = &mut presenter.view;
        view.netns.news();
        if let Some(holders) = &mut view.holders {
            holders.tell_anew();
        }
        view.told.tell_anew();
        view.meanings.tell_anew();
        self.hooks = view.hooks.known();
        self.programs = view.programs.len();
        self.dumps = dumps(view);
        self.known(presenter)
    }

    /// All that is known now, every answer that was given among it: for events that came before.
    pub fn everything(&self, presenter: &mut Presenter) -> Vec<News> {
        let mut all = self.known(presenter);
        let view = &presenter.view;
        if let Some(holders) = &view.holders {
            all.extend(pieces(&holders.told(), News::Holders));
        }
        all.extend(pieces(&view.told.all(), News::Containers));
        all.extend(pieces(&view.meanings.all(), News::Meanings));
        all
    }

    /// What changes from event to event, as it is now: a chunk that begins with it can be shown without those before it.
    pub fn state(&self) -> Vec<News> {
        let mut state = vec![News::Clock(self.clock)];
        if self.with_dumps {
            state.push(News::Dumps(self.dumps.0.clone(), self.dumps.1.clone()));
        }
        state
    }

    fn known(&self, presenter: &mut Presenter) -> Vec<News> {
        let mut all = self.state();
        let view = &mut presenter.view;
        let functions = view
            .names
            .iter()
            .filter(|(id, _)| !view.programs.contains_key(id));
        let mut functions: Vec<_> = functions
            .map(|(addr, name)| (*addr, name.clone()))
            .collect();
        functions.sort_unstable();
        all.extend(pieces(&functions, News::Functions));
        all.extend(pieces(&view.symbols.all(), News::Symbols));
        all.push(reasons(view));
        all.push(News::Netns(view.netns.all()));
        all.push(News::Hooks(self.hooks.0.clone(), self.hooks.1));
        all.push(programs(view));
        all
    }

    /// What has become known since the last call, most often nothing.
    pub fn news(&mut self, presenter: &mut Presenter) -> Vec<News> {
        let mut news = Vec::new();
        let clock = presenter.clock.offset();
        if clock != self.clock {
            self.clock = clock;
            news.push(News::Clock(clock));
        }
        let view = &mut presenter.view;
        news.extend(pieces(&view.symbols.news(), News::Symbols));
        if view.reasons.news() {
            news.push(reasons(view));
        }
        if view.netns.news() {
            news.push(News::Netns(view.netns.all()));
        }
        if let Some(holders) = &mut view.holders {
            news.extend(pieces(&holders.news(), News::Holders));
        }
        news.extend(pieces(&view.told.news(), News::Containers));
        news.extend(pieces(&view.meanings.news(), News::Meanings));
        if view.hooks.has_more() != self.hooks.1 {
            self.hooks = view.hooks.known();
            news.push(News::Hooks(self.hooks.0.clone(), self.hooks.1));
        }
        if view.programs.len() != self.programs {
            self.programs = view.programs.len();
            news.push(programs(view));
        }
        if self.with_dumps {
            let dumps = dumps(view);
            if dumps != self.dumps {
                self.dumps = dumps;
                news.push(News::Dumps(self.dumps.0.clone(), self.dumps.1.clone()));
            }
        }
        news
    }
}

fn pieces<T: Clone>(all: &[T], make: fn(Vec<T>) -> News) -> Vec<News> {
    all.chunks(PIECE)
        .map(|piece| make(piece.to_vec()))
        .collect()
}

fn reasons(view: &View) -> News {
    let [names, subsystems] = view.reasons.all();
    News::Reasons(names, subsystems)
}

fn programs(view: &View) -> News {
    let mut programs: Vec<_> = view.programs.values().cloned().collect();
    programs.sort_unstable_by_key(|p| p.id);
    News::Programs(programs)
}

fn dumps(view: &View) -> (Option<String>, Option<String>) {
    (view.skb.shown.clone(), view.shared_info.shown.clone())
}

impl Presenter {
    /// One that asks no kernel and knows nothing yet.
    pub fn recorded(style: &Style, members: [super::members::Members; 2]) -> Self {
        let mut view = View {
            netns: NetnsNames::recorded(style.netns_names),
            members,
            holders: Some(SocketHolders::recorded()),
            symbols: KernelSymbols::recorded(),
            reasons: DropReasons::recorded(Vec::new(), Vec::new()),
            ..View::default()
        };
        view.skb.learn(None);
        view.shared_info.learn(None);
        Self::with(style, view, WallClock::recorded(0))
    }

    /// Takes in what a recording says. Names that lines show as they are lose what could reach a terminal.
    pub fn learn(&mut self, news: News) {
        let view = &mut self.view;
        match news {
            News::Functions(functions) => {
                let functions = functions.into_iter();
                let clean = functions.map(|(addr, name)| (addr, name_of(&name)));
                view.names.extend(clean);
            }
            News::Symbols(symbols) => {
                for (addr, symbol) in symbols {
                    let clean = symbol.map(|s| Symbol {
                        name: name_of(&s.name),
                        offset: s.offset,
                        module: s.module.map(|m| cut(&m).to_owned()),
                    });
                    view.symbols.learn(addr, clean);
                }
            }
            News::Reasons(names, subsystems) => {
                let clean = |list: Vec<(u32, String)>| {
                    let list = list.into_iter();
                    list.map(|(n, name)| (n, name_of(&name))).collect()
                };
                view.reasons = DropReasons::recorded(clean(names), clean(subsystems));
            }
            // Escaped where they are shown, as those of processes.
            News::Netns(names) => {
                let names = names.into_iter();
                view.netns.learn(
                    names
                        .map(|(inode, name)| (inode, cut(&name).to_owned()))
                        .collect(),
                );
            }
            News::Holders(list) => {
                for (inode, holder) in list {
                    let holder = holder.map(|p| Process {
                        comm: cut(&p.comm).to_owned(),
                        ..p
                    });
                    if let Some(holders) = &mut view.holders {
                        holders.learn(inode, holder);
                    }
                }
            }
            News::Containers(list) => {
                for (cgroup, pid, name) in list {
                    let name = name.map(|name| name_of(&name));
                    view.told.learn((cgroup, pid, name));
                }
            }
            News::Meanings(list) => {
                for ((reason, place, facts), words) in list {
                    let key = (name_of(&reason), name_of(&place), facts);
                    view.meanings.learn((key, words));
                }
            }
            News::Hooks(probed, more) => {
                view.hooks = Hooks::recorded(probed.into_iter().collect(), more);
            }
            News::Programs(programs) => {
                let clean = |p: TracedProgram| TracedProgram {
                    name: name_of(&p.name),
                    ..p
                };
                self.programs(programs.into_iter().map(clean).collect());
            }
            News::Clock(offset) => self.clock = WallClock::recorded(offset),
            News::Dumps(skb, shared_info) => {
                view.skb.learn(skb.map(|text| printable_lines(&text)));
                view.shared_info
                    .learn(shared_info.map(|text| printable_lines(&text)));
            }
        }
    }
}

/// Characters of a name that is longer than any.
const NAME: usize = 256;

/// A name as lines may show it.
fn name_of(text: &str) -> String {
    printable(cut(text))
}

fn cut(text: &str) -> &str {
    text.char_indices()
        .nth(NAME)
        .map_or(text, |(at, _)| &text[..at])
}
