//! What the link layer says: addresses of frames, VLANs, where a tunnel sends frames to.

use crate::event::link::Link;
use crate::event::packet::Mac;
use crate::kernel::routing;
use crate::text::escape::escaped;

use super::ip::addresses;
use super::policy::output;
use super::{Case, Proof};

/// Entries that are shown.
const MOST: usize = 4;

pub fn mac(case: &Case<'_>) -> Vec<Proof> {
    let frame = case.dropped.and_then(|d| d.frame.as_ref());
    let Some(Link::Ethernet { dst, .. }) = frame.map(|f| f.link) else {
        return Vec::new();
    };
    let mut text = format!("the frame is for {}", Mac(dst));
    let device = case.inside(|| routing::device(case.ifindex()));
    let own = device.and_then(Result::ok).flatten().and_then(|d| d.mac);
    if let Some(own) = own {
        text += &format!("; {} is {}", case.device(), Mac(own));
    }
    let mut proof = Proof::then("mac", text).with("frame", Mac(dst).to_string());
    if let Some((_, to)) = addresses(case) {
        proof.change = Some(format!(
            "the sender's neighbour entry of {to} is wrong: ip neigh there"
        ));
    }
    vec![proof]
}

/// The VLAN that the frame came in with, and the VLAN devices on this device.
pub fn vlans(case: &Case<'_>) -> Vec<Proof> {
    let (device, ifindex) = (case.device(), case.ifindex());
    let Some(vlan) = case.dropped.and_then(|d| d.vlan).or(case.leg.vlan) else {
        return Vec::new();
    };
    let text = format!("the frame came in by {device} with VLAN {vlan}");
    let mut frame = Proof::then("vlan", text).with("vlan", u32::from(vlan));
    let Some(listed) = output(case, "ip", &["-d", "-o", "link", "show", "type", "vlan"]) else {
        return vec![frame];
    };
    let there: Vec<String> = vlans_of(&listed, &device, ifindex).collect();
    if there.iter().all(|v| *v != vlan.to_string()) {
        frame.change = Some(format!(
            "ip link add link {device} name {device}.{vlan} type vlan id {vlan}; or the sender's tag"
        ));
    }
    let text = match there.as_slice() {
        [] => format!("{device} has no VLAN device"),
        some => format!("VLANs with a device on {device}: {}", some.join(", ")),
    };
    vec![frame, Proof::now("vlans", text).with("vlans", there)]
}

/// Ids out of `ip -d -o link show type vlan`, of those on a device: `5: eth0.5@eth0: <...> ... vlan protocol 802.1Q id 5 ...`
fn vlans_of<'a>(
    listed: &'a str,
    device: &'a str,
    ifindex: u32,
) -> impl Iterator<Item = String> + 'a {
    listed.lines().filter_map(move |line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (_, below) = words.get(1)?.trim_end_matches(':').split_once('@')?;
        if below != device && below != format!("if{ifindex}") {
            return None;
        }
        let at = words.iter().position(|w| *w == "vlan")?;
        let id = words[at..].windows(2).find(|w| w[0] == "id")?;
        id[1].parse::<u16>().ok().map(|id| id.to_string())
    })
}

/// Where a tunnel device sends frames whose place it does not know.
pub fn fdb(case: &Case<'_>) -> Vec<Proof> {
    let device = case.device();
    let Some(listed) = output(case, "bridge", &["fdb", "show", "dev", &device]) else {
        return Vec::new();
    };
    let lines = listed.lines().filter(|l| l.contains(" dst "));
    let entries: Vec<String> = lines
        .take(MOST)
        .map(|l| escaped(l.trim().as_bytes()))
        .collect();
    let mut proof = match entries.as_slice() {
        [] => Proof::now(
            "fdb",
            format!("{device} has no forwarding entry with a destination"),
        ),
        some => Proof::now(
            "fdb",
            format!("forwarding entries of {device}: {}", some.join("; ")),
        ),
    };
    if entries.iter().all(|e| !e.starts_with("00:00:00:00:00:00")) {
        proof.change = Some(format!(
            "bridge fdb append 00:00:00:00:00:00 dev {device} dst REMOTE, or one entry for the MAC address"
        ));
    }
    vec![proof.with("entries", entries)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlan_devices_of_a_device() {
        let list = "7: s5v@s5: <BROADCAST> mtu 1500 qdisc noqueue state UP mode DEFAULT \\    link/ether 02:00:00:00:00:01 brd ff:ff:ff:ff:ff:ff promiscuity 0 \\    vlan protocol 802.1Q id 5 <REORDER_HDR> addrgenmode eui64\n\
                    8: x@s6: <BROADCAST> mtu 1500 vlan protocol 802.1Q id 9 <REORDER_HDR>\n";
        assert_eq!(vlans_of(list, "s5", 4).collect::<Vec<_>>(), ["5"]);
        assert_eq!(vlans_of(list, "s7", 4).count(), 0);
    }
}
