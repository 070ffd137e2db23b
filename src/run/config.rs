//! The map `config` of a run's programs, pinned for `netprobe ctl`: field filters, and whether the run is paused.

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};

use crate::bpf::bytes_of;
use crate::bpf::skb::types::{np_config, np_field};

/// Set in `np_config.fields`: no program sends any more.
const ENDED: u32 = np_field::NP_PAUSED.0 | np_field::NP_ENDED.0;

/// A run's configuration, as the programs read it.
pub struct Config<'a, M> {
    map: &'a M,
    value: np_config,
}

impl<'a, M: MapCore> Config<'a, M> {
    /// Writes `value` into the map.
    pub fn set(map: &'a M, value: np_config) -> Result<Self> {
        let config = Self { map, value };
        config.write(&value)?;
        Ok(config)
    }

    /// From here on no program sends anything. The heartbeat has ended.
    pub fn pause(&self) -> Result<()> {
        self.write(&np_config {
            fields: self.value.fields | ENDED,
            ..self.value
        })
    }

    fn write(&self, value: &np_config) -> Result<()> {
        self.map
            .update(&0u32.to_ne_bytes(), bytes_of(value), MapFlags::ANY)
            .context("failed to set the filter")
    }
}
