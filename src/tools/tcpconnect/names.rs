//! Which name a process resolved an address from, by the answers that it received itself. Pure.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::event::dns::{self, Stream};

use super::decode::Answer;

/// Addresses remembered; past it the older half is forgotten.
const NAMES: usize = 65_536;
/// TCP streams remembered.
const STREAMS: usize = 1024;

/// Names by process and address.
#[derive(Debug, Default)]
pub struct Names {
    names: HashMap<(u32, IpAddr), Name>,
    streams: HashMap<(u32, u64), Stream>,
}

#[derive(Debug)]
struct Name {
    text: Vec<u8>,
    ts: u64,
}

impl Names {
    /// Takes in what a process received from port 53.
    pub fn add(&mut self, answer: &Answer) {
        let messages = if answer.stream {
            if self.streams.len() >= STREAMS {
                // Streams are short, and their ends are not told: begin anew.
                self.streams.clear();
            }
            let stream = self
                .streams
                .entry((answer.head.tgid, answer.sock))
                .or_default();
            stream.push(&answer.data, answer.cut)
        } else {
            vec![answer.data.clone()]
        };
        for message in messages {
            let Some(found) = dns::parse(&message) else {
                continue;
            };
            for address in found.addresses {
                let name = Name {
                    text: found.question.clone(),
                    ts: answer.head.ts,
                };
                self.names.insert((answer.head.tgid, address), name);
            }
        }
        if self.names.len() > NAMES {
            let mut times: Vec<u64> = self.names.values().map(|n| n.ts).collect();
            times.sort_unstable();
            let middle = times[times.len() / 2];
            self.names.retain(|_, n| n.ts > middle);
        }
    }

    /// The name, as bytes of the packet; `None` where this process did not resolve the address while we looked.
    pub fn get(&self, tgid: u32, address: IpAddr) -> Option<&[u8]> {
        self.names.get(&(tgid, address)).map(|n| n.text.as_slice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::head::Head;

    fn answer(tgid: u32, data: &[u8], stream: bool) -> Answer {
        Answer {
            head: Head {
                tgid,
                ..Head::default()
            },
            sock: 1,
            stream,
            cut: false,
            data: data.to_vec(),
        }
    }

    /// `a.b` is 192.0.2.1
    const MESSAGE: &[u8] =
        b"\0\x07\x81\x80\0\x01\0\x01\0\0\0\0\x01a\x01b\0\0\x01\0\x01\xc0\x0c\0\x01\0\x01\0\0\0\x3c\0\x04\xc0\0\x02\x01";

    #[test]
    fn names_belong_to_the_process_that_asked() {
        let mut names = Names::default();
        let address = "192.0.2.1".parse().unwrap();
        names.add(&answer(7, MESSAGE, false));
        assert_eq!(names.get(7, address), Some(&b"a.b"[..]));
        assert_eq!(names.get(8, address), None);
    }

    #[test]
    fn a_stream_comes_in_two_pieces() {
        let mut names = Names::default();
        let len = (MESSAGE.len() as u16).to_be_bytes();
        names.add(&answer(7, &len, true));
        names.add(&answer(7, MESSAGE, true));
        assert!(names.get(7, "192.0.2.1".parse().unwrap()).is_some());
    }
}
