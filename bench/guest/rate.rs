//! The highest rate of packets that a tool captures to a file without loss: floods at a steady rate, each with a new run of the
//! tool, and what is in its file afterwards. Runs inside a machine and, what parallelism is about, outside.

use std::fs;
use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use netprobe::capture::savefile::Reader;
use netprobe::os::monotonic_ns;

use crate::child::Tool;
use crate::net::{self, Net};

/// How long a flood lasts; so many packets at least would fill any tool's buffer.
const FLOOD_NS: u64 = 1_000_000_000;
const TICK_NS: u64 = 1_000_000;
/// Until every tool has been given what its buffer still holds.
pub const GATHER: Duration = Duration::from_secs(2);
/// Rates nearer to one another than this are one (a search between a rate that holds and one that does not).
const NEAR: f64 = 1.1;

/// What became of a flood.
struct Flood {
    /// packets that reached the receiver's interface
    arrived: u64,
    /// packets a second, as sent in truth
    rate: f64,
}

/// Packets a second of `len` bytes (with the headers of IPv4 and UDP) captured into `file` without loss by the tool that
/// `start` starts; and whether the sender could send no faster.
pub fn highest(
    net: &Net,
    len: usize,
    file: &str,
    start: &dyn Fn() -> Result<Tool>,
) -> Result<(f64, bool)> {
    let holds = |rate: Option<f64>| -> Result<(f64, bool)> {
        let mut fastest = 0.0;
        // Whatever else happens on the machine may lose a packet once.
        for _ in 0..2 {
            let tool = start()?;
            let sent = flood(net, len, rate)?;
            // tcpdump is given a block that is not full after a second, and leaves it behind when it is ended before.
            std::thread::sleep(GATHER);
            tool.settle()?;
            tool.stop()?;
            let captured = captured(file)?;
            fs::remove_file(file)?;
            if captured > sent.arrived {
                bail!("{} packets arrived, {captured} captured", sent.arrived);
            }
            if captured == sent.arrived {
                return Ok((sent.rate, true));
            }
            fastest = sent.rate;
        }
        Ok((fastest, false))
    };
    let (mut high, unhindered) = holds(None)?;
    if unhindered {
        return Ok((high, true));
    }
    // Down until one holds, then between.
    let mut low = high;
    loop {
        low /= 2.0;
        if low < 500.0 {
            bail!("loses packets at {low:.0} a second still");
        }
        let (rate, ok) = holds(Some(low))?;
        if ok {
            low = rate;
            break;
        }
        high = low;
    }
    while high / low > NEAR {
        let (rate, ok) = holds(Some((low * high).sqrt()))?;
        if ok && rate > low {
            low = rate;
        } else {
            high = (low * high).sqrt();
        }
    }
    Ok((low, false))
}

/// Packets a second of `len` bytes that the sender reaches, with whatever is attached.
pub fn sender(net: &Net, len: usize) -> Result<f64> {
    Ok(flood(net, len, None)?.rate)
}

/// Sends for `FLOOD_NS` to a port of its own, `rate` packets a second evenly spread, or as fast as it goes.
fn flood(net: &Net, len: usize, rate: Option<f64>) -> Result<Flood> {
    // Nobody reads it: what is too much for its buffer ends there, whoever captures.
    let (sender, receiver): (UdpSocket, UdpSocket) = net.sockets()?;
    sender.connect(receiver.local_addr()?)?;
    let payload = vec![0x55; len - net::HEADERS];
    let before = net.forwarded()?;
    let start = monotonic_ns()?;
    let mut sent = 0u64;
    loop {
        let elapsed = monotonic_ns()? - start;
        if elapsed >= FLOOD_NS {
            break;
        }
        let due = match rate {
            Some(rate) => (elapsed as f64 * rate / 1e9) as u64 + 1,
            None => sent + 64,
        };
        while sent < due {
            sender.send(&payload)?;
            sent += 1;
        }
        if rate.is_some() {
            std::thread::sleep(Duration::from_nanos(TICK_NS));
        }
    }
    let elapsed = monotonic_ns()? - start;
    let arrived = net.forwarded()? - before;
    Ok(Flood {
        arrived,
        rate: arrived as f64 * 1e9 / elapsed as f64,
    })
}

fn captured(file: &str) -> Result<u64> {
    let mut reader =
        Reader::open(Path::new(file)).with_context(|| format!("{file} is no capture"))?;
    let mut count = 0;
    while reader.next_packet()?.is_some() {
        count += 1;
    }
    Ok(count)
}
