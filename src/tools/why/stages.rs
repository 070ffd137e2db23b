//! The stages of a packet's way, as data (stages.toml): which kernel functions belong to which, and what it means to be there.

use std::sync::OnceLock;

use rustc_hash::FxHashMap;
use serde::Deserialize;

/// Being sent, or being received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    Out,
    In,
}

/// What became of a packet whose way ended at a stage, without a drop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rest {
    Delivered,
    Sent,
    Answered,
    Taken,
    Copied,
    Merged,
}

/// The fact that matters at a stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shows {
    Route,
    Device,
    NextHop,
    Queue,
    Reader,
    Hook,
}

/// A stage.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stage {
    functions: Vec<String>,
    pub stage: String,
    pub way: Option<Way>,
    pub shows: Option<Shows>,
    pub end: Option<Rest>,
    #[serde(default)]
    pub what: String,
    pub queued: Option<String>,
}

/// Functions that end an sk_buff.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ends {
    functions: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    stage: Vec<Stage>,
    free: Vec<Ends>,
    gone: Vec<Ends>,
}

/// What a function means for a packet that enters it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Stage(&'static Stage),
    /// the sk_buff is freed, if nobody else holds it
    Free,
    /// its memory goes
    Gone,
}

/// Roles by function.
pub struct Stages {
    roles: FxHashMap<&'static str, Role>,
}

impl Stages {
    pub fn builtin() -> &'static Self {
        static TABLE: OnceLock<Table> = OnceLock::new();
        static STAGES: OnceLock<Stages> = OnceLock::new();
        let table = TABLE.get_or_init(|| {
            // A unit test reads it.
            toml::from_str(include_str!("stages.toml")).unwrap_or(Table {
                stage: Vec::new(),
                free: Vec::new(),
                gone: Vec::new(),
            })
        });
        STAGES.get_or_init(|| {
            let mut roles = FxHashMap::default();
            for stage in &table.stage {
                for name in &stage.functions {
                    roles.insert(name.as_str(), Role::Stage(stage));
                }
            }
            for (ends, role) in [(&table.free, Role::Free), (&table.gone, Role::Gone)] {
                for name in ends.iter().flat_map(|e| &e.functions) {
                    roles.insert(name.as_str(), role);
                }
            }
            Stages { roles }
        })
    }

    /// Functions and the words of their stages.
    pub fn names(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        self.roles
            .iter()
            .filter_map(|(&function, role)| match role {
                Role::Stage(stage) => Some((function, stage.stage.as_str())),
                _ => None,
            })
    }

    pub fn role(&self, function: &str) -> Option<Role> {
        self.roles.get(function).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_can_be_read_and_names_each_function_once() {
        let table: Table = toml::from_str(include_str!("stages.toml")).unwrap();
        let ends = table.free.iter().chain(&table.gone);
        let all = table.stage.iter().map(|s| &s.functions);
        let all: Vec<&String> = all.chain(ends.map(|e| &e.functions)).flatten().collect();
        assert_eq!(all.len(), Stages::builtin().roles.len());
        assert!(all.len() > 60);
        for stage in &table.stage {
            assert_eq!(stage.end.is_some(), !stage.what.is_empty(), "{stage:?}");
        }
    }

    #[test]
    fn roles() {
        let stages = Stages::builtin();
        let Some(Role::Stage(socket)) = stages.role("tcp_conn_request") else {
            panic!("no stage");
        };
        assert_eq!(
            (&*socket.stage, socket.end),
            ("socket", Some(Rest::Delivered))
        );
        assert_eq!(stages.role("kfree_skbmem"), Some(Role::Gone));
        assert_eq!(stages.role("schedule"), None);
    }
}
