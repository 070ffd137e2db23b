//! SIGINT, SIGTERM, SIGQUIT and SIGHUP (unless it is ignored, as by nohup) as messages on a channel. A second signal, but for SIGHUP,
//! ends the process at once, with the pins removed.

use std::io::IsTerminal;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

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

/// Set where SIGHUP was ignored when this process started (nohup): it stays so.
static NO_HANGUP: AtomicBool = AtomicBool::new(false);

/// When the first signal that ends a run came.
static STOPPED: OnceLock<Instant> = OnceLock::new();

/// How long ago the first signal that ends a run came; `None`: none has come.
pub fn since_stop() -> Option<Duration> {
    STOPPED.get().map(Instant::elapsed)
}

/// The signals that end a run.
const ENDS: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGQUIT,
    Signal::SIGHUP,
];

fn ends() -> impl Iterator<Item = Signal> {
    let hangup = !NO_HANGUP.load(Ordering::Relaxed);
    let heard = move |s: &Signal| hangup || *s != Signal::SIGHUP;
    ENDS.into_iter().filter(heard)
}

fn set() -> SigSet {
    ends().collect()
}

/// Blocks the signals that end a run in this thread and in those it starts later: call it before any thread is started.
/// A shell starts background jobs with SIGINT and SIGQUIT ignored; a tracer that is stopped by SIGINT must hear it all the same.
pub fn block() -> Result<()> {
    NO_HANGUP.store(is_ignored(Signal::SIGHUP)?, Ordering::Relaxed);
    let action = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    for signal in ends() {
        // SAFETY: the default action runs no code of ours.
        unsafe { sigaction(signal, &action) }.context("failed to reset a signal's action")?;
    }
    blocked().thread_block().context("failed to block signals")
}

/// Those that end a run, and that of a new window size: a thread waits for each where somebody wants to know.
fn blocked() -> SigSet {
    let mut blocked = set();
    blocked.add(Signal::SIGWINCH);
    blocked
}

/// Undoes [`block`] in a child process, before it becomes another program.
pub fn unblock() {
    let mut blocked = blocked();
    blocked.add(Signal::SIGUSR1);
    let _ = blocked.thread_unblock();
}

fn is_ignored(signal: Signal) -> Result<bool> {
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: no new action, and room for the old one.
    let status = unsafe { libc::sigaction(signal as i32, std::ptr::null(), old.as_mut_ptr()) };
    if status != 0 {
        return Err(std::io::Error::last_os_error()).context("failed to read a signal's action");
    }
    // SAFETY: zeros are a value of it, and the kernel has filled it.
    Ok(unsafe { old.assume_init() }.sa_sigaction == libc::SIG_IGN)
}

/// A channel that gets a message with the first signal that ends a run.
pub fn stop_channel() -> Result<Receiver<Signal>> {
    let (tx, rx) = bounded(1);
    let terminals = Terminals::now();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let set = set();
            let Ok(first) = set.wait() else { return };
            let _ = STOPPED.set(Instant::now());
            if first == Signal::SIGHUP {
                terminals.give_up();
            }
            let _ = tx.send(first);
            let second = loop {
                match set.wait() {
                    // The kernel and the shell both say it; nobody is there who would be in a hurry.
                    Ok(Signal::SIGHUP) => terminals.give_up(),
                    Ok(second) => break second,
                    Err(_) => return,
                }
            };
            if let Ok(pins) = PINS.lock() {
                for dir in pins.iter() {
                    let _ = std::fs::remove_dir_all(dir);
                }
            }
            // SAFETY: ends the process at once; no destructor is relied on after it.
            unsafe { libc::_exit(128 + second as i32) };
        })
        .context("failed to start the signal thread")?;
    Ok(rx)
}

/// A channel that gets a message when the terminal has another size.
pub fn resize_channel() -> Result<Receiver<()>> {
    channel(Signal::SIGWINCH, "resize")
}

/// A channel that gets a message with SIGUSR1, which otherwise ends the process: call it before any thread is started.
pub fn usr1_channel() -> Result<Receiver<()>> {
    let usr1: SigSet = [Signal::SIGUSR1].into_iter().collect();
    usr1.thread_block().context("failed to block a signal")?;
    channel(Signal::SIGUSR1, "usr1")
}

fn channel(signal: Signal, thread: &str) -> Result<Receiver<()>> {
    let (tx, rx) = bounded(1);
    let mut set = SigSet::empty();
    set.add(signal);
    std::thread::Builder::new()
        .name(thread.into())
        .stack_size(64 * 1024)
        .spawn(move || {
            // A message that waits stands for this one too.
            while set.wait().is_ok() {
                let _ = tx.try_send(());
            }
        })
        .context("failed to start a thread")?;
    Ok(rx)
}

/// stdout and stderr, those that are a terminal.
struct Terminals(Vec<i32>);

impl Terminals {
    fn now() -> Self {
        let stdout = std::io::stdout().is_terminal().then_some(1);
        let stderr = std::io::stderr().is_terminal().then_some(2);
        Self(stdout.into_iter().chain(stderr).collect())
    }

    /// The terminal is gone: what is written to it would fail, and the run is to end in good order.
    fn give_up(&self) {
        let Ok(null) = std::fs::File::options().write(true).open("/dev/null") else {
            return;
        };
        for &fd in &self.0 {
            // SAFETY: plain numbers; the stream of that number is the new file from here on.
            unsafe { libc::dup2(null.as_raw_fd(), fd) };
        }
    }
}
