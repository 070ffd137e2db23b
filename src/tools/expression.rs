//! The flags of a packet expression, shared by tools that see an sk_buff: what was typed in, `Filters` out.

use std::path::Path;

use anyhow::{Context, Result};

use crate::filter::Filters;
use crate::filter::cbpf::Program;
use crate::filter::expr::{self, Compiled, SNAPLEN};
use crate::filter::members::Condition;
use crate::filter::pcap::Linktype;
use crate::kernel::btf::Btf;
use crate::tools::fields;
use crate::usage::usage;

/// Filters by expression, decided in the kernel. All that are given must hold, beside the field filters.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Filter by expression")]
pub struct ExpressionArgs {
    /// Packets to show, in tcpdump's language (pcap-filter(7)); the words are joined
    #[arg(value_name = "EXPRESSION")]
    pub expression: Vec<String>,

    /// Match the Ethernet frame inside VXLAN, GENEVE or GRE. Packets outside a tunnel are not filtered
    #[arg(long, value_name = "EXPRESSION")]
    pub filter_tunnel_pcap_l2: Option<String>,

    /// Match the IP packet inside VXLAN, GENEVE, IPIP or GRE. Packets outside a tunnel are not filtered
    #[arg(long, value_name = "EXPRESSION")]
    pub filter_tunnel_pcap_l3: Option<String>,

    /// A condition in C on members of the sk_buff and of the structs that it points to: 'skb->dev->ifindex == 3 && skb->mark & 0xff != 0';
    /// constants may be names of enums; values are in the kernel's byte order (htons(…), htonl(…))
    #[arg(long, value_name = "CONDITION")]
    pub filter_skb_expr: Option<String>,
}

impl ExpressionArgs {
    /// Compiles everything; an error is the user's. Notes go to stderr. `kernel_btf`: the file in place of the kernel's own types.
    pub fn filters(&self, kernel_btf: Option<&Path>) -> Result<Filters> {
        let expression = match expr::join(&self.expression) {
            Some(text) => Some(Compiled::new(&text).map_err(|e| usage(format!("{e:#}")))?),
            None => None,
        };
        if let Some(note) = expression.as_ref().and_then(Compiled::note) {
            eprintln!("netprobe: {note}");
        }
        Ok(Filters {
            expression,
            tunnel_l2: tunnel(
                "--filter-tunnel-pcap-l2",
                &self.filter_tunnel_pcap_l2,
                Linktype::ETHERNET,
            )?,
            tunnel_l3: tunnel(
                "--filter-tunnel-pcap-l3",
                &self.filter_tunnel_pcap_l3,
                Linktype::RAW_IP,
            )?,
            members: self.members(kernel_btf)?,
            translations: false,
        })
    }

    /// For tools that show drops: filters hold for what a packet was before its addresses were translated, too. `fields`: NP_FIELD_*
    /// that are set. stderr tells if the kernel does not say what an entry of conntrack is.
    pub fn follow_translations(filters: &mut Filters, fields: u32, btf: &Btf) {
        if filters.expression.is_none() && fields & fields::PACKET == 0 {
            return;
        }
        filters.translations = btf.struct_named("nf_conn").is_some();
        if !filters.translations {
            eprintln!(
                "netprobe: drops after a translation of addresses match by their new addresses alone: this kernel's BTF has no struct nf_conn"
            );
        }
    }

    fn members(&self, kernel_btf: Option<&Path>) -> Result<Option<Condition>> {
        let Some(text) = &self.filter_skb_expr else {
            return Ok(None);
        };
        let mut btf = Btf::vmlinux(kernel_btf);
        if kernel_btf.is_some() {
            btf = btf.context("--kernel-btf");
        }
        let btf = btf?;
        Condition::parse(text, ("skb", "sk_buff"), &btf)
            .map(Some)
            .map_err(|e| usage(format!("--filter-skb-expr '{text}': {e:#}")))
    }
}

fn tunnel(flag: &str, text: &Option<String>, linktype: Linktype) -> Result<Option<Program>> {
    text.as_ref()
        .map(|text| {
            expr::compile(text, linktype, SNAPLEN).map_err(|e| usage(format!("{flag}: {e:#}")))
        })
        .transpose()
}
