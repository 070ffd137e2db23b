//! The lines of `netprobe icmp --sent`: text columns and JSON. What both sides have in common is in [`super::present`].

use std::collections::BTreeMap;

use anyhow::Result;
use serde::Serialize;

use crate::run::Flow;
use crate::run::output::Output;
use crate::text::escape::escaped;

use super::culprit::Names;
use super::present::{Presenter, push_us};
use super::requests::{Drop, Lost, Part, Request};

impl Presenter {
    /// One request that was answered, or is lost.
    pub fn request(
        &mut self,
        out: &mut Output,
        request: &Request,
        names: &mut Names,
    ) -> Result<Flow> {
        self.begin(request.event.head.ts)?;
        let lost = match request.how_lost() {
            Some(how) => Some(self.lost(request, how, names)?),
            None => None,
        };
        if out.json() {
            return out.json_event(&self.request_row(request, lost));
        }
        let mut line = Vec::new();
        self.columns(&mut line, &request.event, None);
        for part in Part::ALL {
            push_us(&mut line, request.part(part));
        }
        if let Some(lost) = lost {
            line.extend_from_slice(b" lost: ");
            line.extend_from_slice(lost.why.as_bytes());
            if let Some(dropped) = &lost.dropped {
                dropped.push_text(&mut line);
            }
            if let Some(copy) = &lost.copy {
                line.extend_from_slice(b"; a copy of the request was dropped");
                copy.push_text(&mut line);
            }
        }
        if request.late {
            line.extend_from_slice(b" [late]");
        }
        out.event(|b| b.extend_from_slice(&line))
    }

    fn lost(&mut self, request: &Request, how: Lost, names: &mut Names) -> Result<LostRow> {
        let why = match how {
            Lost::RequestDropped(_) => "this kernel dropped the request",
            Lost::ReplyDropped(_) => "this kernel dropped the reply",
            Lost::NotSent => "not handed to a device's driver yet (a neighbour or a queue?)",
            Lost::NoReply => "no reply came back",
            Lost::NotDelivered => "the reply came back, and reached no socket",
            Lost::NotRead => "the reply is in the socket's queue, its process has not read it",
        };
        let dropped = match how {
            Lost::RequestDropped(d) | Lost::ReplyDropped(d) => Some(self.dropped(d, names)?),
            _ => None,
        };
        let copy = match request.copy.filter(|_| how == Lost::NoReply) {
            Some(d) => Some(self.dropped(d, names)?),
            None => None,
        };
        Ok(LostRow { why, dropped, copy })
    }

    fn dropped(&mut self, drop: Drop, names: &mut Names) -> Result<DropRow> {
        Ok(DropRow {
            // A kernel before 5.17 gives none.
            reason: self.reasons.any().then(|| self.reasons.short(drop.reason)),
            location: names.place(drop.location)?,
        })
    }

    fn request_row(&self, request: &Request, lost: Option<LostRow>) -> RequestRow {
        let e = &request.event;
        RequestRow {
            kind: "request",
            ts_ns: e.head.ts,
            wall_ns: self.wall(e.head.ts),
            late: request.late,
            tgid: e.head.tgid,
            pid: e.head.pid,
            comm: escaped(&e.head.comm),
            cpu: e.head.cpu,
            saddr: e.key.saddr.to_string(),
            daddr: e.key.daddr.to_string(),
            id: e.key.id,
            seq: e.key.seq,
            iface: escaped(&e.ifname),
            ifindex: e.ifindex,
            netns: e.key.netns,
            len: e.len,
            result: if request.lost { "lost" } else { "reply" },
            lost,
            stages_ns: request.parts().map(|(_, name, ns)| (name, ns)).collect(),
        }
    }
}

#[derive(Serialize)]
struct LostRow {
    why: &'static str,
    #[serde(flatten)]
    dropped: Option<DropRow>,
    /// of the request, while another went on
    #[serde(skip_serializing_if = "Option::is_none")]
    copy: Option<DropRow>,
}

#[derive(Serialize)]
struct DropRow {
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// function+offset
    location: String,
}

impl DropRow {
    /// ` (NETFILTER_DROP) at nft_do_chain+0x1f`
    fn push_text(&self, line: &mut Vec<u8>) {
        if let Some(reason) = &self.reason {
            line.extend_from_slice(format!(" ({reason})").as_bytes());
        }
        line.extend_from_slice(format!(" at {}", self.location).as_bytes());
    }
}

/// One JSON object a line.
#[derive(Serialize)]
struct RequestRow {
    #[serde(rename = "type")]
    kind: &'static str,
    ts_ns: u64,
    wall_ns: u64,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    late: bool,
    tgid: u32,
    pid: u32,
    comm: String,
    cpu: u16,
    saddr: String,
    daddr: String,
    id: u16,
    seq: u16,
    iface: String,
    ifindex: u32,
    netns: u32,
    len: u32,
    result: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    lost: Option<LostRow>,
    stages_ns: BTreeMap<&'static str, u64>,
}
