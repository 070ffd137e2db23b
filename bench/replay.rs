//! Events a second, from a perf buffer to lines in a file, on one core: `cargo bench --bench replay`. Replays what a kernel wrote
//! (bench/data) through the parser of perf buffers, merge, decoding, formatting and writing; beside it the same bytes written
//! alone, which is what no tool can do without.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use netprobe::engine::batch::Batch;
use netprobe::engine::perf::note_records;
use netprobe::tools::skb::replay::Replay;

const RING: &[u8] = include_bytes!("data/skb-6.12.ring.gz");
const NAMES: &str = include_str!("data/skb-6.12.names");
/// Times that the recording is repeated: what a buffer of 4,096 pages holds.
const TIMES: usize = 140;

/// The recording over and over, each time a second later.
fn ring() -> Vec<u8> {
    let mut once = Vec::new();
    flate2::read::GzDecoder::new(RING)
        .read_to_end(&mut once)
        .expect("bench/data/skb-6.12.ring.gz is whole");
    let mut batch = Batch::default();
    consume(&mut batch, &once);
    let mut ring = Vec::new();
    for second in 0..TIMES as u64 {
        for r in &batch.records {
            let at = r.offset as usize;
            let ts = r.ts + second * 1_000_000_000;
            once[at..at + 8].copy_from_slice(&ts.to_ne_bytes());
        }
        ring.extend_from_slice(&once);
    }
    ring
}

/// As [`netprobe::engine::perf::PerfBuffers::consume`] does it.
fn consume(batch: &mut Batch, ring: &[u8]) {
    batch.data.clear();
    batch.records.clear();
    batch.data.extend_from_slice(ring);
    note_records(batch, 0, 0);
}

fn replay(c: &mut Criterion) {
    let ring = ring();
    let mut batch = Batch::default();
    consume(&mut batch, &ring);
    let events = batch.records.len() as u64;
    let folder = tempfile::tempdir().expect("a folder for the output");
    let path = folder.path().join("lines");
    let mut group = c.benchmark_group("replay");
    group
        .throughput(Throughput::Elements(events))
        .sample_size(20);
    for (name, flags) in [("text", &[][..]), ("json", &["--output-json"][..])] {
        let new = || Replay::new(flags, &path, NAMES).expect("flags of netprobe skb");
        let mut all = |mut replay: Replay| {
            let mut taken = std::mem::take(&mut batch);
            consume(&mut taken, &ring);
            batch = replay.batch(taken).expect("events that can be decoded");
        };
        all(new());
        let bytes = fs::read(&path).expect("the lines");
        group.bench_function(name, |b| {
            b.iter_batched(new, &mut all, BatchSize::PerIteration);
        });
        group.bench_function(format!("{name}, the same bytes written alone"), |b| {
            b.iter(|| {
                let mut file = File::create(&path).expect("a file");
                for part in black_box(&bytes).chunks(64 * 1024) {
                    file.write_all(part).expect("room for the lines");
                }
            });
        });
    }
    group.finish();
}

/// Of each packet in the events of [`varied`].
const SNAP: usize = 256;

/// The ring with the sections that a recording asks for (bytes of a packet, number of its life), and with what differs from packet to
/// packet and from event to event, as a flood of other packets has it: time stamps, addresses, ports, numbers, checksums.
fn varied(ring: &[u8]) -> Batch {
    const DATA: u32 = 1 << 9;
    const LIFE: u32 = 1 << 13;
    let mut from = Batch::default();
    consume(&mut from, ring);
    let (mut to, mut seed, mut round) = (Batch::default(), 1u64, 0u64);
    let mut last = 0;
    for r in &from.records {
        let mut event = from.data[r.offset as usize..(r.offset + r.len) as usize].to_vec();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // Each repetition has packets of its own.
        round += u64::from(r.ts > last + 500_000_000);
        last = r.ts;
        let own = round.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let ts = r.ts + (seed >> 54);
        event[..8].copy_from_slice(&ts.to_ne_bytes());
        let skb = u64::from_ne_bytes(event[40..48].try_into().expect("8 bytes")) ^ (own >> 40 << 8);
        event[40..48].copy_from_slice(&skb.to_ne_bytes());
        let sections = u32::from_ne_bytes(event[56..60].try_into().expect("4 bytes")) | DATA | LIFE;
        event[56..60].copy_from_slice(&sections.to_ne_bytes());
        event.extend([98u32, 98].iter().flat_map(|n| n.to_ne_bytes()));
        event.extend([1u16, 1, 0, 0].iter().flat_map(|n| n.to_ne_bytes()));
        let packet = event.len();
        event.extend([2; 12]);
        event.extend([8, 0, 0x45, 0, 0, 84]);
        // The packet's id, checksum, sequence and time.
        for at in 0..6 {
            event.extend((skb.wrapping_mul(own | 1) >> (8 * at)).to_ne_bytes()[..2].iter());
        }
        event.resize(packet + 98, 0x5a);
        event.resize(packet + SNAP, 0);
        event.extend(skb.to_ne_bytes());
        let len = event.len() as u32;
        event[8..12].copy_from_slice(&len.to_ne_bytes());
        let at = to.data.len();
        to.data.extend(&event);
        to.note(r.cpu, at, event.len());
    }
    to
}

/// Events into a recording; says how large that is.
fn record(c: &mut Criterion) {
    let mut batch = varied(&ring());
    let events = batch.records.len() as u64;
    let folder = tempfile::tempdir().expect("a folder for the output");
    let (lines, path) = (folder.path().join("lines"), folder.path().join("recording"));
    // -w is what asks for packets.
    let flags = ["-w", "/dev/null"];
    let new = || {
        let replay = Replay::new(&flags, &lines, NAMES).expect("flags of netprobe skb");
        let replay = replay.record(&flags, &path, false, u64::MAX);
        replay.expect("a recording")
    };
    let mut all = |mut replay: Replay| {
        let taken = std::mem::take(&mut batch);
        batch = replay.batch(taken).expect("events that can be decoded");
        replay.close().expect("room for the recording");
    };
    let mut group = c.benchmark_group("replay");
    group
        .throughput(Throughput::Elements(events))
        .sample_size(20);
    group.bench_function("record", |b| {
        b.iter_batched(new, &mut all, BatchSize::PerIteration);
    });
    group.finish();
    let size = fs::metadata(&path).expect("the recording").len();
    println!(
        "replay/record: {:.1} bytes an event",
        size as f64 / events as f64
    );
}

criterion_group!(benches, replay, record);
criterion_main!(benches);
