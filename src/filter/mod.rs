//! Packet expressions decided in the kernel: tcpdump's language → cBPF (`expr`, by libpcap) → eBPF (`ebpf`) → put
//! into a BPF object before it is loaded (`inject`). Must not know any tool.
//!
//! | module | what it holds |
//! |---|---|
//! | `expr` | an expression, compiled for both kinds of packets, or the reason why not |
//! | `pcap` | the functions of libpcap |
//! | `cbpf` | programs that passed the kernel's checks, a plain interpreter |
//! | `ebpf` | the translation |
//! | `members` | conditions on members of kernel structs |
//! | `code` | a program's instructions, taken out of libbpf and put back |
//! | `inject` | instructions in place of a stub |
//! | `prune` | a program without what its constants switch off |
//! | `run` | a translated filter over packets, in this kernel, without a network |
//!
//! One expression is put into a program in one of these forms (`ebpf::LoadMode`), the first that the kernel and the expression allow:
//!
//! | form | how it loads the packet's bytes | stub | for | kernels |
//! |---|---|---|---|---|
//! | `ByCast` | plain loads behind bpf_rdonly_cast | `np_filter_by_cast` | an expression that does not ask for `len` or `vlan` | 6.2 |
//! | `ByCopy` | from a short copy on the stack; what it does not decide is left to `ByBlock` | `np_filter_by_copy` | an expression without `vlan` | before 6.2 |
//! | `ByBlock` | from a block of headers that was copied once, farther ones by a subprogram | `np_filter_l2`, `np_filter_l3`, `np_filter_tagged`, `np_filter_tunnel_*` | all | all |
//! | `ByPacket` | direct access between data and data_end; farther ones by bpf_xdp_load_bytes | `np_filter_xdp_stub` | XDP programs | all; 5.18 for several buffers |
//!
//! `l2` is the program for packets that have an Ethernet header, `l3` the one for packets that begin with the IP header.

pub mod cbpf;
mod code;
pub mod ebpf;
pub mod expr;
pub mod inject;
pub mod members;
pub mod pcap;
mod prune;
pub mod run;

#[cfg(test)]
mod tests;

use anyhow::Result;
use libbpf_rs::OpenObject;

use crate::bpf::skb::types::{np_filter_bit, np_filter_block};
use crate::insn::asm::Insn;
use cbpf::Program;
use ebpf::{FarLoad, LoadMode};
use expr::Compiled;
use inject::Body;
use members::Condition;

use crate::kernel::features::{Features, SkbFields};

/// Bytes of header that a tracing program copies once, for all loads.
pub const BLOCK: u32 = np_filter_block::NP_FILTER_BLOCK.0;

/// What is set in `np_filter_on` (NP_FILTER_*).
const EXPRESSION: u32 = np_filter_bit::NP_FILTER_EXPRESSION.0;
const TUNNEL_L2: u32 = np_filter_bit::NP_FILTER_TUNNEL_L2.0;
const TUNNEL_L3: u32 = np_filter_bit::NP_FILTER_TUNNEL_L3.0;
const MEMBERS: u32 = np_filter_bit::NP_FILTER_MEMBERS.0;
const BY_CAST: u32 = np_filter_bit::NP_FILTER_BY_CAST.0;
const BY_COPY: u32 = np_filter_bit::NP_FILTER_BY_COPY.0;
const VLAN: u32 = np_filter_bit::NP_FILTER_VLAN.0;

/// Sets the filters' variables in the `.rodata` of an object with filter.bpf.h: `$on` is [`Filters::on`] or [`Filters::on_xdp`]. A macro,
/// since each skeleton has a type of its own for its `.rodata`.
macro_rules! set_filter {
    ($rodata:expr, $on:expr) => {
        $rodata.np_filter_on = $on;
        if $rodata.np_filter_on != 0 {
            let pages = $crate::kernel::pages::Pages::find();
            $rodata.np_filter_vmemmap_base = pages.vmemmap_base;
            $rodata.np_filter_page_offset_base = pages.page_offset_base;
            $rodata.np_filter_vmemmap = pages.vmemmap;
            $rodata.np_filter_page_offset = pages.page_offset;
            $rodata.np_filter_page_shift = $crate::os::page_size().ilog2();
        }
    };
}
pub(crate) use set_filter;

/// The stub of [`Filters::members`].
const MEMBERS_STUB: &str = "np_filter_members";
/// The stub of the expression for packets with a VLAN tag beside them.
const TAGGED_STUB: &str = "np_filter_tagged";

/// The filters of a program that has an sk_buff (filter.bpf.h); all that are given must hold.
#[derive(Debug, Default)]
pub struct Filters {
    pub expression: Option<Compiled>,
    /// On the Ethernet frame inside a tunnel; what is not tunnelled passes.
    pub tunnel_l2: Option<Program>,
    /// On the IP packet inside a tunnel; what is not tunnelled passes.
    pub tunnel_l3: Option<Program>,
    /// On members of the sk_buff and what it points to.
    pub members: Option<Condition>,
    /// The expression is asked about other addresses too (translated.bpf.h): in the form `ByBlock` for what begins with the IP header.
    pub translations: bool,
}

impl Filters {
    /// The value of `np_filter_on`. `fields`: as for `inject`.
    pub fn on(&self, fields: Option<SkbFields>) -> u32 {
        let bit = |given: bool, bit: u32| if given { bit } else { 0 };
        bit(self.expression.is_some(), EXPRESSION)
            | bit(self.tunnel_l2.is_some(), TUNNEL_L2)
            | bit(self.tunnel_l3.is_some(), TUNNEL_L3)
            | bit(self.members.is_some(), MEMBERS)
            | bit(self.by_cast(fields).is_some(), BY_CAST)
            | bit(self.by_copy(fields).is_some(), BY_COPY)
            | bit(self.tagged().is_some(), VLAN)
    }

    /// The expression for packets with a VLAN tag beside them, where it has `vlan`: then it has no other form than that of the block.
    fn tagged(&self) -> Option<&Program> {
        self.expression.as_ref()?.tagged.as_ref()
    }

    /// The expression, where typed loads can decide it: all that do not ask for the packet's length.
    fn by_cast(&self, fields: Option<SkbFields>) -> Option<(&Compiled, SkbFields)> {
        let asks = |program: &Program| program.ops().any(|op| op.asks_length());
        let expression = self.expression.as_ref()?;
        if expression.tagged.is_some() {
            return None;
        }
        let length = asks(&expression.l2) || expression.l3.as_ref().is_ok_and(asks);
        let fields = fields.filter(|fields| fields.typed && !length)?;
        Some((expression, fields))
    }

    /// The expression over a short copy, where there are no typed loads.
    fn by_copy(&self, fields: Option<SkbFields>) -> Option<Vec<Insn>> {
        let expression = self.expression.as_ref()?;
        if expression.tagged.is_some() {
            return None;
        }
        let fields = fields.filter(|fields| !fields.typed)?;
        let nothing = Program::nothing();
        let l3 = expression.l3.as_ref().unwrap_or(&nothing);
        // What cannot be translated is told of by the whole translation.
        let copied = ebpf::translate_by_copy(&expression.l2, l3, fields);
        copied.ok().flatten()
    }

    /// The stubs' new bodies.
    fn bodies(&self, fields: Option<SkbFields>) -> Result<Vec<Body>> {
        let block = LoadMode::ByBlock {
            size: BLOCK,
            far: FarLoad::Subprogram,
        };
        let (mut bodies, mut by_cast) = (Vec::new(), None);
        let mut add = |stub, program: &Program| -> Result<()> {
            bodies.push(Body {
                stub,
                insns: ebpf::translate(program, block)?,
            });
            Ok(())
        };
        if let Some((expression, fields)) = self.by_cast(fields) {
            let nothing = Program::nothing();
            let l3 = expression.l3.as_ref().unwrap_or(&nothing);
            by_cast = Some(ebpf::translate_by_cast(&expression.l2, l3, fields)?);
            if self.translations {
                add("np_filter_l3", l3)?;
            }
        } else if let Some(expression) = &self.expression {
            add("np_filter_l2", &expression.l2)?;
            match &expression.l3 {
                Ok(l3) => add("np_filter_l3", l3)?,
                Err(_) => add("np_filter_l3", &Program::nothing())?,
            }
            if let Some(tagged) = self.tagged() {
                add(TAGGED_STUB, tagged)?;
            }
        }
        let by_copy = self.by_copy(fields);
        if let Some(program) = &self.tunnel_l2 {
            add("np_filter_tunnel_l2", program)?;
        }
        if let Some(program) = &self.tunnel_l3 {
            add("np_filter_tunnel_l3", program)?;
        }
        if let Some(insns) = by_copy {
            bodies.push(Body {
                stub: "np_filter_by_copy",
                insns,
            });
        }
        if let Some(insns) = by_cast {
            bodies.push(Body {
                stub: "np_filter_by_cast",
                insns,
            });
        }
        if let Some(condition) = &self.members {
            bodies.push(Body {
                stub: MEMBERS_STUB,
                insns: condition.translate()?,
            });
        }
        Ok(bodies)
    }

    /// Puts them into an object that is open and configured, and prepares it: the skeleton's `load()` is what may
    /// follow. Where the kernel has typed loads, casts become those of the kernel.
    pub fn prepare(&self, object: &mut OpenObject, features: &Features) -> Result<()> {
        inject::inject(
            object,
            &self.bodies(features.skb_fields)?,
            features.casts.as_ref(),
        )
    }

    /// The same for an object that is prepared.
    pub fn put_into(&self, object: &mut OpenObject, features: &Features) -> Result<()> {
        inject::change(
            object,
            &self.bodies(features.skb_fields)?,
            features.casts.as_ref(),
        )
    }

    /// The value of `np_filter_on` in a program that traces XDP programs; `members`: of the xdp_buff.
    pub fn on_xdp(&self, members: Option<&Condition>) -> u32 {
        let members = if members.is_some() { MEMBERS } else { 0 };
        self.on(None) & !(MEMBERS | VLAN) | members
    }

    /// [`Filters::prepare`] for a program that traces XDP programs: it has an xdp_buff and no sk_buff, and so no tag beside the packet.
    pub fn prepare_xdp(
        &self,
        object: &mut OpenObject,
        members: Option<&Condition>,
        features: &Features,
    ) -> Result<()> {
        let mut bodies = self.bodies(None)?;
        bodies.retain(|body| !matches!(body.stub, TAGGED_STUB | MEMBERS_STUB));
        if let Some(condition) = members {
            bodies.push(Body {
                stub: MEMBERS_STUB,
                insns: condition.translate()?,
            });
        }
        inject::inject(object, &bodies, features.casts.as_ref())
    }
}

/// The same for an XDP program (filter_xdp.bpf.h). `frags`: its packets may lie in several buffers.
pub fn inject_xdp(object: &mut OpenObject, program: &Program, frags: bool) -> Result<()> {
    let far = if frags {
        FarLoad::XdpLoad
    } else {
        FarLoad::Nothing
    };
    let insns = ebpf::translate(program, LoadMode::ByPacket { far })?;
    inject::inject(
        object,
        &[Body {
            stub: "np_filter_xdp_stub",
            insns,
        }],
        None,
    )
}

/// The same for a program that traces XDP programs: it calls np_filter_fields with a link header always, so that it has the one
/// stub alone. `np_filter_on` is 1 there.
pub fn inject_l2(object: &mut OpenObject, program: &Program) -> Result<()> {
    let mode = LoadMode::ByBlock {
        size: BLOCK,
        far: FarLoad::Subprogram,
    };
    let insns = ebpf::translate(program, mode)?;
    inject::inject(
        object,
        &[Body {
            stub: "np_filter_l2",
            insns,
        }],
        None,
    )
}

/// Takes out of an object that is prepared (see [`crate::kernel::bpf_object::prepare`]) what its constants switch off.
pub fn prune(object: &mut OpenObject) -> Result<()> {
    inject::change(object, &[], None)
}

/// The same where `use_cast` is set: with the running kernel's numbers of what is cast to.
pub fn prune_with_casts(object: &mut OpenObject, features: &Features) -> Result<()> {
    inject::change(object, &[], features.casts.as_ref())
}
