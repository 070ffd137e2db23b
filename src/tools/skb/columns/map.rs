//! What a BPF program does with a map (--output-bpfmap).

use std::fmt;
use std::io::Write;

use serde::Serialize;

use crate::bpf::read;
use crate::bpf::skb::types::{skb_map, skb_map_part};
use crate::text::escape::escaped;
use crate::tools::skb::event::{Event, MapCall, SECTION_MAP};

use super::column::Column;

const KEY: u32 = skb_map_part::SKB_MAP_KEY.0;
const VALUE: u32 = skb_map_part::SKB_MAP_VALUE.0;

pub const MAP: Column = Column {
    below: Some(|_, event, line| {
        if let Some(map) = &event.map {
            let _ = write!(line, "\n    {}", MapRow::new(map));
        }
    }),
    json: Some(|_, event, object| {
        object.some("map", event.map.as_deref().map(MapRow::new).as_ref());
    }),
    ..Column::new(SECTION_MAP, size_of::<skb_map>(), decode)
};

fn decode<'b>(event: &mut Event, bytes: &'b [u8], _: usize) -> Option<&'b [u8]> {
    let (m, rest) = read::<skb_map>(bytes)?;
    let part = |known: u32, bytes: &[u8], size: u32| {
        let len = bytes.len().min(size as usize);
        (m.known & known != 0).then(|| bytes[..len].to_vec())
    };
    event.map = Some(Box::new(MapCall {
        id: m.id,
        name: m.name,
        key: part(KEY, &m.key, m.key_size),
        value: part(VALUE, &m.value, m.value_size),
        key_size: m.key_size,
        value_size: m.value_size,
    }));
    Some(rest)
}

/// What a BPF program does with a map. `key` and `value` in hexadecimal, 256 bytes of them at most; `value` is null where a look-up finds
/// nothing, and where a call has none.
#[derive(Serialize)]
struct MapRow {
    id: u32,
    name: String,
    key: Option<String>,
    key_size: u32,
    value: Option<String>,
    value_size: u32,
}

impl MapRow {
    fn new(map: &MapCall) -> Self {
        let hex = |bytes: &Option<Vec<u8>>| {
            let bytes = bytes.as_ref()?;
            Some(bytes.iter().map(|b| format!("{b:02x}")).collect())
        };
        Self {
            id: map.id,
            name: escaped(&map.name),
            key: hex(&map.key),
            key_size: map.key_size,
            value: hex(&map.value),
            value_size: map.value_size,
        }
    }
}

impl fmt::Display for MapRow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |part: &Option<String>, size: u32| match part {
            // Two digits a byte.
            Some(hex) if hex.len() < 2 * size as usize => format!("{hex}…"),
            Some(hex) => hex.clone(),
            None => "-".to_owned(),
        };
        write!(
            f,
            "map {} {}: key {} value {}",
            self.id,
            self.name,
            shown(&self.key, self.key_size),
            shown(&self.value, self.value_size)
        )
    }
}
