//! Traffic inside a namespace, by sockets of the test process itself: no helper program, no race for a port.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, SockaddrStorage};

use super::Netns;

impl Netns {
    /// A TCP server at this address (port 0: any free one) that sends back what it gets, until it is dropped.
    pub fn tcp_listen(&self, address: SocketAddr) -> Result<TcpServer> {
        let listener = self
            .enter(|| TcpListener::bind(address))?
            .with_context(|| format!("failed to listen at {address}"))?;
        TcpServer::start(listener)
    }

    /// A TCP socket that listens at this address (port 0: any free one) and accepts nothing; and its address.
    pub fn tcp_listen_only(
        &self,
        address: SocketAddr,
        backlog: i32,
    ) -> Result<(OwnedFd, SocketAddr)> {
        self.enter(|| {
            let family = match address {
                SocketAddr::V4(_) => AddressFamily::Inet,
                SocketAddr::V6(_) => AddressFamily::Inet6,
            };
            let fd = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
            socket::bind(fd.as_raw_fd(), &SockaddrStorage::from(address))?;
            socket::listen(&fd, Backlog::new(backlog)?)?;
            let copy = nix::unistd::dup(&fd)?;
            let address = TcpListener::from(copy).local_addr()?;
            Ok((fd, address))
        })?
    }

    /// Connects `count` times to a socket of `server` that accepts nothing, and waits until all of them are in its accept queue:
    /// a connect returns before the server has seen the last packet of the handshake.
    pub fn fill_accept_queue(
        &self,
        server: &Netns,
        to: SocketAddr,
        count: usize,
    ) -> Result<Vec<TcpStream>> {
        let mut held = Vec::new();
        for _ in 0..count {
            held.push(self.tcp_connect(to, super::deadline())??);
        }
        // Columns 2, 4, 5 of /proc/net/tcp: address:port, state (0A: LISTEN), sent:received (a listener's accept queue), in hexadecimal.
        let (port, full) = (format!(":{:04X}", to.port()), format!(":{count:08X}"));
        super::wait_for("a full accept queue", || {
            let table = server.cmd("cat /proc/net/tcp /proc/net/tcp6")?;
            let is_full = table.lines().any(|line| {
                let columns: Vec<&str> = line.split_whitespace().collect();
                columns.len() > 4
                    && columns[1].ends_with(&port)
                    && columns[3] == "0A"
                    && columns[4].ends_with(&full)
            });
            Ok(is_full.then_some(()))
        })?;
        Ok(held)
    }

    /// Connects to an address, giving up after `patience`. `Ok(Err(..))` is the connect's own failure.
    pub fn tcp_connect(
        &self,
        address: SocketAddr,
        patience: Duration,
    ) -> Result<io::Result<TcpStream>> {
        self.enter(|| TcpStream::connect_timeout(&address, patience))
    }

    /// A UDP socket bound to this address (port 0: any free one).
    pub fn udp_bind(&self, address: SocketAddr) -> Result<UdpSocket> {
        let socket = self
            .enter(|| UdpSocket::bind(address))?
            .with_context(|| format!("failed to bind {address}"))?;
        socket.set_read_timeout(Some(super::deadline()))?;
        Ok(socket)
    }

    /// Sends one UDP datagram from any free port; gives the port.
    pub fn udp_send(&self, to: SocketAddr, payload: &[u8]) -> Result<u16> {
        let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        let socket = self.udp_bind(any.parse()?)?;
        // A filter may refuse it (EPERM): that is for the test to look at, by the trace.
        let _ = socket.send_to(payload, to);
        Ok(socket.local_addr()?.port())
    }

    /// Pings an address `count` times, fast; whether every ping was answered.
    pub fn ping(&self, address: SocketAddr, count: u32) -> Result<bool> {
        let mut command = Command::new("ping");
        command.args([
            "-q",
            "-i",
            "0.01",
            "-W",
            "1",
            "-c",
            &count.to_string(),
            &address.ip().to_string(),
        ]);
        let output = self
            .enter(|| command.output())?
            .context("failed to run ping")?;
        Ok(output.status.success())
    }
}

/// An echo server in a thread.
pub struct TcpServer {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl TcpServer {
    fn start(listener: TcpListener) -> Result<Self> {
        let address = listener.local_addr()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (inner, stopped) = (listener.try_clone()?, stop.clone());
        let thread = std::thread::spawn(move || {
            for stream in inner.incoming() {
                if stopped.load(Ordering::Acquire) {
                    break;
                }
                if let Ok(stream) = stream {
                    std::thread::spawn(move || echo(stream));
                }
            }
        });
        Ok(Self {
            address,
            stop,
            listener,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TcpServer {
    fn drop(&mut self) {
        use std::os::fd::AsRawFd;
        self.stop.store(true, Ordering::Release);
        // Wakes the thread that waits in accept(2), from whatever namespace.
        let _ =
            nix::sys::socket::shutdown(self.listener.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Sends a frame, from its link header on, out of a device of this thread's namespace.
pub fn send_frame(device: &str, bytes: &[u8]) -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let fd = socket(
        AddressFamily::Packet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: sockaddr_ll is integers and an array: all zeros is a value.
    let mut to: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    to.sll_family = libc::AF_PACKET as u16;
    to.sll_ifindex = nix::net::if_::if_nametoindex(device)? as i32;
    // SAFETY: both buffers live through the call, and their lengths are given.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            bytes.as_ptr().cast(),
            bytes.len(),
            0,
            (&raw const to).cast(),
            size_of_val(&to) as u32,
        )
    };
    ensure!(
        sent == bytes.len() as isize,
        "sent {sent}: {}",
        std::io::Error::last_os_error()
    );
    Ok(())
}

/// Makes the socket take no packet, by a filter of one instruction (BPF_RET | BPF_K, 0).
pub fn refuse_all(socket: &UdpSocket) -> Result<()> {
    let mut code = [libc::sock_filter {
        code: 6,
        jt: 0,
        jf: 0,
        k: 0,
    }];
    let program = libc::sock_fprog {
        len: 1,
        filter: code.as_mut_ptr(),
    };
    // SAFETY: the program lives through the call, and its length is given.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of_val(&program) as u32,
        )
    };
    ensure!(done == 0, "the filter is refused");
    Ok(())
}

/// Sends everything back until the other side is done.
fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
}
