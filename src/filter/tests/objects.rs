//! Filters inside a BPF object, as the tools have them, loaded (not attached).

use std::mem::MaybeUninit;

use anyhow::Result;
use libbpf_rs::OpenObject;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};

use crate::bpf::filter_probe::{FilterProbeSkelBuilder, OpenFilterProbeSkel};
use crate::filter::expr::Compiled;
use crate::filter::members::Condition;
use crate::filter::{Filters, set_filter};
use crate::kernel::btf::Btf;
use crate::kernel::features::{Features, SkbFields};

/// The object with these filters in it, not loaded yet.
fn prepared<'o>(
    storage: &'o mut MaybeUninit<OpenObject>,
    filters: &Filters,
    fields: Option<SkbFields>,
) -> Result<OpenFilterProbeSkel<'o>> {
    let mut open = FilterProbeSkelBuilder::default().open(storage)?;
    let rodata = open.maps.rodata_data.as_mut().unwrap();
    rodata.use_cast = u8::from(fields.is_some());
    set_filter!(rodata, filters.on(fields));
    let features = Features {
        skb_fields: fields,
        ..Features::detect()
    };
    filters.prepare(open.open_object_mut(), &features)?;
    Ok(open)
}

fn load(filters: &Filters, fields: Option<SkbFields>) -> Result<()> {
    let mut storage = MaybeUninit::uninit();
    prepared(&mut storage, filters, fields)?.load()?;
    Ok(())
}

fn loads(filters: &Filters) {
    load(filters, None).unwrap();
    let fields = Features::detect().skb_fields;
    if fields.is_some() {
        load(filters, fields).unwrap();
    }
}

fn expression(text: &str) -> Compiled {
    Compiled::new(text).unwrap()
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn an_expression_loads() {
    for text in [
        "tcp port 80 or icmp",
        "arp",
        "len > 100",
        "ip6[53] & 0x3f = 0x2",
    ] {
        loads(&Filters {
            expression: Some(expression(text)),
            ..Filters::default()
        });
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn loads_beyond_the_block_and_tunnels_load() {
    loads(&Filters {
        expression: Some(expression("tcp[100] = 3 and ether[2000] = 1")),
        tunnel_l2: Some(expression("tcp port 80 or icmp").l2),
        tunnel_l3: Some(expression("host 10.1.1.1 and udp[200:2] = 77").l3.unwrap()),
        ..Filters::default()
    });
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn conditions_on_members_load() {
    let btf = Btf::vmlinux(None).unwrap();
    for text in [
        "skb->mark",
        "skb->dev->ifindex == 3 && skb->dev->nd_net.net->ns.inum != 0xfffffff0",
        "!(skb->pkt_type == 4 || skb->cb[3] >= 0x80) || skb->sk->__sk_common.skc_daddr == htonl(0x0a000001)",
    ] {
        let members = Some(Condition::parse(text, ("skb", "sk_buff"), &btf).unwrap());
        loads(&Filters {
            members,
            ..Filters::default()
        });
    }
}

#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn no_filter_loads() {
    loads(&Filters::default());
}

/// No filter is off, and adds no instruction to any program; an expression does.
#[test]
fn no_filter_adds_nothing() {
    let count = |object: &OpenObject| -> Vec<usize> {
        object.progs().map(|program| program.insn_cnt()).collect()
    };
    let lengths = |filters: &Filters| -> Result<Vec<(usize, usize)>> {
        let (mut plain, mut storage) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        let plain = FilterProbeSkelBuilder::default().open(&mut plain)?;
        let prepared = prepared(&mut storage, filters, None)?;
        let before = count(plain.open_object());
        Ok(before
            .into_iter()
            .zip(count(prepared.open_object()))
            .collect())
    };
    let none = Filters::default();
    assert_eq!(none.on(None), 0);
    let unfiltered = lengths(&none).unwrap();
    assert!(!unfiltered.is_empty() && unfiltered.iter().all(|(before, after)| after <= before));
    let filtered = lengths(&Filters {
        expression: Some(expression("tcp port 80 or icmp")),
        ..Filters::default()
    });
    let filtered = filtered.unwrap();
    assert!(
        filtered
            .iter()
            .zip(&unfiltered)
            .any(|((_, with), (_, without))| with > without)
    );
}

/// Several hundred hosts: the largest expression that the tools are to take, on every kernel that this runs on.
#[test]
#[cfg_attr(not(is_root), ignore = "loading BPF programs needs root")]
fn several_hundred_hosts_load() {
    let hosts: Vec<String> = (0..300)
        .map(|i| format!("host 10.{}.{}.{}", i % 7, i % 251, i % 13 + 1))
        .collect();
    loads(&Filters {
        expression: Some(expression(&hosts.join(" or "))),
        ..Filters::default()
    });
}

#[test]
fn past_the_limit_the_error_says_so() {
    let hosts: Vec<String> = (0..700)
        .map(|i| format!("host 10.{}.{}.1", i % 100, i / 100))
        .collect();
    let error = format!("{:#}", Compiled::new(&hosts.join(" or ")).unwrap_err());
    assert!(error.contains("4096"), "{error}");
}
