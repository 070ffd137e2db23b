//! What `netprobe latency` costs.

use std::ffi::CStr;

use anyhow::Result;

use crate::child::Tool;
use crate::hooks;
use crate::{Bench, LIMIT, NETPROBE, end, last_program, say, tell_programs};

/// The tracepoints that `netprobe latency` attaches to, and its functions.
const LATENCY_TRACEPOINTS: [&CStr; 10] = [
    c"tcp_destroy_sock",
    c"kfree_skb",
    c"consume_skb",
    c"tcp_rcv_space_adjust",
    c"net_dev_xmit",
    c"net_dev_start_xmit",
    c"net_dev_queue",
    c"netif_receive_skb",
    c"netif_rx",
    c"netif_receive_skb_entry",
];
const LATENCY_FUNCTIONS: [&CStr; 12] = [
    c"skb_consume_udp",
    c"tcp_rcv_established",
    c"__udp_enqueue_schedule_skb",
    c"sk_filter_trim_cap",
    c"ip_local_deliver",
    c"ip6_input",
    c"ip_queue_xmit",
    c"inet6_csk_xmit",
    c"ip_send_skb",
    c"ip6_send_skb",
    c"inet_sendmsg",
    c"inet6_sendmsg",
];

impl Bench {
    /// What `netprobe latency` costs a packet, with a threshold that nothing reaches and without; its start and memory.
    pub fn latency(&mut self) -> Result<()> {
        let empty = hooks::empty_tracepoints(&LATENCY_TRACEPOINTS)?;
        let entries = hooks::empty_entries(&LATENCY_FUNCTIONS)?;
        say("udp.latency-empty", self.packet()?);
        say("tcp.latency-empty", self.connect()?);
        drop((empty, entries));
        for (name, flags) in [
            ("latency", " --min-us 100000000"),
            ("latency-table", ""),
            ("latency-culprit", " --min-us 100000000 --culprit"),
        ] {
            let before = last_program();
            let tool = Tool::with_ready_file(&format!("{NETPROBE} latency{flags}"), LIMIT)?;
            say(&format!("start.{name}"), tool.ready_ns);
            tell_programs(before);
            say(&format!("udp.{name}"), self.packet()?);
            say(&format!("tcp.{name}"), self.connect()?);
            self.idle(name, &tool)?;
            say(&format!("memory.{name}"), tool.memory()?.0);
            say(&format!("memory.{name}.file"), tool.file_memory()?);
            end(tool)?;
        }
        Ok(())
    }
}
