//! Names of network namespaces in place of their inodes (--output-netns-names).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::kernel::netns;

/// Names of namespaces are not looked up more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// Names under /run/netns by inode, where they were asked for. A namespace that appears later is looked up then.
#[derive(Default)]
pub struct NetnsNames(Option<(HashMap<u32, String>, Instant)>);

impl NetnsNames {
    pub fn look() -> Self {
        Self(Some((netns::names(), Instant::now())))
    }

    /// They were asked for.
    pub fn wanted(&self) -> bool {
        self.0.is_some()
    }

    /// The name of a namespace, where it has one.
    pub fn of(&mut self, inode: u32) -> Option<&str> {
        let (names, looked) = self.0.as_ref()?;
        if !names.contains_key(&inode) && looked.elapsed() >= AGAIN {
            *self = Self::look();
        }
        self.0.as_ref()?.0.get(&inode).map(String::as_str)
    }
}
