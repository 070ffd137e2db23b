//! Packets of many kinds, built here, and random changes to them.

/// A small random generator (splitmix64): the same seed gives the same run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `n`.
    pub fn below(&mut self, n: u32) -> u32 {
        (self.next() % u64::from(n)) as u32
    }

    pub fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u32) as usize].clone()
    }
}

pub const MAC_A: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub const MAC_B: [u8; 6] = [2, 0, 0, 0, 0, 2];

pub fn ether(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut p = [MAC_B, MAC_A].concat();
    p.extend(ethertype.to_be_bytes());
    p.extend(payload);
    p
}

pub fn tag(ethertype: u16, vid: u16, inner: u16, payload: &[u8]) -> Vec<u8> {
    let mut p = vid.to_be_bytes().to_vec();
    p.extend(inner.to_be_bytes());
    p.extend(payload);
    ether(ethertype, &p)
}

pub fn ipv4(protocol: u8, options: usize, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let total = (20 + options + payload.len()) as u16;
    let mut p = vec![0x45 + (options / 4) as u8, 0];
    p.extend(total.to_be_bytes());
    p.extend([0x12, 0x34]);
    p.extend(fragment.to_be_bytes());
    p.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    p.extend(std::iter::repeat_n(1, options));
    p.extend(payload);
    p
}

pub fn ipv6(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = vec![0x60, 0, 0, 0];
    p.extend((payload.len() as u16).to_be_bytes());
    p.extend([next, 64]);
    p.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    p.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    p.extend(payload);
    p
}

pub fn tcp(sport: u16, dport: u16, flags: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = sport.to_be_bytes().to_vec();
    p.extend(dport.to_be_bytes());
    p.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
    p.extend(payload);
    p
}

pub fn udp(sport: u16, dport: u16, payload: &[u8]) -> Vec<u8> {
    let mut p = sport.to_be_bytes().to_vec();
    p.extend(dport.to_be_bytes());
    p.extend((8 + payload.len() as u16).to_be_bytes());
    p.extend([0, 0]);
    p.extend(payload);
    p
}

pub fn icmp(kind: u8) -> Vec<u8> {
    let mut p = vec![kind, 0, 0, 0, 0, 1, 0, 1];
    p.extend(0..48);
    p
}

pub fn arp() -> Vec<u8> {
    let mut p = vec![0, 1, 8, 0, 6, 4, 0, 1];
    p.extend(MAC_A);
    p.extend([10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2]);
    ether(0x0806, &p)
}

/// One of each kind.
pub fn all() -> Vec<Vec<u8>> {
    let http = tcp(43210, 80, 0x18, b"GET / HTTP/1.1\r\n\r\n");
    let syn = tcp(80, 43210, 0x02, &[]);
    let dns = udp(5353, 53, &[0; 30]);
    let inner = ether(0x0800, &ipv4(6, 0, 0, &http));
    let mut vxlan = vec![8, 0, 0, 0, 0, 0, 42, 0];
    vxlan.extend(&inner);
    let mut gre = vec![0, 0, 8, 0];
    gre.extend(ipv4(17, 0, 0, &dns));
    // Hop-by-hop options, then a fragment header, then UDP.
    let mut extended = vec![44, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 1, 0, 0, 0, 9];
    extended.extend(&dns);
    let mut hop_by_hop = vec![6, 0, 1, 4, 0, 0, 0, 0];
    hop_by_hop.extend(&syn);
    let mut mpls = vec![0, 0x40, 0x01, 64, 0, 0x40, 0x11, 64];
    mpls.extend(ipv4(6, 0, 0, &http));
    let mut pppoe = vec![0x11, 0, 0, 7, 0, 80, 0, 0x21];
    pppoe.extend(ipv4(17, 0, 0, &dns));
    let mut long = udp(9, 9, &[]);
    long.extend((0..1400u32).map(|i| (i * 7) as u8));
    vec![
        ether(0x0800, &ipv4(6, 0, 0x4000, &http)),
        ether(0x0800, &ipv4(6, 12, 0, &syn)),
        ether(0x0800, &ipv4(6, 40, 0, &http)),
        ether(0x0800, &ipv4(17, 0, 0, &dns)),
        ether(0x0800, &ipv4(17, 0, 0x2000, &dns)),
        ether(0x0800, &ipv4(17, 0, 0x00b9, &dns)),
        ether(0x0800, &ipv4(17, 0, 0, &udp(40000, 4789, &vxlan))),
        ether(0x0800, &ipv4(1, 0, 0, &icmp(8))),
        ether(0x0800, &ipv4(4, 0, 0, &ipv4(6, 0, 0, &syn))),
        ether(0x0800, &ipv4(47, 0, 0, &gre)),
        ether(0x0800, &ipv4(132, 0, 0, &udp(1000, 80, &[0; 12]))),
        ether(0x0800, &ipv4(17, 0, 0, &long)),
        ether(0x86dd, &ipv6(6, &http)),
        ether(0x86dd, &ipv6(6, &syn)),
        ether(0x86dd, &ipv6(17, &dns)),
        ether(0x86dd, &ipv6(58, &icmp(128))),
        ether(0x86dd, &ipv6(0, &extended)),
        ether(0x86dd, &ipv6(0, &hop_by_hop)),
        arp(),
        tag(0x8100, 100, 0x0800, &ipv4(6, 0, 0, &http)),
        tag(0x8100, 7, 0x86dd, &ipv6(17, &dns)),
        tag(
            0x88a8,
            5,
            0x8100,
            &[&[0, 100, 8, 0][..], &ipv4(1, 0, 0, &icmp(0))].concat(),
        ),
        ether(0x8847, &mpls),
        ether(0x8864, &pppoe),
        ether(60, &[0x42, 0x42, 3, 0, 0, 0, 0, 0]),
        vec![0xff; 64],
        vec![0; 14],
    ]
}

/// A packet with some bytes changed, or cut.
pub fn mutate(random: &mut Random, packet: &[u8]) -> Vec<u8> {
    let mut p = packet.to_vec();
    for _ in 0..random.below(4) {
        // Mostly in the headers, where filters look.
        let reach = if random.below(4) == 0 {
            p.len()
        } else {
            p.len().min(64)
        };
        if reach > 0 {
            let at = random.below(reach as u32) as usize;
            p[at] = random.next() as u8;
        }
    }
    if random.below(3) == 0 {
        p.truncate(random.below(p.len() as u32 + 1) as usize);
    }
    p
}
