//! Members of a kernel struct that are shown with each event (`--output-skb-metadata skb->mark,skb->dev->ifindex`): from their
//! paths to what the BPF programs read (src/bpf/skb/members.h), and from what was read to numbers.

use anyhow::{Result, ensure};

use crate::bpf::skb::types::{np_path, np_path_limit};
use crate::filter::members::path;
use crate::kernel::btf::Btf;
use crate::kernel::members::{Access, Scalar};
use crate::text::escape::printable;

/// NP_PATHS
pub const MOST: usize = np_path_limit::NP_PATHS.0 as usize;

/// The members asked for, each with its path as it was typed.
#[derive(Debug, Clone, Default)]
pub struct Members(Vec<(String, Access)>);

/// What shows members: paths, and what kind of numbers they are.
pub type Shown = Vec<(String, Scalar)>;

impl Members {
    /// For a recording.
    pub fn shown(&self) -> Shown {
        let shown = |(path, access): &(String, Access)| (path.clone(), access.scalar);
        self.0.iter().map(shown).collect()
    }

    /// From a recording: they can be shown, not read.
    pub fn recorded(shown: Shown) -> Result<Self> {
        ensure!(shown.len() <= MOST, "more than {MOST} members");
        let member = |(path, scalar): (String, Scalar)| {
            ensure!(scalar.is_sound(), "a member of an unknown kind");
            let access = Access {
                pointers: Vec::new(),
                offset: 0,
                scalar,
            };
            Ok((printable(&path), access))
        };
        let members = shown.into_iter().map(member);
        Ok(Self(members.collect::<Result<_>>()?))
    }

    /// `root`: the name that paths begin with, and the struct that it points to.
    pub fn parse(paths: &[String], root: (&str, &str), btf: &Btf) -> Result<Self> {
        ensure!(paths.len() <= MOST, "{MOST} members at most");
        let members = paths.iter().map(|text| {
            let access = path(text, root, btf)?;
            let most = np_path::default().offsets.len();
            ensure!(
                access.pointers.len() <= most,
                "{text}: more than {most} pointers to follow"
            );
            Ok((text.clone(), access))
        });
        Ok(Self(members.collect::<Result<_>>()?))
    }

    /// For the BPF programs.
    pub fn paths(&self) -> Vec<np_path> {
        let path = |access: &Access| {
            let mut path = np_path {
                pointers: access.pointers.len() as u32,
                offset: access.offset,
                size: access.scalar.size,
                ..np_path::default()
            };
            for (to, from) in path.offsets.iter_mut().zip(&access.pointers) {
                *to = *from;
            }
            path
        };
        self.0.iter().map(|(_, access)| path(access)).collect()
    }

    /// Paths and values; `None` where there was a NULL pointer on the way.
    pub fn values(&self, read: [Option<u64>; MOST]) -> impl Iterator<Item = (&str, Option<i128>)> {
        let numbers = self.0.iter().zip(read);
        numbers.map(|((path, access), raw)| (path.as_str(), raw.map(|r| access.scalar.value(r))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn paths_and_values() {
        let btf = Btf::vmlinux(None).unwrap();
        let parse = |paths: &[&str]| {
            let paths: Vec<String> = paths.iter().map(|p| (*p).to_string()).collect();
            Members::parse(&paths, ("skb", "sk_buff"), &btf)
        };
        let members = parse(&["skb->mark", "skb->dev->ifindex", "skb->pkt_type"]).unwrap();
        let paths = members.paths();
        assert_eq!((paths[0].pointers, paths[0].size), (0, 4));
        assert_eq!((paths[1].pointers, paths[1].size), (1, 4));
        let values: Vec<_> = members.values([Some(7), None, Some(0xff), None]).collect();
        assert_eq!(values[0], ("skb->mark", Some(7)));
        assert_eq!(values[1], ("skb->dev->ifindex", None));
        // pkt_type:3
        assert_eq!(values[2], ("skb->pkt_type", Some(7)));
        for wrong in [
            "skb",
            "dev->ifindex",
            "skb->nope",
            "skb->mark == 3",
            "skb->dev",
            "",
        ] {
            assert_eq!(parse(&[wrong]).is_ok(), wrong == "skb->dev", "{wrong}");
        }
        assert!(parse(&["skb->mark"; 5]).is_err());
    }
}
