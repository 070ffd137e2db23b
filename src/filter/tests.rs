use std::mem::MaybeUninit;

use libbpf_rs::skel::{OpenSkel, SkelBuilder};

use super::Filters;
use super::expr::{self, Compiled};
use super::pcap::{self, Linktype};
use super::run::Runner;
use crate::bpf::filter_probe::FilterProbeSkelBuilder;
use crate::kernel::features::Features;
use crate::kernel::pages::PageVariables;

fn load(filters: &Filters) -> anyhow::Result<()> {
    let mut storage = MaybeUninit::uninit();
    let mut open = FilterProbeSkelBuilder::default().open(&mut storage)?;
    let rodata = open.maps.rodata_data.as_mut().unwrap();
    let pages = PageVariables::find();
    rodata.use_cast = u8::from(Features::detect().rdonly_cast);
    rodata.np_filter_on = filters.on();
    rodata.np_filter_vmemmap_base = pages.vmemmap_base;
    rodata.np_filter_page_offset_base = pages.page_offset_base;
    filters.inject(open.open_object_mut())?;
    open.load()?;
    Ok(())
}

#[test]
fn inject() {
    let e = |t: &str| Compiled::new(t).unwrap();
    load(&Filters { expression: Some(e("tcp port 80 or icmp")), ..Default::default() }).unwrap();
    load(&Filters { expression: Some(e("arp")), ..Default::default() }).unwrap();
    load(&Filters { expression: Some(e("tcp[100] = 3 and ether[2000]=1")), tunnel_l2: Some(e("tcp port 80 or icmp").l2), tunnel_l3: Some(e("ip6[53] & 0x3f = 0x2").l3.unwrap()) }).unwrap();
}

#[test]
fn smoke() {
    let p = expr::compile("tcp port 80 or icmp", Linktype::ETHERNET, 262144).unwrap();
    let mut pkt = vec![0u8; 60];
    pkt[12] = 8; pkt[14] = 0x45; pkt[23] = 1;
    for n in [60usize, 40, 24, 23, 15] {
        let want = pcap::interpret(&p, &pkt[..n], n as u32);
        assert_eq!(p.run(&pkt[..n], n as u32), want);
        for size in [0, 24, 96] {
            assert_eq!(Runner::traced(&p, size).unwrap().run(&pkt[..n], n as u32).unwrap(), want, "{n} {size}");
        }
        assert_eq!(Runner::xdp(&p, false).unwrap().run(&pkt[..n], n as u32).unwrap(), want, "{n}");
        assert_eq!(Runner::xdp(&p, true).unwrap().run(&pkt[..n], n as u32).unwrap(), want, "{n}");
        if n >= 40 { assert_eq!(Runner::tc(&p).unwrap().run(&pkt[..n], n as u32).unwrap(), want, "{n}"); }
    }
}
