//! Runs translated filters over packets in this kernel (BPF_PROG_TEST_RUN), without any network: for `netprobe filter
//! -r`, the tests and the benchmark. Touches libbpf.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, bail};
use libbpf_sys as sys;

use super::cbpf::Program;
use super::ebpf::{self, CAST_CALL, FarLoad, LOAD_CALL, LoadMode};
use crate::insn::asm::{Alu, Assembler, Cond, HELPER_PROBE_READ_KERNEL, Insn, Reg, Size};
use crate::kernel::features::SkbFields;

/// The kind of program that a filter is put into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProgramType {
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
    kind: ProgramType,
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
    /// What `SkbFields` are in an sk_buff.
    data_len: u32,
    network_header: u16,
    mac_header: u16,
    tail: u32,
    head: u64,
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

/// Where the slot is kept in a program, and its fields.
const SLOT: Reg = Reg::R6;
const LINEAR: i16 = std::mem::offset_of!(Slot, linear) as i16;
const WIRE_LEN: i16 = std::mem::offset_of!(Slot, wire_len) as i16;
const ADDRESS: i16 = std::mem::offset_of!(Slot, address) as i16;
const HEADROOM: u16 = 5;
const BYTES: i32 = std::mem::offset_of!(Slot, bytes) as i32;

fn field(to: Reg, at: i16) -> Insn {
    Insn::load(Size::Dw, to, SLOT, at)
}

impl Memory {
    fn slot(&self) -> [Insn; 2] {
        Insn::load_imm64(SLOT, MAP_VALUE, self.map.as_raw_fd(), 0)
    }

    /// SLOT is set, r1 points to the packet, and its address is a number in the slot.
    fn begin(&self) -> Vec<Insn> {
        let mut main = self.slot().to_vec();
        main.extend([
            Insn::alu64(Alu::Mov, Reg::R1, SLOT),
            Insn::alu64_imm(Alu::Add, Reg::R1, BYTES),
            // The pointer becomes a number on its way through memory.
            Insn::store(Size::Dw, SLOT, ADDRESS, Reg::R1),
        ]);
        main
    }

    /// SLOT is set, and r1 is its address: it looks like an sk_buff whose packet begins some bytes behind its head.
    fn as_sk_buff(&self) -> Vec<Insn> {
        let mut main = self.begin();
        let head = std::mem::offset_of!(Slot, head) as i16;
        main.extend([
            field(Reg::R1, ADDRESS),
            Insn::alu64_imm(Alu::Sub, Reg::R1, HEADROOM.into()),
            Insn::store(Size::Dw, SLOT, head, Reg::R1),
            field(Reg::R1, ADDRESS),
            Insn::alu64_imm(Alu::Sub, Reg::R1, BYTES),
        ]);
        main
    }

    /// What `FarLoad::Subprogram` calls.
    fn load_function(&self) -> Result<Vec<Insn>> {
        let mut asm = Assembler::default();
        let fail = asm.label();
        let mov = |to, from| Insn::alu64(Alu::Mov, to, from);
        asm.extend(self.slot());
        asm.extend([mov(Reg::R7, Reg::R2), mov(Reg::R4, Reg::R1)]);
        asm.extend([
            Insn::alu64(Alu::Add, Reg::R4, Reg::R2),
            field(Reg::R5, LINEAR),
        ]);
        asm.jump_if(Reg::R4, Cond::Gt, Reg::R5, fail);
        asm.extend([
            field(Reg::R3, ADDRESS),
            Insn::alu64(Alu::Add, Reg::R3, Reg::R1),
            mov(Reg::R1, Reg::Fp),
            Insn::alu64_imm(Alu::Add, Reg::R1, -8),
            // Four bytes always: behind the packet there is room.
            Insn::alu32_imm(Alu::Mov, Reg::R2, 4),
            Insn::call(HELPER_PROBE_READ_KERNEL),
        ]);
        asm.jump_if_imm(Reg::R0, Cond::Ne, 0, fail);
        asm.extend([
            Insn::load(Size::W, Reg::R0, Reg::Fp, -8),
            Insn::from_be(Reg::R0, 32),
            Insn::alu32_imm(Alu::Mov, Reg::R1, 4),
            Insn::alu64(Alu::Sub, Reg::R1, Reg::R7),
            Insn::alu64_imm(Alu::Lsh, Reg::R1, 3),
            Insn::alu64(Alu::Rsh, Reg::R0, Reg::R1),
            Insn::exit(),
        ]);
        asm.place(fail);
        asm.extend([Insn::alu64_imm(Alu::Mov, Reg::R0, -1), Insn::exit()]);
        asm.finish()
    }
}

/// Bytes of a packet's link header, by its length: an odd one begins with Ethernet, with up to two VLAN tags.
fn link_len(len: usize) -> u16 {
    match len % 6 {
        1 => 14,
        3 => 18,
        5 => 22,
        _ => 0,
    }
}

/// Where a slot has what an sk_buff has.
fn fields(typed: bool) -> SkbFields {
    SkbFields {
        typed,
        data_len: std::mem::offset_of!(Slot, data_len) as u32,
        network_header: std::mem::offset_of!(Slot, network_header) as u32,
        head: std::mem::offset_of!(Slot, head) as u32,
    }
}

/// BTF ids of bpf_rdonly_cast and of the struct through which bytes are read (NP_FILTER_BYTES).
fn cast_ids() -> Option<(i32, i32)> {
    // SAFETY: plain calls; the BTF is freed at the end, names end in NUL.
    unsafe {
        let btf = sys::btf__load_vmlinux_btf();
        if btf.is_null() {
            return None;
        }
        let id = |name: &CStr, kind| sys::btf__find_by_name_kind(btf, name.as_ptr(), kind);
        let cast = id(c"bpf_rdonly_cast", sys::BTF_KIND_FUNC);
        let bytes = id(c"__kernel_sockaddr_storage", sys::BTF_KIND_STRUCT);
        sys::btf__free(btf);
        (cast > 0 && bytes > 0).then_some((cast, bytes))
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
        let mode = LoadMode::ByBlock {
            size,
            far: FarLoad::ProbeRead,
        };
        let body = ebpf::translate(program, mode)?;
        let memory = Memory::new()?;
        let mut main = memory.begin();
        main.extend([
            field(Reg::R3, ADDRESS),
            field(Reg::R2, LINEAR),
            field(Reg::R4, WIRE_LEN),
        ]);
        let program = load(ProgramType::Tracing, 0, &main, &body)?;
        Ok(Runner {
            program,
            kind: ProgramType::Tracing,
            memory: Some(memory),
        })
    }

    /// As the tracing tools have it where typed loads are possible (kernels from 6.2).
    pub fn typed(program: &Program) -> Result<Self> {
        let (cast, bytes) = cast_ids().context("no bpf_rdonly_cast in this kernel")?;
        let mut body = ebpf::translate_by_cast(program, program, fields(true))?;
        let (end, mut loads) = (body.len(), false);
        for at in 0..end {
            if body[at].is_subprogram_call() && body[at].imm == LOAD_CALL {
                body[at].imm = (end - at - 1) as i32;
                loads = true;
            }
            if body[at].is_kfunc_call() && body[at].imm == CAST_CALL {
                body[at].imm = cast;
                body[at - 1].imm = bytes;
            }
        }
        let memory = Memory::new()?;
        if loads {
            body.extend(memory.load_function()?);
        }
        let main = memory.as_sk_buff();
        let program = load(ProgramType::Tracing, 0, &main, &body)?;
        Ok(Runner {
            program,
            kind: ProgramType::Tracing,
            memory: Some(memory),
        })
    }

    /// As the tracing tools have it where there are no typed loads, before the filter that loads anything: what is known by a copy
    /// (`ebpf::translate_by_copy`). Packets of odd length begin with a link header, see `link_len`. None where a copy does not help.
    pub fn copied(l2: &Program, l3: &Program) -> Result<Option<Self>> {
        let Some(body) = ebpf::translate_by_copy(l2, l3, fields(false))? else {
            return Ok(None);
        };
        let memory = Memory::new()?;
        let program = load(ProgramType::Tracing, 0, &memory.as_sk_buff(), &body)?;
        Ok(Some(Runner {
            program,
            kind: ProgramType::Tracing,
            memory: Some(memory),
        }))
    }

    /// As an XDP program has it: between data and data_end, and where `frags` is set in further buffers.
    pub fn xdp(program: &Program, frags: bool) -> Result<Self> {
        let far = if frags {
            FarLoad::XdpLoad
        } else {
            FarLoad::Nothing
        };
        let body = ebpf::translate(program, LoadMode::ByPacket { far })?;
        let mov = |to, from| Insn::alu64(Alu::Mov, to, from);
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
            main.push(Insn::alu64(Alu::Sub, Reg::R4, Reg::R1));
        }
        let program = load(
            ProgramType::Xdp,
            if frags { XDP_HAS_FRAGS } else { 0 },
            &main,
            &body,
        )?;
        Ok(Runner {
            program,
            kind: ProgramType::Xdp,
            memory: None,
        })
    }

    /// As a tc program has it: the linear part directly, the rest by bpf_skb_load_bytes.
    pub fn tc(program: &Program) -> Result<Self> {
        let body = ebpf::translate(
            program,
            LoadMode::ByPacket {
                far: FarLoad::SkbLoad,
            },
        )?;
        let main = [
            Insn::alu64(Alu::Mov, Reg::R3, Reg::R1),
            Insn::load(Size::W, Reg::R4, Reg::R3, 0),
            Insn::load(Size::W, Reg::R1, Reg::R3, 76),
            Insn::load(Size::W, Reg::R2, Reg::R3, 80),
        ];
        let program = load(ProgramType::Tc, 0, &main, &body)?;
        Ok(Runner {
            program,
            kind: ProgramType::Tc,
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
                let link = packet.len() % 2 == 1;
                // SAFETY: the slot is mapped, the program runs only inside the call below, and the packet fits.
                unsafe {
                    let slot = memory.slot.as_ptr();
                    (*slot).linear = packet.len() as u64;
                    (*slot).wire_len = u64::from(wire_len);
                    // Both ways of a load beyond the end lead to no match.
                    (*slot).data_len = packet.len() as u32 >> 1 & 1;
                    (*slot).network_header = HEADROOM + link_len(packet.len());
                    // A link header of no bytes is as good as none.
                    let unset = !link && packet.len() & 2 == 0;
                    (*slot).mac_header = if unset { u16::MAX } else { HEADROOM };
                    (*slot).tail = u32::from(HEADROOM) + packet.len() as u32;
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
        if self.kind == ProgramType::Tracing {
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
fn load(kind: ProgramType, flags: u32, main: &[Insn], body: &[Insn]) -> Result<OwnedFd> {
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
