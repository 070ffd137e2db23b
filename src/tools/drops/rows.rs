//! Counts of the kernel side to rows: what was lost, where, whose.

use crate::bpf::drops::types::{drop_example, drop_fact, drop_key};
use crate::explain::{Fact, Meaning, NOT_SPECIFIED, Rules};
use crate::kernel::drop_reason::DropReasons;
use crate::kernel::ksyms::FewSymbols;
use crate::kernel::listen;
use crate::kernel::process::SocketHolders;

use super::kernel::{Count, Taken};
use super::table::Seen;

/// PACKET_BROADCAST, PACKET_MULTICAST, PACKET_OTHERHOST of include/uapi/linux/if_packet.h.
const PKT_TYPES: [(u8, Fact); 3] = [
    (1, Fact::Broadcast),
    (2, Fact::Multicast),
    (3, Fact::OtherHost),
];

/// One row of a table.
#[derive(Debug, Clone)]
pub struct Row {
    pub count: Count,
    pub meaning: Meaning,
    /// the kernel's name without SKB_DROP_REASON_, or ours (kernel::listen); empty where there is none
    pub reason: String,
    /// the function that decided; empty where places are not asked for
    pub place: String,
    pub offset: u64,
    pub key: drop_key,
    pub example: Option<drop_example>,
    /// who holds the example's socket now
    pub owner: Option<(u32, String)>,
}

impl Row {
    /// As the ledger wants it.
    pub fn seen(&self) -> Seen {
        Seen {
            netns: self.key.netns,
            ifindex: self.key.ifindex,
            port: self.key.dport,
            proto: self.key.proto,
            ip: self.key.ip,
            guessed: matches!(self.reason.as_str(), "" | NOT_SPECIFIED),
            reason: self.meaning.reason.clone(),
            rule: self.meaning.rule().to_owned(),
            class: self.meaning.class.clone(),
            place: self.place.clone(),
        }
    }
}

/// What turns counts into rows.
pub struct Names {
    rules: Rules,
    reasons: DropReasons,
    symbols: FewSymbols,
    holders: Option<SocketHolders>,
}

impl Names {
    pub fn new(rules: Rules, reasons: DropReasons) -> Self {
        Self {
            rules,
            reasons,
            symbols: FewSymbols::default(),
            holders: None,
        }
    }

    /// The name of a reason without what all of the core's have in common.
    pub fn reason(&mut self, value: u32) -> String {
        if let Some(name) = listen::reason(value) {
            return name.to_owned();
        }
        if value == 0 {
            return String::new();
        }
        let name = self.reasons.name(value);
        name.strip_prefix("SKB_DROP_REASON_")
            .map_or(name.clone(), str::to_owned)
    }

    /// Rows of what was taken.
    pub fn rows(&mut self, taken: &[Taken]) -> Vec<Row> {
        self.resolve(taken);
        let mut rows = Vec::new();
        for Taken {
            key,
            count,
            example,
        } in taken
        {
            let (place, offset) = self.place(key);
            let reason = self.reason(key.reason);
            let inode = example.as_ref().map_or(0, |e| e.inode);
            rows.push(Row {
                count: *count,
                meaning: self.rules.explain(&reason, &place, &facts(key.facts)),
                reason,
                place,
                offset,
                key: *key,
                owner: self.owner(inode),
                example: *example,
            });
        }
        rows
    }

    fn owner(&mut self, inode: u64) -> Option<(u32, String)> {
        if inode == 0 {
            return None;
        }
        let holders = self.holders.get_or_insert_with(SocketHolders::look);
        holders.of(inode).map(|p| (p.pid, p.comm.clone()))
    }

    fn resolve(&mut self, taken: &[Taken]) {
        let places = taken.iter().map(|row| row.key.place);
        let places: Vec<u64> = places.filter(|place| *place != 0).collect();
        self.symbols.resolve(&places);
    }

    /// The function that decided, and how far behind its beginning; empty where places are not asked for.
    fn place(&self, key: &drop_key) -> (String, u64) {
        match self.symbols.get(key.place) {
            Some(symbol) => (symbol.name.clone(), symbol.offset),
            None if key.place == 0 => (String::new(), 0),
            None => (format!("{:#x}", key.place), 0),
        }
    }
}

/// What a rule may ask about the row's packets.
fn facts(bits: u8) -> Vec<Fact> {
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
