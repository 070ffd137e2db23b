//! One page that stands for itself (`--format html`): what was lost first, then the packets' journeys, to be searched, looked at and
//! compared. The page's code is `page.html`; here it gets its data, so that nothing of a recording is ever code or markup.

use std::collections::HashMap;

use anyhow::Result;
use serde::Serialize;

use crate::kernel::frees::only_frees;
use crate::run::Flow;
use crate::run::loss::Loss;
use crate::run::output::Output;
use crate::text::escape::{escaped, printable};
use crate::text::json;
use crate::tools::skb::event::Event;
use crate::tools::skb::record::{Head, identity};
use crate::tools::skb::recorded::Recorded;

use super::show::Show;
use super::stats::is_loss;

/// The page in front of its data, and behind it.
const PAGE: &str = include_str!("page.html");
const DATA: &str = "<!-- data -->";
/// Journeys of a page, steps of a journey, texts of a page: more make no browser happier.
const JOURNEYS: u64 = 50_000;
const STEPS: usize = 250;
const TEXTS: usize = 200_000;

/// One event: ns since the journey's begin, function, place, CPU, process, reason (numbers of texts; -1: none).
type Step = (u64, usize, usize, u16, usize, i64);

/// One packet.
#[derive(Serialize)]
struct Journey {
    /// what the packet is
    packet: usize,
    /// ns since the first event of the page
    begin: u64,
    /// events that are not among `steps`
    more: u64,
    /// number of the last step that freed it with a drop reason; -1: none
    lost: i64,
    /// the last function in front of that which does more than to free; -1: none
    after: i64,
    /// the same in front of the step at hand
    #[serde(skip)]
    last: i64,
    steps: Vec<Step>,
}

/// A kind of loss: what, where (function, the one in front of it, place), who; how often.
#[derive(Serialize)]
struct LossRow {
    reason: usize,
    at: usize,
    after: i64,
    place: usize,
    process: usize,
    count: u64,
}

#[derive(Serialize)]
struct Rest<'a> {
    about: &'a [String],
    texts: &'a [String],
    losses: Vec<LossRow>,
    /// journeys that are not in the page
    left_out: u64,
}

/// Texts, each once.
#[derive(Default)]
struct Texts {
    numbers: HashMap<String, usize>,
    texts: Vec<String>,
}

impl Texts {
    fn number(&mut self, text: String) -> usize {
        if let Some(number) = self.numbers.get(&text) {
            return *number;
        }
        if self.texts.len() >= TEXTS {
            return 0;
        }
        self.texts.push(text.clone());
        self.numbers.insert(text, self.texts.len() - 1);
        self.texts.len() - 1
    }
}

pub struct Html {
    out: Output,
    texts: Texts,
    about: Vec<String>,
    /// the packet whose events come
    at: Option<(u64, u64, Journey)>,
    /// time of the first event
    zero: Option<u64>,
    journeys: u64,
    losses: HashMap<(usize, usize, i64, usize, usize), u64>,
}

impl Html {
    pub fn new(out: Output) -> Result<Self> {
        let mut html = Self {
            out,
            texts: Texts::default(),
            about: Vec::new(),
            at: None,
            zero: None,
            journeys: 0,
            losses: HashMap::new(),
        };
        html.texts.number("…".to_owned());
        let (before, _) = PAGE.split_once(DATA).unwrap_or((PAGE, ""));
        html.out.line(|b| b.extend_from_slice(before.as_bytes()))?;
        html.out.line(|b| {
            b.extend_from_slice(b"<script type=\"application/json\" id=\"journeys\">[");
        })?;
        Ok(html)
    }

    fn end_journey(&mut self) -> Result<()> {
        let Some((_, _, journey)) = self.at.take() else {
            return Ok(());
        };
        self.journeys += 1;
        if let Ok(step) = usize::try_from(journey.lost) {
            if let Some((_, at, place, _, process, reason)) = journey.steps.get(step) {
                let reason = usize::try_from(*reason).unwrap_or(0);
                let kind = (reason, *at, journey.after, *place, *process);
                *self.losses.entry(kind).or_default() += 1;
            }
        }
        if self.journeys > JOURNEYS {
            return Ok(());
        }
        let first = self.journeys == 1;
        push(&mut self.out, if first { "" } else { "," }, &journey)
    }

    fn add(&mut self, step: Step, lost: bool, frees: bool) {
        let Some((_, _, journey)) = &mut self.at else {
            return;
        };
        if journey.steps.len() >= STEPS {
            // The last ones matter: that is where it ended.
            journey.steps.remove(STEPS / 2);
            journey.more += 1;
            if journey.lost > (STEPS / 2) as i64 {
                journey.lost -= 1;
            }
        }
        journey.steps.push(step);
        if lost {
            journey.lost = journey.steps.len() as i64 - 1;
            journey.after = journey.last;
        }
        if !frees {
            journey.last = step.1 as i64;
        }
    }
}

/// Appends a value as JSON within a script element: no `<` in it ends the element.
fn push(out: &mut Output, before: &str, value: &impl Serialize) -> Result<()> {
    let mut text = Vec::new();
    json::push(&mut text, value)?;
    out.line(|b| {
        b.extend_from_slice(before.as_bytes());
        for byte in text {
            match byte {
                b'<' => b.extend_from_slice(b"\\u003c"),
                byte => b.push(byte),
            }
        }
    })
}

impl Show for Html {
    fn begin(&mut self, _: &Recorded, head: &Head) -> Result<()> {
        self.about.push(printable(&format!(
            "recorded by netprobe {} on Linux {} {}: {}",
            head.netprobe,
            head.kernel,
            head.machine,
            head.command.join(" ")
        )));
        Ok(())
    }

    fn event(&mut self, of: &mut Recorded, event: &Event, _: bool) -> Result<Flow> {
        let ts = event.head.ts;
        let packet = identity(event);
        let same = |(of, ..): &(u64, u64, Journey)| packet == Some(*of);
        if !self.at.as_ref().is_some_and(same) {
            self.end_journey()?;
            let tuple = event.tuple.flatten();
            let what = tuple.map_or_else(|| "packet".to_owned(), |t| t.to_string());
            let zero = *self.zero.get_or_insert(ts);
            let journey = Journey {
                packet: self.texts.number(what),
                begin: ts.saturating_sub(zero),
                more: 0,
                lost: -1,
                after: -1,
                last: -1,
                steps: Vec::new(),
            };
            self.at = Some((packet.unwrap_or(u64::MAX), ts, journey));
        }
        let begin = self.at.as_ref().map_or(ts, |(_, begin, _)| *begin);
        let function = of.function(event);
        let frees = !event.dropped && only_frees(&function);
        let reason = of.reason(event);
        let lost = is_loss(event, reason.as_deref());
        let netns = event.meta.as_ref().map_or(0, |m| m.netns);
        let name = of.netns_name(netns).map(|n| escaped(n.as_bytes()));
        let device = match &event.meta {
            Some(m) if m.ifindex != 0 => escaped(&m.ifname),
            _ => "-".to_owned(),
        };
        let mut process = Vec::new();
        event.head.push_process(&mut process);
        let texts = &mut self.texts;
        let step = (
            ts.saturating_sub(begin),
            texts.number(function),
            texts.number(format!(
                "{} {device}",
                name.unwrap_or_else(|| netns.to_string())
            )),
            event.head.cpu,
            texts.number(String::from_utf8_lossy(&process).into_owned()),
            reason.map_or(-1, |reason| texts.number(reason) as i64),
        );
        self.add(step, lost, frees);
        Ok(Flow::Continue)
    }

    fn end(&mut self, loss: Option<&Loss>) -> Result<()> {
        self.end_journey()?;
        match loss {
            None => self.about.push(
                "the recording has no end: what was lost of the trace itself is not known"
                    .to_owned(),
            ),
            Some(loss) if loss.any() => {
                loss.tell();
                self.about.extend(loss.lines());
            }
            Some(_) => self.about.push("no event of the trace was lost".to_owned()),
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush()
    }

    fn finish(&mut self) -> Result<()> {
        let left_out = self.journeys.saturating_sub(JOURNEYS);
        if left_out > 0 {
            eprintln!(
                "netprobe: {left_out} journeys are not in the page, which has {JOURNEYS}; a filter helps (their losses are counted)"
            );
        }
        let mut losses: Vec<_> = std::mem::take(&mut self.losses).into_iter().collect();
        losses.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        let row = |((reason, at, after, place, process), count)| LossRow {
            reason,
            at,
            after,
            place,
            process,
            count,
        };
        let losses = losses.into_iter().map(row);
        let rest = Rest {
            about: &self.about,
            texts: &self.texts.texts,
            losses: losses.collect(),
            left_out,
        };
        let script = "]</script>\n<script type=\"application/json\" id=\"rest\">";
        push(&mut self.out, script, &rest)?;
        let (_, behind) = PAGE.split_once(DATA).unwrap_or((PAGE, ""));
        self.out.line(|b| {
            b.extend_from_slice(b"</script>");
            b.extend_from_slice(behind.as_bytes());
        })?;
        self.out.flush()
    }
}
