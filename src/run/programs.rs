//! A run's programs from load to end: maps pinned, filter set, buffers drained, probes attached; then paused, and their counters read.

use anyhow::Result;
use libbpf_rs::{MapCore, MapMut};

use crate::bpf::skb::types::np_config;
use crate::engine::batch::BufferOptions;
use crate::engine::drain::{Drain, EventMap};

use super::config::Config;
use super::heartbeat::Heartbeat;
use super::loss::Loss;
use super::pins::Pins;

/// What a tool has attached.
pub trait Attached {
    /// Hits that the kernel skipped.
    fn missed(&self) -> u64;
}

/// What each BPF object with events has in common.
pub struct Engine<'a, M> {
    pub pins: Option<Pins>,
    /// the map `data_config`
    pub config: &'a M,
    /// what programs filter by
    pub filter: np_config,
    /// the map `stats`
    pub stats: &'a M,
    /// the map that events come through
    pub source: EventMap<'a>,
    pub buffer: BufferOptions,
    pub heartbeat: Heartbeat,
}

/// The engine of a loaded skeleton, its maps pinned: `engine!(skel, "icmp", filter, transport, buffer)`, in a function that gives a `Result`.
/// A macro, since each skeleton has a type of its own for its maps.
macro_rules! engine {
    ($skel:expr, $tool:literal, $filter:expr, $transport:expr, $buffer:expr) => {{
        use std::os::fd::AsFd;
        let maps = &mut $skel.maps;
        let pins = $crate::run::programs::pin($tool, &mut maps.data_config, &mut maps.stats)?;
        let maps = &$skel.maps;
        $crate::run::programs::Engine {
            pins,
            config: &maps.data_config,
            filter: $filter,
            stats: &maps.stats,
            source: $transport.source(maps.events.as_fd(), maps.rings.as_fd()),
            buffer: $buffer,
            heartbeat: $crate::run::heartbeat::heartbeat!($skel, $crate::run::heartbeat::LIMIT)?,
        }
    }};
}
pub(crate) use engine;

/// The programs of a run. Its pins go when it is dropped.
pub struct Programs<'a, M, A> {
    config: Config<'a, M>,
    stats: &'a M,
    pub attached: A,
    pub heartbeat: Heartbeat,
    _pins: Option<Pins>,
}

/// Pins the configuration and the counters of a run, for `netprobe ctl`; see [`Pins::create`].
pub fn pin(tool: &str, config: &mut MapMut<'_>, stats: &mut MapMut<'_>) -> Result<Option<Pins>> {
    let pins = Pins::create(tool);
    if let Some(pins) = &pins {
        pins.pin(config, "config")?;
        pins.pin(stats, "stats")?;
    }
    Ok(pins)
}

impl<'a, M: MapCore, A: Attached> Programs<'a, M, A> {
    /// Starts what must run before the first event, then attaches the probes.
    pub fn start(
        engine: Engine<'a, M>,
        attach: impl FnOnce() -> Result<A>,
    ) -> Result<(Drain, Self)> {
        let config = Config::set(engine.config, engine.filter)?;
        let drain = Drain::start(engine.source, engine.buffer)?;
        match attach() {
            Ok(attached) => {
                let programs = Self {
                    config,
                    stats: engine.stats,
                    attached,
                    heartbeat: engine.heartbeat,
                    _pins: engine.pins,
                };
                Ok((drain, programs))
            }
            Err(e) => {
                // The kernel may be busy for a while removing single kprobes.
                config.pause()?;
                Err(e)
            }
        }
    }

    /// See [`super::session::Tool::pause`].
    pub fn pause(&self) -> Result<()> {
        self.config.pause()
    }

    /// Events that full buffers have refused so far.
    pub fn lost(&self) -> Result<u64> {
        let mut loss = Loss::default();
        loss.add_stats(self.stats)?;
        Ok(loss.lost)
    }

    /// Grows while the programs stand still.
    pub fn unseen(&self) -> u64 {
        let gaps = self.heartbeat.gaps();
        gaps.times + gaps.ns
    }

    /// Adds the programs' own counters.
    pub fn count(&self, loss: &mut Loss) -> Result<()> {
        loss.missed += self.attached.missed();
        self.heartbeat.count(loss);
        loss.add_stats(self.stats)
    }
}
