//! What is said on stderr while all is well, unless nobody wants it; and libbpf's messages, which are kept back, and shown when something
//! failed or when the user asked for them.

use std::collections::VecDeque;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use libbpf_rs::PrintLevel;

use crate::kernel::caps;

/// Lines kept for the report of a failure.
const KEEP: usize = 40;

static LINES: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());
static VERBOSE: AtomicBool = AtomicBool::new(false);
static QUIET: AtomicBool = AtomicBool::new(false);

/// Nothing is said from now on while all is well: what is on stderr then is an error to whoever runs us.
pub fn quiet() {
    QUIET.store(true, Ordering::Relaxed);
}

/// Says on stderr what is as it should be.
pub fn note(text: &str) {
    if !QUIET.load(Ordering::Relaxed) {
        eprintln!("netprobe: {text}");
    }
}

/// Says what a run that traces cannot know for want of a capability, a line each.
pub fn lacking() {
    for line in caps::lacking() {
        note(&line);
    }
}

/// Routes libbpf's log here. `verbose` prints it on stderr as it comes.
pub fn init(verbose: bool) {
    VERBOSE.store(verbose, Ordering::Relaxed);
    libbpf_rs::set_print(Some((
        if verbose {
            PrintLevel::Debug
        } else {
            PrintLevel::Warn
        },
        print,
    )));
}

fn print(_level: PrintLevel, text: String) {
    if VERBOSE.load(Ordering::Relaxed) {
        eprint!("{text}");
        return;
    }
    if let Ok(mut lines) = LINES.lock() {
        // Our objects have no source lines on purpose (build.rs).
        for line in text
            .lines()
            .filter(|l| !l.contains("missing .BTF.ext line info"))
        {
            if lines.len() == KEEP {
                lines.pop_front();
            }
            lines.push_back(line.to_string());
        }
    }
}

/// The last lines since the start or the last call, for an error's context; empty where there are none.
pub fn take() -> String {
    LINES
        .lock()
        .map(|mut l| l.drain(..).collect::<Vec<_>>().join("\n"))
        .unwrap_or_default()
}
