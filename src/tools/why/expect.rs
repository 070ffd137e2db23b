//! `--expect`: is what became of the packets what was expected? And the answer as a test's result, in TAP or JUnit's XML.

use std::fmt::Write;
use std::str::FromStr;

use anyhow::Result;
use clap::ValueEnum;

use crate::run::output::Output;
use crate::usage::Unexpected;

use super::ends::End;
use super::fold::Totals;

/// Bytes of blocks that a test's result holds.
const MOST: usize = 1 << 20;

/// What a run is expected to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expect {
    /// packets are delivered, sent or answered, and none is lost or rejected
    Delivered,
    /// a packet is lost, by this rule
    Lost(Option<String>),
    /// a packet is rejected
    Rejected,
}

impl FromStr for Expect {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "delivered" => Ok(Self::Delivered),
            None if text == "lost" => Ok(Self::Lost(None)),
            None if text == "rejected" => Ok(Self::Rejected),
            Some(("lost", rule)) if !rule.is_empty() => Ok(Self::Lost(Some(rule.to_owned()))),
            _ => Err("give delivered, lost, lost:RULE or rejected".to_owned()),
        }
    }
}

impl std::fmt::Display for Expect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Delivered => f.write_str("delivered"),
            Self::Lost(None) => f.write_str("lost"),
            Self::Lost(Some(rule)) => write!(f, "lost:{rule}"),
            Self::Rejected => f.write_str("rejected"),
        }
    }
}

impl Expect {
    fn is_met(&self, totals: &Totals) -> bool {
        let good: u64 = [End::Delivered, End::Answered, End::Sent]
            .map(|end| totals.of(end))
            .iter()
            .sum();
        let bad = totals.of(End::Lost) + totals.of(End::Rejected);
        match self {
            Self::Delivered => good > 0 && bad == 0,
            Self::Lost(None) => totals.of(End::Lost) > 0,
            Self::Lost(Some(rule)) => totals.rules.contains(rule),
            Self::Rejected => totals.of(End::Rejected) > 0,
        }
    }

    /// An error with its own exit status where it is not met.
    pub fn check(&self, totals: &Totals) -> Result<()> {
        match self.is_met(totals) {
            true => Ok(()),
            false => Err(
                Unexpected("--expect: this is not what became of the packets".to_owned()).into(),
            ),
        }
    }
}

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Test Anything Protocol, version 13
    Tap,
    /// JUnit's XML
    Junit,
}

/// A test's result: the blocks of a run, until it is known how it ended.
pub struct Report {
    format: Format,
    blocks: String,
    cut: bool,
}

impl Report {
    pub fn new(format: Format) -> Self {
        Self {
            format,
            blocks: String::new(),
            cut: false,
        }
    }

    pub fn add(&mut self, block: &str) {
        if self.cut || self.blocks.len() + block.len() > MOST {
            self.cut = true;
            return;
        }
        self.blocks += block;
        self.blocks.push('\n');
    }

    /// Writes all of it. `name`: what was tested; `sum`: the last line; `seconds`: how long it took.
    pub fn finish(
        &mut self,
        out: &mut Output,
        (name, expect): (&str, &Expect),
        totals: &Totals,
        (sum, seconds): (&str, f64),
    ) -> Result<()> {
        if self.cut {
            self.blocks += "... and more packets\n";
        }
        let met = expect.is_met(totals);
        let text = match self.format {
            Format::Tap => self.tap(&format!("{name}: {expect}"), met, sum),
            Format::Junit => self.junit((name, expect), met, sum, seconds),
        };
        out.line(|b| b.extend_from_slice(text.trim_end().as_bytes()))
    }

    fn tap(&self, what: &str, met: bool, sum: &str) -> String {
        let ok = if met { "ok" } else { "not ok" };
        // A # begins a directive.
        let what = what
            .replace('\\', "\\\\")
            .replace('#', "\\#")
            .replace(['\n', '\r'], " ");
        let mut text = format!("TAP version 13\n1..1\n{ok} 1 - {what}\n");
        for line in self.blocks.lines().chain([sum]) {
            let _ = writeln!(text, "# {line}");
        }
        text
    }

    fn junit(&self, (name, expect): (&str, &Expect), met: bool, sum: &str, seconds: f64) -> String {
        let failures = u8::from(!met);
        let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        let _ = writeln!(
            text,
            "<testsuites>\n<testsuite name=\"netprobe why\" tests=\"1\" failures=\"{failures}\" time=\"{seconds:.3}\">"
        );
        let name = xml(&format!("{name}: {expect}"));
        let _ = writeln!(
            text,
            "<testcase classname=\"netprobe.why\" name=\"{name}\" time=\"{seconds:.3}\">"
        );
        let (sum, blocks) = (xml(sum), xml(&self.blocks));
        let _ = match met {
            true => writeln!(text, "<system-out>{blocks}{sum}</system-out>"),
            false => writeln!(
                text,
                "<failure message=\"not {expect}: {sum}\">{blocks}</failure>",
                expect = xml(&expect.to_string())
            ),
        };
        text += "</testcase>\n</testsuite>\n</testsuites>\n";
        text
    }
}

/// Text for XML, in an attribute too. What XML cannot hold is left out.
fn xml(text: &str) -> String {
    let mut to = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => to += "&amp;",
            '<' => to += "&lt;",
            '>' => to += "&gt;",
            '"' => to += "&quot;",
            '\n' | '\t' => to.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => to.push(c),
        }
    }
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expectations() {
        for text in ["delivered", "lost", "lost:NO_SOCKET", "rejected"] {
            assert_eq!(text.parse::<Expect>().unwrap().to_string(), text);
        }
        for bad in ["", "lost:", "sent", "delivered:X"] {
            assert!(bad.parse::<Expect>().is_err(), "{bad}");
        }
    }

    #[test]
    fn results_of_tests() {
        let mut report = Report::new(Format::Tap);
        report.add("a > b: LOST\n  dropped by \"x\" & y");
        let tap = report.tap("curl #1\n: delivered", false, "1 packet");
        assert_eq!(
            tap,
            "TAP version 13\n1..1\nnot ok 1 - curl \\#1 : delivered\n# a > b: LOST\n#   dropped by \"x\" & y\n# 1 packet\n"
        );
        let expect = Expect::Delivered;
        let junit = report.junit(("<curl>", &expect), false, "1 lost", 1.5);
        assert!(junit.contains("failures=\"1\" time=\"1.500\""), "{junit}");
        assert!(
            junit.contains("name=\"&lt;curl&gt;: delivered\""),
            "{junit}"
        );
        assert!(
            junit.contains("<failure message=\"not delivered: 1 lost\">a &gt; b: LOST"),
            "{junit}"
        );
        let junit = report.junit(("curl", &expect), true, "\u{1}sum", 1.5);
        assert!(
            junit.contains("1.500\">\n<system-out>") && junit.contains("sum</system-out>"),
            "{junit}"
        );
        assert!(!junit.contains('\u{1}'));
    }

    #[test]
    fn a_result_has_a_bound() {
        let mut report = Report::new(Format::Tap);
        for _ in 0..3 {
            report.add(&"x".repeat(MOST / 2));
        }
        assert!(report.cut && report.blocks.len() <= MOST);
    }
}
