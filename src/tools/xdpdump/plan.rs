//! What is to be watched at each interface: in front of its XDP programs, or one of them.

use anyhow::{Context, Result};

use crate::capture::linktype::Linktype;
use crate::chain::attach as chain;
use crate::chain::place::{Lock, Place};
use crate::filter::expr::{self, SNAPLEN};
use crate::filter::pcap::Packets;
use crate::kernel::{netdev, xdp};
use crate::usage::UsageError;

use super::args::{Args, Mode};
use super::probes::{Options, Tunnel};
use super::trace::{self, Target};

/// An interface and what is to be traced at it; nothing: capture in front of its programs.
pub struct Planned {
    pub iface: String,
    pub ifindex: u32,
    pub linktype: Linktype,
    pub options: Options,
    pub targets: Vec<Target>,
}

/// Decides what is to be watched at an interface.
pub fn plan(args: &Args, iface: &str) -> Result<Planned> {
    let ifindex = netdev::index(iface)?;
    let hatype = netdev::hardware(iface)?;
    let linktype = linktype(iface, hatype)?;
    let packets = Packets::Of {
        linktype,
        snaplen: SNAPLEN,
        netmask: netdev::netmask(iface),
    };
    let filter = args.filter(packets);
    note_tags(args, iface);
    let tunnel = (linktype == Linktype::RAW_IP).then(|| -> Result<Tunnel> {
        let ends = netdev::tunnel_ends(ifindex)
            .with_context(|| format!("failed to ask for the addresses of {iface}"))?;
        Ok(Tunnel { hatype, ends })
    });
    let mut planned = Planned {
        iface: iface.to_owned(),
        ifindex,
        linktype,
        options: Options {
            snaplen: args.capture_len(),
            sample: args.sample,
            filter: filter.with_context(|| format!("{iface} ({})", linktype.name()))?,
            tunnel: tunnel.transpose()?,
        },
        targets: Vec::new(),
    };
    let trace = match args.mode {
        Mode::Chain => false,
        Mode::Trace => true,
        Mode::Auto => {
            // A chain of netprobe's own is joined; a capture without a program to look at makes its own.
            let lock = Lock::take()?;
            let chained = chain::recover(&Place::find(iface, &lock)?)?.is_some();
            let attached = xdp::query(ifindex)
                .with_context(|| format!("failed to ask for the XDP program of {iface}"))?;
            !chained && attached.is_some()
        }
    };
    if trace {
        match trace::targets(iface, ifindex, &args.program_names) {
            Ok(targets) => planned.targets = targets,
            Err(error) if args.mode == Mode::Trace || error.is::<UsageError>() => {
                return Err(error);
            }
            Err(error) => eprintln!("netprobe: {iface}: {error:#}"),
        }
    }
    Ok(planned)
}

/// Says that VLAN tags are not in the packets, where somebody may look for them: where the expression does, and below VLAN interfaces.
fn note_tags(args: &Args, iface: &str) {
    let asks = args
        .filter_text()
        .is_some_and(|text| expr::asks_vlan(&text));
    let above = netdev::vlans_above(iface);
    if (asks || !above.is_empty()) && netdev::takes_vlan_tags(iface) {
        eprintln!(
            "netprobe: {iface} takes VLAN tags off before XDP (rx-vlan-offload): packets are shown, and matched by `vlan`, without \
             their outer tag; ethtool -K {iface} rxvlan off leaves it in the packet"
        );
    }
}

/// What the packets of an interface begin with.
fn linktype(iface: &str, hatype: u16) -> Result<Linktype> {
    Linktype::of_device(hatype).with_context(|| {
        format!(
            "{iface}: its packets have a link header that netprobe does not know (ARPHRD {hatype})"
        )
    })
}
