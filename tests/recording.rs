//! Recordings without a kernel: bench/data's events through the recorder, and what `netprobe report` makes of the files, whole, cut off,
//! damaged and hostile.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use clap::Parser;
use crossbeam_channel::never;
use netprobe::engine::batch::Batch;
use netprobe::engine::perf::note_records;
use netprobe::recording::block::{Kind, Packer};
use netprobe::recording::reader::Reader;
use netprobe::tools::report;
use netprobe::tools::skb::replay::Replay;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const NAMES: &str = include_str!("../bench/data/skb-6.12.names");
/// Of each packet in the events that [`with_packets`] makes.
const SNAP: usize = 64;

/// The perf buffer of bench/data.
fn ring() -> Vec<u8> {
    let gz: &[u8] = include_bytes!("../bench/data/skb-6.12.ring.gz");
    let mut ring = Vec::new();
    flate2::read::GzDecoder::new(gz)
        .read_to_end(&mut ring)
        .unwrap();
    ring
}

fn batch() -> Batch {
    let mut batch = Batch {
        data: ring(),
        ..Batch::default()
    };
    note_records(&mut batch, 0, 0);
    batch
}

/// The same events with two sections more: bytes of a packet, and the number of its sk_buff's life.
fn with_packets() -> Batch {
    const DATA: u32 = 1 << 9;
    const LIFE: u32 = 1 << 13;
    let from = batch();
    let mut to = Batch::default();
    for r in &from.records {
        let mut event = from.data[r.offset as usize..(r.offset + r.len) as usize].to_vec();
        let sections = u32::from_ne_bytes(event[56..60].try_into().unwrap()) | DATA | LIFE;
        event[56..60].copy_from_slice(&sections.to_ne_bytes());
        // struct skb_data: len, captured, ethernet, hatype, vlan, vlan_type
        event.extend(
            [SNAP as u32, SNAP as u32]
                .iter()
                .flat_map(|n| n.to_ne_bytes()),
        );
        event.extend([1u16, 1, 0, 0].iter().flat_map(|n| n.to_ne_bytes()));
        let mut packet = [
            vec![2; 12],
            vec![8, 0, 0x45, 0, 0, 50, 0, 1, 0, 0, 64, 17, 0, 0],
        ]
        .concat();
        packet.extend([10, 0, 0, 1, 10, 0, 0, 2, 0x30, 0x39, 0, 53, 0, 30, 0, 0]);
        packet.resize(SNAP, 7);
        event.extend(packet);
        // The address stands for its life.
        event.extend_from_within(40..48);
        let len = event.len() as u32;
        event[8..12].copy_from_slice(&len.to_ne_bytes());
        let at = to.data.len();
        to.data.extend(&event);
        to.note(r.cpu, at, event.len());
    }
    to
}

struct Recording {
    _folder: tempfile::TempDir,
    file: PathBuf,
    lines: String,
}

/// Records, with lines beside it. `most`: bytes of a file.
fn record(flags: &[&str], batch: Batch, most: u64) -> Recording {
    let folder = tempfile::tempdir().unwrap();
    let (file, lines) = (folder.path().join("r.pcapng"), folder.path().join("lines"));
    let replay = Replay::new(flags, &lines, NAMES).unwrap();
    let mut replay = replay.record(flags, &file, true, most).unwrap();
    replay.batch(batch).unwrap();
    replay.close().unwrap();
    drop(replay);
    Recording {
        file,
        lines: fs::read_to_string(&lines).unwrap(),
        _folder: folder,
    }
}

fn packets() -> Recording {
    // -w is what asks for packets; the recorder makes the file.
    let flags = ["--timestamp=current", "-s", "64", "-w", "/dev/null"];
    record(&flags, with_packets(), u64::MAX)
}

fn netprobe(args: &[&str], files: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_netprobe"))
        .arg("report")
        .args(args)
        .args(files)
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn the_lines_are_those_of_the_live_run() {
    for flags in [
        &["--timestamp=current"][..],
        &["--output-json", "--output-relative-timestamp"],
        &["--timestamp=absolute"],
    ] {
        let recording = record(flags, batch(), u64::MAX);
        assert!(recording.lines.lines().count() > 500);
        let json = flags.contains(&"--output-json");
        let args: &[&str] = if json { &["--output-json"] } else { &[] };
        let shown = netprobe(args, &[&recording.file]);
        assert_eq!(stderr(&shown), "");
        assert_eq!(stdout(&shown), recording.lines, "{flags:?}");
    }
}

#[test]
fn each_file_of_many_stands_for_itself() {
    let recording = record(&["--timestamp=current"], batch(), 1);
    let folder = recording.file.parent().unwrap();
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| !path.ends_with("lines"))
        .collect();
    files.sort();
    assert!(files.len() >= 2, "{files:?}");
    let refs: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    assert_eq!(stdout(&netprobe(&[], &refs)), recording.lines);
    let last = netprobe(&[], &refs[refs.len() - 1..]);
    assert!(stdout(&last).starts_with("SKB"), "{last:?}");
    assert_eq!(stderr(&last), "");
}

/// tshark and capinfos take it for what it is: a capture file.
#[test]
fn others_read_it() {
    let recording = packets();
    let mut read = 0;
    for (program, args) in [("tshark", &["-n", "-r"][..]), ("capinfos", &["-c", "-M"])] {
        let Ok(output) = Command::new(program)
            .args(args)
            .arg(&recording.file)
            .output()
        else {
            eprintln!("{program} is not installed");
            continue;
        };
        assert!(output.status.success(), "{program}: {}", stderr(&output));
        let said = stderr(&output);
        let warnings: Vec<_> = said
            .lines()
            .filter(|l| !l.starts_with("Running as user"))
            .collect();
        assert!(warnings.is_empty(), "{program}: {warnings:?}");
        if program == "tshark" {
            read = stdout(&output).lines().count();
            let comments = Command::new("tshark")
                .args(["-n", "-T", "fields", "-e", "frame.comment", "-r"])
                .arg(&recording.file)
                .output()
                .unwrap();
            assert!(stdout(&comments).contains(" skb 0x"), "{comments:?}");
        }
    }
    let skbs: std::collections::BTreeSet<_> = recording
        .lines
        .lines()
        .skip(1)
        .filter_map(|line| line.split(' ').next())
        .collect();
    assert!(
        read == 0 || read == skbs.len(),
        "{read} packets of {}",
        skbs.len()
    );
}

/// The page: what comes from names is text in it, and neither code nor markup; it works in a browser, without a network.
#[test]
fn the_page_stands_for_itself() {
    let (_folder, page) = page_with_a_hostile_name();
    let text = fs::read_to_string(&page).unwrap();
    assert!(text.contains("onerror=document"), "the name is in its data");
    assert_eq!(
        text.matches("</script>").count(),
        3,
        "two of data, one of code"
    );
    assert!(
        !text.contains("https://") && !text.contains("src=\""),
        "no network"
    );
}

/// The page of a recording with a function's name that tries to be a script, in a folder that goes with the value.
fn page_with_a_hostile_name() -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let evil = "</script><img src=x onerror=document.title='evil'>";
    let first = NAMES.lines().next().unwrap();
    let mut names = format!("{} {evil}\n", first.split(' ').next().unwrap());
    names.extend(NAMES.lines().skip(1).map(|line| format!("{line}\n")));
    let (file, lines) = (folder.path().join("r.pcapng"), folder.path().join("lines"));
    let flags = ["-s", "64", "-w", "/dev/null"];
    let replay = Replay::new(&flags, &lines, &names).unwrap();
    let mut replay = replay.record(&flags, &file, false, u64::MAX).unwrap();
    replay.batch(with_packets()).unwrap();
    replay.close().unwrap();
    let page = folder.path().join("page.html");
    let to = page.to_string_lossy();
    let done = netprobe(&["--format", "html", "--output-file", &to], &[&file]);
    assert!(done.status.success(), "{}", stderr(&done));
    (folder, page)
}

#[test]
#[cfg_attr(not(has_chromium), ignore = "chromium is not installed")]
fn the_page_runs_in_a_browser() {
    let (_folder, page) = page_with_a_hostile_name();
    // A search for what is nowhere finds nothing, and then all is shown again.
    let whole = fs::read_to_string(&page).unwrap();
    let search = "<script>$('search').value = 'nowhere at all'; filter(); document.body.dataset.found = shown.length; \
                  $('search').value = ''; filter(); document.body.dataset.all = shown.length;</script></body>";
    fs::write(&page, whole.replacen("</body>", search, 1)).unwrap();
    let dom = Command::new("chromium")
        .args([
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=3000",
        ])
        .args(["--dump-dom", &format!("file://{}", page.display())])
        .output()
        .unwrap();
    let dom = stdout(&dom);
    assert!(
        dom.contains("data-ready=\""),
        "its code has run to its end: {dom:.2000}"
    );
    assert!(dom.contains("data-found=\"0\"") && !dom.contains("data-all=\"0\""));
    assert!(
        dom.contains("<title>netprobe report</title>"),
        "no name is code"
    );
    let (_, rows) = dom.split_once("id=\"rows\"").unwrap();
    assert!(
        rows.contains("class=\"row picked\"") && rows.contains("<svg"),
        "{rows:.2000}"
    );
}

/// Foreign files, files of others, and what is no file: one line that says what is wrong.
#[test]
fn what_is_no_recording_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let recording = record(&[], batch(), u64::MAX);
    let whole = fs::read(&recording.file).unwrap();
    let section = u32::from_le_bytes(whole[4..8].try_into().unwrap()) as usize;
    // The head's netprobe has another layout of events.
    let mut other = whole[..section].to_vec();
    let mut reader = Reader::new(&whole[..]);
    let (_, head) = reader.next_block().unwrap().unwrap();
    let head = String::from_utf8(head.to_vec()).unwrap();
    let changed = head.replacen("[[0,64]", "[[0,72]", 1);
    assert_ne!(head, changed);
    let mut packer = Packer::new().unwrap();
    packer
        .push(&mut other, Kind::Head, (0, (0, 0)), changed.as_bytes())
        .unwrap();
    for (path, says) in [
        (
            write("text", b"hello, world, this is no recording"),
            "it is no pcapng file",
        ),
        (write("empty", b""), "it is no pcapng file"),
        (
            write("capture", &whole[..section]),
            "a capture file without events",
        ),
        (write("other", &other), "layout differs"),
        (folder.path().join("none"), "failed to open"),
        (folder.path().to_path_buf(), "failed to read"),
    ] {
        let shown = netprobe(&[], &[&path]);
        let said = stderr(&shown);
        assert_eq!(shown.status.code(), Some(1), "{path:?}: {said}");
        assert!(said.contains(says) && said.lines().count() == 1, "{said}");
        assert!(stdout(&shown).is_empty(), "{path:?}");
    }
}

/// The beginning of a file gives the beginning of its lines, and says what is missing.
#[test]
fn a_file_that_is_cut_off_gives_what_it_has() {
    let recording = record(&[], batch(), u64::MAX);
    let whole = fs::read(&recording.file).unwrap();
    for part in [50, 90, 99] {
        let path = recording.file.with_extension("cut");
        fs::write(&path, &whole[..whole.len() * part / 100]).unwrap();
        let shown = netprobe(&[], &[&path]);
        let (lines, said) = (stdout(&shown), stderr(&shown));
        assert!(recording.lines.starts_with(&lines), "{part}");
        assert!(said.contains("has no end"), "{part}: {said}");
    }
}

/// Shows a file in a form, in this process. Whatever is in it: no panic.
fn show(file: &Path, form: &[&str], to: &Path) {
    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: report::args::Args,
    }
    let to = to.to_string_lossy();
    let line = ["report", &file.to_string_lossy(), "--output-file", &to].map(str::to_owned);
    let form = form.iter().map(|flag| (*flag).to_owned());
    let args = Line::parse_from(line.into_iter().chain(form)).args;
    let _ = report::run_until(&args, &never());
}

const FORMS: [&[&str]; 9] = [
    &["--format", "html"],
    &[],
    &["--output-json"],
    &["--sort", "packet"],
    &["--sort", "latency", "--format", "json"],
    &["--stats"],
    &["--format", "pcapng", "-f", "udp"],
    &["--format", "packets"],
    &["--format", "perfetto"],
];

/// What is changed in a file.
#[derive(Debug, Clone)]
struct Change {
    /// with the contents of blocks changed under a right checksum
    inside: bool,
    bytes: Vec<(prop::sample::Index, u8)>,
    cut: Option<prop::sample::Index>,
    insert: Vec<u8>,
    form: usize,
}

fn change() -> impl Strategy<Value = Change> {
    let bytes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12);
    let insert = prop::collection::vec(any::<u8>(), 0..30);
    let cut = prop::option::of(any::<prop::sample::Index>());
    (any::<bool>(), bytes, cut, insert, 0..FORMS.len()).prop_map(
        |(inside, bytes, cut, insert, form)| Change {
            inside,
            bytes,
            cut,
            insert,
            form,
        },
    )
}

fn mutate(bytes: &mut Vec<u8>, change: &Change) {
    if bytes.is_empty() {
        return;
    }
    for (index, byte) in &change.bytes {
        let at = index.index(bytes.len());
        bytes[at] = *byte;
    }
    if let Some(cut) = &change.cut {
        let at = cut.index(bytes.len());
        bytes.splice(at..at, change.insert.iter().copied());
        if change.form % 2 == 0 {
            bytes.truncate(at);
        }
    }
}

/// The file with the contents of its blocks changed, and packed again.
fn mutate_inside(whole: &[u8], change: &Change) -> Vec<u8> {
    let section = u32::from_le_bytes(whole[4..8].try_into().unwrap()) as usize;
    let mut file = whole[..section].to_vec();
    let mut packer = Packer::new().unwrap();
    let mut reader = Reader::new(whole);
    let which = change.bytes.first().map_or(0, |(_, byte)| *byte);
    while let Some((info, contents)) = reader.next_block().unwrap() {
        let mut contents = contents.to_vec();
        // Mostly not the head: without one nothing else is looked at.
        if info.kind != Kind::Head || which % 8 == 0 {
            mutate(&mut contents, change);
        }
        packer
            .push(&mut file, info.kind, (info.events, info.times), &contents)
            .unwrap();
    }
    file
}

/// Changed files, in every form: no panic, and no memory beyond a bound. NETPROBE_FUZZ_SECONDS: for as long (make fuzz).
#[test]
fn changed_files_never_panic() {
    let recordings = [
        packets(),
        record(&["--timestamp=relative"], batch(), u64::MAX),
    ];
    let whole: Vec<Vec<u8>> = recordings
        .iter()
        .map(|r| fs::read(&r.file).unwrap())
        .collect();
    let folder = tempfile::tempdir().unwrap();
    let (file, to) = (folder.path().join("changed"), folder.path().join("shown"));
    let seconds = std::env::var("NETPROBE_FUZZ_SECONDS").ok();
    let seconds: Option<u64> = seconds.and_then(|s| s.parse().ok());
    let end = seconds.map(|s| Instant::now() + Duration::from_secs(s));
    let mut rounds = 0;
    loop {
        let mut runner = TestRunner::new(Config {
            cases: 100,
            failure_persistence: None,
            ..Config::default()
        });
        runner
            .run(&change(), |change| {
                let whole = &whole[change.bytes.len() % 2];
                let bytes = if change.inside {
                    mutate_inside(whole, &change)
                } else {
                    let mut bytes = whole.clone();
                    mutate(&mut bytes, &change);
                    bytes
                };
                fs::write(&file, bytes).unwrap();
                show(&file, FORMS[change.form], &to);
                Ok(())
            })
            .unwrap();
        rounds += 1;
        if end.is_none_or(|end| Instant::now() >= end) {
            break;
        }
    }
    eprintln!("{rounds} rounds of 100 files");
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let peak: u64 = peak
        .unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap();
    assert!(peak < 600_000, "{peak} kB");
}
