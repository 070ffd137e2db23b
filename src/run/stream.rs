//! A file, pipe or terminal that is written to, whose reader may stall: a write waits for it, but after the signal that ends the run no
//! longer than a second. A reader that is slow, and takes something in each second, gets everything.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{MsgFlags, send};

use super::signals;

/// How long after the signal a reader may take nothing.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often a writer that waits looks for the signal, ms.
const LOOK_MS: u16 = 50;

/// Where bytes go.
pub struct Stream {
    file: File,
    socket: bool,
}

impl Stream {
    /// stdout, without the standard library's line buffer. A pipe or a terminal is opened anew: its file description is shared with
    /// other processes, which must not find it non-blocking.
    pub fn stdout() -> io::Result<Self> {
        let stdout = io::stdout();
        let file = File::from(stdout.as_fd().try_clone_to_owned()?);
        let kind = file.metadata()?.file_type();
        if kind.is_fifo() || stdout.is_terminal() {
            let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
            let again = File::options()
                .write(true)
                .custom_flags(flags.bits())
                .open("/proc/self/fd/1");
            // Without /proc, or where it may not be opened, a write may block.
            let file = again.unwrap_or(file);
            return Ok(Self {
                file,
                socket: false,
            });
        }
        Ok(Self {
            file,
            socket: kind.is_socket(),
        })
    }

    /// Creates the file, or opens the pipe, device or terminal of that name; `-` is stdout.
    pub fn create(path: &Path) -> io::Result<Self> {
        if path == Path::new("-") {
            return Self::stdout();
        }
        let file = File::create(path)?;
        let kind = file.metadata()?.file_type();
        if kind.is_fifo() || file.is_terminal() {
            let flags = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
            fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self {
            file,
            socket: false,
        })
    }

    fn try_write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.socket {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            return send(self.file.as_raw_fd(), bytes, flags).map_err(io::Error::from);
        }
        self.file.write(bytes)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Write for Stream {
    /// Fails with `TimedOut` when the reader has not taken anything for a second after the signal.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let begun = Instant::now();
        loop {
            match self.try_write(bytes) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                // A terminal that has gone, which SIGHUP has said: nobody is there to read.
                Err(e)
                    if e.raw_os_error() == Some(libc::EIO) && signals::since_stop().is_some() =>
                {
                    return Ok(bytes.len());
                }
                result => return result,
            }
            let waited = |since: Duration| since.min(begun.elapsed()) > PATIENCE;
            if signals::since_stop().is_some_and(waited) {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "its reader has not read for a second after the signal",
                ));
            }
            let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLOUT)];
            match nix::poll::poll(&mut fds, PollTimeout::from(LOOK_MS)) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
