//! `-c`: the table of counts, from the map and as lines.

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use serde::Serialize;

use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::pad;

use super::decode::{self, CountedFlow};

/// A flow and how many connects it had.
pub type Count = (CountedFlow, u64);

/// Reads the map; largest first, then by address.
pub fn read(map: &impl MapCore) -> Result<Vec<Count>> {
    let mut counts = Vec::new();
    for key in map.keys() {
        // A key may be gone or new while we look: nothing removes keys, so one that is listed has a value.
        let Some(value) = map
            .lookup(&key, MapFlags::ANY)
            .context("failed to read the counts")?
        else {
            continue;
        };
        if let (Some(flow), Ok(value)) = (decode::flow(&key), value.as_slice().try_into()) {
            counts.push((flow, u64::from_ne_bytes(value)));
        }
    }
    sort(&mut counts);
    Ok(counts)
}

fn sort(counts: &mut [Count]) {
    counts.sort_by(|(f, n), (g, m)| m.cmp(n).then_with(|| f.cmp(g)));
}

/// Prints the table: at most `top` rows, each an event.
pub fn print(out: &mut Output, counts: &[Count], top: Option<usize>, lport: bool) -> Result<Flow> {
    let shown = &counts[..top.unwrap_or(counts.len()).min(counts.len())];
    if out.json() {
        for (flow, connects) in shown {
            let row = Row {
                kind: "count",
                saddr: flow.saddr.to_string(),
                lport: lport.then_some(flow.lport),
                daddr: flow.daddr.to_string(),
                dport: flow.dport,
                connects: *connects,
            };
            if out.json_event(&row)? == Flow::Stop {
                return Ok(Flow::Stop);
            }
        }
        return Ok(Flow::Continue);
    }
    let mut widths = [25, 20, 25, 20, 10];
    let header = ["LADDR", "LPORT", "RADDR", "RPORT", "CONNECTS"].map(str::to_string);
    let rows: Vec<[String; 5]> = shown.iter().map(columns).collect();
    for row in &rows {
        for (width, text) in widths.iter_mut().zip(row) {
            *width = text.len().max(*width);
        }
    }
    out.line(|b| line(b, &header, &mut widths, lport))?;
    for row in &rows {
        if out.event(|b| line(b, row, &mut widths, lport))? == Flow::Stop {
            return Ok(Flow::Stop);
        }
    }
    Ok(Flow::Continue)
}

fn columns((flow, connects): &Count) -> [String; 5] {
    [
        flow.saddr.to_string(),
        flow.lport.to_string(),
        flow.daddr.to_string(),
        flow.dport.to_string(),
        connects.to_string(),
    ]
}

fn line(b: &mut Vec<u8>, row: &[String; 5], widths: &mut [usize; 5], lport: bool) {
    for (i, (text, width)) in row.iter().zip(widths).enumerate() {
        if i == 1 && !lport {
            continue;
        }
        let start = b.len();
        b.extend_from_slice(text.as_bytes());
        pad(b, start, width);
    }
    // The last column has no space behind it.
    b.pop();
}

#[derive(Serialize)]
struct Row {
    #[serde(rename = "type")]
    kind: &'static str,
    saddr: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    lport: Option<u16>,
    daddr: String,
    dport: u16,
    connects: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::output::OutputArgs;

    fn flow(daddr: &str, dport: u16) -> CountedFlow {
        CountedFlow {
            saddr: "10.0.0.1".parse().unwrap(),
            daddr: daddr.parse().unwrap(),
            dport,
            lport: 7,
        }
    }

    fn printed(top: Option<usize>, lport: bool) -> String {
        let file = tempfile::NamedTempFile::new().unwrap();
        let args = OutputArgs {
            output_file: Some(file.path().to_path_buf()),
            ..OutputArgs::default()
        };
        let mut out = Output::open(&args).unwrap();
        let mut counts = vec![
            (flow("10.0.0.2", 80), 2),
            (flow("2001:db8:1111:2222:3333:4444:5555:6666", 443), 3),
        ];
        sort(&mut counts);
        print(&mut out, &counts, top, lport).unwrap();
        out.flush().unwrap();
        std::fs::read_to_string(file.path()).unwrap()
    }

    #[test]
    fn the_table_is_sorted_and_its_columns_fit() {
        assert_eq!(
            printed(None, false),
            "\
LADDR                     RADDR                                  RPORT                CONNECTS  
10.0.0.1                  2001:db8:1111:2222:3333:4444:5555:6666 443                  3         
10.0.0.1                  10.0.0.2                               80                   2         
"
        );
        let top = printed(Some(1), true);
        assert!(top.contains("LADDR                     LPORT "), "{top}");
        assert_eq!(top.lines().count(), 2);
    }
}
