-- Ten questions of a fleet: deploy/clickhouse/ask NUMBER 'YYYY-MM-DD hh:mm:ss'. @since@ is that time.

-- 1. Which nodes lose to the same reason since then?
SELECT reason, place, uniq(node) AS nodes, sum(packets) AS lost, arraySlice(arraySort(groupUniqArray(node)), 1, 5) AS some
FROM netprobe.drops WHERE time >= '@since@'
GROUP BY reason, place HAVING nodes > 1 ORDER BY nodes DESC, lost DESC LIMIT 20;

-- 2. Which firewall rule dropped more after this deploy than in as long a time before?
SELECT nft, sumIf(packets, time >= '@since@') AS after, sumIf(packets, time < '@since@') AS before, uniq(node) AS nodes
FROM netprobe.drops
WHERE nft != '' AND time >= toDateTime('@since@') - (toUInt32(@now@) - toUInt32(toDateTime('@since@')))
GROUP BY nft ORDER BY after - before DESC LIMIT 20;

-- 3. How long does a connect take, by destination?
SELECT daddr, dport, count() AS connects, round(quantile(0.5)(latency_ns) / 1e6, 2) AS p50_ms,
    round(quantile(0.99)(latency_ns) / 1e6, 2) AS p99_ms
FROM netprobe.connects WHERE time >= '@since@' AND outcome = 'established'
GROUP BY daddr, dport ORDER BY p99_ms DESC LIMIT 20;

-- 4. Which nodes lose most, beside the median of the fleet?
SELECT node, lost, round(lost / median, 1) AS times_median
FROM (SELECT node, sum(packets) AS lost, 1 AS one FROM netprobe.drops WHERE time >= '@since@' GROUP BY node)
ANY LEFT JOIN (SELECT quantile(0.5)(lost) AS median, 1 AS one
    FROM (SELECT node, sum(packets) AS lost FROM netprobe.drops WHERE time >= '@since@' GROUP BY node)) USING one
ORDER BY lost DESC LIMIT 20;

-- 5. Which reasons are new since then, on any node?
SELECT reason, place, min(time) AS first, uniq(node) AS nodes, sum(packets) AS lost
FROM netprobe.drops GROUP BY reason, place HAVING first >= toDateTime('@since@') ORDER BY lost DESC LIMIT 20;

-- 6. Which containers lose, and why?
SELECT container, what, uniq(node) AS nodes, sum(packets) AS lost
FROM netprobe.drops WHERE time >= '@since@' AND container != ''
GROUP BY container, what ORDER BY lost DESC LIMIT 20;

-- 7. Which destinations refuse or do not answer, and from how many nodes?
SELECT daddr, dport, outcome, count() AS connects, uniq(node) AS nodes
FROM netprobe.connects WHERE time >= '@since@' AND outcome != 'established'
GROUP BY daddr, dport, outcome ORDER BY connects DESC LIMIT 20;

-- 8. To which destinations is a SYN sent again, and how often?
SELECT daddr, dport, sum(retransmits) AS again, round(100 * avg(retransmits > 0), 2) AS percent_of_connects
FROM netprobe.connects WHERE time >= '@since@'
GROUP BY daddr, dport HAVING again > 0 ORDER BY percent_of_connects DESC LIMIT 20;

-- 9. Where do the kernel's counters tell of packets that nobody saw?
SELECT counter, what, uniq(node) AS nodes, sum(packets) AS unseen
FROM netprobe.counters WHERE time >= '@since@' AND kind = 'unexplained'
GROUP BY counter, what ORDER BY unseen DESC LIMIT 20;

-- 10. How did the loss of each class go on, by ten minutes?
SELECT toDateTime(intDiv(toUInt32(time), 600) * 600) AS begin, class, sum(packets) AS lost, uniq(node) AS nodes
FROM netprobe.drops WHERE time >= '@since@'
GROUP BY begin, class ORDER BY begin, class LIMIT 200;
