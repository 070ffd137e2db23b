//! Why XDP dropped a packet: the kernel's tracepoints about aborted packets and failed redirects, in words.

use std::collections::BTreeMap;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{ErrorKind, Link, OpenObject};

use crate::bpf;
use crate::bpf::xdperr::types::{np_xdp_error, np_xdp_kind, np_xdp_what};
use crate::bpf::xdperr::{XdperrSkel, XdperrSkelBuilder};
use crate::kernel::bpf_object;
use crate::kernel::netns::Netns;
use crate::run::log;
use crate::run::loss::Loss;
use crate::text::escape::escaped;

use super::decode::verdict_name;

/// NP_XDP_ERROR
const KIND: u16 = np_xdp_kind::NP_XDP_ERROR.0 as u16;
/// The kernel's id of the map where a redirect went through none.
const NO_MAP: u32 = i32::MAX as u32;
/// NP_XDP_EXCEPTION, NP_XDP_REDIRECT, NP_XDP_XMIT
const EXCEPTION: u32 = np_xdp_what::NP_XDP_EXCEPTION.0;
const REDIRECT: u32 = np_xdp_what::NP_XDP_REDIRECT.0;
const XMIT: u32 = np_xdp_what::NP_XDP_XMIT.0;

const NO_FRAMES: &str = "the target cannot take XDP frames: its driver does not, or on veth its peer \
    lacks NAPI (an XDP program there, or ethtool -K PEER gro on, brings it)";

/// What an error number means at a place. The first row that fits holds; errno 0 fits all.
const REASONS: &[(u32, i32, &str)] = &[
    (
        REDIRECT,
        libc::EINVAL,
        "no such interface, or nothing under that key of the map",
    ),
    (REDIRECT, libc::ENETDOWN, "the target interface is down"),
    (REDIRECT, libc::EOPNOTSUPP, NO_FRAMES),
    (
        REDIRECT,
        libc::EMSGSIZE,
        "the packet is larger than the target's MTU",
    ),
    (
        REDIRECT,
        libc::ENOSPC,
        "the packet is larger than the target's MTU, or its queue is full",
    ),
    (
        REDIRECT,
        libc::EPERM,
        "the target does not take this packet",
    ),
    (XMIT, libc::ENXIO, NO_FRAMES),
    (XMIT, libc::ENETDOWN, "the target interface is down"),
    (XMIT, libc::ENOSPC, "the target's queue is full"),
    (
        XMIT,
        0,
        "the target's queue is full or it refused the frames",
    ),
];

/// One report of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Problem {
    pub ts: u64,
    pub what: u32,
    pub ifindex: u32,
    /// 0: the tracepoint does not tell it.
    pub program: u32,
    pub verdict: u32,
    /// As errno, positive.
    pub errno: i32,
    /// 0: unknown.
    pub target: u32,
    pub map: u32,
    pub index: u32,
    pub count: u32,
}

/// Nothing for events of another kind.
pub fn decode(bytes: &[u8]) -> Option<Problem> {
    let (event, _) = bpf::read::<np_xdp_error>(bytes)?;
    (event.head.kind == KIND).then_some(Problem {
        ts: event.head.ts,
        what: event.what,
        ifindex: event.ifindex,
        program: event.program,
        verdict: event.verdict,
        errno: event.err.saturating_neg(),
        target: event.target,
        map: event.map,
        index: event.index,
        count: event.count,
    })
}

impl Problem {
    /// The tracepoint's name.
    pub fn name(&self) -> &'static str {
        match self.what {
            EXCEPTION => "xdp_exception",
            REDIRECT => "xdp_redirect_err",
            _ => "xdp_devmap_xmit",
        }
    }

    /// One line in words.
    pub fn words(&self, programs: &mut Names) -> String {
        let program = programs.of(self.program);
        let reason = self.reason();
        match self.what {
            EXCEPTION if self.verdict == 0 => format!("{program} aborted the packet"),
            EXCEPTION => format!(
                "{program} returned {}, which could not be done",
                verdict_name(self.verdict)
            ),
            REDIRECT if !matches!(self.map, 0 | NO_MAP) => {
                format!(
                    "{program} redirected through key {} of map {}: {reason}",
                    self.index, self.map
                )
            }
            REDIRECT => format!("{program} redirected to interface {}: {reason}", self.index),
            _ => format!(
                "{} frames redirected to interface {} were dropped: {reason}",
                self.count, self.target
            ),
        }
    }

    fn reason(&self) -> String {
        let row = REASONS
            .iter()
            .find(|(what, errno, _)| *what == self.what && (*errno == self.errno || *errno == 0));
        match (row, self.errno) {
            (Some((_, _, words)), _) => (*words).to_owned(),
            (None, 0) => "no reason was given".to_owned(),
            (None, errno) => std::io::Error::from_raw_os_error(errno).to_string(),
        }
    }
}

/// Names of programs, asked for once.
#[derive(Debug, Default)]
pub struct Names(BTreeMap<u32, String>);

impl Names {
    fn of(&mut self, id: u32) -> &str {
        self.0.entry(id).or_insert_with(|| {
            let info =
                bpf_object::program_by_id(id).and_then(|fd| bpf_object::program_info(fd.as_fd()));
            match info {
                // The kernel names the program at the interface, whichever of the chain it was.
                Ok(info) if matches!(info.name.as_str(), "xdp_dump" | "xdp_chain") => {
                    "a program of the chain".to_owned()
                }
                Ok(info) => format!("program {id} ({})", escaped(info.name.as_bytes())),
                Err(_) => format!("program {id}"),
            }
        })
    }
}

/// The tracepoints, attached.
pub struct Errors<'a> {
    skel: XdperrSkel<'a>,
    links: Vec<Link>,
}

impl<'a> Errors<'a> {
    pub fn begin(
        ifindices: &[u32],
        events: BorrowedFd<'_>,
        storage: &'a mut MaybeUninit<OpenObject>,
    ) -> Result<Self> {
        let mut open = XdperrSkelBuilder::default()
            .open(storage)
            .context("failed to open the BPF object")?;
        let rodata = open
            .maps
            .rodata_data
            .as_mut()
            .context("the BPF object has no .rodata")?;
        ensure!(
            ifindices.len() <= rodata.ifindices.len(),
            "too many interfaces"
        );
        for (to, from) in rodata.ifindices.iter_mut().zip(ifindices) {
            *to = *from;
        }
        rodata.netns = Netns::current()?.inode;
        open.maps
            .events
            .reuse_fd(events)
            .context("failed to share the perf buffers")?;
        let refused = |error: libbpf_rs::Error| anyhow!("{error:?}\n{}", log::take());
        let skel = open.load().map_err(refused)?;
        let programs = [
            &skel.progs.xdp_exception,
            &skel.progs.xdp_redirect_err,
            &skel.progs.xdp_redirect_map_err,
            &skel.progs.xdp_devmap_xmit,
        ];
        let mut links = Vec::new();
        for program in programs {
            match program.attach() {
                Ok(link) => links.push(link),
                // Kernels differ in which of them they have.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(refused(error)),
            }
        }
        Ok(Errors { skel, links })
    }

    pub fn end(&mut self) {
        self.links.clear();
    }

    pub fn add_loss(&self, loss: &mut Loss) -> Result<()> {
        loss.add_stats(&self.skel.maps.stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(what: u32, errno: i32) -> Problem {
        let mut event = np_xdp_error {
            what,
            ifindex: 2,
            program: u32::MAX,
            err: -errno,
            count: 1,
            ..Default::default()
        };
        event.index = 7;
        event.head.kind = KIND;
        decode(bpf::bytes_of(&event)).unwrap()
    }

    #[test]
    fn words_for_each_place() {
        let mut names = Names::default();
        let mut words = |problem: Problem| problem.words(&mut names);
        assert!(words(problem(EXCEPTION, 0)).ends_with("aborted the packet"));
        let down = words(problem(REDIRECT, libc::ENETDOWN));
        assert!(
            down.contains("to interface 7: the target interface is down"),
            "{down}"
        );
        assert!(words(problem(XMIT, libc::ENXIO)).contains("NAPI"));
        assert!(words(problem(REDIRECT, libc::ENOMEM)).contains("memory"));
    }

    #[test]
    fn other_kinds_and_short_events_are_none() {
        let event = np_xdp_error::default();
        assert_eq!(decode(bpf::bytes_of(&event)), None);
        assert_eq!(decode(&[0; 20]), None);
    }
}
