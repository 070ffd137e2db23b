//! Functions that tracking and owners depend on, as data: by which program of skb.bpf.c each is attached to. A kernel has some
//! of them only; more than one leads to the same end where a compiler may have inlined one.

/// A function, and the program that is attached to it where its hits are not shown.
pub type Hook = (&'static str, &'static str);

/// --filter-track-skb (src/bpf/skb/skb_track.bpf.h)
pub const TRACK: [Hook; 25] = [
    // An skb is given up, or freed where this is its last reference.
    ("track_free_1", "consume_skb"),
    ("track_free_1", "kfree_skb"),
    ("track_free_1", "kfree_skb_reason"),
    ("track_free_2", "sk_skb_reason_drop"),
    ("track_free_1", "__kfree_skb"),
    ("track_free_1", "skb_release_head_state"),
    ("track_free_1", "skb_release_all"),
    ("track_free_1", "kfree_skb_partial"),
    ("track_free_1", "napi_consume_skb"),
    ("track_free_1", "napi_skb_free_stolen_head"),
    ("track_free_1", "__consume_stateless_skb"),
    ("track_free_1", "__kfree_skb_defer"),
    ("track_free_1", "__napi_kfree_skb"),
    // The memory goes back.
    ("track_gone_1", "kfree_skbmem"),
    ("track_gone_1", "napi_skb_cache_put"),
    // Another skb of the same packet: clone, copy, segment, fragment, the rest of a split one.
    ("track_copy_to_1", "__copy_skb_header"),
    ("track_copy_to_1", "__skb_clone"),
    ("track_copy_to_1", "skb_copy_header"),
    ("track_copy_to_1", "skb_morph"),
    ("track_copy_to_1", "ip_copy_metadata"),
    ("track_copy_to_1", "ip6_copy_metadata"),
    ("track_copy_to_2", "skb_split"),
    // One skb for several packets.
    ("track_merge_to_1", "skb_gro_receive"),
    ("track_merge_to_1", "skb_gro_receive_list"),
    // Its data moves.
    ("track_head_1", "pskb_expand_head"),
];

/// Those of them that end the life of an sk_buff, or move its head.
pub fn is_of_life(hook: &Hook) -> bool {
    !matches!(
        hook.0,
        "track_copy_to_1" | "track_copy_to_2" | "track_merge_to_1"
    )
}

/// --output-owner (src/bpf/skb/skb_owner.bpf.h)
pub const OWNER: [Hook; 14] = [
    ("owner_made", "sock_init_data"),
    ("owner_connects", "tcp_v4_connect"),
    ("owner_connects", "tcp_v6_connect"),
    ("owner_connects", "__ip4_datagram_connect"),
    ("owner_connects", "__ip6_datagram_connect"),
    ("owner_sends", "tcp_sendmsg"),
    ("owner_sends", "tcp_recvmsg"),
    ("owner_sends", "udp_sendmsg"),
    ("owner_sends", "udpv6_sendmsg"),
    ("owner_sends", "raw_sendmsg"),
    ("owner_sends", "rawv6_sendmsg"),
    ("owner_sends", "packet_sendmsg"),
    ("owner_gone", "inet_sock_destruct"),
    ("owner_gone", "packet_sock_destruct"),
];

/// --filter-trace-xdp with tracking (src/bpf/skb/skb_xdp.bpf.h)
pub const XDP: [Hook; 7] = [
    // A packet in an skb is on its way to XDP: generic, then veth.
    ("xdp_skb_2", "do_xdp_generic"),
    ("xdp_skb_1", "pskb_expand_head"),
    ("xdp_skb_1", "bpf_prog_run_generic_xdp"),
    ("xdp_skb_2", "veth_xdp_rcv_skb"),
    ("xdp_skb_at_3", "veth_convert_skb_to_xdp_buff"),
    ("xdp_skb_1", "skb_copy_header"),
    // A packet that XDP passed is in an skb.
    ("xdp_passed_1", "eth_type_trans"),
];

/// The program that sees netfilter enter a function of a hook: which there are, BTF tells.
pub const NETFILTER_HOOK: &str = "nf_enter";
/// The program at an expression of nft.
pub const EXPRESSION: &str = "nft_eval";

/// --output-nft (src/bpf/skb/netfilter.bpf.h)
pub const NETFILTER: [Hook; 26] = [
    ("nf_run", "nf_hook_slow"),
    ("nft_enter", "nft_do_chain"),
    ("nft_immediate", "nft_immediate_eval"),
    // Expressions that may give a verdict that ends an evaluation, or a jump.
    (EXPRESSION, "nft_lookup_eval"),
    (EXPRESSION, "nft_reject_ipv4_eval"),
    (EXPRESSION, "nft_reject_ipv6_eval"),
    (EXPRESSION, "nft_reject_inet_eval"),
    (EXPRESSION, "nft_reject_bridge_eval"),
    (EXPRESSION, "nft_reject_netdev_eval"),
    (EXPRESSION, "nft_queue_eval"),
    (EXPRESSION, "nft_queue_sreg_eval"),
    (EXPRESSION, "nft_target_eval_xt"),
    (EXPRESSION, "nft_target_eval_bridge"),
    (EXPRESSION, "nft_nat_eval"),
    (EXPRESSION, "nft_nat_inet_eval"),
    (EXPRESSION, "nft_masq_eval"),
    (EXPRESSION, "nft_masq_ipv4_eval"),
    (EXPRESSION, "nft_masq_ipv6_eval"),
    (EXPRESSION, "nft_masq_inet_eval"),
    (EXPRESSION, "nft_redir_eval"),
    (EXPRESSION, "nft_synproxy_eval"),
    (EXPRESSION, "nft_objref_eval"),
    (EXPRESSION, "nft_objref_map_eval"),
    (EXPRESSION, "nft_connlimit_eval"),
    (EXPRESSION, "nft_ct_set_zone_eval"),
    (EXPRESSION, "nft_exthdr_tcp_strip_eval"),
];

/// --drops (src/bpf/skb/skb_drops.bpf.h)
pub const LISTEN: [Hook; 4] = [
    ("listen_syn", "tcp_conn_request"),
    ("listen_answer", "tcp_make_synack"),
    ("listen_ack", "tcp_v4_syn_recv_sock"),
    ("listen_ack", "tcp_v6_syn_recv_sock"),
];

/// --drops with tracking: where a packet may match before something changes its headers
pub const DROP_BEGINS: [Hook; 6] = [
    ("drop_begin", "nf_hook_slow"),
    ("drop_begin", "ip_rcv_core"),
    ("drop_begin", "ip6_rcv_core"),
    ("drop_begin", "__ip_local_out"),
    ("drop_begin", "__ip6_local_out"),
    ("drop_begin", "__dev_queue_xmit"),
];

/// --drops: segments for connections in TIME-WAIT, which are no losses (src/bpf/common/drop_facts.bpf.h)
pub const TIME_WAIT: [Hook; 1] = [("drops_time_wait", "tcp_timewait_state_process")];

/// --drops with --output-owner, where the tracepoint does not tell the socket (before 6.11)
pub const RECEIVERS: [Hook; 12] = [
    ("rx_sock", "udp_queue_rcv_one_skb"),
    ("rx_sock", "udpv6_queue_rcv_one_skb"),
    ("rx_sock", "tcp_v4_do_rcv"),
    ("rx_sock", "tcp_v6_do_rcv"),
    ("rx_sock", "raw_rcv"),
    ("rx_sock", "rawv6_rcv"),
    ("rx_packet", "tcp_v4_rcv"),
    ("rx_packet", "tcp_v6_rcv"),
    (FOUND, "__inet_lookup_established"),
    (FOUND, "__inet6_lookup_established"),
    (FOUND, "__inet_lookup_listener"),
    (FOUND, "inet6_lookup_listener"),
];

/// The same on kernels whose drops have no reasons: who refuses a packet
pub const REFUSALS: [Hook; 5] = [
    ("rx_filter", "sk_filter_trim_cap"),
    ("rx_policy", "__xfrm_policy_check"),
    ("rx_sum", "__skb_checksum_complete"),
    ("rx_enqueue", "__udp_enqueue_schedule_skb"),
    ("rx_route", "ip_route_input_noref"),
];

/// netprobe why (src/bpf/skb_why.bpf.h)
pub const ICMP: [Hook; 4] = [
    ("why_icmp", "__icmp_send"),
    ("why_icmp", "icmp6_send"),
    ("why_pushed", "icmp_push_reply"),
    ("why_pushed", "icmpv6_push_pending_frames"),
];

/// netprobe why with a filter by process
pub const ROUTES: [Hook; 1] = [("why_route", "ip_route_output_key_hash_rcu")];

/// --pid, --comm, --uid, --cgroup, --container, -- COMMAND (src/bpf/common/who.bpf.h): ports and connections of sockets
pub const WHO: [Hook; 9] = [
    ("who_listens", "inet_hash"),
    ("who_listens", "inet6_hash"),
    ("who_binds_begin", "udp_lib_get_port"),
    ("who_connects", "tcp_connect"),
    ("who_child", "inet_csk_complete_hashdance"),
    ("who_leaves", "inet_unhash"),
    ("who_leaves", "udp_lib_unhash"),
    ("who_gone", "inet_sock_destruct"),
    ("who_gone", "packet_sock_destruct"),
];

/// Those of them that ask for processes: which sockets these make and use
pub const WHO_PROCESSES: [Hook; 11] = [
    ("who_made", "sock_init_data"),
    ("who_uses", "tcp_v4_connect"),
    ("who_uses", "tcp_v6_connect"),
    ("who_uses", "tcp_sendmsg"),
    ("who_uses", "tcp_recvmsg"),
    ("who_uses", "udp_sendmsg"),
    ("who_uses", "udpv6_sendmsg"),
    ("who_uses", "udp_recvmsg"),
    ("who_uses", "udpv6_recvmsg"),
    ("who_uses", "raw_sendmsg"),
    ("who_uses", "rawv6_sendmsg"),
];

/// netprobe why --changes (src/bpf/skb/skb_changes.bpf.h): where a process changes the network
pub const CHANGES: [Hook; 4] = [
    ("change_rtnl", "rtnetlink_rcv_msg"),
    ("change_sysctl", "proc_sys_write"),
    ("change_ipt", "do_ipt_set_ctl"),
    ("change_ip6t", "do_ip6t_set_ctl"),
];

/// Those of nf_tables, where its types are known
pub const CHANGES_NFT: [Hook; 4] = [
    ("change_nft_rule", "nf_tables_rule_notify"),
    ("change_nft_chain", "nf_tables_chain_notify"),
    ("change_nft_chain", "nf_tables_table_notify"),
    ("change_nft_elem", "nf_tables_setelem_notify"),
];

/// Where they are not
pub const CHANGES_NFT_SOME: [Hook; 1] = [("change_nft_some", "nf_tables_commit")];

/// netprobe record --trigger rst (src/bpf/skb/skb_flight.bpf.h)
pub const TRIGGER_RST: [Hook; 3] = [
    ("flight_answers", "tcp_v4_send_reset"),
    ("flight_answers", "tcp_v6_send_reset"),
    ("flight_resets", "tcp_send_active_reset"),
];

/// netprobe record --trigger connect-slower
pub const TRIGGER_CONNECT: [Hook; 1] = [("flight_connects", "tcp_connect")];

/// A program for functions' returns alone.
pub const FOUND: &str = "rx_found";

/// Programs, and those at the returns of the same functions.
pub const ENDS: [(&str, &str); 17] = [
    ("change_rtnl", "change_end"),
    ("change_sysctl", "change_end"),
    ("change_ipt", "change_end"),
    ("change_ip6t", "change_end"),
    ("who_binds_begin", "who_binds_end"),
    ("why_route", "why_route_end"),
    ("why_icmp", "why_icmp_end"),
    (EXPRESSION, "nft_eval_end"),
    ("listen_syn", "listen_syn_end"),
    ("listen_ack", "listen_ack_end"),
    ("rx_sock", "rx_end"),
    ("rx_packet", "rx_end"),
    ("rx_filter", "rx_filter_end"),
    ("rx_policy", "rx_policy_end"),
    ("rx_sum", "rx_sum_end"),
    ("rx_enqueue", "rx_enqueue_end"),
    ("rx_route", "rx_route_end"),
];

/// The program that shows a hit and does what `hook`'s own program does, where tracking needs both in one.
pub fn shown(hook: &str) -> Option<&'static str> {
    match hook {
        "track_free_1" => Some("skb_free_1"),
        "track_gone_1" => Some("skb_gone_1"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_function_once() {
        for table in [
            &TRACK[..],
            &OWNER[..],
            &XDP[..],
            &NETFILTER[..],
            &LISTEN[..],
            &RECEIVERS[..],
            &REFUSALS[..],
            &ICMP[..],
            &WHO[..],
            &WHO_PROCESSES[..],
            &CHANGES[..],
            &CHANGES_NFT[..],
        ] {
            let names: HashSet<&str> = table.iter().map(|(_, f)| *f).collect();
            assert_eq!(names.len(), table.len());
        }
    }
}
