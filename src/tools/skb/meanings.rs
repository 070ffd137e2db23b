//! What drops mean, by the rules of `explain`: the answers that a live run got, for its recording, or those out of a recording. And how
//! many drops were normal frees, which are not shown.

use std::collections::{BTreeSet, HashMap};

use serde::{Deserialize, Serialize};

use crate::explain::{EXPECTED, Rules};
use crate::text::escape::printable;
use crate::tools::drop_facts::facts;

/// Answers that are remembered.
const MOST: usize = 65_536;
/// Characters of a sentence.
const SENTENCE: usize = 1024;

/// A reason without what all of the core's have in common, the function that decided, bits of enum drop_fact.
pub type Key = (String, String, u8);
pub type Answer = (Key, Words);

/// What a drop means.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Words {
    pub class: String,
    pub what: String,
    pub change: String,
}

impl Words {
    fn of(rules: &Rules, (reason, place, bits): &Key) -> Self {
        let meaning = rules.explain(reason, place, &facts(*bits));
        Self {
            class: meaning.class,
            what: meaning.what,
            change: meaning.change,
        }
        .clean()
    }

    /// As lines may show it: a recording or a file of rules may hold anything.
    fn clean(self) -> Self {
        let clean = |text: String| {
            let end = text
                .char_indices()
                .nth(SENTENCE)
                .map_or(text.len(), |(at, _)| at);
            printable(&text[..end])
        };
        Self {
            class: clean(self.class),
            what: clean(self.what),
            change: clean(self.change),
        }
    }

    /// It is no loss.
    pub fn is_expected(&self) -> bool {
        self.class == EXPECTED
    }
}

/// The rules, and what they have answered.
#[derive(Debug, Default)]
pub struct Meanings {
    /// `None`: those that are compiled in
    rules: Option<Rules>,
    answers: HashMap<Key, Words>,
    /// `None`: nobody asks for them
    new: Option<Vec<Answer>>,
}

impl Meanings {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules: Some(rules),
            ..Self::default()
        }
    }

    /// What a drop means. A recording has an answer for each; the rules that are compiled in serve where it is damaged.
    pub fn of(&mut self, key: Key) -> &Words {
        if self.answers.len() >= MOST && !self.answers.contains_key(&key) {
            self.answers.clear();
        }
        let (rules, new) = (&self.rules, &mut self.new);
        self.answers.entry(key).or_insert_with_key(|key| {
            let words = Words::of(rules.as_ref().unwrap_or(Rules::builtin()), key);
            if let Some(new) = new {
                new.push((key.clone(), words.clone()));
            }
            words
        })
    }

    /// Every answer is forgotten: [`Meanings::news`] has it again when it is given the next time.
    pub fn tell_anew(&mut self) {
        self.answers.clear();
        self.new = Some(Vec::new());
    }

    /// Every answer that was given since [`Meanings::tell_anew`].
    pub fn all(&self) -> Vec<Answer> {
        let all = self.answers.iter();
        all.map(|(key, words)| (key.clone(), words.clone()))
            .collect()
    }

    /// New answers since the last call.
    pub fn news(&mut self) -> Vec<Answer> {
        self.new.as_mut().map_or_else(Vec::new, std::mem::take)
    }

    /// An answer out of a recording.
    pub fn learn(&mut self, (key, words): Answer) {
        self.answers.insert(key, words.clean());
    }
}

/// Normal frees that were not shown.
#[derive(Debug, Default)]
pub struct Hidden {
    frees: u64,
    kinds: BTreeSet<String>,
}

impl Hidden {
    pub fn add(&mut self, what: &str) {
        self.frees += 1;
        if !self.kinds.contains(what) && self.kinds.len() < MOST {
            self.kinds.insert(what.to_owned());
        }
    }

    /// Tells on stderr, once.
    pub fn tell(&mut self) {
        let Self { frees, kinds } = std::mem::take(self);
        if frees > 0 {
            eprintln!(
                "netprobe: {frees} normal frees of {} kinds, --all shows them",
                kinds.len()
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_told_once_and_known_again() {
        let key = || ("NO_SOCKET".to_owned(), "__udp4_lib_rcv".to_owned(), 0);
        let mut live = Meanings::new(Rules::builtin().clone());
        assert_eq!(live.of(key()).class, "socket");
        assert_eq!(live.news(), [], "nobody asks");
        live.tell_anew();
        let words = live.of(key()).clone();
        live.of(key());
        assert_eq!(live.news(), [(key(), words.clone())]);
        let mut recorded = Meanings::default();
        let told = Words {
            what: "a\x1b[2Jport scan".to_owned(),
            ..words
        };
        recorded.learn((key(), told));
        let shown = &recorded.of(key()).what;
        assert!(
            shown.ends_with("port scan") && !shown.contains('\x1b'),
            "{shown}"
        );
    }
}
