//! A tool under measurement as a child process: started, ready, stopped; its CPU time, memory and system calls.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libbpf_sys as sys;
use netprobe::os::monotonic_ns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Files in the working directory.
pub const READY: &str = "ready";
pub const OUT: &str = "out";
pub const ERR: &str = "err";

/// So many times 300 ms at most until a tool counts as settled.
const SETTLE: u32 = 20;

/// A running tool.
pub struct Tool {
    child: Child,
    /// from its start until it was ready, ns
    pub ready_ns: u64,
    /// CPU time that it had used by then, ns
    pub ready_cpu_ns: u64,
}

/// How a tool ended.
pub struct Ended {
    /// from the signal until its end, ns
    pub stop_ns: u64,
}

impl Tool {
    /// Starts `command` (words split at blanks, `NS:` in front: in that namespace) and waits until `ready` says so.
    pub fn start(command: &str, limit: Duration, ready: impl Fn() -> bool) -> Result<Self> {
        let _ = fs::remove_file(READY);
        let mut words = command.split_whitespace();
        let program = words.next().context("empty command")?;
        let start = monotonic_ns()?;
        let mut child = Command::new(program)
            .args(words)
            .stdin(Stdio::null())
            .stdout(File::create(OUT)?)
            .stderr(File::create(ERR)?)
            .spawn()
            .with_context(|| format!("failed to start {command}"))?;
        while !ready() {
            if let Some(status) = child.try_wait()? {
                bail!(
                    "{command}: {status}: {}",
                    fs::read_to_string(ERR).unwrap_or_default()
                );
            }
            if monotonic_ns()? - start > limit.as_nanos() as u64 {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{command}: not ready within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let ready_ns = monotonic_ns()? - start;
        let mut tool = Self {
            child,
            ready_ns,
            ready_cpu_ns: 0,
        };
        tool.ready_cpu_ns = tool.cpu_ns()?;
        Ok(tool)
    }

    /// Starts a tool that takes `--ready-file`.
    pub fn with_ready_file(command: &str, limit: Duration) -> Result<Self> {
        Self::start(&format!("{command} --ready-file {READY}"), limit, || {
            Path::new(READY).exists()
        })
    }

    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32)
    }

    /// CPU time of all its threads so far, ns.
    pub fn cpu_ns(&self) -> Result<u64> {
        let clock = nix::time::clock_getcpuclockid(self.pid())?;
        let t = nix::time::clock_gettime(clock)?;
        Ok(t.tv_sec() as u64 * 1_000_000_000 + t.tv_nsec() as u64)
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).context("failed to signal the tool")
    }

    /// Holds it, so that it does nothing while the kernel's side is measured.
    pub fn hold(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        while self.state() != Some('T') {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    pub fn go_on(&self) -> Result<()> {
        self.signal(Signal::SIGCONT)
    }

    fn state(&self) -> Option<char> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    }

    /// Waits until it has used no CPU for a while (of the guest); not for ever: a tool may spin while it has nothing to do.
    pub fn settle(&self) -> Result<()> {
        let mut before = self.cpu_ns()?;
        for _ in 0..SETTLE {
            std::thread::sleep(Duration::from_millis(300));
            let now = self.cpu_ns()?;
            // An idle tool still wakes up now and then.
            if now - before < 3_000_000 {
                break;
            }
            before = now;
        }
        Ok(())
    }

    /// Peak of its resident memory, and how much of what is resident now are perf buffers, KiB.
    pub fn memory(&self) -> Result<(u64, u64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let peak = field(&status, "VmHWM:").context("no VmHWM")?;
        let mut buffers = 0;
        let mut perf = false;
        for line in fs::read_to_string(format!("/proc/{}/smaps", self.pid()))?.lines() {
            if line.contains('-') && !line.contains(':') || line.contains("anon_inode") {
                perf = line.contains("perf_event") || line.contains("bpf-map");
            } else if perf && line.starts_with("Rss:") {
                buffers += field(line, "Rss:").unwrap_or(0);
            }
        }
        Ok((peak, buffers))
    }

    /// Memory of it that is its program's and its libraries' files, KB: pages that the kernel has anyway.
    pub fn file_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        // The guest's files are in a tmpfs.
        let files = ["RssFile:", "RssShmem:"].map(|name| field(&status, name).unwrap_or(0));
        Ok(files.iter().sum::<u64>().saturating_sub(self.memory()?.1))
    }

    /// Counts the system calls of its threads from now on.
    pub fn count_syscalls(&self) -> Result<Syscalls> {
        let id = fs::read_to_string("/sys/kernel/tracing/events/raw_syscalls/sys_enter/id")?;
        let attr = sys::perf_event_attr {
            type_: sys::PERF_TYPE_TRACEPOINT,
            size: size_of::<sys::perf_event_attr>() as u32,
            config: id.trim().parse()?,
            ..Default::default()
        };
        let mut events = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let tid: i32 = task?.file_name().to_string_lossy().parse()?;
            // SAFETY: attr is valid for the call; the other arguments are numbers.
            let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &attr, tid, -1, -1, 8u64) };
            if fd < 0 {
                bail!(
                    "failed to count system calls: {}",
                    std::io::Error::last_os_error()
                );
            }
            // SAFETY: a fresh fd that nothing else owns.
            events.push(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        }
        Ok(Syscalls(events))
    }

    /// Ctrl-C, and the end awaited.
    pub fn stop(mut self) -> Result<Ended> {
        let start = monotonic_ns()?;
        self.signal(Signal::SIGINT)?;
        let status = self.child.wait()?;
        let stop_ns = monotonic_ns()? - start;
        if status.code() != Some(0) && status.code() != Some(130) {
            eprintln!(
                "bench: the tool ended with {status}: {}",
                fs::read_to_string(ERR).unwrap_or_default()
            );
        }
        Ok(Ended { stop_ns })
    }
}

/// A count of system calls.
pub struct Syscalls(Vec<OwnedFd>);

impl Syscalls {
    pub fn count(&self) -> Result<u64> {
        let mut sum = 0;
        for fd in &self.0 {
            let mut value = [0u8; 8];
            // SAFETY: reads at most 8 bytes into an array of 8.
            let n = unsafe { libc::read(fd.as_raw_fd(), value.as_mut_ptr().cast(), 8) };
            if n == 8 {
                sum += u64::from_ne_bytes(value);
            }
        }
        Ok(sum)
    }
}

fn field(text: &str, name: &str) -> Option<u64> {
    text.lines()
        .find_map(|l| l.strip_prefix(name))?
        .split_whitespace()
        .next()?
        .parse()
        .ok()
}

/// Lines of the tool's output so far.
pub fn lines() -> Result<u64> {
    Ok(fs::read(OUT)?.iter().filter(|&&b| b == b'\n').count() as u64)
}
