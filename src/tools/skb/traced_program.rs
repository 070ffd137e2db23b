//! A watched tc or XDP program, as lines show it.

use serde::{Deserialize, Serialize};

use super::event::Point;

/// What a program works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Tc,
    Xdp,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Kind::Tc => "tc",
            Kind::Xdp => "xdp",
        }
    }

    /// The programs of skb_prog.bpf.c for it: at entry, at exit.
    pub(super) fn watchers(self) -> (&'static str, &'static str) {
        match self {
            Kind::Tc => ("tc_enter", "tc_leave"),
            Kind::Xdp => ("xdp_enter", "xdp_leave"),
        }
    }

    /// The kernel's name of a verdict: TC_ACT_* or XDP_*. tcx and netkit programs have the same numbers as tc's.
    pub fn verdict(self, value: i32) -> Option<&'static str> {
        const TC: [&str; 10] = [
            "TC_ACT_UNSPEC",
            "TC_ACT_OK",
            "TC_ACT_RECLASSIFY",
            "TC_ACT_SHOT",
            "TC_ACT_PIPE",
            "TC_ACT_STOLEN",
            "TC_ACT_QUEUED",
            "TC_ACT_REPEAT",
            "TC_ACT_REDIRECT",
            "TC_ACT_TRAP",
        ];
        const XDP: [&str; 5] = [
            "XDP_ABORTED",
            "XDP_DROP",
            "XDP_PASS",
            "XDP_TX",
            "XDP_REDIRECT",
        ];
        let (names, first) = match self {
            Kind::Tc => (&TC[..], -1),
            Kind::Xdp => (&XDP[..], 0),
        };
        let index = usize::try_from(value.checked_sub(first)?).ok()?;
        names.get(index).copied()
    }
}

/// A watched program, as lines show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracedProgram {
    pub id: u32,
    /// of its main function, escaped
    pub name: String,
    pub kind: Kind,
}

/// A tc or XDP program; its name is the event's `func`.
#[derive(Serialize)]
pub struct ProgramRow {
    pub id: u32,
    pub kind: &'static str,
    /// `entry` or `exit`
    pub at: &'static str,
    /// at exit: TC_ACT_* or XDP_*, or the number where it has no name
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verdict: Option<String>,
}

impl ProgramRow {
    pub fn new(program: &TracedProgram, point: Point) -> Self {
        let verdict = |value| match program.kind.verdict(value) {
            Some(name) => name.to_owned(),
            None => value.to_string(),
        };
        let (at, verdict) = match point {
            Point::Enter => ("entry", None),
            Point::Leave(value) => ("exit", Some(verdict(value))),
        };
        Self {
            id: program.id,
            kind: program.kind.name(),
            at,
            verdict,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_by_name() {
        assert_eq!(Kind::Tc.verdict(-1), Some("TC_ACT_UNSPEC"));
        assert_eq!(Kind::Tc.verdict(2), Some("TC_ACT_SHOT"));
        assert_eq!(Kind::Tc.verdict(8), Some("TC_ACT_TRAP"));
        assert_eq!(Kind::Tc.verdict(9), None);
        assert_eq!(Kind::Tc.verdict(i32::MIN), None);
        assert_eq!(Kind::Xdp.verdict(1), Some("XDP_DROP"));
        assert_eq!(Kind::Xdp.verdict(-1), None);
        assert_eq!(Kind::Xdp.verdict(i32::MAX), None);
    }
}
