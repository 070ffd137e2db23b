//! The few functions of libpcap that are used, safe to call: compile an expression, name an instruction, read and
//! write capture files, run the interpreter. All `unsafe` of this concern is here; libpcap is linked statically.

use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint};
use std::path::Path;
use std::ptr::{self, NonNull};
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow, bail};

use super::cbpf::Insn;

/// A link type's number (DLT_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Linktype(pub c_int);

impl Linktype {
    /// Packets that begin with an Ethernet header.
    pub const ETHERNET: Linktype = Linktype(1);
    /// Packets that begin with an IPv4 or IPv6 header.
    pub const RAW_IP: Linktype = Linktype(12);

    /// From a name (`EN10MB`, `RAW`) as `tcpdump -L` prints it.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        // SAFETY: `name` is a string that ends in NUL.
        let number = unsafe { pcap_datalink_name_to_val(name.as_ptr()) };
        (number >= 0).then_some(Linktype(number))
    }

    /// Its name, or its number where libpcap knows none.
    pub fn name(self) -> String {
        // SAFETY: the answer is null or a constant string of libpcap's.
        let name = unsafe {
            pcap_datalink_val_to_name(self.0)
                .as_ref()
                .map(|c| CStr::from_ptr(c))
        };
        name.map_or_else(
            || self.0.to_string(),
            |name| name.to_string_lossy().into_owned(),
        )
    }
}

#[repr(C)]
struct BpfProgram {
    len: c_uint,
    insns: *mut Insn,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct PacketHeader {
    time: libc::timeval,
    caplen: u32,
    len: u32,
}

/// libpcap's `pcap_t`.
#[repr(C)]
struct Handle {
    _opaque: [u8; 0],
}

/// libpcap's `pcap_dumper_t`.
#[repr(C)]
struct Dumper {
    _opaque: [u8; 0],
}

const ERROR_SIZE: usize = 256;
const NETMASK_UNKNOWN: u32 = 0xffff_ffff;
const PRECISION_NANO: c_uint = 1;

// The search path and the static library are named in build.rs.
unsafe extern "C" {
    fn pcap_open_dead_with_tstamp_precision(
        linktype: c_int,
        snaplen: c_int,
        precision: c_uint,
    ) -> *mut Handle;
    fn pcap_open_offline_with_tstamp_precision(
        file: *const c_char,
        precision: c_uint,
        error: *mut c_char,
    ) -> *mut Handle;
    fn pcap_close(handle: *mut Handle);
    fn pcap_geterr(handle: *mut Handle) -> *mut c_char;
    fn pcap_datalink(handle: *mut Handle) -> c_int;
    fn pcap_snapshot(handle: *mut Handle) -> c_int;
    fn pcap_datalink_name_to_val(name: *const c_char) -> c_int;
    fn pcap_datalink_val_to_name(linktype: c_int) -> *const c_char;
    fn pcap_compile(
        handle: *mut Handle,
        program: *mut BpfProgram,
        expression: *const c_char,
        optimize: c_int,
        netmask: u32,
    ) -> c_int;
    fn pcap_freecode(program: *mut BpfProgram);
    fn pcap_next_ex(
        handle: *mut Handle,
        header: *mut *mut PacketHeader,
        data: *mut *const c_uchar,
    ) -> c_int;
    fn pcap_dump_open(handle: *mut Handle, file: *const c_char) -> *mut Dumper;
    fn pcap_dump(dumper: *mut Dumper, header: *const PacketHeader, data: *const c_uchar);
    fn pcap_dump_flush(dumper: *mut Dumper) -> c_int;
    fn pcap_dump_close(dumper: *mut Dumper);
    fn bpf_image(insn: *const Insn, at: c_int) -> *mut c_char;
    fn bpf_filter(
        insns: *const Insn,
        packet: *const c_uchar,
        wire_len: c_uint,
        caplen: c_uint,
    ) -> c_uint;
}

/// Debian's libpcap can capture from D-Bus and wants libdbus for it. These two stand in for that part, so that it is
/// not linked; nothing here opens a live capture, so nothing calls them.
#[unsafe(no_mangle)]
extern "C" fn dbus_create(
    _device: *const c_char,
    _error: *mut c_char,
    _is_ours: *mut c_int,
) -> *mut Handle {
    ptr::null_mut()
}

/// See `dbus_create`.
#[unsafe(no_mangle)]
extern "C" fn dbus_findalldevs(_list: *mut libc::c_void, _error: *mut c_char) -> c_int {
    0
}

/// libpcap's compiler and `bpf_image` keep state in static variables.
static COMPILER: Mutex<()> = Mutex::new(());

/// An open `pcap_t`.
struct Pcap(NonNull<Handle>);

impl Pcap {
    fn dead(linktype: Linktype, snaplen: u32) -> Result<Self> {
        let snaplen = c_int::try_from(snaplen).unwrap_or(c_int::MAX);
        // SAFETY: no pointer is passed.
        let handle =
            unsafe { pcap_open_dead_with_tstamp_precision(linktype.0, snaplen, PRECISION_NANO) };
        NonNull::new(handle)
            .map(Pcap)
            .context("libpcap has no memory")
    }

    fn error(&self) -> String {
        // SAFETY: the handle is open, and its error buffer lives as long.
        unsafe { CStr::from_ptr(pcap_geterr(self.0.as_ptr())) }
            .to_string_lossy()
            .into_owned()
    }
}

impl Drop for Pcap {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used again.
        unsafe { pcap_close(self.0.as_ptr()) }
    }
}

/// Compiles an expression; the error is libpcap's.
pub fn compile(
    expression: &str,
    linktype: Linktype,
    snaplen: u32,
    optimize: bool,
) -> Result<Vec<Insn>> {
    let text = CString::new(expression).context("the expression has a NUL in it")?;
    let _one_at_a_time = COMPILER
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    let pcap = Pcap::dead(linktype, snaplen)?;
    let mut program = BpfProgram {
        len: 0,
        insns: ptr::null_mut(),
    };
    // SAFETY: the handle is open, the string ends in NUL, `program` is written on success only.
    let status = unsafe {
        pcap_compile(
            pcap.0.as_ptr(),
            &mut program,
            text.as_ptr(),
            c_int::from(optimize),
            NETMASK_UNKNOWN,
        )
    };
    if status != 0 {
        return Err(anyhow!("{}", pcap.error()));
    }
    // SAFETY: libpcap says that `len` instructions are there; they are copied before it frees them.
    let insns = unsafe {
        let insns = std::slice::from_raw_parts(program.insns, program.len as usize).to_vec();
        pcap_freecode(&mut program);
        insns
    };
    Ok(insns)
}

/// An instruction as `tcpdump -d` prints it.
pub fn image(insn: Insn, at: usize) -> String {
    let _one_at_a_time = COMPILER
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner());
    // SAFETY: libpcap writes a string into a static buffer, which the lock keeps others from.
    unsafe { CStr::from_ptr(bpf_image(&insn, c_int::try_from(at).unwrap_or(c_int::MAX))) }
        .to_string_lossy()
        .into_owned()
}

/// Runs a program by libpcap's own interpreter.
pub fn interpret(program: &super::cbpf::Program, packet: &[u8], wire_len: u32) -> u32 {
    // SAFETY: the program passed the checks (every jump inside, a return at the end), and the packet's length is true.
    unsafe {
        bpf_filter(
            program.insns().as_ptr(),
            packet.as_ptr(),
            wire_len,
            u32::try_from(packet.len()).unwrap_or(u32::MAX),
        )
    }
}

/// A packet of a capture file.
pub struct Packet {
    time: libc::timeval,
    pub wire_len: u32,
    pub bytes: Vec<u8>,
}

/// A capture file being read: pcap or pcapng.
pub struct Reader(Pcap);

impl Reader {
    pub fn open(path: &Path) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())
            .context("the name has a NUL in it")?;
        let mut error = [0 as c_char; ERROR_SIZE];
        // SAFETY: the name ends in NUL, and the error buffer has the size that libpcap asks for.
        let handle = unsafe {
            pcap_open_offline_with_tstamp_precision(
                name.as_ptr(),
                PRECISION_NANO,
                error.as_mut_ptr(),
            )
        };
        match NonNull::new(handle) {
            Some(handle) => Ok(Reader(Pcap(handle))),
            None => {
                // SAFETY: libpcap wrote a string into the buffer.
                let error = unsafe { CStr::from_ptr(error.as_ptr()) };
                bail!("{}", error.to_string_lossy())
            }
        }
    }

    pub fn linktype(&self) -> Linktype {
        // SAFETY: the handle is open.
        Linktype(unsafe { pcap_datalink(self.0.0.as_ptr()) })
    }

    pub fn snaplen(&self) -> u32 {
        // SAFETY: the handle is open.
        u32::try_from(unsafe { pcap_snapshot(self.0.0.as_ptr()) }).unwrap_or(0)
    }

    /// The next packet; none at the end.
    pub fn next_packet(&mut self) -> Result<Option<Packet>> {
        let mut header = ptr::null_mut();
        let mut data = ptr::null();
        // SAFETY: the handle is open; both pointers are written when the answer is 1.
        match unsafe { pcap_next_ex(self.0.0.as_ptr(), &mut header, &mut data) } {
            1 => {
                // SAFETY: header and `caplen` bytes are valid until the next call; both are copied.
                let packet = unsafe {
                    Packet {
                        time: (*header).time,
                        wire_len: (*header).len,
                        bytes: std::slice::from_raw_parts(data, (*header).caplen as usize).to_vec(),
                    }
                };
                Ok(Some(packet))
            }
            -2 => Ok(None),
            _ => bail!("{}", self.0.error()),
        }
    }
}

/// A capture file being written (pcap, nanoseconds).
pub struct Writer {
    dumper: NonNull<Dumper>,
    pcap: Pcap,
}

impl Writer {
    /// `-` is the standard output.
    pub fn create(path: &Path, linktype: Linktype, snaplen: u32) -> Result<Self> {
        let name = CString::new(path.as_os_str().as_encoded_bytes())
            .context("the name has a NUL in it")?;
        let pcap = Pcap::dead(linktype, snaplen)?;
        // SAFETY: the handle is open and the name ends in NUL.
        let dumper = unsafe { pcap_dump_open(pcap.0.as_ptr(), name.as_ptr()) };
        match NonNull::new(dumper) {
            Some(dumper) => Ok(Writer { dumper, pcap }),
            None => bail!("{}", pcap.error()),
        }
    }

    pub fn write(&mut self, packet: &Packet) {
        let header = PacketHeader {
            time: packet.time,
            caplen: u32::try_from(packet.bytes.len()).unwrap_or(u32::MAX),
            len: packet.wire_len,
        };
        // SAFETY: the dumper is open, and `caplen` bytes are there.
        unsafe { pcap_dump(self.dumper.as_ptr(), &header, packet.bytes.as_ptr()) }
    }

    /// Everything to the file; an error of any write so far shows here.
    pub fn finish(self) -> Result<()> {
        // SAFETY: the dumper is open.
        if unsafe { pcap_dump_flush(self.dumper.as_ptr()) } != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // SAFETY: the dumper is open and not used again; the handle that it came from is still open.
        unsafe { pcap_dump_close(self.dumper.as_ptr()) }
        let _ = &self.pcap;
    }
}
