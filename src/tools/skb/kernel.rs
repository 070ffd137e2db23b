//! What is known of the running kernel before anything of a run is loaded: its types, what it can do, what will be probed.

use anyhow::{Context, Result};
use regex::Regex;

use crate::bpf;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::tools::who::WhoWants;
use crate::usage::usage;

use super::args::Args;
use super::columns::Types;
use super::event::{SECTION_NFT, SECTION_OWNER};
use super::members::Members;
use super::probes::{Plan, Wants};

pub struct Kernel {
    pub features: Features,
    pub wants: Wants,
    pub plan: Plan,
    /// members of the sk_buff that are shown
    pub members: Members,
    /// the same of the xdp_buff
    pub xdp_members: Members,
    pub reasons: DropReasons,
    /// the types that relocations ask for; `None`: libbpf looks for them itself
    pub core: Option<CoreBtf>,
    /// the kernel's types, where helpers of BPF programs are tracked
    pub btf: Option<Btf>,
}

impl Kernel {
    /// `pattern`: of the functions' names. `who`: what is needed to know whose packets they are.
    pub fn look(args: &Args, pattern: Option<&Regex>, who: WhoWants) -> Result<Self> {
        let mut btf = Btf::vmlinux(args.kernel_btf.as_deref());
        if args.kernel_btf.is_some() {
            // What was asked for by name is told by name.
            btf = Ok(btf.context("--kernel-btf")?);
        }
        if let Ok(btf) = &btf {
            btf.await_names(bpf::SKB_TYPES);
        }
        let mut features = Features::with(btf.as_ref().ok());
        if args.kernel_btf.is_some() {
            features.take_casts(Btf::vmlinux(None).ok().as_ref());
        }
        let wants = Wants {
            track: args.track(),
            lives: args.lives(),
            owner: args.asks(SECTION_OWNER),
            drops: args.drops,
            listens: args.drops && features.why_no_tracing().is_none(),
            receivers: args.drops && args.asks(SECTION_OWNER) && !features.drop_sock,
            returns: args.output_retval,
            xdp: args.filter_trace_xdp,
            nft: args.asks(SECTION_NFT),
            icmp: false,
            routes: false,
            who,
            changes: false,
        };
        if args.drops && !wants.owner && !wants.nft && !wants.who.any {
            features.require_drops("skb --drops")?;
        } else {
            features.require_tracing("skb")?;
        }
        let btf = btf?;
        let types = args.types(&btf)?;
        let plan = if args.drops {
            Plan::drops(&btf, &features, args.backend, wants)?
        } else {
            Plan::make(&btf, &features, args, pattern, wants)?
        };
        let members = Members::parse(&args.output_skb_metadata, ("skb", "sk_buff"), &btf)
            .map_err(|e| usage(format!("--output-skb-metadata: {e:#}")))?;
        let xdp_shown = Members::parse(&args.output_xdp_metadata, ("xdp", "xdp_buff"), &btf)
            .map_err(|e| usage(format!("--output-xdp-metadata: {e:#}")))?;
        let reasons = DropReasons::load(&btf);
        // In modules libbpf has to look for types itself. So it has in the user's file.
        let core = (args.kernel_btf.is_none() && types == Types::Kernel)
            .then(|| CoreBtf::new(&btf, bpf::SKB_TYPES))
            .transpose()?;
        // Some 3 MB, which only a few need any longer.
        let helpers = args.filter_track_bpf_helpers.then_some(btf);
        Ok(Self {
            features,
            wants,
            plan,
            members,
            xdp_members: xdp_shown,
            reasons,
            core,
            btf: helpers,
        })
    }
}
