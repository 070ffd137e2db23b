//! The live tests: netprobe on a running kernel, as root, in network namespaces of their own.
//!
//! They run on the host as far as it allows (`cargo test --test live`) and whole in a virtual machine
//! (`tests/vm/live 6.12`); what cannot run is ignored with the reason. `cargo test --test live -- NAME` picks by
//! name. Each tool's cases are a module here with a `cases()`; how to write one is told in tests/common/mod.rs.

mod caps;
#[path = "../common/mod.rs"]
mod common;
mod drops;
mod drops_device;
mod drops_kinds;
mod drops_metrics;
mod drops_nat;
mod drops_nft;
mod drops_programs;
mod drops_rows;
mod drops_screen;
mod extcap;
mod faults_traffic;
mod files;
mod filter;
mod filter_scenarios;
mod harness;
mod heartbeat;
mod icmp;
mod icmp_culprit;
mod icmp_identity;
mod icmp_sent;
mod join;
mod latency;
mod latency_requests;
mod otlp;
mod record;
mod record_flight;
mod run_ends;
mod skb;
mod skb_ct;
mod skb_drops;
mod skb_ends;
mod skb_headers;
mod skb_netfilter;
mod skb_output;
mod skb_owner;
mod skb_programs;
mod skb_track;
mod tcp;
mod tcp_beside;
mod tcp_events;
mod tcp_losses;
mod tcp_network;
mod tcpconnect;
mod tcpconnect_beside;
mod tcpconnect_dns;
mod tcpconnect_loss;
mod tcpconnect_outcome;
mod tcpconnect_stack;
mod tunnels;
mod who;
mod why;
mod why_command;
mod why_faults;
mod why_reasons;
mod why_ways;
mod xdp;
mod xdpchain;
mod xdpdump;
mod xdpdump_trace;

fn main() {
    if let Ok(address) = std::env::var(who::HELPER) {
        who::help(&address);
    }
    if let Ok(file) = std::env::var(faults_traffic::HELPER) {
        faults_traffic::help(&file);
    }
    // Whoever starts the tests may ignore it (nohup); netprobe would inherit that.
    // SAFETY: the default action runs no code of ours.
    unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
    common::mount_bpffs();
    let mut cases = Vec::new();
    cases.extend(harness::cases());
    cases.extend(heartbeat::cases());
    cases.extend(caps::cases());
    cases.extend(icmp::cases());
    cases.extend(icmp_culprit::cases());
    cases.extend(icmp_sent::cases());
    cases.extend(icmp_identity::cases());
    cases.extend(skb_owner::cases());
    cases.extend(files::cases());
    cases.extend(extcap::cases());
    cases.extend(join::cases());
    cases.extend(latency::cases());
    cases.extend(latency_requests::cases());
    cases.extend(otlp::cases());
    cases.extend(record::cases());
    cases.extend(record_flight::cases());
    cases.extend(tcp::cases());
    cases.extend(tcp_beside::cases());
    cases.extend(tcp_events::cases());
    cases.extend(tcp_losses::cases());
    cases.extend(tcp_network::cases());
    cases.extend(tunnels::cases());
    cases.extend(skb_headers::cases());
    cases.extend(filter::cases());
    cases.extend(skb_drops::cases());
    cases.extend(skb_ct::cases());
    cases.extend(drops::cases());
    cases.extend(drops_kinds::cases());
    cases.extend(drops_metrics::cases());
    cases.extend(drops_device::cases());
    cases.extend(drops_nat::cases());
    cases.extend(drops_nft::cases());
    cases.extend(drops_programs::cases());
    cases.extend(drops_rows::cases());
    cases.extend(drops_screen::cases());
    cases.extend(skb_netfilter::cases());
    cases.extend(skb_output::cases());
    cases.extend(xdpdump_trace::cases());
    cases.extend(skb_programs::cases());
    cases.extend(skb_track::cases());
    cases.extend(filter_scenarios::cases());
    cases.extend(xdpdump::cases());
    cases.extend(xdpchain::cases());
    cases.extend(skb::cases());
    cases.extend(skb_ends::cases());
    cases.extend(run_ends::cases());
    cases.extend(why::cases());
    cases.extend(why_command::cases());
    cases.extend(why_faults::cases());
    cases.extend(who::cases());
    cases.extend(why_reasons::cases());
    cases.extend(why_ways::cases());
    cases.extend(tcpconnect::cases());
    cases.extend(tcpconnect_outcome::cases());
    cases.extend(tcpconnect_dns::cases());
    cases.extend(tcpconnect_stack::cases());
    cases.extend(tcpconnect_beside::cases());
    cases.extend(tcpconnect_loss::cases());
    cases.extend(skb_ends::last());
    common::run(cases)
}
