//! Traffic inside a namespace, by sockets of the test process itself: no helper program, no race for a port.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Netns;

impl Netns {
    /// A TCP server at this address (port 0: any free one) that sends back what it gets, until it is dropped.
    pub fn tcp_listen(&self, address: SocketAddr) -> Result<TcpServer> {
        let listener = self
            .enter(|| TcpListener::bind(address))?
            .with_context(|| format!("failed to listen at {address}"))?;
        TcpServer::start(listener)
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

/// Sends everything back until the other side is done.
fn echo(mut stream: TcpStream) {
    let mut buffer = [0; 4096];
    while let Ok(len @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..len]).is_err() {
            break;
        }
    }
}
