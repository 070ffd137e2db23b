//! What is known of the running kernel before anything of a run is loaded: its types, what it can do, what will be probed.

use anyhow::Result;
use regex::Regex;

use crate::bpf;
use crate::filter::Filters;
use crate::kernel::btf::Btf;
use crate::kernel::btf_core::CoreBtf;
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::features::Features;
use crate::run::log;
use crate::tools::expression::ExpressionArgs;
use crate::tools::who::WhoWants;
use crate::usage::usage;

use super::args::Args;
use super::columns::{self, Types};
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

/// Which of the columns that --drops shows unasked this kernel can have.
fn settle(args: &mut Args, btf: &Btf, features: &Features) {
    if !args.drops {
        return;
    }
    let with_drops = &mut args.columns.with_drops;
    if let Some(why) = features.why_no_tracing() {
        if *with_drops != 0 {
            eprintln!("netprobe: owners of sockets and firewall rules are not shown: {why}");
        }
        *with_drops = 0;
    }
    for column in &columns::ALL {
        if *with_drops & column.section != 0 && (column.types)(btf).is_err() {
            *with_drops &= !column.section;
        }
    }
}

/// The types that the programs ask for, with those of netfilter's modules.
pub fn core_types(btf: &Btf) -> Result<CoreBtf> {
    CoreBtf::with_modules(
        btf,
        bpf::SKB_TYPES,
        &["nf_conntrack", "nf_tables", "x_tables"],
    )
}

impl Kernel {
    /// `pattern`: of the functions' names. `who`: what is needed to know whose packets they are.
    /// `fields`: NP_FIELD_* that are set.
    pub fn look(
        args: &mut Args,
        (filters, fields): (&mut Filters, u32),
        pattern: Option<&Regex>,
        who: WhoWants,
    ) -> Result<Self> {
        let (btf, features) = args.types.load(&[bpf::SKB_TYPES])?;
        if let Ok(btf) = &btf {
            settle(args, btf, &features);
        }
        let wants = Wants {
            track: args.track(),
            lives: args.lives(),
            owner: args.asks(SECTION_OWNER),
            drops: args.drops,
            begins: args.drops,
            listens: args.drops && features.why_no_tracing().is_none(),
            receivers: args.drops && args.asks(SECTION_OWNER) && !features.drop_sock,
            refusals: args.drops && args.asks(SECTION_OWNER) && !features.drop_reasons,
            returns: args.output_retval,
            xdp: args.filter_trace_xdp,
            nft: args.asks(SECTION_NFT),
            icmp: false,
            routes: false,
            who,
            changes: false,
            triggers: args.triggers.kinds(),
        };
        if args.drops && !wants.owner && !wants.nft && !wants.track && !wants.who.any {
            features.require_drops("skb --drops")?;
        } else {
            features.require_tracing("skb")?;
        }
        log::lacking();
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
        if args.drops {
            ExpressionArgs::follow_translations(filters, fields, &btf);
        }
        // In the user's file libbpf has to look for types itself.
        let core = match (&args.types.kernel_btf, types) {
            (Some(_), _) => None,
            (None, Types::Kernel) => Some(CoreBtf::new(&btf, bpf::SKB_TYPES)?),
            (None, Types::Modules) => Some(core_types(&btf)?),
        };
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
