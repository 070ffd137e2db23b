//! Which drops move which of the kernel's counters: counters.toml, compiled in.

use std::sync::OnceLock;

use serde::Deserialize;

use crate::kernel::counters::Source;

/// Drops of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Seen {
    pub netns: u32,
    pub ifindex: u32,
    pub port: u16,
    /// IPPROTO_*
    pub proto: u8,
    /// 4, 6, or 0
    pub ip: u8,
    /// the kernel gave no reason: it is the place's
    pub guessed: bool,
    /// the kernel's reason, or the one that newer kernels give; empty: none
    pub reason: String,
    /// of the rule
    pub rule: String,
    pub class: String,
    /// the function that decided
    pub place: String,
}

/// Counters of one kind, and the drops that move them. counters.toml says what the fields mean.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    source: Source,
    names: Vec<String>,
    pub what: String,
    proto: Option<u8>,
    ip: Option<u8>,
    #[serde(default)]
    reasons: Vec<String>,
    #[serde(default)]
    classes: Vec<String>,
    #[serde(default)]
    places: Vec<String>,
    #[serde(default)]
    pub far: Vec<String>,
    #[serde(default)]
    pub exact: bool,
    #[serde(default)]
    pub told: Vec<String>,
    #[serde(default)]
    pub shared: String,
    #[serde(default)]
    pub group: String,
    #[serde(default)]
    pub note: bool,
}

impl Entry {
    /// A drop of this kind, at the counter's place, may have moved it.
    pub fn fits(&self, seen: &Seen) -> bool {
        // What cannot be read as IP may be any.
        let any = seen.ip == 0;
        self.proto.is_none_or(|proto| any || proto == seen.proto)
            && self.ip.is_none_or(|ip| any || ip == seen.ip)
            && (self.names_one_of(seen)
                || self.classes.contains(&seen.class)
                || seen.guessed && self.places.iter().any(|p| is_like(p, &seen.place)))
    }

    fn names_one_of(&self, seen: &Seen) -> bool {
        let mut all = self.reasons.iter();
        all.any(|reason| *reason == seen.reason || *reason == seen.rule)
    }

    /// A drop of this kind anywhere on the machine may have moved it.
    pub fn fits_from_far(&self, seen: &Seen) -> bool {
        self.far.contains(&seen.class)
    }
}

/// The whole table.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Counters {
    counter: Vec<Entry>,
}

impl Counters {
    /// A socket's counter may have been moved by this drop.
    pub fn asks_for_port(&self, seen: &Seen) -> bool {
        let mut sockets = self.counter.iter().filter(|e| e.source == Source::Socket);
        sockets.any(|entry| entry.fits(seen))
    }

    /// The entry of a counter; `None`: it tells of no loss.
    pub fn find(&self, source: Source, name: &str) -> Option<&Entry> {
        let of_source = self.counter.iter().filter(|e| e.source == source);
        let mut fits = of_source.filter(|e| e.names.iter().any(|n| is_like(n, name)));
        fits.next()
    }
}

/// The one that is compiled in.
pub fn table() -> &'static Counters {
    static TABLE: OnceLock<Counters> = OnceLock::new();
    TABLE.get_or_init(|| {
        // A unit test reads it.
        toml::from_str(include_str!("counters.toml")).unwrap_or(Counters {
            counter: Vec::new(),
        })
    })
}

/// `*` stands for any characters.
fn is_like(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(name) = name.strip_prefix(start) else {
        return false;
    };
    rest.is_empty() || (0..=name.len()).any(|at| name.get(at..).is_some_and(|n| is_like(rest, n)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_can_be_read() {
        let counters: Counters = toml::from_str(include_str!("counters.toml")).unwrap();
        assert!(counters.counter.len() > 60);
        for entry in &counters.counter {
            assert!(
                entry.note == entry.group.is_empty(),
                "{:?}: a group or a note",
                entry.names
            );
            let one = entry.names.len() == 1 && !entry.names[0].contains('*');
            assert!(!entry.exact || one, "{:?}: which one?", entry.names);
        }
    }

    #[test]
    fn reasons_and_classes_of_the_table_are_in_the_rules() {
        let rules = crate::explain::Rules::builtin();
        let classes = [rules.classes(), vec!["unknown".to_owned()]].concat();
        for entry in &table().counter {
            for class in entry.classes.iter().chain(&entry.far) {
                assert!(classes.contains(class), "{class}");
            }
            for reason in &entry.reasons {
                assert!(rules.knows(reason), "{reason}");
            }
        }
    }

    #[test]
    fn any_characters() {
        assert!(is_like("*rx*drop*", "rx_queue_0_xdp_drops") && is_like("a*", "a"));
        assert!(!is_like("*rx*drop*", "tx_drops") && !is_like("a*b", "ab c"));
        assert!(is_like("*", "") && is_like("é*", "éa"));
    }
}
