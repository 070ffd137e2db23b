//! The facts of a dropped packet that the kernel side tells (src/bpf/common/drop_facts.h), as the rules ask for them.

use crate::bpf::drops::types::drop_fact;
use crate::explain::Fact;

/// PACKET_BROADCAST, PACKET_MULTICAST, PACKET_OTHERHOST of include/uapi/linux/if_packet.h.
const PKT_TYPES: [(u8, Fact); 3] = [
    (1, Fact::Broadcast),
    (2, Fact::Multicast),
    (3, Fact::OtherHost),
];

/// What a rule may ask about the packet.
pub fn facts(bits: u8) -> Vec<Fact> {
    let bits = u32::from(bits);
    let pkt_type = bits & drop_fact::DROP_PKT_TYPE.0;
    let mut facts: Vec<Fact> = PKT_TYPES
        .iter()
        .filter(|(value, _)| u32::from(*value) == pkt_type)
        .map(|(_, fact)| *fact)
        .collect();
    let more = [
        (drop_fact::DROP_PROMISCUOUS, Fact::Promiscuous),
        (drop_fact::DROP_ECHO_REPLY, Fact::EchoReply),
        (drop_fact::DROP_NO_IP, Fact::NoIp),
        (drop_fact::DROP_TIME_WAIT, Fact::TimeWait),
        (drop_fact::DROP_NO_DATA, Fact::NoData),
    ];
    let set = more.into_iter().filter(|(bit, _)| bits & bit.0 != 0);
    facts.extend(set.map(|(_, fact)| fact));
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_of_bits() {
        let bits = 3 | drop_fact::DROP_PROMISCUOUS.0 as u8;
        assert_eq!(facts(bits), [Fact::OtherHost, Fact::Promiscuous]);
        assert_eq!(facts(0), []);
    }
}
