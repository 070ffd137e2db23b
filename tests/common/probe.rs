//! The program under test: started, waited for, stopped, and what it said.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

use super::schema::Schema;
use super::{Netns, deadline, wait_for};

/// The binary under test: `$NETPROBE`, else the one that cargo built for this test.
pub fn binary() -> PathBuf {
    std::env::var_os("NETPROBE").map_or_else(
        || PathBuf::from(env!("CARGO_BIN_EXE_netprobe")),
        PathBuf::from,
    )
}

/// A run of netprobe to be started.
pub struct Netprobe<'a> {
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    netns: Option<&'a Netns>,
    /// not root, but nobody with these capabilities
    caps: Option<u64>,
    /// the kernel's types, which it does not find in the kernel
    types: Option<NamedTempFile>,
}

impl<'a> Netprobe<'a> {
    /// A run of one subcommand.
    pub fn new(subcommand: &str) -> Self {
        Self {
            args: vec![subcommand.into()],
            env: Vec::new(),
            netns: None,
            caps: None,
            types: None,
        }
    }

    /// As on a kernel that has no types of its own: they are in a file (--kernel-btf).
    pub fn types_by_file(mut self) -> Result<Self> {
        let file = NamedTempFile::new()?;
        std::fs::copy("/sys/kernel/btf/vmlinux", file.path())?;
        self = self.arg("--kernel-btf").arg(file.path());
        self.types = Some(file);
        Ok(self)
    }

    /// One more argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// More arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// An environment variable.
    pub fn env(mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.env
            .push((key.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it inside this namespace.
    pub fn netns(mut self, netns: &'a Netns) -> Self {
        self.netns = Some(netns);
        self
    }

    /// Runs it as nobody, with these capabilities (numbers) alone.
    pub fn caps(mut self, caps: &[u32]) -> Self {
        self.caps = Some(caps.iter().map(|cap| 1 << cap).sum());
        self
    }

    /// Starts it with `--ready-file` and returns when the file is there; an error with its stderr when it ends before.
    pub fn start(mut self) -> Result<Running> {
        let dir = tempfile::tempdir()?;
        if self.caps.is_some() {
            std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777))?;
        }
        let ready = dir.path().join("ready");
        // First, so that it stays an option whatever follows (`-- COMMAND`).
        self.args.splice(
            1..1,
            ["--ready-file".into(), ready.clone().into_os_string()],
        );
        let run = self.spawn()?;
        wait_for("the ready file", || {
            if ready.exists() {
                return Ok(Some(()));
            }
            if run.has_ended()? {
                bail!("netprobe ended before it was ready:\n{}", run.said());
            }
            Ok(None)
        })
        .with_context(|| format!("netprobe is not ready:\n{}", run.said()))?;
        Ok(run)
    }

    /// Starts it without `--ready-file` and does not wait.
    pub fn spawn(self) -> Result<Running> {
        let mut command = match self.types {
            None => Command::new(binary()),
            Some(_) => {
                let mut command = Command::new("unshare");
                let hide = "mount -t tmpfs none /sys/kernel/btf && exec \"$0\" \"$@\"";
                command.args(["-m", "sh", "-c", hide]).arg(binary());
                command
            }
        };
        command
            .args(&self.args)
            .envs(self.env.iter().map(|(key, value)| (key, value)));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        if let Some(caps) = self.caps {
            super::caps::confine(&mut command, caps);
        }
        let child = match self.netns {
            Some(netns) => netns.enter(|| command.spawn())?,
            None => command.spawn(),
        };
        Running::new(
            child.with_context(|| format!("failed to start {command:?}"))?,
            format!("{command:?}"),
            self.schema(),
            self.types,
        )
    }

    /// What its stdout must fit, if it is JSON.
    fn schema(&self) -> Option<String> {
        let json = self.args.iter().any(|arg| arg == "--output-json");
        json.then(|| self.args[0].to_string_lossy().into_owned())
    }

    /// Runs it to its end, without `--ready-file`.
    pub fn run(self) -> Result<Finished> {
        self.spawn()?.wait()
    }
}

/// What a process has written to one of its streams so far.
#[derive(Default)]
struct Text {
    bytes: Mutex<Vec<u8>>,
    more: Condvar,
}

impl Text {
    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.lock()).into_owned()
    }

    /// Collects a stream in a thread until its end.
    fn collect(self: &Arc<Self>, mut stream: impl Read + Send + 'static) -> JoinHandle<()> {
        let text = self.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 65536];
            while let Ok(len @ 1..) = stream.read(&mut buffer) {
                text.lock().extend_from_slice(&buffer[..len]);
                text.more.notify_all();
            }
        })
    }
}

/// A netprobe that runs. Dropped before its end, it is killed.
pub struct Running {
    child: Mutex<Child>,
    command: String,
    stdout: Arc<Text>,
    stderr: Arc<Text>,
    readers: Vec<JoinHandle<()>>,
    /// the tool whose schema (docs/json) each line of stdout must fit
    schema: Option<String>,
    _types: Option<NamedTempFile>,
}

impl Running {
    fn new(
        mut child: Child,
        command: String,
        schema: Option<String>,
        types: Option<NamedTempFile>,
    ) -> Result<Self> {
        remember(child.id());
        let (stdout, stderr) = (Arc::new(Text::default()), Arc::new(Text::default()));
        let readers = vec![
            stdout.collect(child.stdout.take().context("no stdout")?),
            stderr.collect(child.stderr.take().context("no stderr")?),
        ];
        Ok(Self {
            child: Mutex::new(child),
            command,
            stdout,
            stderr,
            readers,
            schema,
            _types: types,
        })
    }

    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child().id()
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> Result<bool> {
        Ok(self.child().try_wait()?.is_some())
    }

    /// Its stdout so far.
    pub fn stdout(&self) -> String {
        self.stdout.so_far()
    }

    /// Its stderr so far.
    pub fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// Waits until stdout has a whole line that contains `needle`; gives the first such line.
    pub fn wait_line(&self, needle: &str) -> Result<String> {
        self.wait_lines(&format!("a line with {needle:?} on stdout"), |text| {
            text.lines()
                .find(|line| line.contains(needle))
                .map(str::to_owned)
        })
    }

    /// Waits until `find` makes something of the whole lines on stdout.
    pub fn wait_lines<T>(&self, what: &str, find: impl FnMut(&str) -> Option<T>) -> Result<T> {
        self.wait_text(&self.stdout, what, find)
    }

    /// Waits until stderr has a whole line that contains `needle`; gives the first such line.
    pub fn wait_stderr(&self, needle: &str) -> Result<String> {
        self.wait_text(
            &self.stderr,
            &format!("a line with {needle:?} on stderr"),
            |text| {
                text.lines()
                    .find(|line| line.contains(needle))
                    .map(str::to_owned)
            },
        )
    }

    fn wait_text<T>(
        &self,
        text: &Text,
        what: &str,
        mut find: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + deadline();
        let mut bytes = text.lock();
        loop {
            let whole = bytes
                .iter()
                .rposition(|byte| *byte == b'\n')
                .map_or(0, |at| at + 1);
            if let Some(found) = find(&String::from_utf8_lossy(&bytes[..whole])) {
                return Ok(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            // Woken now and then to notice that the process is gone.
            let nap = left.min(std::time::Duration::from_millis(200));
            let gone = self.readers.iter().all(JoinHandle::is_finished);
            if left.is_zero() || gone {
                drop(bytes);
                let why = if gone {
                    "netprobe ended without"
                } else {
                    "waited in vain for"
                };
                bail!("{why} {what}:\n{}", self.said());
            }
            bytes = text
                .more
                .wait_timeout(bytes, nap)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid() as i32), signal).context("failed to signal netprobe")
    }

    /// SIGINT, as Ctrl-C, then waits for its end.
    pub fn stop(self) -> Result<Finished> {
        self.signal(Signal::SIGINT)?;
        self.wait()
    }

    /// `kill -9`, then waits for its end.
    pub fn kill9(self) -> Result<Finished> {
        self.signal(Signal::SIGKILL)?;
        self.wait()
    }

    /// Waits for its end, which it must reach by itself. An error where it printed JSON that does not fit its schema.
    pub fn wait(mut self) -> Result<Finished> {
        let status = wait_for("the end of netprobe", || Ok(self.child().try_wait()?))
            .with_context(|| format!("netprobe does not end:\n{}", self.said()))?;
        forget(self.pid());
        for reader in self.readers.drain(..) {
            // A grandchild could hold the pipe open; netprobe makes none.
            let _ = reader.join();
        }
        let finished = Finished {
            command: self.command.clone(),
            status,
            stdout: self.stdout(),
            stderr: self.stderr(),
        };
        if let Some(tool) = &self.schema {
            let fits = Schema::of(tool).and_then(|schema| schema.check_lines(&finished.stdout));
            fits.map_err(|e| anyhow!("docs/json/{tool}.json: {e}"))?;
        }
        Ok(finished)
    }

    /// For error messages: all it wrote so far.
    fn said(&self) -> String {
        said(&self.command, &self.stdout(), &self.stderr())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let mut child = self.child();
        forget(child.id());
        if let Ok(None) = child.try_wait() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A netprobe that has ended.
pub struct Finished {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// The exit code, or -1 when a signal ended it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or(-1)
    }

    /// An error with everything it said unless it exited with 0.
    pub fn expect_success(&self) -> Result<()> {
        self.expect_code(0)
    }

    /// An error with everything it said unless it exited with `code`.
    pub fn expect_code(&self, code: i32) -> Result<()> {
        ensure!(
            self.code() == code,
            "{} instead of exit code {code}:\n{self}",
            self.status
        );
        Ok(())
    }

    /// The lines of stdout that contain `needle`.
    pub fn lines_with(&self, needle: &str) -> Vec<&str> {
        self.stdout
            .lines()
            .filter(|line| line.contains(needle))
            .collect()
    }

    /// An error with everything it said unless stdout contains `needle`.
    pub fn expect_stdout(&self, needle: &str) -> Result<()> {
        ensure!(
            self.stdout.contains(needle),
            "no {needle:?} on stdout:\n{self}"
        );
        Ok(())
    }

    /// An error with everything it said unless stderr contains `needle`.
    pub fn expect_stderr(&self, needle: &str) -> Result<()> {
        ensure!(
            self.stderr.contains(needle),
            "no {needle:?} on stderr:\n{self}"
        );
        Ok(())
    }

    /// The records of one type: there is one of loss too where an event came late, on a machine that stood still for a moment.
    pub fn json_of(&self, kind: &str) -> Result<Vec<serde_json::Value>> {
        let mut rows = self.json()?;
        rows.retain(|row| row["type"] == kind);
        Ok(rows)
    }

    /// Each line of stdout as JSON; an error when one is not.
    pub fn json(&self) -> Result<Vec<serde_json::Value>> {
        let parse =
            |line| serde_json::from_str(line).with_context(|| format!("not JSON: {line:?}"));
        self.stdout.lines().map(parse).collect()
    }
}

impl fmt::Display for Finished {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\n{}",
            self.status,
            said(&self.command, &self.stdout, &self.stderr)
        )
    }
}

/// The command and the ends of both streams, for error messages.
fn said(command: &str, stdout: &str, stderr: &str) -> String {
    format!(
        "$ {command}\n--- stdout\n{}\n--- stderr\n{}",
        tail(stdout),
        tail(stderr)
    )
}

/// The last lines of a text, so that a failing test under a flood stays readable.
fn tail(text: &str) -> String {
    const LINES: usize = 60;
    let lines: Vec<&str> = text.lines().collect();
    let cut = lines.len().saturating_sub(LINES);
    let note = if cut > 0 {
        format!("({cut} lines left out)\n")
    } else {
        String::new()
    };
    note + &lines[cut..].join("\n")
}

/// Processes that run now: what a case over its time limit leaves behind is killed by these.
static RUNNING: Mutex<BTreeSet<u32>> = Mutex::new(BTreeSet::new());

fn running() -> MutexGuard<'static, BTreeSet<u32>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

fn remember(pid: u32) {
    running().insert(pid);
}

fn forget(pid: u32) {
    running().remove(&pid);
}

/// Kills every netprobe that the tests started and that still runs.
pub fn kill_all() {
    for pid in std::mem::take(&mut *running()) {
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
}
