//! Functions of the kernel that free an sk_buff which others give up: the place of a drop is the function that called them.

/// Frees what a qdisc dropped, from 7.x on.
pub const QDISC_FREE: &str = "__tcf_kfree_skb_list";

/// How their names begin.
const FREES: [&str; 16] = [
    "kfree_skb",
    "__kfree_skb",
    "consume_skb",
    "sk_skb_reason_drop",
    "__sk_skb_reason_drop",
    "dev_kfree_skb_any",
    "__dev_kfree_skb_any",
    "skb_queue_purge",
    "__skb_queue_purge",
    "skb_rbtree_purge",
    "skb_errqueue_purge",
    "skb_release_",
    "rtnl_kfree_skbs",
    "tcp_drop",
    "tcp_rtx_queue_purge",
    QDISC_FREE,
];

pub fn heads() -> impl Iterator<Item = &'static str> {
    FREES.into_iter()
}

/// Is this function one of them?
pub fn only_frees(name: &str) -> bool {
    FREES.iter().any(|begin| name.starts_with(begin))
}

#[cfg(test)]
mod tests {
    use super::only_frees;

    #[test]
    fn functions_that_free_for_others() {
        assert!(only_frees("kfree_skb_list_reason") && only_frees("skb_queue_purge_reason"));
        assert!(!only_frees("nf_hook_slow") && !only_frees("__dev_queue_xmit"));
    }
}
