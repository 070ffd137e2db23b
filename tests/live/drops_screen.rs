//! `netprobe drops` on a terminal: a screen of any size, hostile names, and a terminal that is left as it was.

use std::fs::File;
use std::io::Read;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::common::{Case, Netns, Pair, binary, case, wait_for};

pub fn cases() -> Vec<Case> {
    vec![
        case("drops_screen_sizes", sizes).once_on("6.12").trace(),
        case("drops_screen_hostile_names", hostile_names)
            .once_on("6.12")
            .trace()
            .program("tc"),
    ]
}

/// Both ends of a terminal of our own.
struct Terminal {
    here: OwnedFd,
    there: OwnedFd,
}

impl Terminal {
    fn new(columns: u16, rows: u16) -> Result<Self> {
        let (mut here, mut there) = (0, 0);
        let no_name = std::ptr::null_mut();
        // SAFETY: room for two numbers; no name, no settings.
        let done = unsafe {
            libc::openpty(
                &raw mut here,
                &raw mut there,
                no_name,
                std::ptr::null(),
                std::ptr::null(),
            )
        };
        ensure!(done == 0, "no terminal");
        // SAFETY: just made, owned by nobody else.
        let terminal = unsafe {
            Self {
                here: OwnedFd::from_raw_fd(here),
                there: OwnedFd::from_raw_fd(there),
            }
        };
        terminal.resize(columns, rows)?;
        Ok(terminal)
    }

    fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let size = libc::winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        // SAFETY: the size lives through the call.
        let done = unsafe { libc::ioctl(self.here.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
        ensure!(done == 0, "the terminal has no size");
        Ok(())
    }

    /// Its settings, as bytes to compare.
    fn settings(&self) -> Result<[u32; 4]> {
        // SAFETY: termios is integers and arrays: all zeros is a value; the call fills it.
        let (settings, done) = unsafe {
            let mut settings: libc::termios = std::mem::zeroed();
            let done = libc::tcgetattr(self.there.as_raw_fd(), &raw mut settings);
            (settings, done)
        };
        ensure!(done == 0, "the terminal has no settings");
        Ok([
            settings.c_iflag,
            settings.c_oflag,
            settings.c_cflag,
            settings.c_lflag,
        ])
    }
}

/// A netprobe drops that writes to a terminal.
struct OnScreen {
    child: Child,
    terminal: Terminal,
    text: Arc<Mutex<Vec<u8>>>,
}

impl OnScreen {
    fn start(columns: u16, rows: u16, args: &[&str]) -> Result<Self> {
        let terminal = Terminal::new(columns, rows)?;
        let dir = tempfile::tempdir()?;
        let ready = dir.path().join("ready");
        let child = Command::new(binary())
            .args(["drops", "-i", "2", "--max-cpu", "80", "--ready-file"])
            .arg(&ready)
            .args(args)
            .stdin(Stdio::null())
            .stdout(terminal.there.try_clone()?)
            .stderr(Stdio::null())
            .spawn()?;
        let text = Arc::new(Mutex::new(Vec::new()));
        let (to, mut from) = (text.clone(), File::from(terminal.here.try_clone()?));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(len @ 1..) = from.read(&mut buffer) {
                to.lock()
                    .expect("poisoned")
                    .extend_from_slice(&buffer[..len]);
            }
        });
        let screen = Self {
            child,
            terminal,
            text,
        };
        wait_for("the ready file", || Ok(ready.exists().then_some(())))?;
        Ok(screen)
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.text.lock().expect("poisoned")).into_owned()
    }

    /// The first screen that has both texts (`end` in its last line), by lines.
    fn screen(&self, needle: &str, end: &str) -> Result<Vec<String>> {
        wait_for(needle, || {
            let text = self.text();
            let mut screens = text.split("\x1b[H\x1b[J");
            let found = screens.find(|s| s.contains(needle) && s.contains(end));
            Ok(found.map(|s| s.lines().map(str::to_owned).collect()))
        })
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id() as i32), signal)?)
    }

    /// Ctrl-C; its exit status.
    fn stop(mut self) -> Result<(String, [u32; 4])> {
        self.signal(Signal::SIGINT)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "{status}: {}", self.text());
        let settings = self.terminal.settings()?;
        Ok((self.text(), settings))
    }
}

impl Drop for OnScreen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lose(net: &Pair, ports: std::ops::Range<u16>) -> Result<()> {
    net.client.enter(|| -> Result<()> {
        for port in ports {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            let _ = socket.send_to(b"to be lost", net.server.v4(port));
        }
        Ok(())
    })?
}

/// 80 columns and few lines; after a change of size the same table in the new one, at once; at the end the terminal as it was.
fn sizes() -> Result<()> {
    let net = Pair::new()?;
    net.fix_neighbours()?;
    let run = OnScreen::start(80, 10, &[])?;
    let before = run.terminal.settings()?;
    lose(&net, 7000..7020)?;
    // Twenty rows do not fit on ten lines.
    let screen = run.screen("LOST", "lines more")?;
    ensure!(screen.len() <= 9, "{screen:#?}");
    let wide = screen
        .iter()
        .map(|line| line.trim_end().chars().count())
        .max();
    ensure!(wide.is_some_and(|n| n <= 80), "{screen:#?}");
    ensure!(
        screen.iter().any(|line| line.contains("LOST")),
        "{screen:#?}"
    );
    run.terminal.resize(40, 50)?;
    run.signal(Signal::SIGWINCH)?;
    // The table of twenty rows once more, whole, before the next one takes its place.
    wait_for("the table in the new size", || {
        let text = run.text();
        let narrow = |s: &&str| s.lines().all(|l| l.trim_end().chars().count() <= 40);
        let mut screens = text.split("\x1b[H\x1b[J").skip(1);
        let found = screens.any(|s| narrow(&s) && s.matches("no socket").count() >= 20);
        Ok(found.then_some(()))
    })?;
    let (text, after) = run.stop()?;
    ensure!(before == after, "{before:?} {after:?}");
    // No other screen, no hidden cursor, no colour is left behind.
    for sequence in ["\x1b[?1049h", "\x1b[?25l", "\x1b[3"] {
        ensure!(!text.contains(sequence), "{sequence:?}");
    }
    Ok(())
}

/// An interface whose name clears the screen: it is shown, and does not.
fn hostile_names() -> Result<()> {
    let client = Netns::new("client")?;
    let name = "a\x1b[2Jb\\\"";
    let output = client.enter(|| {
        let line = ["link", "add", name, "type", "dummy"];
        Command::new("ip").args(line).output()
    })??;
    ensure!(output.status.success(), "{output:?}");
    client.enter(|| {
        Command::new("ip")
            .args(["link", "set", name, "up"])
            .output()
    })??;
    client.enter(|| {
        Command::new("ip")
            .args(["addr", "add", "10.66.0.1/24", "dev", name])
            .output()
    })??;
    // Nobody answers for the address: frames wait for it and are lost. The quick way: a queue discipline that takes none.
    let line = ["qdisc", "add", "dev", name, "root", "netem", "loss", "100%"];
    let output = client.enter(|| Command::new("tc").args(line).output())??;
    ensure!(output.status.success(), "{output:?}");
    let run = OnScreen::start(200, 50, &[])?;
    client.enter(|| -> Result<()> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_broadcast(true)?;
        for _ in 0..10 {
            let _ = socket.send_to(b"to be lost", "10.66.0.255:9");
        }
        Ok(())
    })??;
    let screen = run.screen("\\x1b[2Jb", "also:")?;
    let row = screen.iter().find(|line| line.contains("\\x1b[2Jb"));
    ensure!(row.context("no row")?.contains("10 "), "{screen:#?}");
    let (text, _) = run.stop()?;
    ensure!(!text.contains("\x1b[2J"), "the name cleared the screen");
    Ok(())
}
