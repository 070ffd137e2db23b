//! The fact that matters at a stage, in words.

use crate::text::escape::escaped;
use crate::tools::skb::event::{Event, Facts};

use super::stages::{Shows, Stage};

/// The fact that matters at a stage.
pub fn fact(stage: &Stage, event: &Event, device: &str) -> String {
    let facts = event.facts.as_deref();
    match stage.shows {
        Some(Shows::Route) => facts.map_or_else(String::new, route),
        Some(Shows::Device) if !device.is_empty() => format!("dev {device}"),
        Some(Shows::NextHop) => facts.map_or_else(String::new, |f| next_hop(f, event)),
        Some(Shows::Queue) => facts.map_or_else(String::new, queue),
        Some(Shows::Reader) => format!("{}[{}]", escaped(&event.head.comm), event.head.tgid),
        _ => String::new(),
    }
}

pub fn route(facts: &Facts) -> String {
    let Some(route) = &facts.route else {
        return String::new();
    };
    let mut text = format!("dev {}", escaped(&route.ifname));
    if let Some(gateway) = route.gateway {
        text += &format!(" via {gateway}");
    }
    text += match route.kind {
        2 => ", local",
        3 => ", broadcast",
        5 => ", multicast",
        _ => "",
    };
    if route.error != 0 {
        let errno = nix::errno::Errno::from_raw(i32::from(route.error).abs());
        text += &format!(", refuses ({errno:?})");
    }
    text
}

fn next_hop(facts: &Facts, event: &Event) -> String {
    let route = facts.route.as_ref();
    let hop = route
        .and_then(|r| r.gateway)
        .or_else(|| event.tuple.flatten().map(|t| t.daddr));
    hop.map_or_else(String::new, |hop| format!("of {hop}"))
}

fn queue(facts: &Facts) -> String {
    const LISTEN: u8 = 10;
    match facts.socket {
        Some(s) if s.state == LISTEN => {
            format!("listening, {} of {} wait for accept()", s.backlog, s.limit)
        }
        Some(s) => format!("holds {} of {} bytes", s.rmem, s.rcvbuf),
        None => String::new(),
    }
}
