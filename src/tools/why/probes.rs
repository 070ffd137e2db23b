//! What `netprobe why` attaches: the programs of `netprobe skb` at the functions of its stages, with tracking, owners, drops and
//! netfilter's decisions.

use std::mem::MaybeUninit;

use anyhow::{Context, Result};
use libbpf_rs::OpenMapMut;
use libbpf_rs::skel::OpenSkel;

use crate::bpf::skb::{SkbSkel, SkbSkelBuilder};
use crate::filter::{Filters, set_filter};
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::run::object;
use crate::tools::skb::columns::ct::{self, SECTION_CT};
use crate::tools::skb::columns::facts::SECTION_FACTS;
use crate::tools::skb::columns::nft;
use crate::tools::skb::event as skb;
use crate::tools::skb::kernel::core_types;
use crate::tools::skb::probes::{Plan, Wants};
use crate::tools::who::{self, Who};

use super::args::Args;
use super::stages::Stages;

/// What is to be attached, and the sections that events carry.
pub struct Probes {
    pub plan: Plan,
    /// nft's decisions are seen
    pub nft: bool,
    /// entries of connection tracking are seen
    ct: bool,
    receivers: bool,
    returns: bool,
    types: CoreBtf,
}

impl Probes {
    pub fn plan(args: &Args, who: &Who, btf: &Btf, features: &Features) -> Result<Self> {
        let nft = nft::types(btf).is_ok();
        let receivers = !features.drop_sock;
        let returns = args.compare.is_some() && features.func_ip;
        if args.compare.is_some() && !returns {
            eprintln!(
                "netprobe: kernel {} does not show what functions return (it needs 5.15)",
                features.release
            );
        }
        let wants = Wants {
            track: true,
            owner: true,
            drops: true,
            listens: true,
            receivers,
            refusals: !features.drop_reasons,
            nft,
            icmp: true,
            routes: who.on != 0,
            returns,
            who: who.wants(),
            changes: args.changes,
            ..Wants::default()
        };
        let stages = Stages::builtin();
        let wanted = |name: &str| stages.role(name).is_some();
        let plan = Plan::of_names(btf, features, args.backend, wanted, wants)?;
        Ok(Self {
            plan,
            nft,
            ct: ct::types(btf).is_ok(),
            receivers,
            returns,
            types: core_types(btf)?,
        })
    }

    fn sections(&self) -> u32 {
        let nft = if self.nft { skb::SECTION_NFT } else { 0 };
        let ct = if self.ct { SECTION_CT } else { 0 };
        skb::SECTION_META
            | skb::SECTION_TUPLE
            | skb::SECTION_PACKET
            | skb::SECTION_OWNER
            | skb::SECTION_DATA
            | skb::SECTION_DROP
            | SECTION_FACTS
            | nft
            | ct
    }

    /// Opens, configures and loads the programs.
    pub fn load<'a>(
        &self,
        args: &Args,
        features: &Features,
        (filters, reasons): (&Filters, &DropReasons),
        who: &Who,
        storage: &'a mut MaybeUninit<libbpf_rs::OpenObject>,
    ) -> Result<SkbSkel<'a>> {
        let mut open = object::open(SkbSkelBuilder::default(), Some(self.types.path()), storage)?;
        let rodata = open.maps.rodata_data.as_mut();
        let rodata = rodata.context("the BPF object has no .rodata")?;
        rodata.use_cast = u8::from(features.rdonly_cast);
        rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
        rodata.has_func_ip = u8::from(features.func_ip);
        rodata.has_reasons = u8::from(features.drop_reasons);
        rodata.sections = self.sections();
        rodata.snap_len = args.snap_len();
        rodata.returns_on = u8::from(self.returns);
        set_filter!(rodata, filters.on(features.skb_fields));
        rodata.nf_drop_reason = reasons.number("NETFILTER_DROP").unwrap_or(0);
        rodata.nf_accepts = u8::from(self.nft);
        rodata.nf_legacy = self.plan.legacy_tables();
        rodata.track = 1;
        rodata.listens = 1;
        rodata.rx_watched = u8::from(self.receivers);
        rodata.has_rx_sock = u8::from(features.drop_sock);
        rodata.who_on = who.on;
        rodata.who_uid = who.uid;
        rodata.who_cgroup = who.cgroup;
        rodata.who_comm = who.comm;
        let size = |map: &mut OpenMapMut<'_>, entries: u32| {
            map.set_max_entries(entries)
                .context("failed to set the size of a map")
        };
        size(&mut open.maps.tracked, args.track_entries)?;
        size(&mut open.maps.contexts, 4096)?;
        if self.returns {
            size(&mut open.maps.entered, 16_384)?;
        }
        if args.changes {
            size(&mut open.maps.changes, 256)?;
        }
        size(&mut open.maps.owners, args.track_entries)?;
        who::prepare!(who, &mut open.maps, args.track_entries)?;
        if self.nft {
            size(&mut open.maps.nf_ways, 4096)?;
            size(&mut open.maps.nft_calls, 4096)?;
        }
        args.transport.prepare(&mut open.maps.rings)?;
        self.plan.prepare(&mut open);
        filters.prepare(open.open_object_mut(), features)?;
        object::load(open)
    }
}
