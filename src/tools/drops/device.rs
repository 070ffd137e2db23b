//! What devices tell of losses (src/bpf/drops/drops_device.bpf.h): transmit queues that time out, devlink traps.

use anyhow::{Context, Result};
use libbpf_rs::Link;

use crate::bpf::drops::types::{drop_device, drop_key, drop_rule};
use crate::bpf::drops::{DropsSkel, OpenDropsSkel};
use crate::kernel::features::Features;
use crate::text::escape::escaped;

/// Rules and traps that are told apart.
const RULES: u32 = 4096;

/// In the form of a drop reason's name; `None` for other reasons.
pub fn reason(value: u32) -> Option<&'static str> {
    match drop_device(value) {
        drop_device::DROP_TX_TIMEOUT => Some("TX_TIMEOUT"),
        drop_device::DROP_DEVLINK_TRAP => Some("DEVLINK_TRAP"),
        _ => None,
    }
}

pub fn is_device(value: u32) -> bool {
    reason(value).is_some()
}

/// The row is about a transmit queue.
pub fn is_queue(value: u32) -> bool {
    drop_device(value) == drop_device::DROP_TX_TIMEOUT
}

pub fn queue(key: &drop_key) -> Option<u32> {
    is_queue(key.reason).then_some(key.decider)
}

/// The trap's group and name.
pub fn trap(key: &drop_key, rule: &drop_rule) -> Option<(String, String)> {
    let is_trap = drop_device(key.reason) == drop_device::DROP_DEVLINK_TRAP;
    is_trap.then(|| (escaped(&rule.table), escaped(&rule.chain)))
}

/// Before the load.
pub fn prepare(open: &mut OpenDropsSkel<'_>, features: &Features) -> Result<()> {
    open.progs.drops_trap.set_autoload(features.devlink_trap);
    open.maps.rules_seen.set_max_entries(RULES)?;
    Ok(())
}

pub fn attach(skel: &DropsSkel<'_>, features: &Features) -> Result<Vec<Link>> {
    let mut links = Vec::new();
    let timeout = skel
        .progs
        .drops_tx_timeout
        .attach_raw_tracepoint("net_dev_xmit_timeout");
    links.push(timeout.context("failed to attach to the tracepoint net:net_dev_xmit_timeout")?);
    if features.devlink_trap {
        let trap = skel
            .progs
            .drops_trap
            .attach_raw_tracepoint("devlink_trap_report");
        links.push(trap.context("failed to attach to the tracepoint devlink:devlink_trap_report")?);
    }
    Ok(links)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_and_a_trap() {
        let key = |reason: drop_device, decider| drop_key {
            reason: reason.0,
            decider,
            ..drop_key::default()
        };
        let timeout = key(drop_device::DROP_TX_TIMEOUT, 3);
        let mut rule = drop_rule::default();
        rule.table[..8].copy_from_slice(b"l2_drops");
        rule.chain[..6].copy_from_slice(b"a\nmac\0");
        assert_eq!((queue(&timeout), trap(&timeout, &rule)), (Some(3), None));
        let dropped = key(drop_device::DROP_DEVLINK_TRAP, 9);
        assert_eq!(queue(&dropped), None);
        let told = trap(&dropped, &rule).unwrap();
        assert_eq!((&*told.0, &*told.1), ("l2_drops", "a\\x0amac"));
        assert!(!is_device(2) && reason(0xffff_0011) == Some("TX_TIMEOUT"));
    }
}
