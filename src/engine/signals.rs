//! SIGINT and SIGTERM as messages on a channel. A second signal ends the process at once, with the pins removed.

use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result};
use crossbeam_channel::{Receiver, bounded};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Pins to remove when a second signal ends the process without unwinding.
static PINS: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

/// Registers a pin folder for removal on a forced end.
pub(super) fn remember(dir: PathBuf) {
    if let Ok(mut pins) = PINS.lock() {
        pins.push(dir);
    }
}

fn set() -> SigSet {
    let mut set = SigSet::empty();
    set.add(Signal::SIGINT);
    set.add(Signal::SIGTERM);
    set
}

/// Blocks SIGINT and SIGTERM in this thread and in those it starts later: call it before any thread is started.
/// A shell starts background jobs with SIGINT ignored; a tracer that is stopped by SIGINT must hear it all the same.
pub fn block() -> Result<()> {
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(signal, &action) }.context("failed to reset a signal's action")?;
    }
    set().thread_block().context("failed to block signals")
}

/// Undoes [`block`]: for a child between fork and exec.
pub fn unblock() -> std::io::Result<()> {
    set().thread_unblock().map_err(std::io::Error::from)
}

/// A channel that gets a message with the first SIGINT or SIGTERM.
pub fn stop_channel() -> Result<Receiver<Signal>> {
    let (tx, rx) = bounded(1);
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let set = set();
            let Ok(first) = set.wait() else { return };
            let _ = tx.send(first);
            if let Ok(second) = set.wait() {
                if let Ok(pins) = PINS.lock() {
                    for dir in pins.iter() {
                        let _ = std::fs::remove_dir_all(dir);
                    }
                }
                // SAFETY: ends the process at once; no destructor is relied on after it.
                unsafe { libc::_exit(128 + second as i32) };
            }
        })
        .context("failed to start the signal thread")?;
    Ok(rx)
}
