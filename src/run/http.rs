//! The smallest HTTP server that Prometheus can scrape: GET of one page, one connection at a time, each with a limit of time and length.
//!
//! By hand, in 90 lines: the servers that are well kept bring an asynchronous runtime, for one page that is fetched every some seconds.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What a request may take.
const PATIENCE: Duration = Duration::from_secs(2);
const REQUEST: usize = 8 * 1024;

/// `ADDR:PORT`, or a port of the loopback address.
pub fn address(text: &str) -> Result<SocketAddr, String> {
    if let Ok(port) = text.parse::<u16>() {
        return Ok((IpAddr::V4(Ipv4Addr::LOCALHOST), port).into());
    }
    text.parse()
        .map_err(|_| "give ADDR:PORT, [ADDR]:PORT, or a port of 127.0.0.1".to_owned())
}

/// A page that others may fetch; it serves until the process ends.
#[derive(Debug, Clone)]
pub struct Page {
    text: Arc<Mutex<Arc<str>>>,
    /// where it is served
    pub address: SocketAddr,
}

impl Page {
    /// Serves an empty page at `path`, as `kind` (its content type).
    pub fn serve(address: SocketAddr, path: &'static str, kind: &'static str) -> Result<Self> {
        let listener =
            TcpListener::bind(address).with_context(|| format!("failed to listen at {address}"))?;
        let page = Self {
            text: Arc::new(Mutex::new(Arc::from(""))),
            address: listener.local_addr()?,
        };
        let served = page.clone();
        let serve = move || {
            for stream in listener.incoming() {
                match stream {
                    // A client that goes away is its own affair.
                    Ok(stream) => drop(served.answer(stream, path, kind)),
                    // No more files: the next one may have one.
                    Err(_) => thread::sleep(Duration::from_millis(100)),
                }
            }
        };
        thread::Builder::new()
            .name("metrics".into())
            .stack_size(128 * 1024)
            .spawn(serve)
            .context("failed to start a thread")?;
        Ok(page)
    }

    /// What is served from now on.
    pub fn set(&self, text: String) {
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = text.into();
    }

    fn answer(&self, mut stream: TcpStream, path: &str, kind: &str) -> io::Result<()> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let request = request(&mut stream)?;
        let text = self
            .text
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let (status, kind, body) = match reply(&request, path) {
            Reply::Page => ("200 OK", kind, &*text),
            Reply::Index => ("200 OK", "text/plain", path),
            Reply::Wrong(status) => (status, "text/plain", status),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(head.as_bytes())?;
        if !request.starts_with(b"HEAD ") {
            stream.write_all(body.as_bytes())?;
        }
        stream.flush()
    }
}

/// What is sent back.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Page,
    /// where the page is
    Index,
    Wrong(&'static str),
}

fn reply(request: &[u8], path: &str) -> Reply {
    let line = request.split(|b| *b == b'\r').next().unwrap_or_default();
    let line = String::from_utf8_lossy(line);
    let mut words = line.split(' ');
    let (method, target) = (words.next().unwrap_or(""), words.next().unwrap_or(""));
    let target = target.split('?').next().unwrap_or("");
    match (method, target) {
        ("GET" | "HEAD", target) if target == path => Reply::Page,
        ("GET" | "HEAD", "/") => Reply::Index,
        ("GET" | "HEAD", _) => Reply::Wrong("404 Not Found"),
        _ => Reply::Wrong("405 Method Not Allowed"),
    }
}

/// The request up to its empty line, within the limits.
fn request(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let end = Instant::now() + PATIENCE;
    let mut request = Vec::new();
    let mut buffer = [0; 1024];
    while !request.windows(4).any(|w| w == b"\r\n\r\n") {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || request.len() > REQUEST {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => request.extend_from_slice(&buffer[..len]),
        }
    }
    Ok(request)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(address("9100").unwrap().to_string(), "127.0.0.1:9100");
        assert_eq!(address("[::1]:9").unwrap().to_string(), "[::1]:9");
        assert!(address("localhost:9").is_err() && address("70000").is_err());
    }

    #[test]
    fn what_is_answered() {
        let of = |text: &str| reply(text.as_bytes(), "/metrics");
        assert_eq!(of("GET /metrics HTTP/1.1\r\n\r\n"), Reply::Page);
        assert_eq!(of("GET /metrics?x=1 HTTP/1.1\r\n\r\n"), Reply::Page);
        assert_eq!(of("GET / HTTP/1.1\r\n\r\n"), Reply::Index);
        assert_eq!(
            of("GET /other HTTP/1.1\r\n\r\n"),
            Reply::Wrong("404 Not Found")
        );
        assert_eq!(
            of("POST /metrics\r\n\r\n"),
            Reply::Wrong("405 Method Not Allowed")
        );
        assert_eq!(of("\u{0}\u{1}"), Reply::Wrong("405 Method Not Allowed"));
    }

    #[test]
    fn a_page_is_fetched() {
        let page = Page::serve(address("0").unwrap(), "/metrics", "text/plain").unwrap();
        page.set("a 1\n".into());
        // A client that says nothing is let go after a while; one that asks for too much too.
        let _silent = TcpStream::connect(page.address).unwrap();
        let mut stream = TcpStream::connect(page.address).unwrap();
        stream
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
            .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        assert!(
            text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with("\r\n\r\na 1\n"),
            "{text}"
        );
    }
}
