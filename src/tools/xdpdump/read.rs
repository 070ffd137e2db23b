//! `-r`: the packets of a capture file, printed as live ones are.

use std::path::Path;

use anyhow::{Context, Result};

use crate::capture::savefile::Reader;
use crate::filter::pcap::Packets;
use crate::run::Flow;
use crate::run::output::Output;

use super::args::Args;
use super::present::{Presenter, Shown};

/// Prints the packets of `path` that the filter and the verdicts let through.
pub fn run(args: &Args, path: &Path) -> Result<()> {
    let failed = || format!("failed to read {}", path.display());
    let mut reader = Reader::open(path).with_context(failed)?;
    let linktype = reader.linktype();
    let filter = args.filter(Packets::in_file(&reader))?;
    let mut out = Output::open(&args.output)?;
    let mut presenter = Presenter::new(args);
    let mut printed = 0;
    loop {
        // What was read before a cut is printed: the error comes behind it.
        let packet = match reader.next_packet() {
            Ok(Some(packet)) => packet,
            Ok(None) => break,
            Err(error) => {
                out.flush()?;
                return Err(error).with_context(failed);
            }
        };
        let note = &packet.note;
        let verdict = note.verdict.and_then(|verdict| u32::try_from(verdict).ok());
        let matches = filter
            .as_ref()
            .is_none_or(|filter| filter.run(&packet.bytes, packet.wire_len) != 0);
        if !matches || !args.wants(verdict) {
            continue;
        }
        let shown = Shown {
            wall: packet.ts(),
            iface: &note.interface,
            place: None,
            queue: note.queue,
            id: note.id,
            verdict,
            linktype,
            len: packet.wire_len,
            data: &packet.bytes,
            late: false,
            comment: note.comment.as_deref(),
            diff: None,
        };
        printed += 1;
        if presenter.packet(&mut out, &shown)? == Flow::Stop || printed == args.limit() {
            break;
        }
    }
    out.flush()
}
