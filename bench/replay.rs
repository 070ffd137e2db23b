//! Events a second, from a perf buffer to lines in a file, on one core: `cargo bench --bench replay`. Replays what a kernel wrote
//! (bench/data) through the parser of perf buffers, merge, decoding, formatting and writing; beside it the same bytes written
//! alone, which is what no tool can do without.

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};

use criterion::measurement::WallTime;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
};
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
    record(&mut group, &ring, batch);
    group.finish();
}

/// The same events into a recording.
fn record(group: &mut BenchmarkGroup<'_, WallTime>, ring: &[u8], mut batch: Batch) {
    let folder = tempfile::tempdir().expect("a folder for the output");
    let (lines, path) = (folder.path().join("lines"), folder.path().join("recording"));
    let new = || {
        let replay = Replay::new(&[], &lines, NAMES).expect("flags of netprobe skb");
        let replay = replay.record(&[], &path, false, u64::MAX);
        replay.expect("a recording")
    };
    let mut all = |mut replay: Replay| {
        let mut taken = std::mem::take(&mut batch);
        consume(&mut taken, ring);
        batch = replay.batch(taken).expect("events that can be decoded");
        replay.close().expect("room for the recording");
    };
    group.bench_function("record", |b| {
        b.iter_batched(new, &mut all, BatchSize::PerIteration)
    });
}

criterion_group!(benches, replay);
criterion_main!(benches);
