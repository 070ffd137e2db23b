//! What is shown in other words where asked for: kernel structs as C text, names of namespaces.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::kernel::btf::Btf;
use crate::kernel::btf_dump::Dumper;
use crate::kernel::netns;

/// Names of namespaces are not looked up more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// A kernel struct as C text.
#[derive(Default)]
pub struct Dump {
    dumper: Option<Dumper>,
    /// of the event at hand
    pub shown: Option<String>,
}

impl Dump {
    /// Of `struct NAME`.
    pub fn new(btf: &Btf, name: &str) -> Result<Self> {
        let dumper = Some(Dumper::new(btf, name)?);
        Ok(Self {
            dumper,
            shown: None,
        })
    }

    /// Makes the text of these bytes; there is none where they could not be read.
    pub fn show(&mut self, bytes: Option<&[u8]>) -> Result<()> {
        self.shown = match (&mut self.dumper, bytes) {
            (Some(dumper), Some(bytes)) if !bytes.is_empty() => Some(dumper.text(bytes)?),
            _ => None,
        };
        Ok(())
    }
}

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
