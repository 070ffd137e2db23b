//! Kernel memory as it is: skb->cb, the struct sk_buff, the struct skb_shared_info.

use crate::bpf::read;
use crate::bpf::skb::types::skb_copy;
use crate::tools::skb::event::{SECTION_CB, SECTION_SHINFO, SECTION_SKB};

use super::column::{Column, Flag, Of};

pub const CB: Column = Column {
    flag: Some(Flag::new("output-skb-cb", "Show skb->cb, as 32-bit words")),
    of: Of::Skbs,
    below: Some(|_, event, line| {
        if let Some(cb) = &event.cb {
            line.extend_from_slice(b"\n    cb: ");
            line.extend_from_slice(cb_words(cb).join(" ").as_bytes());
        }
    }),
    json: Some(|_, event, object| object.some("cb", event.cb.as_deref().map(cb_words).as_ref())),
    ..Column::new(SECTION_CB, 48, |event, bytes, _| {
        let (cb, rest) = bytes.split_first_chunk()?;
        event.cb = Some(Box::new(*cb));
        Some(rest)
    })
};

pub const SKB: Column = Column {
    flag: Some(Flag::new("output-skb", "Show the whole struct sk_buff")),
    of: Of::Skbs,
    prepare: Some(|view, event| view.skb.show(event.skb_copy.as_deref())),
    below: Some(|view, _, line| below(view.skb.shown.as_deref(), line)),
    json: Some(|view, _, object| object.some("sk_buff", view.skb.shown.as_ref())),
    ..Column::new(SECTION_SKB, size_of::<skb_copy>(), |event, bytes, _| {
        let (copy, rest) = copy(bytes)?;
        event.skb_copy = Some(copy);
        Some(rest)
    })
};

pub const SHINFO: Column = Column {
    flag: Some(Flag::new(
        "output-skb-shared-info",
        "Show the whole struct skb_shared_info",
    )),
    of: Of::Skbs,
    prepare: Some(|view, event| view.shared_info.show(event.shared_info.as_deref())),
    below: Some(|view, _, line| below(view.shared_info.shown.as_deref(), line)),
    json: Some(|view, _, object| object.some("shared_info", view.shared_info.shown.as_ref())),
    ..Column::new(SECTION_SHINFO, size_of::<skb_copy>(), |event, bytes, _| {
        let (copy, rest) = copy(bytes)?;
        event.shared_info = Some(copy);
        Some(rest)
    })
};

fn copy(bytes: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let (copy, rest) = read::<skb_copy>(bytes)?;
    let len = (copy.size as usize).min(copy.bytes.len());
    Some((copy.bytes[..len].to_vec(), rest))
}

fn below(text: Option<&str>, line: &mut Vec<u8>) {
    if let Some(text) = text {
        line.extend_from_slice(b"\n    ");
        line.extend_from_slice(text.as_bytes());
    }
}

/// `skb->cb` as the kernel's 32-bit words, in hexadecimal.
fn cb_words(cb: &[u8; 48]) -> Vec<String> {
    cb.chunks_exact(4)
        .filter_map(|c| c.try_into().ok().map(u32::from_ne_bytes))
        .map(|w| format!("{w:08x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_cb() {
        let mut cb = [0; 48];
        cb[..4].copy_from_slice(&0x1234u32.to_ne_bytes());
        let words = cb_words(&cb);
        assert_eq!((words.len(), words[0].as_str()), (12, "00001234"));
    }
}
