-- What netprobe tells of a fleet. Debian's ClickHouse (18.16) and newer ones take it.
CREATE DATABASE IF NOT EXISTS netprobe;

-- netprobe drops --output-json: one row for each kind of drop and interval
CREATE TABLE IF NOT EXISTS netprobe.drops (
    time DateTime,
    node String,
    class String,
    reason String,
    what String,
    place String,
    nft String,
    netns UInt32,
    iface String,
    proto UInt8,
    dport UInt16,
    comm String,
    container String,
    packets UInt64,
    bytes UInt64,
    example String
) ENGINE = MergeTree PARTITION BY toYYYYMMDD(time) ORDER BY (class, reason, node, time);

-- the same: counters of the kernel that grew by another number than was seen
CREATE TABLE IF NOT EXISTS netprobe.counters (
    time DateTime,
    node String,
    kind String,
    counter String,
    what String,
    netns UInt32,
    grew UInt64,
    seen UInt64,
    packets UInt64
) ENGINE = MergeTree PARTITION BY toYYYYMMDD(time) ORDER BY (kind, counter, node, time);

-- netprobe tcpconnect --outcome --output-json: one row for each connect
CREATE TABLE IF NOT EXISTS netprobe.connects (
    time DateTime,
    node String,
    comm String,
    daddr String,
    dport UInt16,
    outcome String,
    latency_ns UInt64,
    retransmits UInt32,
    cgroup String,
    reason String,
    place String
) ENGINE = MergeTree PARTITION BY toYYYYMMDD(time) ORDER BY (daddr, dport, outcome, time);
