//! What an expression costs on each packet: translated in each way, beside the kernel's own JIT of the same cBPF (a socket filter).
//! A cost is the difference to a filter that only returns 0, run in the same way.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;

use anyhow::{Result, ensure};
use netprobe::filter::BLOCK;
use netprobe::filter::cbpf::Program;
use netprobe::filter::expr::{self, SNAPLEN};
use netprobe::filter::pcap::Linktype;
use netprobe::filter::run::{Runner, socket_filter};
use netprobe::os::monotonic_ns;

const EXPRESSION: &str = "tcp port 80 or icmp";
const PACKETS: u32 = 5_000;
/// So many that what the call itself costs (it patches the kernel's dispatcher) is nothing beside them.
const REPEATS: u32 = 200_000;

/// `NAME.PACKET` and instructions, for packets that do not match.
pub fn measure() -> Result<Vec<(String, f64)>> {
    let program = expr::compile(EXPRESSION, Linktype::ETHERNET, SNAPLEN)?;
    let none = Program::nothing();
    let mut figures = Vec::new();
    for (name, packet) in [("udp", packet(17, 53)), ("tcp", packet(6, 443))] {
        ensure!(
            program.run(&packet, packet.len() as u32) == 0,
            "{name} matches"
        );
        let mut add = |way: &str, with: f64, without: f64| {
            figures.push((format!("{way}.{name}"), with - without));
        };
        add(
            "kernel",
            socket(&program, &packet)?,
            socket(&none, &packet)?,
        );
        for (way, frags) in [("xdp", false), ("xdp-frags", true)] {
            let run = |p| repeated(&mut Runner::xdp(p, frags)?, &packet);
            add(way, run(&program)?, run(&none)?);
        }
        let run = |p| one_by_one(&mut Runner::traced(p, BLOCK)?, &packet);
        add("block", run(&program)?, run(&none)?);
        // Kernels from 6.2; with the loads of the sk_buff's fields, which a filter that returns 0 does not need.
        if Runner::typed(&none).is_ok() {
            let run = |p| one_by_one(&mut Runner::typed(p)?, &packet);
            add("typed", run(&program)?, run(&none)?);
        }
    }
    Ok(figures)
}

fn packet(protocol: u8, port: u16) -> Vec<u8> {
    let mut packet = [&[2; 12][..], &[8, 0]].concat();
    packet.extend([
        0x45, 0, 0, 60, 0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    packet.extend([0x9c, 0x40]);
    packet.extend(port.to_be_bytes());
    packet.extend([0; 36]);
    packet
}

/// Time of one run, in one call for all.
fn repeated(runner: &mut Runner, packet: &[u8]) -> Result<f64> {
    runner.time(packet, PACKETS)?;
    let start = monotonic_ns()?;
    runner.time(packet, REPEATS)?;
    Ok((monotonic_ns()? - start) as f64 / f64::from(REPEATS))
}

/// The same of programs that cannot be repeated.
fn one_by_one(runner: &mut Runner, packet: &[u8]) -> Result<f64> {
    average(|| runner.run(packet, packet.len() as u32).map(drop))
}

/// A datagram sent to a socket whose filter, compiled by the kernel, refuses it.
fn socket(program: &Program, packet: &[u8]) -> Result<f64> {
    let (from, to) = UnixDatagram::pair()?;
    to.set_nonblocking(true)?;
    socket_filter(to.as_fd(), program)?;
    average(|| Ok(from.send(packet).map(drop)?))
}

fn average(mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    for _ in 0..PACKETS / 10 {
        work()?;
    }
    let start = monotonic_ns()?;
    for _ in 0..PACKETS {
        work()?;
    }
    Ok((monotonic_ns()? - start) as f64 / f64::from(PACKETS))
}
