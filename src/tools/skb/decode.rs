//! Bytes of an event (src/bpf/skb/skb.h) to an owned value. Pure; short or odd data gives `None`.

use crate::bpf::read;
use crate::bpf::skb::types::{
    nf_decision, np_members, np_tuple, skb_copy, skb_data, skb_drop, skb_event, skb_kind, skb_map,
    skb_map_part, skb_meta, skb_mtu, skb_owner, skb_packet,
};
use crate::event::head::Head;
use crate::event::tuple::{Tuple, address};

use super::args::{
    SECTION_CALLER, SECTION_CB, SECTION_DATA, SECTION_DROP, SECTION_LIFE, SECTION_MAP,
    SECTION_MEMBERS, SECTION_META, SECTION_NFT, SECTION_OWNER, SECTION_PACKET, SECTION_SHINFO,
    SECTION_SKB, SECTION_STACK, SECTION_TUNNEL, SECTION_TUPLE,
};
use super::drops::Drop;
use super::netfilter::Decision;

const KIND_DROP: u16 = skb_kind::SKB_KIND_DROP.0 as u16;
const KIND_DROPPED: u16 = skb_kind::SKB_KIND_DROPPED.0 as u16;
const KIND_RETURN: u16 = skb_kind::SKB_KIND_RETURN.0 as u16;
const KIND_ENTER: u16 = skb_kind::SKB_KIND_ENTER.0 as u16;
const KIND_LEAVE: u16 = skb_kind::SKB_KIND_LEAVE.0 as u16;
const MAP_KEY: u32 = skb_map_part::SKB_MAP_KEY.0;
const MAP_VALUE: u32 = skb_map_part::SKB_MAP_VALUE.0;
const MTU_TAGGED: u32 = skb_mtu::SKB_MTU_TAGGED.0;
const PACKET_CPU_BITS: u32 = skb_packet::SKB_PACKET_CPU_BITS.0;

/// A function was entered with this skb.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Event {
    pub head: Head,
    /// address of the sk_buff
    pub skb: u64,
    /// address of the function, or of the place of the drop
    pub func: u64,
    /// from the tracepoint of drops
    pub dropped: bool,
    /// value of enum skb_drop_reason, where the function says why it frees the skb
    pub reason: Option<u32>,
    /// what the function gives back: it ends, where this is something
    pub retval: Option<i32>,
    /// it is no function but a tc or XDP program: `func` is its id
    pub program: Option<Point>,
    pub meta: Option<Meta>,
    /// outer: the section is there; inner: the packet is IP
    pub tuple: Option<Option<Tuple>>,
    pub packet: Option<Packet>,
    /// outer: the section is there; inner: the packet has a socket
    pub owner: Option<Option<Owner>>,
    /// address of the function's caller
    pub caller: Option<u64>,
    /// outer: the section is there; inner: there is a packet inside
    pub tunnel: Option<Option<Tuple>>,
    pub cb: Option<[u8; 48]>,
    /// bytes of the struct sk_buff; empty where they could not be read
    pub skb_copy: Option<Vec<u8>>,
    /// the same of the struct skb_shared_info
    pub shared_info: Option<Vec<u8>>,
    pub data: Option<Data>,
    /// bytes as they were read, `None` where they could not be: `members` knows what they are
    pub members: Option<[Option<u64>; 4]>,
    /// who in netfilter dropped the packet
    pub nft: Option<Decision>,
    pub map: Option<MapCall>,
    /// number of the sk_buff's life, from its first event to its free
    pub life: Option<u64>,
    /// with --drops: what is known beyond the kernel's reason
    pub drop: Option<Drop>,
    /// addresses, innermost first
    pub stack: Option<Vec<u64>>,
}

impl Event {
    /// 8 bits that are the same of events with the same CPU, meta and tuple, and mostly not of others.
    pub fn like(&self) -> u64 {
        let meta = self.meta.as_ref().map_or(0, |m| {
            let device = u64::from(m.netns) << 20 ^ u64::from(m.ifindex) << 16;
            device ^ u64::from(m.len) ^ u64::from(m.protocol) << 40
        });
        let tuple = self.tuple.flatten().map_or(0, |t| {
            u64::from(t.sport) << 32 ^ u64::from(t.dport) << 8 ^ u64::from(t.tcp_flags)
        });
        (meta ^ tuple ^ u64::from(self.head.cpu)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56
    }
}

/// What a BPF program does with a map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MapCall {
    pub id: u32,
    /// NUL-padded
    pub name: [u8; 16],
    /// the first 256 bytes; `None` where it could not be read
    pub key: Option<Vec<u8>>,
    /// the same; `None` also where the call has none
    pub value: Option<Vec<u8>>,
    pub key_size: u32,
    pub value_size: u32,
}

/// Where in a program's run an event is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    Enter,
    /// with its verdict
    Leave(i32),
}

/// The packet's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Data {
    /// length of the packet; `bytes` may be fewer
    pub len: u32,
    /// begins with an Ethernet header, else with that of IP
    pub ethernet: bool,
    /// ARPHRD_* of the device; 0 where it has none
    pub hatype: u16,
    /// the VLAN tag beside the packet: its EtherType; priority, DEI and id
    pub vlan: Option<(u16, u16)>,
    pub bytes: Vec<u8>,
}

/// A packet's identity: the number that the CPU which saw it first gave it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub number: u64,
    pub cpu: u16,
}

/// `struct skb_owner`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owner {
    /// address of the socket
    pub sock: u64,
    /// 0 where the kernel has not made one yet
    pub cookie: u64,
    pub cgroup: u64,
    pub inode: u64,
    pub uid: u32,
    /// 0: made before the trace, or by the kernel
    pub pid: u32,
    /// NUL-padded
    pub comm: [u8; 16],
}

/// `struct skb_meta`
#[derive(Debug, Clone, PartialEq)]
pub struct Meta {
    pub netns: u32,
    pub mark: u32,
    pub ifindex: u32,
    pub len: u32,
    pub mtu: u32,
    pub protocol: u16,
    /// of the VLAN tag beside the packet: priority, DEI and id
    pub vlan: Option<u16>,
    /// NUL-padded
    pub ifname: [u8; 16],
}

/// Decodes one event, without the padding that perf adds. `snap_len`: bytes of each packet that events carry.
pub fn decode(bytes: &[u8], snap_len: usize) -> Option<Event> {
    let (e, mut rest) = read::<skb_event>(bytes)?;
    let mut event = Event {
        head: Head {
            ts: e.head.ts,
            kind: e.head.kind,
            cpu: e.head.cpu,
            tgid: e.head.tgid,
            pid: e.head.pid,
            comm: e.head.comm,
        },
        skb: e.skb,
        func: e.func,
        dropped: e.head.kind == KIND_DROPPED,
        reason: matches!(e.head.kind, KIND_DROP | KIND_DROPPED).then_some(e.reason),
        retval: (e.head.kind == KIND_RETURN).then_some(e.reason as i32),
        program: match e.head.kind {
            KIND_ENTER => Some(Point::Enter),
            KIND_LEAVE => Some(Point::Leave(e.reason as i32)),
            _ => None,
        },
        meta: None,
        tuple: None,
        packet: None,
        owner: None,
        caller: None,
        tunnel: None,
        cb: None,
        skb_copy: None,
        shared_info: None,
        data: None,
        members: None,
        nft: None,
        map: None,
        life: None,
        drop: None,
        stack: None,
    };
    if e.sections & SECTION_META != 0 {
        let (m, r) = read::<skb_meta>(rest)?;
        rest = r;
        event.meta = Some(Meta {
            netns: m.netns,
            mark: m.mark,
            ifindex: m.ifindex,
            len: m.len,
            mtu: m.mtu & !MTU_TAGGED,
            protocol: m.protocol,
            vlan: (m.mtu & MTU_TAGGED != 0).then_some(m.vlan),
            ifname: m.ifname,
        });
    }
    if e.sections & SECTION_TUPLE != 0 {
        let (t, r) = read::<np_tuple>(rest)?;
        rest = r;
        event.tuple = Some(tuple(&t));
    }
    if e.sections & SECTION_PACKET != 0 {
        let id;
        (id, rest) = word(rest)?;
        event.packet = Some(Packet {
            number: id >> PACKET_CPU_BITS,
            cpu: id as u16,
        });
    }
    if e.sections & SECTION_OWNER != 0 {
        let (o, r) = read::<skb_owner>(rest)?;
        rest = r;
        event.owner = Some((o.sock != 0).then_some(Owner {
            sock: o.sock,
            cookie: o.cookie,
            cgroup: o.cgroup,
            inode: o.inode,
            uid: o.uid,
            pid: o.pid,
            comm: o.comm,
        }));
    }
    if e.sections & SECTION_CALLER != 0 {
        let caller;
        (caller, rest) = word(rest)?;
        event.caller = Some(caller);
    }
    if e.sections & SECTION_TUNNEL != 0 {
        let (t, r) = read::<np_tuple>(rest)?;
        rest = r;
        event.tunnel = Some(tuple(&t));
    }
    if e.sections & SECTION_CB != 0 {
        let (cb, r) = rest.split_first_chunk()?;
        rest = r;
        event.cb = Some(*cb);
    }
    if e.sections & SECTION_SKB != 0 {
        let copy;
        (copy, rest) = self::copy(rest)?;
        event.skb_copy = Some(copy);
    }
    if e.sections & SECTION_SHINFO != 0 {
        let copy;
        (copy, rest) = self::copy(rest)?;
        event.shared_info = Some(copy);
    }
    if e.sections & SECTION_DATA != 0 {
        let (d, r) = read::<skb_data>(rest)?;
        let (bytes, r) = r.split_at_checked(snap_len)?;
        rest = r;
        event.data = Some(Data {
            len: d.len,
            ethernet: d.ethernet != 0,
            hatype: d.hatype,
            vlan: (d.vlan_type != 0).then_some((d.vlan_type, d.vlan)),
            bytes: bytes.get(..d.captured as usize)?.to_vec(),
        });
    }
    if e.sections & SECTION_MEMBERS != 0 {
        let (m, r) = read::<np_members>(rest)?;
        rest = r;
        let known = |i: usize| m.known & (1 << i) != 0;
        event.members = Some(std::array::from_fn(|i| known(i).then(|| m.values[i])));
    }
    if e.sections & SECTION_NFT != 0 {
        let (n, r) = read::<nf_decision>(rest)?;
        rest = r;
        event.nft = Decision::new(&n);
    }
    if e.sections & SECTION_MAP != 0 {
        let (m, r) = read::<skb_map>(rest)?;
        rest = r;
        let part = |known: u32, bytes: &[u8], size: u32| {
            let len = bytes.len().min(size as usize);
            (m.known & known != 0).then(|| bytes[..len].to_vec())
        };
        event.map = Some(MapCall {
            id: m.id,
            name: m.name,
            key: part(MAP_KEY, &m.key, m.key_size),
            value: part(MAP_VALUE, &m.value, m.value_size),
            key_size: m.key_size,
            value_size: m.value_size,
        });
    }
    if e.sections & SECTION_LIFE != 0 {
        let life;
        (life, rest) = word(rest)?;
        event.life = Some(life);
    }
    if e.sections & SECTION_DROP != 0 {
        let (d, r) = read::<skb_drop>(rest)?;
        rest = r;
        event.drop = Some(Drop::new(&d));
    }
    if e.sections & SECTION_STACK != 0 {
        event.stack = Some(
            rest.chunks_exact(8)
                .filter_map(|c| c.try_into().ok().map(u64::from_ne_bytes))
                .collect(),
        );
    }
    Some(event)
}

fn copy(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let (copy, rest) = read::<skb_copy>(bytes)?;
    let len = (copy.size as usize).min(copy.bytes.len());
    Some((copy.bytes[..len].to_vec(), rest))
}

fn word(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    Some((u64::from_ne_bytes(*word), rest))
}

fn tuple(t: &np_tuple) -> Option<Tuple> {
    let bytes = |w: [u64; 2]| {
        let mut b = [0; 16];
        b[..8].copy_from_slice(&w[0].to_ne_bytes());
        b[8..].copy_from_slice(&w[1].to_ne_bytes());
        b
    };
    matches!(t.l3_version, 4 | 6).then(|| Tuple {
        saddr: address(bytes(t.saddr), t.l3_version),
        daddr: address(bytes(t.daddr), t.l3_version),
        sport: t.sport,
        dport: t.dport,
        proto: t.l4_proto,
        tcp_flags: t.tcp_flags,
        icmp_type: t.icmp_type,
        icmp_code: t.icmp_code,
        fragment: t.fragment != 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bytes<T: plain::Plain>(v: &T) -> &[u8] {
        // SAFETY: Plain types are their bytes.
        unsafe { plain::as_bytes(v) }
    }

    #[test]
    fn a_whole_event() {
        let mut e = skb_event {
            skb: 0xffff_8880_0000_1000,
            func: 42,
            sections: SECTION_META | SECTION_TUPLE | SECTION_STACK,
            reason: 5,
            ..skb_event::default()
        };
        e.head.kind = KIND_DROP;
        e.head.comm[..4].copy_from_slice(b"curl");
        let m = skb_meta {
            netns: 4_026_531_840,
            protocol: 0x0800,
            ..skb_meta::default()
        };
        let mut t = np_tuple {
            l3_version: 4,
            l4_proto: 6,
            sport: 1234,
            dport: 80,
            ..np_tuple::default()
        };
        t.saddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 1]);
        t.daddr[1] = u64::from_ne_bytes([0, 0, 0xff, 0xff, 10, 0, 0, 2]);
        let mut b = bytes(&e).to_vec();
        b.extend_from_slice(bytes(&m));
        b.extend_from_slice(bytes(&t));
        b.extend_from_slice(&7u64.to_ne_bytes());
        b.extend_from_slice(&8u64.to_ne_bytes());
        let got = decode(&b, 0).unwrap();
        assert_eq!(got.reason, Some(5));
        assert_eq!(got.meta.unwrap().netns, 4_026_531_840);
        assert_eq!(
            got.tuple.unwrap().unwrap().to_string(),
            "10.0.0.1:1234->10.0.0.2:80(tcp)"
        );
        assert_eq!(got.stack.unwrap(), [7, 8]);
        // Cut anywhere in the fixed sections: refused, not misread.
        for cut in 0..b.len() - 16 {
            assert_eq!(decode(&b[..cut], 0), None, "{cut}");
        }
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..400)) {
            let _ = decode(&b, 64);
        }
    }
}
