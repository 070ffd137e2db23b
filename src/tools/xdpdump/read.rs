//! `-r`: the packets of a capture file, printed as live ones are.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::capture::pcap_read::{Reader, is_ethernet};
use crate::run::output::Output;
use crate::run::session::Flow;

use super::args::Args;
use super::present::{Presenter, Shown};

/// Prints the packets of `path` that the filter and the verdicts let through.
pub fn run(args: &Args, path: &Path) -> Result<()> {
    let filter = args.filter()?;
    let failed = || format!("failed to read {}", path.display());
    let input: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).with_context(failed)?)
    };
    let mut reader = Reader::new(BufReader::with_capacity(1 << 20, input)).with_context(failed)?;
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
        let interface = reader.interface(packet.interface);
        if !interface.is_some_and(is_ethernet) {
            out.flush()?;
            bail!("{}: its packets are no Ethernet frames", path.display());
        }
        let verdict = packet
            .verdict
            .and_then(|verdict| u32::try_from(verdict).ok());
        let matches = filter
            .as_ref()
            .is_none_or(|(_, filter)| filter.l2.run(&packet.data, packet.len) != 0);
        if !matches || !args.wants(verdict) {
            continue;
        }
        let shown = Shown {
            wall: packet.ts,
            iface: interface.map_or("", |interface| &interface.name),
            place: None,
            queue: packet.queue,
            id: packet.id,
            verdict,
            len: packet.len,
            data: &packet.data,
            late: false,
            comment: packet.comment.as_deref(),
            diff: None,
        };
        printed += 1;
        if presenter.packet(&mut out, &shown)? == Flow::Stop || printed == args.limit() {
            break;
        }
    }
    out.flush()
}
