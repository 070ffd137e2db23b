//! What tools with `--metrics-listen` share: the page that is scraped, and what is said of netprobe itself.

use std::fmt;
use std::net::SocketAddr;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::kernel::process;
use crate::os::cpu_time;
use crate::run::http::Page;

const PATH: &str = "/metrics";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// Series of a family, at most.
pub const SERIES: usize = 2000;
/// The labels of what has no series of its own.
pub const OVERFLOW: &str = "overflow";

/// Labels of a series.
pub type Labels = Vec<(&'static str, String)>;
pub type Series<V> = Vec<(Labels, V)>;

/// The page that others scrape.
#[derive(Debug)]
pub struct Exporter {
    page: Page,
    /// of the run, seconds since 1970
    pub started: f64,
}

impl Exporter {
    /// Begins to listen.
    pub fn listen(address: SocketAddr) -> Result<Self> {
        let page = Page::serve(address, PATH, OPEN_METRICS)?;
        eprintln!("netprobe: metrics at http://{}{PATH}", page.address);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            page,
            started: now.unwrap_or_default().as_secs_f64(),
        })
    }

    /// What is scraped from now on.
    pub fn give_out(&self, all: impl Collector + 'static) -> Result<()> {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(all));
        let mut text = String::new();
        text::encode(&mut text, &registry).context("failed to write the metrics")?;
        self.page.set(text);
        Ok(())
    }
}

/// netprobe's own CPU time and memory, and when it began.
pub fn of_process(to: &mut DescriptorEncoder<'_>, started: f64) -> fmt::Result {
    let cpu = ConstCounter::new(cpu_time().as_secs_f64());
    metric(to, "process_cpu_seconds", "CPU time of netprobe", &cpu)?;
    let memory = ConstGauge::new(process::resident_memory() as f64);
    metric(
        to,
        "process_resident_memory_bytes",
        "Memory of netprobe",
        &memory,
    )?;
    let started = ConstGauge::new(started);
    metric(
        to,
        "process_start_time_seconds",
        "When netprobe began",
        &started,
    )
}

/// A metric without labels.
pub fn metric(
    to: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: &impl EncodeMetric,
) -> fmt::Result {
    let encoder = to.encode_descriptor(name, help, None, value.metric_type())?;
    value.encode(encoder)
}
