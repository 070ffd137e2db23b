//! What is shown of an event beyond its columns, where asked for: whole kernel structs, skb->cb, names of namespaces.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::kernel::btf::Btf;
use crate::kernel::btf_dump::Dumper;
use crate::kernel::netns;

use super::args::Args;
use super::decode::Event;

/// Names of namespaces are not looked up more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// What was asked for.
pub struct Extras {
    skb: Option<Dumper>,
    shared_info: Option<Dumper>,
    netns: Option<NetnsNames>,
}

/// An event's extras as text.
#[derive(Debug, Default)]
pub struct Shown {
    /// the kernel structs, as C text
    pub skb: Option<String>,
    pub shared_info: Option<String>,
}

impl Extras {
    pub fn new(args: &Args) -> Result<Self> {
        let dumper = |wanted: bool, name| {
            wanted
                .then(|| Dumper::new(&Btf::vmlinux(args.kernel_btf.as_deref())?, name))
                .transpose()
        };
        Ok(Self {
            skb: dumper(args.output_skb, "sk_buff")?,
            shared_info: dumper(args.output_skb_shared_info, "skb_shared_info")?,
            netns: args.output_netns_names.then(NetnsNames::look),
        })
    }

    /// The dumps of an event.
    pub fn show(&mut self, event: &Event) -> Result<Shown> {
        let text = |dumper: &mut Option<Dumper>, bytes: &Option<Vec<u8>>| match (dumper, bytes) {
            (Some(d), Some(b)) if !b.is_empty() => d.text(b).map(Some),
            _ => Ok(None),
        };
        Ok(Shown {
            skb: text(&mut self.skb, &event.skb_copy)?,
            shared_info: text(&mut self.shared_info, &event.shared_info)?,
        })
    }

    /// Names of namespaces were asked for.
    pub fn names_netns(&self) -> bool {
        self.netns.is_some()
    }

    /// The name of a namespace, where names were asked for and it has one.
    pub fn netns(&mut self, inode: u32) -> Option<&str> {
        self.netns.as_mut()?.of(inode)
    }
}

/// `skb->cb` as the kernel's 32-bit words, in hexadecimal.
pub fn cb_words(cb: &[u8; 48]) -> Vec<String> {
    cb.chunks_exact(4)
        .filter_map(|c| c.try_into().ok().map(u32::from_ne_bytes))
        .map(|w| format!("{w:08x}"))
        .collect()
}

/// Names under /run/netns by inode. A namespace that appears later is looked up then.
struct NetnsNames {
    names: HashMap<u32, String>,
    looked: Instant,
}

impl NetnsNames {
    fn look() -> Self {
        Self {
            names: netns::names(),
            looked: Instant::now(),
        }
    }

    fn of(&mut self, inode: u32) -> Option<&str> {
        if !self.names.contains_key(&inode) && self.looked.elapsed() >= AGAIN {
            *self = Self::look();
        }
        self.names.get(&inode).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_cb() {
        let mut cb = [0; 48];
        cb[..4].copy_from_slice(&0x1234u32.to_ne_bytes());
        let words = cb_words(&cb);
        assert_eq!((words.len(), words[0].as_str()), (12, "00001234"));
    }
}
