//! libpcap's compiler, its names of instructions and its interpreter, safe to call. All `unsafe` of this concern is here; libpcap is
//! linked statically. Its files are in [`crate::capture::savefile`].

use std::ffi::{CStr, CString, c_char, c_int, c_uchar, c_uint};
use std::marker::PhantomData;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result, anyhow};

use super::cbpf::Insn;
pub use crate::capture::linktype::Linktype;
use crate::capture::savefile::{Handle, Reader};

#[repr(C)]
struct BpfProgram {
    len: c_uint,
    insns: *mut Insn,
}

const NETMASK_UNKNOWN: u32 = 0xffff_ffff;
const PRECISION_NANO: c_uint = 1;

// The search path and the static library are named in build.rs.
unsafe extern "C" {
    fn pcap_open_dead_with_tstamp_precision(
        linktype: c_int,
        snaplen: c_int,
        precision: c_uint,
    ) -> *mut Handle;
    fn pcap_close(handle: *mut Handle);
    fn pcap_geterr(handle: *mut Handle) -> *mut c_char;
    fn pcap_compile(
        handle: *mut Handle,
        program: *mut BpfProgram,
        expression: *const c_char,
        optimize: c_int,
        netmask: u32,
    ) -> c_int;
    fn pcap_freecode(program: *mut BpfProgram);
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

/// A `pcap_t` of no packets, for a link type.
struct Dead(NonNull<Handle>);

impl Dead {
    fn open(linktype: Linktype, snaplen: u32) -> Result<Self> {
        let snaplen = c_int::try_from(snaplen).unwrap_or(c_int::MAX);
        // SAFETY: no pointer is passed.
        let handle =
            unsafe { pcap_open_dead_with_tstamp_precision(linktype.0, snaplen, PRECISION_NANO) };
        NonNull::new(handle)
            .map(Dead)
            .context("libpcap has no memory")
    }
}

impl Drop for Dead {
    fn drop(&mut self) {
        // SAFETY: the handle is open and not used again.
        unsafe { pcap_close(self.0.as_ptr()) }
    }
}

/// The packets that an expression is compiled for.
#[derive(Clone, Copy)]
pub enum Packets<'f> {
    /// `netmask`: of the interface's IPv4 address, in network byte order, for `ip broadcast`; none: unknown.
    Of {
        linktype: Linktype,
        snaplen: u32,
        netmask: Option<u32>,
    },
    /// Those of a file, whose byte order and system decide how the headers of some link types look. A file has no netmask: as for
    /// tcpdump it is 0.
    In(OpenFile<'f>),
}

/// A file that is open for reading, and is not read meanwhile.
#[derive(Clone, Copy)]
pub struct OpenFile<'f>(NonNull<Handle>, PhantomData<&'f Reader>);

// SAFETY: the handle is used by the compiler alone, under its lock; the reader is borrowed, so that nobody reads meanwhile.
unsafe impl Send for OpenFile<'_> {}
// SAFETY: as above.
unsafe impl Sync for OpenFile<'_> {}

impl<'f> Packets<'f> {
    pub fn in_file(file: &'f Reader) -> Self {
        Packets::In(OpenFile(file.handle(), PhantomData))
    }
}

/// Compiles an expression; the error is libpcap's.
pub fn compile(expression: &str, packets: Packets<'_>, optimize: bool) -> Result<Vec<Insn>> {
    let _one_at_a_time = lock();
    match packets {
        Packets::In(OpenFile(handle, _)) => compile_by(expression, handle, 0, optimize),
        Packets::Of {
            linktype,
            snaplen,
            netmask,
        } => {
            let dead = Dead::open(linktype, snaplen)?;
            let netmask = netmask.unwrap_or(NETMASK_UNKNOWN);
            compile_by(expression, dead.0, netmask, optimize)
        }
    }
}

fn lock() -> MutexGuard<'static, ()> {
    COMPILER
        .lock()
        .unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// `handle`: open. The lock is held.
fn compile_by(
    expression: &str,
    handle: NonNull<Handle>,
    netmask: u32,
    optimize: bool,
) -> Result<Vec<Insn>> {
    let text = CString::new(expression).context("the expression has a NUL in it")?;
    let mut program = BpfProgram {
        len: 0,
        insns: ptr::null_mut(),
    };
    // SAFETY: the handle is open, the string ends in NUL, `program` is written on success only.
    let status = unsafe {
        pcap_compile(
            handle.as_ptr(),
            &mut program,
            text.as_ptr(),
            c_int::from(optimize),
            netmask,
        )
    };
    if status != 0 {
        // SAFETY: the handle is open, and its error buffer lives as long.
        let error = unsafe { CStr::from_ptr(pcap_geterr(handle.as_ptr())) };
        return Err(anyhow!("{}", error.to_string_lossy()));
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
    let _one_at_a_time = lock();
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
