//! What made a packet slow, in words: rules as data (delays.toml).

use std::collections::BTreeMap;
use std::sync::OnceLock;

use serde::Deserialize;

/// A sentence with words in braces, and what to do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delay {
    pub text: String,
    pub change: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Delays {
    delay: BTreeMap<String, Delay>,
}

/// The rule of this name, its words filled in; `None`: there is none.
pub fn filled(name: &str, words: &[(&str, String)]) -> Option<Delay> {
    let rule = rules().delay.get(name)?;
    let fill = |text: &str| {
        words.iter().fold(text.to_owned(), |text, (word, value)| {
            text.replace(&format!("{{{word}}}"), value)
        })
    };
    Some(Delay {
        text: fill(&rule.text),
        change: fill(&rule.change),
    })
}

fn rules() -> &'static Delays {
    static RULES: OnceLock<Delays> = OnceLock::new();
    // A unit test reads them all.
    RULES.get_or_init(|| toml::from_str(include_str!("delays.toml")).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_can_be_read_and_filled() {
        let all: Delays = toml::from_str(include_str!("delays.toml")).unwrap();
        assert!(all.delay.len() > 15);
        let words = [
            ("part", "9 ms".to_owned()),
            ("total", "10 ms".to_owned()),
            ("who", "redis[88]".to_owned()),
            ("pid", "88".to_owned()),
        ];
        let delay = filled("reader-stopped", &words).unwrap();
        assert_eq!(
            delay.text,
            "9 ms of 10 ms: redis[88] was stopped, by a signal or a debugger"
        );
        assert_eq!(delay.change, "kill -CONT 88");
        assert!(filled("no-such-rule", &[]).is_none());
    }
}
