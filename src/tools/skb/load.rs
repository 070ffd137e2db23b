//! Loads the programs of a run.

use std::mem::MaybeUninit;

use anyhow::{Context, Result};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{OpenMapMut, OpenObject};

use crate::bpf::skb::{SkbSkel, SkbSkelBuilder};
use crate::filter::{Filters, set_filter};
use crate::kernel::btf_core::CoreBtf;
use crate::run::object;
use crate::tools::who::{self, Who};

use super::args::Args;
use super::kernel::Kernel;

/// Opens, configures and loads the programs: those that the plan needs, as kprobe or kprobe.multi.
pub fn load<'a>(
    args: &Args,
    kernel: &Kernel,
    filters: &Filters,
    who: &Who,
    storage: &'a mut MaybeUninit<OpenObject>,
) -> Result<SkbSkel<'a>> {
    let Kernel {
        features,
        wants,
        plan,
        members,
        reasons,
        core,
        ..
    } = kernel;
    let btf = args
        .types
        .kernel_btf
        .clone()
        .or(core.as_ref().map(CoreBtf::path));
    let mut open = object::open(SkbSkelBuilder::default(), btf, storage)?;
    let rodata = open
        .maps
        .rodata_data
        .as_mut()
        .context("the BPF object has no .rodata")?;
    rodata.use_cast = u8::from(features.rdonly_cast);
    rodata.np_ring_wakeup = args.transport.wakeup(&args.engine);
    rodata.has_func_ip = u8::from(features.func_ip);
    rodata.has_reasons = u8::from(features.drop_reasons);
    rodata.stack_lacks_caller = u8::from(plan.stack_lacks_caller());
    rodata.sections = args.sections();
    rodata.snap_len = args.snap_len();
    set_filter!(rodata, filters.on(features.skb_fields));
    rodata.np_path_count = members.paths().len() as u32;
    for (to, from) in rodata.np_paths.iter_mut().zip(members.paths()) {
        *to = from;
    }
    rodata.np_translations = u8::from(filters.translations);
    rodata.nf_drop_reason = reasons.number("NETFILTER_DROP").unwrap_or(0);
    rodata.track = u8::from(args.track());
    rodata.listens = u8::from(wants.listens);
    rodata.rx_watched = u8::from(wants.receivers);
    rodata.has_rx_sock = u8::from(features.drop_sock);
    rodata.lives = u8::from(args.lives());
    rodata.track_stack = u8::from(args.track_stack());
    rodata.returns_on = u8::from(args.output_retval);
    rodata.who_on = who.on;
    rodata.who_uid = who.uid;
    rodata.who_cgroup = who.cgroup;
    rodata.who_comm = who.comm;
    let numbers = args.triggers.reasons(reasons, features)?;
    rodata.trigger_reason_count = numbers.len() as u32;
    for (to, from) in rodata.trigger_reasons.iter_mut().zip(numbers) {
        *to = from;
    }
    let size = |map: &mut OpenMapMut<'_>, entries: u32| {
        map.set_max_entries(entries)
            .context("failed to set the size of a map")
    };
    if args.track() || args.lives() {
        size(&mut open.maps.tracked, args.track_entries)?;
    }
    if args.track() {
        size(&mut open.maps.contexts, 4096)?;
    }
    if args.output_retval {
        size(&mut open.maps.entered, 16_384)?;
    }
    if args.output_bpfmap {
        size(&mut open.maps.map_calls, 4096)?;
    }
    if wants.owner {
        size(&mut open.maps.owners, args.track_entries)?;
    }
    if wants.nft {
        size(&mut open.maps.nf_ways, 4096)?;
        size(&mut open.maps.nft_calls, 4096)?;
    }
    who::prepare!(who, &mut open.maps, 0)?;
    args.transport.prepare(&mut open.maps.rings)?;
    plan.prepare(&mut open);
    filters.prepare(open.open_object_mut(), features)?;
    object::load(open)
}
