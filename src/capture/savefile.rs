//! Capture files read, and written again, by libpcap: every format, link type and damage is what tcpdump takes it for. What pcapng
//! says beside a packet's bytes comes along ([`Note`]).
//!
//! All `unsafe` of this concern is here; libpcap is linked statically (build.rs).

use std::cell::RefCell;
use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint, c_void};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::rc::Rc;

use anyhow::{Context, Result, bail};

use super::linktype::Linktype;
use super::notes::{Note, Notes};

#[repr(C)]
#[derive(Clone, Copy)]
struct PacketHeader {
    time: libc::timeval,
    caplen: u32,
    len: u32,
}

/// libpcap's `pcap_t`.
#[repr(C)]
pub struct Handle {
    _opaque: [u8; 0],
}

/// libpcap's `pcap_dumper_t`.
#[repr(C)]
struct Dumper {
    _opaque: [u8; 0],
}

/// glibc's `cookie_io_functions_t`.
#[repr(C)]
struct CookieFunctions {
    read: unsafe extern "C" fn(*mut c_void, *mut c_char, usize) -> isize,
    write: *const c_void,
    seek: *const c_void,
    close: unsafe extern "C" fn(*mut c_void) -> c_int,
}

const ERROR_SIZE: usize = 256;
const PRECISION_NANO: c_uint = 1;

unsafe extern "C" {
    fn pcap_fopen_offline_with_tstamp_precision(
        file: *mut libc::FILE,
        precision: c_uint,
        error: *mut c_char,
    ) -> *mut Handle;
    fn pcap_close(handle: *mut Handle);
    fn pcap_geterr(handle: *mut Handle) -> *mut c_char;
    fn pcap_datalink(handle: *mut Handle) -> c_int;
    fn pcap_is_swapped(handle: *mut Handle) -> c_int;
    fn pcap_next_ex(
        handle: *mut Handle,
        header: *mut *mut PacketHeader,
        data: *mut *const c_uchar,
    ) -> c_int;
    fn pcap_dump_open(handle: *mut Handle, file: *const c_char) -> *mut Dumper;
    fn pcap_dump(dumper: *mut Dumper, header: *const PacketHeader, data: *const c_uchar);
    fn pcap_dump_flush(dumper: *mut Dumper) -> c_int;
    fn pcap_dump_close(dumper: *mut Dumper);
    fn fopencookie(
        cookie: *mut c_void,
        mode: *const c_char,
        functions: CookieFunctions,
    ) -> *mut libc::FILE;
}

/// A packet of a capture file.
#[derive(Clone, Debug)]
pub struct Packet {
    /// Nanoseconds in the place of microseconds.
    time: libc::timeval,
    pub wire_len: u32,
    pub bytes: Vec<u8>,
    pub note: Note,
}

impl Packet {
    /// Wall clock, ns since 1970.
    pub fn ts(&self) -> u64 {
        let seconds = u64::try_from(self.time.tv_sec).unwrap_or(0);
        let fraction = u64::try_from(self.time.tv_usec).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(fraction)
    }
}

/// Where libpcap reads from: every byte goes through [`Notes`] on its way.
struct Input {
    input: Box<dyn Read>,
    notes: Rc<RefCell<Notes>>,
}

/// glibc's callback: fills `to`.
unsafe extern "C" fn read_source(cookie: *mut c_void, to: *mut c_char, len: usize) -> isize {
    // SAFETY: the cookie is the Input that `open` boxed, which nothing else refers to until `close_source`.
    let source = unsafe { &mut *cookie.cast::<Input>() };
    // SAFETY: glibc's buffer has `len` bytes, and it has initialized them or will not look at more than was read.
    let to = unsafe {
        ptr::write_bytes(to.cast::<u8>(), 0, len);
        std::slice::from_raw_parts_mut(to.cast::<u8>(), len)
    };
    loop {
        match source.input.read(to) {
            Ok(read) => {
                if let (Ok(mut notes), Some(bytes)) =
                    (source.notes.try_borrow_mut(), to.get(..read))
                {
                    notes.push(bytes);
                }
                return isize::try_from(read).unwrap_or(-1);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => {
                nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)).set();
                return -1;
            }
        }
    }
}

unsafe extern "C" fn close_source(cookie: *mut c_void) -> c_int {
    // SAFETY: the Input that `open` boxed; glibc closes once and calls nothing after that.
    drop(unsafe { Box::from_raw(cookie.cast::<Input>()) });
    0
}

/// A capture file being read: pcap or pcapng.
pub struct Reader {
    handle: NonNull<Handle>,
    notes: Rc<RefCell<Notes>>,
}

impl Reader {
    /// `-` is the standard input.
    pub fn open(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            return Self::new(Box::new(io::stdin()));
        }
        Self::new(Box::new(File::open(path)?))
    }

    pub fn new(input: Box<dyn Read>) -> Result<Self> {
        let notes = Rc::new(RefCell::new(Notes::default()));
        let source = Box::new(Input {
            input,
            notes: notes.clone(),
        });
        let cookie = Box::into_raw(source).cast::<c_void>();
        let functions = CookieFunctions {
            read: read_source,
            write: ptr::null(),
            seek: ptr::null(),
            close: close_source,
        };
        // SAFETY: the functions take such a cookie; the mode ends in NUL.
        let file = unsafe { fopencookie(cookie, c"r".as_ptr(), functions) };
        if file.is_null() {
            let error = io::Error::last_os_error();
            // SAFETY: nobody took it.
            unsafe { close_source(cookie) };
            return Err(error.into());
        }
        let mut error = [0 as c_char; ERROR_SIZE];
        // SAFETY: the file is open, and the error buffer has the size that libpcap asks for.
        let handle = unsafe {
            pcap_fopen_offline_with_tstamp_precision(file, PRECISION_NANO, error.as_mut_ptr())
        };
        match NonNull::new(handle) {
            Some(handle) => Ok(Reader { handle, notes }),
            None => {
                // SAFETY: libpcap wrote a string into the buffer, and left the file open.
                let error = unsafe {
                    libc::fclose(file);
                    CStr::from_ptr(error.as_ptr())
                };
                bail!("{}", error.to_string_lossy())
            }
        }
    }

    /// For libpcap's compiler, which asks an open file for its link type and byte order.
    pub fn handle(&self) -> NonNull<Handle> {
        self.handle
    }

    pub fn linktype(&self) -> Linktype {
        // SAFETY: the handle is open.
        Linktype(unsafe { pcap_datalink(self.handle.as_ptr()) })
    }

    /// The file was written by a machine of the other byte order.
    pub fn is_swapped(&self) -> bool {
        // SAFETY: the handle is open.
        unsafe { pcap_is_swapped(self.handle.as_ptr()) != 0 }
    }

    /// The next packet; none at the end. The error is libpcap's.
    pub fn next_packet(&mut self) -> Result<Option<Packet>> {
        let mut header = ptr::null_mut();
        let mut data = ptr::null();
        // SAFETY: the handle is open; both pointers are written when the answer is 1.
        match unsafe { pcap_next_ex(self.handle.as_ptr(), &mut header, &mut data) } {
            1 => {
                // SAFETY: header and `caplen` bytes are valid until the next call; both are copied.
                let (header, bytes) = unsafe {
                    let header: PacketHeader = *header;
                    let bytes = match header.caplen {
                        0 => Vec::new(),
                        len => std::slice::from_raw_parts(data, len as usize).to_vec(),
                    };
                    (header, bytes)
                };
                Ok(Some(Packet {
                    time: header.time,
                    wire_len: header.len,
                    bytes,
                    note: self.notes.borrow_mut().next(),
                }))
            }
            -2 => Ok(None),
            _ => bail!("{}", error_of(self.handle)),
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used again; it closes the file, and so the source.
        unsafe { pcap_close(self.handle.as_ptr()) }
    }
}

fn error_of(handle: NonNull<Handle>) -> String {
    // SAFETY: the handle is open, and its error buffer lives as long.
    unsafe { CStr::from_ptr(pcap_geterr(handle.as_ptr())) }
        .to_string_lossy()
        .into_owned()
}

/// A capture file being written: packets of a reader, with its link type, the length of its frame check sequences and its snap length.
pub struct Writer {
    dumper: NonNull<Dumper>,
    /// BSD's address family is in the other byte order than the file will be.
    swapped: bool,
}

impl Writer {
    /// `-` is the standard output.
    pub fn for_packets_of(reader: &Reader, path: &Path) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())
            .context("the name has a NUL in it")?;
        // SAFETY: the handle is open and the name ends in NUL.
        let dumper = unsafe { pcap_dump_open(reader.handle.as_ptr(), name.as_ptr()) };
        match NonNull::new(dumper) {
            Some(dumper) => Ok(Writer {
                dumper,
                swapped: reader.is_swapped() && reader.linktype() == Linktype::NULL,
            }),
            None => bail!("{}", error_of(reader.handle)),
        }
    }

    pub fn write(&mut self, packet: &Packet) {
        let mut turned;
        let mut bytes = &packet.bytes;
        if let (true, Some(family)) = (self.swapped, packet.bytes.first_chunk::<4>()) {
            turned = packet.bytes.clone();
            let family = u32::from_ne_bytes(*family).swap_bytes().to_ne_bytes();
            turned[..4].copy_from_slice(&family);
            bytes = &turned;
        }
        let header = PacketHeader {
            time: packet.time,
            caplen: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            len: packet.wire_len,
        };
        // SAFETY: the dumper is open, and `caplen` bytes are there.
        unsafe { pcap_dump(self.dumper.as_ptr(), &header, bytes.as_ptr()) }
    }

    /// Everything to the file; an error of any write so far shows here.
    pub fn finish(self) -> Result<()> {
        // SAFETY: the dumper is open.
        if unsafe { pcap_dump_flush(self.dumper.as_ptr()) } != 0 {
            return Err(io::Error::last_os_error().into());
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: the dumper is open and not used again.
        unsafe { pcap_dump_close(self.dumper.as_ptr()) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::pcapng::{self, Counters, Direction, Format, Interface, Section};
    use super::*;
    use proptest::prelude::*;

    fn open(file: &[u8]) -> Result<Reader> {
        Reader::new(Box::new(io::Cursor::new(file.to_vec())))
    }

    /// All packets up to the end or the first error, and that.
    fn read_all(file: &[u8]) -> (Vec<Packet>, Option<String>) {
        let mut all = Vec::new();
        let mut reader = match open(file) {
            Ok(reader) => reader,
            Err(error) => return (all, Some(error.to_string())),
        };
        loop {
            match reader.next_packet() {
                Ok(Some(packet)) => all.push(packet),
                Ok(None) => return (all, None),
                Err(error) => return (all, Some(error.to_string())),
            }
        }
    }

    const TS: u64 = 1_790_000_000_123_456_789;

    fn sample(format: Format) -> Vec<u8> {
        let mut file = Vec::new();
        let section = Section {
            comment: Some("é".into()),
            ..Section::default()
        };
        let mut writer =
            pcapng::Writer::new(&mut file, format, &section, 0, Linktype::ETHERNET).unwrap();
        let described = Interface {
            description: Some("exit".into()),
            filter: Some("icmp".into()),
            ..Interface::new("v0", Linktype::ETHERNET)
        };
        let other = Interface::new("other", Linktype::ETHERNET);
        writer.add_interface(&other).unwrap();
        let interface = writer.add_interface(&described).unwrap();
        let packet = pcapng::Packet {
            interface,
            ts: TS,
            len: 98,
            data: &(0..61).collect::<Vec<_>>(),
            direction: Some(Direction::Inbound),
            id: Some(u64::MAX - 1),
            queue: Some(3),
            verdict: Some(4),
            dropped: Some(12),
            comment: Some("why"),
        };
        writer.packet(&packet).unwrap();
        let plain = pcapng::Packet {
            ts: TS + 1,
            data: &[7; 14],
            len: 14,
            ..pcapng::Packet::default()
        };
        writer.packet(&plain).unwrap();
        let counters = Counters {
            end: packet.ts,
            delivered: Some(1),
            ..Counters::default()
        };
        writer.statistics(interface, &counters).unwrap();
        file
    }

    #[test]
    fn pcapng_comes_back_as_written() {
        let (packets, error) = read_all(&sample(Format::Pcapng));
        assert_eq!((packets.len(), error), (2, None));
        let first = &packets[0];
        assert_eq!(
            (first.ts(), first.wire_len, first.bytes.len()),
            (TS, 98, 61)
        );
        let note = Note {
            interface: "v0".into(),
            direction: Some(Direction::Inbound),
            id: Some(u64::MAX - 1),
            queue: Some(3),
            verdict: Some(4),
            dropped: Some(12),
            comment: Some("why".into()),
        };
        assert_eq!(first.note, note);
        let other = Note {
            interface: "other".into(),
            ..Note::default()
        };
        assert_eq!((packets[1].ts(), &packets[1].note), (TS + 1, &other));
    }

    #[test]
    fn pcap_keeps_time_length_and_bytes() {
        let (packets, error) = read_all(&sample(Format::Pcap));
        assert_eq!((packets.len(), error), (2, None));
        assert_eq!(
            (packets[0].ts(), packets[0].wire_len, packets[0].bytes.len()),
            (TS, 98, 61)
        );
        assert_eq!(packets[0].note, Note::default());
    }

    /// Words of a file of this byte order.
    fn words(big: bool, words: &[u32]) -> Vec<u8> {
        let bytes = |word: &u32| {
            if big {
                word.to_be_bytes()
            } else {
                word.to_le_bytes()
            }
        };
        words.iter().flat_map(bytes).collect()
    }

    /// A block of pcapng.
    fn block(big: bool, kind: u32, body: &[u8]) -> Vec<u8> {
        let len = 12 + body.len() as u32;
        [words(big, &[kind, len]), body.to_vec(), words(big, &[len])].concat()
    }

    /// The obsolete packet block counts, and says how many packets were lost before it; both byte orders.
    #[test]
    fn packet_blocks_of_every_kind() {
        for big in [false, true] {
            let mut file = block(
                big,
                0x0a0d_0d0a,
                &words(big, &[0x1a2b_3c4d, if big { 0x1_0000 } else { 1 }, !0, !0]),
            );
            let half = |first: u32, second: u32| {
                if big {
                    first << 16 | second
                } else {
                    second << 16 | first
                }
            };
            file.extend(block(big, 1, &words(big, &[half(1, 0), 0])));
            // interface 0, 5 packets lost before
            file.extend(block(big, 2, &words(big, &[half(0, 5), 0, 7, 4, 4, 1])));
            file.extend(block(big, 3, &words(big, &[4, 2])));
            file.extend(block(big, 6, &words(big, &[0, 0, 9, 4, 60, 3])));
            let (packets, error) = read_all(&file);
            assert_eq!(error, None);
            let seen = packets.iter().map(|p| (p.ts(), p.wire_len, p.note.dropped));
            assert_eq!(
                seen.collect::<Vec<_>>(),
                [(7000, 4, Some(5)), (0, 4, None), (9000, 60, None)]
            );
        }
    }

    /// What is wrong, libpcap says, after the packets before it.
    #[test]
    fn damage_in_libpcaps_words() {
        let file = sample(Format::Pcap);
        let (packets, error) = read_all(&file[..file.len() - 3]);
        let want = "truncated dump file; tried to read 14 captured bytes, only got 11";
        assert_eq!((packets.len(), error.as_deref()), (1, Some(want)));
        assert_eq!(
            read_all(b"no capture").1.as_deref(),
            Some("unknown file format")
        );
        assert!(read_all(b"").1.unwrap().contains("truncated dump file"));
        let mut two = block(false, 0x0a0d_0d0a, &words(false, &[0x1a2b_3c4d, 1, !0, !0]));
        for linktype in [1, 101] {
            two.extend(block(false, 1, &words(false, &[linktype, 0])));
        }
        two.extend(block(false, 6, &words(false, &[0, 0, 9, 4, 60, 3])));
        let error = read_all(&two).1.unwrap();
        assert!(
            error.contains("type 101 different from the type of the first"),
            "{error}"
        );
    }

    /// Link type, frame check sequence, byte order of BSD's address family.
    #[test]
    fn written_again_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("again.pcap");
        // 4 bytes of frame check sequence, in the upper bits of the link type
        for (big, linktype, family) in [(false, 0x1400_0001, 0), (true, 0, 2), (false, 0, 24)] {
            let mut file = words(
                big,
                &[
                    0xa1b2_c3d4,
                    if big { 0x0002_0004 } else { 0x0004_0002 },
                    0,
                    0,
                    128,
                    linktype,
                ],
            );
            file.extend(words(big, &[1, 2, 8, 8, family, 0x45]));
            let mut reader = open(&file).unwrap();
            let mut writer = Writer::for_packets_of(&reader, &path).unwrap();
            while let Some(packet) = reader.next_packet().unwrap() {
                writer.write(&packet);
            }
            writer.finish().unwrap();
            let again = std::fs::read(&path).unwrap();
            let word = |at: usize| u32::from_le_bytes(again[at..at + 4].try_into().unwrap());
            assert_eq!((word(16), word(20)), (128, linktype));
            assert_eq!((word(24), word(28), word(40)), (1, 2000, family));
        }
    }

    #[test]
    fn cut_anywhere() {
        for format in [Format::Pcapng, Format::Pcap] {
            let file = sample(format);
            for end in 0..file.len() {
                read_all(&file[..end]);
            }
        }
    }

    proptest! {
        #[test]
        fn any_damage_is_survived(
            classic: bool,
            changes in proptest::collection::vec((0usize..600, any::<u8>()), 1..6),
            tail in proptest::collection::vec(any::<u8>(), 0..64),
        ) {
            let mut file = sample(if classic { Format::Pcap } else { Format::Pcapng });
            for (at, value) in changes {
                let at = at % file.len();
                file[at] = value;
            }
            file.extend(tail);
            let (packets, _) = read_all(&file);
            let bytes = packets.iter().map(|packet| packet.bytes.len()).sum::<usize>();
            prop_assert!(bytes <= file.len());
        }
    }
}
