//! What a filter costs on each packet: translated, beside the kernel's own JIT of the same cBPF (a socket filter), and
//! beside no filter. Prints one line for each packet and way, in nanoseconds (the least of many rounds); under
//! `tests/vm/run KERNEL --icount` a nanosecond is an instruction.
//!
//! A cost is the difference to a filter that only returns 0, run in the same way: BPF_PROG_TEST_RUN of an XDP program
//! for the translation, a datagram between Unix sockets that the filter refuses for the kernel's own.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use anyhow::{Result, ensure};
use netprobe::filter::cbpf::Program;
use netprobe::filter::expr::{self, SNAPLEN};
use netprobe::filter::pcap::Linktype;
use netprobe::filter::run::Runner;

const EXPRESSION: &str = "tcp port 80 or icmp";
const ROUNDS: u32 = 200;
const PACKETS: u32 = 2_000;

fn main() -> Result<()> {
    // What cargo passes is of no interest here.
    if !nix::unistd::geteuid().is_root() {
        println!("filter: loading BPF programs needs root; nothing measured");
        return Ok(());
    }
    let program = expr::compile(EXPRESSION, Linktype::ETHERNET, SNAPLEN)?;
    println!("{EXPRESSION}: ns for each packet that does not match");
    for (name, packet) in [
        ("UDP", packet(17, 53)),
        ("TCP port 443", packet(6, 443)),
        ("ARP", [&[2; 12][..], &[8, 6], &[0; 46]].concat()),
    ] {
        ensure!(
            program.run(&packet, packet.len() as u32) == 0,
            "{name} matches"
        );
        let none = Program::nothing();
        let own = socket(&program, &packet)? - socket(&none, &packet)?;
        let linear = xdp(&program, &packet, false)? - xdp(&none, &packet, false)?;
        let frags = xdp(&program, &packet, true)? - xdp(&none, &packet, true)?;
        println!(
            "{name:<13} kernel's own {own:6.1}   translated {linear:6.1}   translated, several buffers allowed {frags:6.1}"
        );
    }
    Ok(())
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

/// An XDP program with the translated filter, a packet's time.
fn xdp(program: &Program, packet: &[u8], frags: bool) -> Result<f64> {
    let mut runner = Runner::xdp(program, frags)?;
    let mut least = u32::MAX;
    for _ in 0..ROUNDS {
        // The kernel gives whole nanoseconds of one run: too coarse, so the time of the call is taken here.
        let start = Instant::now();
        runner.time(packet, PACKETS)?;
        least = least.min(start.elapsed().as_nanos() as u32);
    }
    Ok(f64::from(least) / f64::from(PACKETS))
}

/// A datagram sent to a socket whose filter, compiled by the kernel, refuses it.
fn socket(program: &Program, packet: &[u8]) -> Result<f64> {
    let (from, to) = UnixDatagram::pair()?;
    to.set_nonblocking(true)?;
    let insns = program.insns();
    let filter = libc::sock_fprog {
        len: insns.len() as u16,
        filter: insns.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `filter` points to as many instructions as it says, laid out as `sock_filter`, for the call's time.
    let status = unsafe {
        libc::setsockopt(
            to.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    };
    ensure!(
        status == 0,
        "SO_ATTACH_FILTER: {}",
        std::io::Error::last_os_error()
    );
    let mut least = u32::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..PACKETS {
            from.send(packet)?;
        }
        least = least.min(start.elapsed().as_nanos() as u32);
    }
    Ok(f64::from(least) / f64::from(PACKETS))
}
