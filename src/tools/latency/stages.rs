//! The ways and stages of a packet: their names, in the order of the way. Pure.

use crate::bpf::latency::types::{lat_stage, lat_way};

/// Bits that a stage takes in `struct lat_packet`'s `seen`, and rows of histograms.
pub const STAGES: usize = lat_stage::LAT_STAGES.0 as usize;

/// A stage by its number, `enum lat_stage`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stage(pub u32);

/// A way by its number, `enum lat_way`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Way(pub u32);

/// Name and meaning.
const NAMES: [(lat_stage, &str); STAGES] = [
    (lat_stage::LAT_NIC, "nic"),
    (lat_stage::LAT_SOFTIRQ, "softirq"),
    (lat_stage::LAT_DEVICE, "device"),
    (lat_stage::LAT_IP, "ip"),
    (lat_stage::LAT_TRANSPORT, "transport"),
    (lat_stage::LAT_QUEUE, "queue"),
    (lat_stage::LAT_SOCKET, "socket"),
    (lat_stage::LAT_WRITE, "write"),
    (lat_stage::LAT_OUTPUT, "output"),
    (lat_stage::LAT_FORWARD, "forward"),
    (lat_stage::LAT_QDISC, "qdisc"),
    (lat_stage::LAT_COMPLETION, "completion"),
    (lat_stage::LAT_BETWEEN_THEM, "between"),
    (lat_stage::LAT_NETWORK, "network"),
    (lat_stage::LAT_PROCESS, "process"),
    (lat_stage::LAT_UNREAD, "unread"),
    (lat_stage::LAT_OVERLAP, "overlap"),
    (lat_stage::LAT_TOTAL, "total"),
];

impl Stage {
    pub const NIC: Self = Self(lat_stage::LAT_NIC.0);
    pub const SOFTIRQ: Self = Self(lat_stage::LAT_SOFTIRQ.0);
    pub const QUEUE: Self = Self(lat_stage::LAT_QUEUE.0);
    pub const SOCKET: Self = Self(lat_stage::LAT_SOCKET.0);
    pub const WRITE: Self = Self(lat_stage::LAT_WRITE.0);
    pub const QDISC: Self = Self(lat_stage::LAT_QDISC.0);
    pub const NETWORK: Self = Self(lat_stage::LAT_NETWORK.0);
    pub const PROCESS: Self = Self(lat_stage::LAT_PROCESS.0);
    pub const UNREAD: Self = Self(lat_stage::LAT_UNREAD.0);

    pub fn all() -> impl Iterator<Item = Self> {
        NAMES.iter().map(|(stage, _)| Self(stage.0))
    }

    pub fn name(self) -> &'static str {
        let mut all = NAMES.iter();
        all.find(|(stage, _)| stage.0 == self.0)
            .map_or("unknown", |(_, name)| name)
    }
}

impl Way {
    pub const ASKS: Self = Self(lat_way::LAT_ASKS.0);

    pub fn all() -> impl Iterator<Item = Self> {
        (0..lat_way::LAT_WAYS.0).map(Self)
    }

    pub fn name(self) -> &'static str {
        match lat_way(self.0) {
            lat_way::LAT_IN => "in",
            lat_way::LAT_OUT => "out",
            lat_way::LAT_THROUGH => "through",
            lat_way::LAT_BETWEEN => "between",
            lat_way::LAT_SERVES => "serves",
            lat_way::LAT_ASKS => "asks",
            _ => "unknown",
        }
    }
}
