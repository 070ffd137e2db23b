//! DNS answers (RFC 1035, 3596): which name an address was resolved from. Pure; what is odd gives `None`, never a panic.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_CNAME: u16 = 5;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
/// A name's longest text (RFC 1035, 2.3.4), and with that the most labels it can have.
const NAME_MAX: usize = 255;
/// Aliases followed from the question on.
const ALIASES: usize = 16;

/// The addresses that an answer gives for its question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// as asked for, without the last dot; bytes as in the packet
    pub question: Vec<u8>,
    pub addresses: Vec<IpAddr>,
}

/// Reads a message; `None` where it is no answer to one question, or has no address for it.
pub fn parse(m: &[u8]) -> Option<Answer> {
    let flags = word(m, 2)?;
    let response = flags & 0x8000 != 0;
    let (opcode, rcode) = (flags >> 11 & 15, flags & 15);
    if !response || opcode != 0 || rcode != 0 || word(m, 4)? != 1 {
        return None;
    }
    let (question, at) = name(m, HEADER)?;
    let mut at = at + 4;
    let mut aliases = Vec::new();
    let mut found = Vec::new();
    for _ in 0..word(m, 6)? {
        let Some((owner, kind, data, next)) = record(m, at) else {
            // Cut off: what came before holds.
            break;
        };
        at = next;
        match (kind, data.len()) {
            (TYPE_A, 4) => {
                let b: [u8; 4] = data.try_into().ok()?;
                found.push((owner, IpAddr::from(Ipv4Addr::from(b))));
            }
            (TYPE_AAAA, 16) => {
                let b: [u8; 16] = data.try_into().ok()?;
                found.push((owner, IpAddr::from(Ipv6Addr::from(b))));
            }
            (TYPE_CNAME, _) => {
                let start = next - data.len();
                aliases.push((owner, name(m, start)?.0));
            }
            _ => {}
        }
    }
    let names = chain(&question, &aliases);
    let addresses: Vec<IpAddr> = found
        .into_iter()
        .filter(|(owner, _)| names.iter().any(|n| same(n, owner)))
        .map(|(_, a)| a)
        .collect();
    (!addresses.is_empty()).then_some(Answer {
        question,
        addresses,
    })
}

/// The question and what it is an alias of, in turn.
fn chain(question: &[u8], aliases: &[(Vec<u8>, Vec<u8>)]) -> Vec<Vec<u8>> {
    let mut names = vec![question.to_vec()];
    while names.len() <= ALIASES {
        let last = &names[names.len() - 1];
        let Some((_, to)) = aliases.iter().find(|(from, _)| same(from, last)) else {
            break;
        };
        if names.iter().any(|n| same(n, to)) {
            break;
        }
        names.push(to.clone());
    }
    names
}

/// Names do not differ by case (RFC 4343).
fn same(a: &[u8], b: &[u8]) -> bool {
    a.eq_ignore_ascii_case(b)
}

/// A resource record of class IN at `at`: owner, type (0 for another class), data, and where the next one is.
fn record(m: &[u8], at: usize) -> Option<(Vec<u8>, u16, &[u8], usize)> {
    let (owner, at) = name(m, at)?;
    let kind = if word(m, at + 2)? == CLASS_IN {
        word(m, at)?
    } else {
        0
    };
    let len = usize::from(word(m, at + 8)?);
    let data = m.get(at + 10..at + 10 + len)?;
    Some((owner, kind, data, at + 10 + len))
}

/// A name at `at`, with pointers followed: its text, and where the bytes behind it are.
fn name(m: &[u8], mut at: usize) -> Option<(Vec<u8>, usize)> {
    let mut text = Vec::new();
    let mut end = None;
    // Each step takes a label or follows a pointer; a loop of pointers ends here.
    for _ in 0..NAME_MAX {
        let len = usize::from(*m.get(at)?);
        match len {
            0 => return Some((text, end.unwrap_or(at + 1))),
            1..=63 => {
                if !text.is_empty() {
                    text.push(b'.');
                }
                text.extend(m.get(at + 1..at + 1 + len)?);
                if text.len() > NAME_MAX {
                    return None;
                }
                at += 1 + len;
            }
            0xc0.. => {
                end.get_or_insert(at + 2);
                at = usize::from(word(m, at)? & 0x3fff);
            }
            _ => return None,
        }
    }
    None
}

fn word(m: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(m.get(at..at + 2)?.try_into().ok()?))
}

/// Takes the pieces of a TCP stream (each message behind its length, RFC 1035 4.2.2) together.
#[derive(Debug, Clone, Default)]
pub struct Stream {
    bytes: Vec<u8>,
    /// a piece was missing: the lengths cannot be trusted any more
    broken: bool,
}

impl Stream {
    /// Adds what was received; gives the messages that are whole. `cut`: the piece had more bytes than these.
    pub fn push(&mut self, piece: &[u8], cut: bool) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        if self.broken {
            return messages;
        }
        self.bytes.extend_from_slice(piece);
        while let Some(len) = word(&self.bytes, 0) {
            let len = usize::from(len);
            let Some(message) = self.bytes.get(2..2 + len) else {
                break;
            };
            messages.push(message.to_vec());
            self.bytes.drain(..2 + len);
        }
        if cut {
            // The message whose end is missing can still be read as far as it came.
            messages.extend(self.bytes.get(2..).map(<[u8]>::to_vec));
            self.broken = true;
            self.bytes = Vec::new();
        }
        messages
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A message with one question and these records (owner, type, data).
    fn message(question: &str, records: &[(&str, u16, Vec<u8>)]) -> Vec<u8> {
        let mut m = vec![0, 7, 0x81, 0x80, 0, 1, 0, records.len() as u8, 0, 0, 0, 0];
        push_name(&mut m, question);
        m.extend([0, 1, 0, 1]);
        for (owner, kind, data) in records {
            push_name(&mut m, owner);
            m.extend(kind.to_be_bytes());
            m.extend([0, 1, 0, 0, 0, 60]);
            m.extend((data.len() as u16).to_be_bytes());
            m.extend(data);
        }
        m
    }

    fn push_name(m: &mut Vec<u8>, name: &str) {
        for label in name.split('.') {
            m.push(label.len() as u8);
            m.extend(label.as_bytes());
        }
        m.push(0);
    }

    fn name_bytes(name: &str) -> Vec<u8> {
        let mut b = Vec::new();
        push_name(&mut b, name);
        b
    }

    #[test]
    fn a_chain_of_aliases_leads_back_to_the_question() {
        let m = message(
            "www.example.org",
            &[
                ("WWW.example.org", TYPE_CNAME, name_bytes("cdn.example.net")),
                ("cdn.example.net", TYPE_CNAME, name_bytes("a.example.net")),
                ("a.example.net", TYPE_A, vec![192, 0, 2, 1]),
                ("other.example", TYPE_A, vec![192, 0, 2, 9]),
            ],
        );
        let a = parse(&m).unwrap();
        assert_eq!(a.question, b"www.example.org");
        assert_eq!(a.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn both_families_and_compressed_names() {
        let mut m = message(
            "h.example",
            &[("x", TYPE_AAAA, std::iter::repeat_n(1, 16).collect())],
        );
        // The owner `x` becomes a pointer to the question.
        let at = HEADER + name_bytes("h.example").len() + 4;
        m.splice(at..at + 3, [0xc0, HEADER as u8]);
        let a = parse(&m).unwrap();
        assert_eq!(a.addresses, [IpAddr::from([1u8; 16])]);
        // Cut inside the second record: the first one holds.
        let m = message(
            "h.example",
            &[
                ("h.example", TYPE_A, vec![192, 0, 2, 1]),
                ("h.example", TYPE_A, vec![192, 0, 2, 2]),
            ],
        );
        assert_eq!(parse(&m[..m.len() - 1]).unwrap().addresses.len(), 1);
    }

    #[test]
    fn what_is_no_answer() {
        let m = message("h.example", &[("h.example", TYPE_A, vec![192, 0, 2, 1])]);
        assert!(parse(&m).is_some());
        for (at, value) in [(2, 0x01), (3, 0x83), (5, 2), (2, 0x89)] {
            let mut odd = m.clone();
            odd[at] = value;
            assert_eq!(parse(&odd), None, "byte {at} = {value:#x}");
        }
        // A pointer to itself.
        let mut odd = m;
        odd[HEADER] = 0xc0;
        odd[HEADER + 1] = HEADER as u8;
        assert_eq!(parse(&odd), None);
    }

    #[test]
    fn a_stream_in_pieces() {
        let m = message("h.example", &[("h.example", TYPE_A, vec![192, 0, 2, 1])]);
        let mut wire = (m.len() as u16).to_be_bytes().to_vec();
        wire.extend(&m);
        wire.extend(wire.clone());
        for size in [1, 2, 7, wire.len()] {
            let mut stream = Stream::default();
            let got: Vec<Vec<u8>> = wire
                .chunks(size)
                .flat_map(|p| stream.push(p, false))
                .collect();
            assert_eq!(got, [m.clone(), m.clone()], "pieces of {size}");
        }
        let mut stream = Stream::default();
        assert_eq!(stream.push(&wire[..20], true), [m[..18].to_vec()]);
        assert!(stream.push(&wire, false).is_empty());
    }

    proptest! {
        #[test]
        fn odd_bytes_never_panic(b in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse(&b);
            let _ = Stream::default().push(&b, b.len() % 2 == 0);
        }

        #[test]
        fn odd_records_never_panic(rest in prop::collection::vec(any::<u8>(), 0..200), n in any::<u8>()) {
            let mut m = message("h.example", &[]);
            m[7] = n;
            m.extend(rest);
            let _ = parse(&m);
        }
    }
}
