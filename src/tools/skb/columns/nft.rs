//! Who in netfilter dropped a packet.

use std::io::Write;

use anyhow::{Result, bail};

use crate::bpf::read;
use crate::bpf::skb::types::nf_decision;
use crate::kernel::btf::{self, Btf};
use crate::text::json::Object;
use crate::tools::skb::event::{Event, SECTION_NFT};
use crate::tools::skb::netfilter::{Decision, Hook, Who};
use crate::tools::skb::view::View;

use super::column::{Column, Default, Flag, Of, Types};

pub const NFT: Column = Column {
    flag: Some(Flag {
        name: "output-nft",
        help: "Show who in netfilter dropped a packet: nft table, chain and rule (its handle) or policy, table of the older iptables, or the function of another hook (kernels with BTF of modules, from 5.11; the rule from 5.17). On with --drops; =false switches it off",
        default: Default::WithDrops,
    }),
    of: Of::Functions,
    types,
    prepare: Some(|view, event| match &event.nft {
        Some(nft) => view.symbols.resolve(&nft.addresses()),
        None => Ok(()),
    }),
    behind: Some((1, text)),
    json: Some(json),
    ..Column::new(SECTION_NFT, size_of::<nf_decision>(), |event, bytes, _| {
        let (n, rest) = read::<nf_decision>(bytes)?;
        event.nft = Decision::new(&n).map(Box::new);
        Some(rest)
    })
};

/// What of the kernel's types it needs; an error where the kernel does not have them.
pub fn types(btf: &Btf) -> Result<Types> {
    if btf.struct_named("nft_chain").is_some() {
        return Ok(Types::Kernel); // built in
    }
    let modules = btf::modules();
    if modules.is_empty() {
        bail!(
            "--output-nft: this kernel has no BTF of modules (it needs 5.11), which says what nf_tables' structs are; without the flag a drop's place still shows"
        );
    }
    if !modules.iter().any(|m| m == "nf_tables") {
        bail!("--output-nft: the module nf_tables is not loaded: nft has no rules here");
    }
    Ok(Types::Modules)
}

fn text(view: &mut View, event: &Event, line: &mut Vec<u8>) {
    if let Some(who) = view.who(event) {
        let _ = write!(line, " {who}");
    }
}

fn json(view: &mut View, event: &Event, object: &mut Object<'_>) {
    match view.who(event) {
        Some(Who::Nft(nft)) => object.field("nft", &nft),
        Some(Who::Legacy(legacy)) => object.field("iptables", &legacy),
        Some(Who::Hook(hook)) => object.field("netfilter", &hook),
        Some(Who::Unknown) => object.field("netfilter", &None::<Hook>),
        None => {}
    }
}
