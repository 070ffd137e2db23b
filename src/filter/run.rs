//! Runs translated filters over packets in this kernel (BPF_PROG_TEST_RUN), without any network: for `netprobe filter
//! -r`, the tests and the benchmark. Touches libbpf.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, bail};
use libbpf_sys as sys;

use super::asm::{Insn, Reg, Size};
use super::cbpf::Program;
use super::ebpf::{self, Beyond, LoadMode};

/// The kind of program that a filter is put into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tracing = sys::BPF_PROG_TYPE_RAW_TRACEPOINT as isize,
    Xdp = sys::BPF_PROG_TYPE_XDP as isize,
    Tc = sys::BPF_PROG_TYPE_SCHED_CLS as isize,
}

const HELPER_XDP_GET_BUFF_LEN: i32 = 188;
/// BPF_F_XDP_HAS_FRAGS: packets in several buffers are welcome.
const XDP_HAS_FRAGS: u32 = 1 << 5;
/// BPF_PSEUDO_MAP_VALUE
const MAP_VALUE: u8 = 2;
/// BPF_F_MMAPABLE
const MMAPABLE: u32 = 1 << 10;
const VERIFIER_LOG: usize = 64 << 10;

/// A filter in the kernel.
pub struct Runner {
    program: OwnedFd,
    kind: Kind,
    memory: Option<Memory>,
}

/// The longest packet that `Runner::traced` takes.
pub const MAX_PACKET: usize = 512 << 10;

/// The map that packets are put into: lengths and an address, then the bytes.
#[repr(C)]
struct Slot {
    linear: u64,
    wire_len: u64,
    /// Room for the program to turn a pointer into a number.
    address: u64,
    bytes: [u8; MAX_PACKET],
}

struct Memory {
    map: OwnedFd,
    slot: NonNull<Slot>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `Memory::new` with this length, and not used again.
        unsafe { libc::munmap(self.slot.as_ptr().cast(), size_of::<Slot>()) };
    }
}

impl Memory {
    fn new() -> Result<Self> {
        let options = sys::bpf_map_create_opts {
            sz: size_of::<sys::bpf_map_create_opts>() as u64,
            map_flags: MMAPABLE,
            ..Default::default()
        };
        // SAFETY: the name ends in NUL, and the options say their size.
        let fd = unsafe {
            sys::bpf_map_create(
                sys::BPF_MAP_TYPE_ARRAY,
                c"np_packet".as_ptr(),
                4,
                size_of::<Slot>() as u32,
                1,
                &options,
            )
        };
        let map = owned(fd).context("failed to make a map for packets")?;
        // SAFETY: a new mapping of a map that is as large.
        let slot = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Slot>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if slot == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error())
                .context("failed to map the packets' memory");
        }
        let slot = NonNull::new(slot.cast()).context("a mapping at address 0")?;
        Ok(Memory { map, slot })
    }
}

/// A descriptor that libbpf returned, or the error that it is.
fn owned(fd: i32) -> std::io::Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::from_raw_os_error(-fd));
    }
    // SAFETY: a descriptor that was just made, and nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives the socket a filter that the kernel itself compiles (SO_ATTACH_FILTER): what a translation is compared with. The
/// kernel's EINVAL for a program that it does not take.
pub fn socket_filter(socket: BorrowedFd<'_>, program: &Program) -> std::io::Result<()> {
    let insns = program.insns();
    let filter = libc::sock_fprog {
        len: insns.len() as u16,
        filter: insns.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `filter` points to as many instructions as it says, laid out as `sock_filter`, for the call's time.
    let status = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            size_of::<libc::sock_fprog>() as u32,
        )
    };
    if status == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}

impl Runner {
    /// As the tracing tools have it: a block of `size` bytes, what lies beyond by bpf_probe_read_kernel.
    pub fn traced(program: &Program, size: u32) -> Result<Self> {
        let mode = LoadMode::Block {
            size,
            beyond: Beyond::ProbeRead,
        };
        let body = ebpf::translate(program, mode)?;
        let memory = Memory::new()?;
        let offset = |field: usize| field as i16;
        let slot = Reg::R6;
        let mut main = Insn::load_imm64(slot, MAP_VALUE, memory.map.as_raw_fd(), 0).to_vec();
        main.extend([
            Insn::alu64(super::asm::Alu::Mov, Reg::R1, slot),
            Insn::alu64_imm(
                super::asm::Alu::Add,
                Reg::R1,
                std::mem::offset_of!(Slot, bytes) as i32,
            ),
            // The pointer becomes a number on its way through memory.
            Insn::store(
                Size::Dw,
                slot,
                offset(std::mem::offset_of!(Slot, address)),
                Reg::R1,
            ),
            Insn::load(
                Size::Dw,
                Reg::R3,
                slot,
                offset(std::mem::offset_of!(Slot, address)),
            ),
            Insn::load(
                Size::Dw,
                Reg::R2,
                slot,
                offset(std::mem::offset_of!(Slot, linear)),
            ),
            Insn::load(
                Size::Dw,
                Reg::R4,
                slot,
                offset(std::mem::offset_of!(Slot, wire_len)),
            ),
        ]);
        let program = load(Kind::Tracing, 0, &main, &body)?;
        Ok(Runner {
            program,
            kind: Kind::Tracing,
            memory: Some(memory),
        })
    }

    /// As an XDP program has it: between data and data_end, and where `frags` is set in further buffers.
    pub fn xdp(program: &Program, frags: bool) -> Result<Self> {
        let beyond = if frags {
            Beyond::XdpLoad
        } else {
            Beyond::Nothing
        };
        let body = ebpf::translate(program, LoadMode::Packet { beyond })?;
        let mov = |to, from| Insn::alu64(super::asm::Alu::Mov, to, from);
        let mut main = vec![mov(Reg::R6, Reg::R1)];
        if frags {
            main.push(Insn::call(HELPER_XDP_GET_BUFF_LEN));
            main.push(mov(Reg::R4, Reg::R0));
        }
        main.extend([
            Insn::load(Size::W, Reg::R1, Reg::R6, 0),
            Insn::load(Size::W, Reg::R2, Reg::R6, 4),
            mov(Reg::R3, Reg::R6),
        ]);
        if !frags {
            main.push(mov(Reg::R4, Reg::R2));
            main.push(Insn::alu64(super::asm::Alu::Sub, Reg::R4, Reg::R1));
        }
        let program = load(
            Kind::Xdp,
            if frags { XDP_HAS_FRAGS } else { 0 },
            &main,
            &body,
        )?;
        Ok(Runner {
            program,
            kind: Kind::Xdp,
            memory: None,
        })
    }

    /// As a tc program has it: the linear part directly, the rest by bpf_skb_load_bytes.
    pub fn tc(program: &Program) -> Result<Self> {
        let body = ebpf::translate(
            program,
            LoadMode::Packet {
                beyond: Beyond::SkbLoad,
            },
        )?;
        let main = [
            Insn::alu64(super::asm::Alu::Mov, Reg::R3, Reg::R1),
            Insn::load(Size::W, Reg::R4, Reg::R3, 0),
            Insn::load(Size::W, Reg::R1, Reg::R3, 76),
            Insn::load(Size::W, Reg::R2, Reg::R3, 80),
        ];
        let program = load(Kind::Tc, 0, &main, &body)?;
        Ok(Runner {
            program,
            kind: Kind::Tc,
            memory: None,
        })
    }

    /// What the filter returns for a packet. XDP and tc: `wire_len` is the packet's own length, and the packet has at
    /// least 14 bytes.
    pub fn run(&mut self, packet: &[u8], wire_len: u32) -> Result<u32> {
        let mut options = sys::bpf_test_run_opts {
            sz: size_of::<sys::bpf_test_run_opts>() as u64,
            ..Default::default()
        };
        match &mut self.memory {
            Some(memory) => {
                if packet.len() > MAX_PACKET {
                    bail!("a packet of {} bytes: too long", packet.len());
                }
                // SAFETY: the slot is mapped, the program runs only inside the call below, and the packet fits.
                unsafe {
                    let slot = memory.slot.as_ptr();
                    (*slot).linear = packet.len() as u64;
                    (*slot).wire_len = u64::from(wire_len);
                    std::ptr::copy_nonoverlapping(
                        packet.as_ptr(),
                        (&raw mut (*slot).bytes).cast(),
                        packet.len(),
                    );
                }
            }
            None => {
                options.data_in = packet.as_ptr().cast();
                options.data_size_in = u32::try_from(packet.len())?;
                options.repeat = 1;
            }
        }
        self.test_run(&mut options)?;
        Ok(options.retval)
    }

    /// Average time of one run in nanoseconds (XDP and tc).
    pub fn time(&mut self, packet: &[u8], repeat: u32) -> Result<u32> {
        let mut options = sys::bpf_test_run_opts {
            sz: size_of::<sys::bpf_test_run_opts>() as u64,
            data_in: packet.as_ptr().cast(),
            data_size_in: u32::try_from(packet.len())?,
            repeat: i32::try_from(repeat)?,
            ..Default::default()
        };
        if self.kind == Kind::Tracing {
            bail!("a tracing program cannot be repeated");
        }
        self.test_run(&mut options)?;
        Ok(options.duration)
    }

    fn test_run(&mut self, options: &mut sys::bpf_test_run_opts) -> Result<()> {
        // SAFETY: the options say their size, and what they point to outlives the call.
        let status = unsafe { sys::bpf_prog_test_run_opts(self.program.as_raw_fd(), options) };
        if status != 0 {
            return Err(std::io::Error::from_raw_os_error(-status))
                .context("failed to run the filter in the kernel");
        }
        Ok(())
    }
}

/// Loads `main`, which leaves the filter's arguments in r1 to r4, with the filter as its subprogram.
fn load(kind: Kind, flags: u32, main: &[Insn], body: &[Insn]) -> Result<OwnedFd> {
    let mut insns = main.to_vec();
    insns.push(Insn::call_subprogram(1));
    insns.push(Insn::exit());
    insns.extend(body);
    let mut log = vec![0u8; VERIFIER_LOG];
    let mut options = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as u64,
        attempts: 3,
        prog_flags: flags,
        ..Default::default()
    };
    let attempt = |options: &mut sys::bpf_prog_load_opts| {
        // SAFETY: the instructions are copied by the kernel; `Insn` has the layout of `bpf_insn`; strings end in NUL,
        // the options say their size, and their log outlives the call.
        owned(unsafe {
            sys::bpf_prog_load(
                kind as sys::bpf_prog_type,
                c"np_filter".as_ptr(),
                c"GPL".as_ptr(),
                insns.as_ptr().cast(),
                insns.len() as _,
                options,
            )
        })
    };
    match attempt(&mut options) {
        Ok(program) => Ok(program),
        Err(error) => {
            options.log_level = 1;
            options.log_size = VERIFIER_LOG as u32;
            options.log_buf = log.as_mut_ptr().cast();
            let _ = attempt(&mut options);
            let text = CStr::from_bytes_until_nul(&log)
                .map(CStr::to_string_lossy)
                .unwrap_or_default();
            let tail: Vec<&str> = text.lines().rev().take(12).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            Err(error)
                .with_context(|| format!("the kernel refuses the filter:\n{}", tail.join("\n")))
        }
    }
}
