//! Names of network namespaces in place of their inodes (--output-netns-names).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::kernel::netns;

/// Names of namespaces are not looked up more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// Names under /run/netns by inode. A namespace that appears later is looked up then.
#[derive(Default)]
pub struct NetnsNames {
    /// they are shown
    wanted: bool,
    names: HashMap<u32, String>,
    /// `None`: this machine is not asked
    looked: Option<Instant>,
    /// other names were found since [`NetnsNames::news`]
    new: bool,
}

impl NetnsNames {
    /// Looks; `wanted`: they are shown.
    pub fn look(wanted: bool) -> Self {
        Self {
            wanted,
            names: netns::names(),
            looked: Some(Instant::now()),
            new: true,
        }
    }

    /// Knows only what it is taught.
    pub fn recorded(wanted: bool) -> Self {
        Self {
            wanted,
            ..Self::default()
        }
    }

    /// All names, from a recording.
    pub fn learn(&mut self, names: Vec<(u32, String)>) {
        self.names = names.into_iter().collect();
    }

    /// All names.
    pub fn all(&self) -> Vec<(u32, String)> {
        let mut all: Vec<_> = self
            .names
            .iter()
            .map(|(n, name)| (*n, name.clone()))
            .collect();
        all.sort_unstable();
        all
    }

    /// Other names were found since the last call.
    pub fn news(&mut self) -> bool {
        std::mem::take(&mut self.new)
    }

    /// They were asked for.
    pub fn wanted(&self) -> bool {
        self.wanted
    }

    /// The name of a namespace that lines show, where it has one.
    pub fn of(&mut self, inode: u32) -> Option<&str> {
        if !self.wanted {
            return None;
        }
        self.find(inode)
    }

    /// The same, whether lines show it or not.
    pub fn find(&mut self, inode: u32) -> Option<&str> {
        let old = self.looked.is_some_and(|then| then.elapsed() >= AGAIN);
        if old && !self.names.contains_key(&inode) {
            *self = Self::look(self.wanted);
        }
        self.names.get(&inode).map(String::as_str)
    }
}
