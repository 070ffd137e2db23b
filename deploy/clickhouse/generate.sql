-- A day of 1,000 made-up nodes for the test and for docs/fleet.md: 600,000 rows of drops, 400,000 connects, and planted
-- troubles that the ten questions must find. The day is 2026-11-28, the deploy was at 12:00.

-- Usual losses all day, everywhere.
INSERT INTO netprobe.drops
SELECT toDateTime('2026-11-28 00:00:00') + intDiv(number * 86400, 550000) AS time,
    concat('node-', toString(cityHash64(number) % 1000)) AS node,
    ['socket', 'queue', 'route'][1 + number % 3] AS class,
    ['NO_SOCKET', 'QDISC_DROP', 'IP_INNOROUTES'][1 + number % 3] AS reason,
    ['no socket listens here', 'queue of a device is full', 'no route'][1 + number % 3] AS what,
    ['__udp4_lib_rcv', '__dev_queue_xmit', 'ip_route_input_slow'][1 + number % 3] AS place,
    '' AS nft, 4026531840 AS netns, 'eth0' AS iface, 17 AS proto, 53 AS dport, '' AS comm,
    if(number % 50 = 0, 'prod/web-1/nginx', '') AS container,
    1 + cityHash64(number, 1) % 10 AS packets, packets * 120 AS bytes, 'udp 10.1.2.3:4000 > 10.3.2.1:53 len 120' AS example
FROM numbers(550000);

-- From 12:00 on a rule drops on forty nodes; it dropped little before. node-7 loses as much as a hundred others.
INSERT INTO netprobe.drops
SELECT toDateTime('2026-11-28 12:00:00') + intDiv(number * 43200, 40000), concat('node-', toString(100 + number % 40)), 'firewall',
    'NETFILTER_DROP', 'firewall rule', 'nft_do_chain', 'inet filter input handle 7', 4026531840, 'eth0', 6, 5432, '', '', 5, 300,
    'tcp 10.1.2.3:4000 > 10.3.2.1:5432 len 60'
FROM numbers(40000);
INSERT INTO netprobe.drops
SELECT toDateTime('2026-11-28 00:00:00') + number * 86, concat('node-', toString(100 + number % 40)), 'firewall', 'NETFILTER_DROP',
    'firewall rule', 'nft_do_chain', ['inet filter input handle 7', 'inet filter input handle 3'][1 + number % 2], 4026531840,
    'eth0', 6, 5432, '', '', 1, 60, ''
FROM numbers(1000);
INSERT INTO netprobe.drops
SELECT toDateTime('2026-11-28 12:00:00') + number * 4, 'node-7', 'socket', 'SOCKET_RCVBUFF', 'receive buffer of a socket is full',
    'udp_queue_rcv_one_skb', '', 4026531840, 'eth0', 17, 514, 'rsyslogd', '', 400, 40000, ''
FROM numbers(9000);

INSERT INTO netprobe.connects
SELECT toDateTime('2026-11-28 00:00:00') + intDiv(number * 86400, 400000) AS time,
    concat('node-', toString(cityHash64(number, 2) % 1000)) AS node, 'app' AS comm,
    concat('10.9.0.', toString(number % 20)) AS daddr, 443 AS dport,
    -- One destination refuses a third of its connects.
    if(number % 20 = 13 AND number % 3 = 0, 'refused', 'established') AS outcome,
    -- One is slow: 1 % take 900 ms. The others take 1 to 3 ms.
    if(number % 20 = 4 AND cityHash64(number, 3) % 50 = 0, 900000000, 1000000 + cityHash64(number, 4) % 2000000) AS latency_ns,
    -- One needs a second SYN for one connect in ten.
    if(number % 20 = 5 AND intDiv(number, 20) % 10 = 0, 1, 0) AS retransmits,
    '/system.slice/app.service' AS cgroup, '' AS reason, '' AS place
FROM numbers(400000);

INSERT INTO netprobe.counters
SELECT toDateTime('2026-11-28 13:00:00'), 'node-9', 'unexplained', 'rx_missed_errors', 'the card had no room', 4026531840, 1234, 0, 1234;
