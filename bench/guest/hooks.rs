//! The limit: a BPF program that does nothing, attached in the same way to the same functions as a tool under measurement.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, bail};
use libbpf_sys as sys;
use netprobe::engine::batch::BufferOptions;
use netprobe::engine::perf::PerfBuffers;
use netprobe::insn::asm::{Alu, Insn, Reg, Size};
use netprobe::kernel::attach::make_room;
use netprobe::kernel::functions::addresses;
use netprobe::kernel::xdp::{self, Mode};
use netprobe::os::{monotonic_ns, online_cpus};

const XDP_PASS: i32 = 2;

/// Where a tool's programs are attached.
#[derive(Debug, Clone)]
pub enum Hooks {
    /// one list of addresses a kprobe.multi link
    Multi(Vec<Vec<u64>>),
    Single(Vec<u64>),
}

impl Hooks {
    /// What is attached now: the links of the kernel, else its list of kprobes.
    pub fn attached() -> Result<Self> {
        let multi = multi_links()?;
        if !multi.is_empty() {
            return Ok(Self::Multi(multi));
        }
        // `ADDRESS  k  FUNCTION+0x0    [FTRACE]`. In reverse: a hit looks for its probe in a list of some 26 (1,673 in 64 lists), which
        // is told from its head on, where the last one was put. So the list is the same again when all are attached again.
        let list = fs::read_to_string("/sys/kernel/debug/kprobes/list")?;
        Ok(Self::Single(
            list.lines()
                .rev()
                .filter(|l| l.split_ascii_whitespace().nth(1) == Some("k"))
                .filter_map(|l| u64::from_str_radix(l.split_ascii_whitespace().next()?, 16).ok())
                .collect(),
        ))
    }

    pub fn count(&self) -> usize {
        match self {
            Self::Multi(links) => links.iter().map(Vec::len).sum(),
            Self::Single(addrs) => addrs.len(),
        }
    }
}

/// Addresses of each kprobe.multi link of the system (told by kernels from 6.6).
fn multi_links() -> Result<Vec<Vec<u64>>> {
    let (mut found, mut id) = (Vec::new(), 0);
    // SAFETY: plain numbers and valid pointers; each fd is owned at once; info is a C struct of integers, and the kernel writes
    // at most its size into it and at most `count` addresses.
    unsafe {
        while sys::bpf_link_get_next_id(id, &mut id) == 0 {
            let fd = sys::bpf_link_get_fd_by_id(id);
            if fd < 0 {
                continue;
            }
            let fd = OwnedFd::from_raw_fd(fd);
            let mut info = sys::bpf_link_info::default();
            let mut len = size_of::<sys::bpf_link_info>() as u32;
            if sys::bpf_link_get_info_by_fd(fd.as_raw_fd(), &mut info, &mut len) != 0
                || info.type_ != sys::BPF_LINK_TYPE_KPROBE_MULTI
            {
                continue;
            }
            let count = info.__bindgen_anon_1.kprobe_multi.count;
            let mut addrs = vec![0u64; count as usize];
            let mut info = sys::bpf_link_info::default();
            info.__bindgen_anon_1.kprobe_multi.addrs = addrs.as_mut_ptr() as u64;
            info.__bindgen_anon_1.kprobe_multi.count = count;
            if sys::bpf_link_get_info_by_fd(fd.as_raw_fd(), &mut info, &mut len) != 0 {
                bail!("a kprobe.multi link does not tell its addresses");
            }
            found.push(addrs);
        }
    }
    Ok(found)
}

/// The empty program, attached; dropping it detaches.
pub struct Empty {
    program: OwnedFd,
    links: Vec<OwnedFd>,
    /// time that attaching took, ns
    pub attach_ns: u64,
}

impl Empty {
    pub fn attach(hooks: &Hooks) -> Result<Self> {
        let multi = matches!(hooks, Hooks::Multi(_));
        let program = load(multi)?;
        let mut links = Vec::new();
        make_room(hooks.count())?;
        let start = monotonic_ns()?;
        match hooks {
            Hooks::Multi(lists) => {
                for addrs in lists {
                    links.push(attach_multi(program.as_raw_fd(), addrs)?);
                }
            }
            Hooks::Single(addrs) => {
                let pmu = fs::read_to_string("/sys/bus/event_source/devices/kprobe/type")?;
                let pmu = pmu.trim().parse()?;
                for &addr in addrs {
                    links.push(attach_single(program.as_raw_fd(), pmu, addr)?);
                }
            }
        }
        Ok(Self {
            program,
            links,
            attach_ns: monotonic_ns()? - start,
        })
    }

    /// Times the program ran and how long in all (ns) since statistics were switched on.
    pub fn runs(&self) -> (u64, u64) {
        runs(self.program.as_raw_fd())
    }

    /// Detaches; the time that it took, ns.
    pub fn detach(self) -> Result<u64> {
        let start = monotonic_ns()?;
        drop(self.links);
        drop(self.program);
        Ok(monotonic_ns()? - start)
    }
}

/// Time to attach the empty program to these functions by their names (without those that share one), ns: the kernel looks for them
/// among all of its symbols, as a tool that knows no addresses has to. `None` where there is no kprobe.multi.
pub fn attach_by_names(hooks: &Hooks) -> Result<Option<u64>> {
    let Hooks::Multi(lists) = hooks else {
        return Ok(None);
    };
    let mut by_addr: BTreeMap<u64, String> = BTreeMap::new();
    let mut count: HashMap<String, usize> = HashMap::new();
    addresses(
        |_| true,
        |addr, name| {
            by_addr.insert(addr, name.to_owned());
            *count.entry(name.to_owned()).or_default() += 1;
        },
    );
    // ftrace's place may be behind an `endbr64`.
    let name = |addr: &u64| Some(by_addr.range(..=addr).next_back()?.1.as_str());
    let names: Vec<CString> = lists
        .iter()
        .flatten()
        .filter_map(name)
        .filter(|name| count[*name] == 1)
        .map(CString::new)
        .collect::<Result<_, _>>()?;
    let pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
    let program = load(true)?;
    let mut opts = sys::bpf_link_create_opts {
        sz: size_of::<sys::bpf_link_create_opts>() as _,
        ..Default::default()
    };
    opts.__bindgen_anon_1.kprobe_multi.cnt = pointers.len() as u32;
    opts.__bindgen_anon_1.kprobe_multi.syms = pointers.as_ptr().cast_mut();
    let start = monotonic_ns()?;
    // SAFETY: opts and the names outlive the call.
    let link = own(unsafe {
        sys::bpf_link_create(program.as_raw_fd(), 0, sys::BPF_TRACE_KPROBE_MULTI, &opts)
    })
    .context("failed to attach the empty program by names")?;
    let took = monotonic_ns()? - start;
    drop(link);
    Ok(Some(took))
}

/// The empty program at the tracepoints with the stages that `netprobe icmp` asks for, while the result lives.
pub fn empty_tracepoints(names: &[&CStr]) -> Result<Vec<OwnedFd>> {
    let insns = returns(0);
    // SAFETY: all pointers are valid for the call, the count is that of `insns`.
    let program = own(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_RAW_TRACEPOINT,
            c"empty".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            std::ptr::null_mut(),
        )
    })
    .context("failed to load the empty program")?;
    let mut held = Vec::new();
    for name in names {
        // SAFETY: the name ends in NUL, the program is open.
        let link = own(unsafe { sys::bpf_raw_tracepoint_open(name.as_ptr(), program.as_raw_fd()) });
        held.push(link.with_context(|| format!("no tracepoint {name:?}"))?);
    }
    held.push(program);
    Ok(held)
}

/// Time to attach an empty program to the return of each of these functions of vmlinux by trampolines, ns.
pub fn empty_trampolines(functions: &[&CStr]) -> Result<u64> {
    Ok(trampolines(functions, sys::BPF_TRACE_FEXIT)?.0)
}

/// Empty programs at these functions of vmlinux, by trampolines, as long as the result lives.
pub fn empty_entries(functions: &[&CStr]) -> Result<Vec<OwnedFd>> {
    Ok(trampolines(functions, sys::BPF_TRACE_FENTRY)?.1)
}

fn trampolines(functions: &[&CStr], kind: u32) -> Result<(u64, Vec<OwnedFd>)> {
    let insns = returns(0);
    let mut programs = Vec::new();
    for name in functions {
        // SAFETY: the name ends in NUL.
        let id = unsafe { sys::libbpf_find_vmlinux_btf_id(name.as_ptr(), kind) };
        let mut opts = sys::bpf_prog_load_opts {
            sz: size_of::<sys::bpf_prog_load_opts>() as _,
            expected_attach_type: kind,
            attach_btf_id: u32::try_from(id).with_context(|| format!("no {name:?}"))?,
            ..Default::default()
        };
        // SAFETY: all pointers are valid for the call, the count is that of `insns`.
        let program = own(unsafe {
            sys::bpf_prog_load(
                sys::BPF_PROG_TYPE_TRACING,
                c"empty".as_ptr(),
                c"GPL".as_ptr(),
                insns.as_ptr(),
                insns.len() as _,
                &mut opts,
            )
        })?;
        programs.push(program);
    }
    let start = monotonic_ns()?;
    let mut links = Vec::new();
    for program in &programs {
        // SAFETY: no name, and an open program: an attach to the function that it was loaded for.
        let link = unsafe { sys::bpf_raw_tracepoint_open(std::ptr::null(), program.as_raw_fd()) };
        links.push(own(link).context("failed to attach an empty program")?);
    }
    let took = monotonic_ns()? - start;
    links.append(&mut programs);
    Ok((took, links))
}

/// Run count and run time of a program.
pub fn runs(program: RawFd) -> (u64, u64) {
    let mut info = sys::bpf_prog_info::default();
    let mut len = size_of::<sys::bpf_prog_info>() as u32;
    // SAFETY: info and len are valid for the call, len is the size of info.
    let err = unsafe { sys::bpf_prog_get_info_by_fd(program, &mut info, &mut len) };
    if err == 0 {
        (info.run_cnt, info.run_time_ns)
    } else {
        (0, 0)
    }
}

/// A BPF program of the system.
#[derive(Debug, Clone)]
pub struct Program {
    pub id: u32,
    pub name: String,
    /// instructions that the verifier went through (kernels from 5.16)
    pub verified: u32,
    /// bytes of machine code
    pub jited: u32,
    pub run_cnt: u64,
    pub run_ns: u64,
}

/// All programs with an id above `after`.
pub fn programs(after: u32) -> Vec<Program> {
    let (mut found, mut id) = (Vec::new(), after);
    // SAFETY: plain numbers and valid pointers; each fd is owned at once; len is the size of info.
    unsafe {
        while sys::bpf_prog_get_next_id(id, &mut id) == 0 {
            let fd = sys::bpf_prog_get_fd_by_id(id);
            if fd < 0 {
                continue;
            }
            let fd = OwnedFd::from_raw_fd(fd);
            let mut info = sys::bpf_prog_info::default();
            let mut len = size_of::<sys::bpf_prog_info>() as u32;
            if sys::bpf_prog_get_info_by_fd(fd.as_raw_fd(), &mut info, &mut len) != 0 {
                continue;
            }
            let name: Vec<u8> = info.name.iter().map(|&c| c as u8).collect();
            let name = name.split(|&c| c == 0).next().unwrap_or_default();
            found.push(Program {
                id,
                name: String::from_utf8_lossy(name).into_owned(),
                verified: info.verified_insns,
                jited: info.jited_prog_len,
                run_cnt: info.run_cnt,
                run_ns: info.run_time_ns,
            });
        }
    }
    found
}

/// Switches run statistics on until the result is dropped.
pub fn statistics() -> Result<OwnedFd> {
    // SAFETY: a plain number; the fd is owned at once.
    let fd = unsafe { sys::bpf_enable_stats(sys::BPF_STATS_RUN_TIME) };
    own(fd).context("failed to switch run statistics on")
}

fn own(fd: i32) -> Result<OwnedFd> {
    if fd < 0 {
        return Err(std::io::Error::last_os_error().into());
    }
    // SAFETY: a fresh fd that nothing else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// XDP_PASS and nothing else at an interface of this namespace, while the result lives: what XDP itself costs in this mode.
pub fn empty_xdp(interface: &str, mode: Mode) -> Result<[OwnedFd; 2]> {
    let program = load_xdp()?;
    let ifindex = nix::net::if_::if_nametoindex(interface)?;
    let link = xdp::link(ifindex, program.as_fd(), mode)
        .with_context(|| format!("failed to attach an empty XDP program to {interface}"))?;
    Ok([program, link])
}

/// A program in generic mode that hands each whole packet to a perf buffer (it has room for some 5,000) and does nothing else: the
/// least that a capture at XDP costs.
pub fn handing_xdp(interface: &str) -> Result<(PerfBuffers, [OwnedFd; 3])> {
    const BUFFER: BufferOptions = BufferOptions {
        pages: 2048,
        threads: 1,
        wakeup: 0,
        poll_ms: 50,
    };
    const PERF_EVENT_OUTPUT: i32 = 25;
    let cpus = libbpf_rs::num_possible_cpus()? as u32;
    // SAFETY: the name outlives the call; opts may be NULL.
    let map = own(unsafe {
        sys::bpf_map_create(
            sys::BPF_MAP_TYPE_PERF_EVENT_ARRAY,
            c"events".as_ptr(),
            4,
            4,
            cpus,
            std::ptr::null(),
        )
    })
    .context("failed to make a perf event array")?;
    let buffers = PerfBuffers::open(map.as_raw_fd(), BUFFER, online_cpus()?)?;
    // bpf_perf_event_output(ctx, map, BPF_F_CURRENT_CPU | length << 32, stack, 8)
    let mut insns = vec![
        Insn::load(Size::W, Reg::R3, Reg::R1, 4),
        Insn::load(Size::W, Reg::R2, Reg::R1, 0),
        Insn::alu64(Alu::Sub, Reg::R3, Reg::R2),
        Insn::alu64_imm(Alu::Lsh, Reg::R3, 32),
        Insn::alu32_imm(Alu::Mov, Reg::R2, u32::MAX),
        Insn::alu64(Alu::Or, Reg::R3, Reg::R2),
        Insn::store_imm(Size::Dw, Reg::Fp, -8, 0),
    ];
    insns.extend(Insn::load_imm64(Reg::R2, 1, map.as_raw_fd(), 0));
    insns.extend([
        Insn::alu64(Alu::Mov, Reg::R4, Reg::Fp),
        Insn::alu64_imm(Alu::Add, Reg::R4, -8),
        Insn::alu64_imm(Alu::Mov, Reg::R5, 8),
        Insn::call(PERF_EVENT_OUTPUT),
        Insn::alu64_imm(Alu::Mov, Reg::R0, XDP_PASS),
        Insn::exit(),
    ]);
    let mut opts = as_netprobe();
    // SAFETY: all pointers are valid for the call, the count is that of `insns`, which have the layout of bpf_insn.
    let program = own(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_XDP,
            c"handing".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr().cast(),
            insns.len() as _,
            &mut opts,
        )
    })
    .context("failed to load the XDP program that hands packets on")?;
    let ifindex = nix::net::if_::if_nametoindex(interface)?;
    let link = xdp::link(ifindex, program.as_fd(), Mode::Generic)
        .with_context(|| format!("failed to attach an XDP program to {interface}"))?;
    Ok((buffers, [program, link, map]))
}

/// A program that returns `value`.
fn returns(value: i32) -> [sys::bpf_insn; 2] {
    [(0xb7, value), (0x95, 0)].map(|(code, imm)| sys::bpf_insn {
        code,
        imm,
        ..Default::default()
    })
}

/// Loaded as netprobe's own programs are: for one that takes packets of several buffers the kernel copies an sk_buff in another way.
fn as_netprobe() -> sys::bpf_prog_load_opts {
    sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as _,
        prog_flags: xdp::Traits::of_kernel().flags(),
        ..Default::default()
    }
}

fn load_xdp() -> Result<OwnedFd> {
    let insns = returns(XDP_PASS);
    let mut opts = as_netprobe();
    // SAFETY: all pointers are valid for the call, the count is that of `insns`.
    own(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_XDP,
            c"empty".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            &mut opts,
        )
    })
    .context("failed to load the empty XDP program")
}

fn load(multi: bool) -> Result<OwnedFd> {
    let insns = returns(0);
    let opts = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as _,
        expected_attach_type: if multi {
            sys::BPF_TRACE_KPROBE_MULTI
        } else {
            0
        },
        ..Default::default()
    };
    // SAFETY: all pointers are valid for the call, the count is that of `insns`.
    own(unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_KPROBE,
            c"empty".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            &opts as *const _ as *mut _,
        )
    })
    .context("failed to load the empty program")
}

fn attach_multi(program: RawFd, addrs: &[u64]) -> Result<OwnedFd> {
    let mut opts = sys::bpf_link_create_opts {
        sz: size_of::<sys::bpf_link_create_opts>() as _,
        ..Default::default()
    };
    opts.__bindgen_anon_1.kprobe_multi.cnt = addrs.len() as u32;
    opts.__bindgen_anon_1.kprobe_multi.addrs = addrs.as_ptr();
    // SAFETY: opts and the addresses outlive the call.
    own(unsafe { sys::bpf_link_create(program, 0, sys::BPF_TRACE_KPROBE_MULTI, &opts) })
        .context("failed to attach the empty program")
}

fn attach_single(program: RawFd, pmu: u32, addr: u64) -> Result<OwnedFd> {
    let mut attr = sys::perf_event_attr {
        type_: pmu,
        size: size_of::<sys::perf_event_attr>() as u32,
        ..Default::default()
    };
    // kprobe_func 0 (a NULL pointer), kprobe_addr the function.
    attr.__bindgen_anon_3.kprobe_func = 0;
    attr.__bindgen_anon_4.kprobe_addr = addr;
    // SAFETY: attr is valid for the call; the other arguments are numbers.
    let event =
        own(unsafe { libc::syscall(libc::SYS_perf_event_open, &attr, -1, 0, -1, 8u64) } as i32)
            .context("failed to make a kprobe")?;
    // SAFETY: PERF_EVENT_IOC_SET_BPF and _ENABLE on a perf event, with an fd and nothing.
    let err = unsafe {
        libc::ioctl(event.as_raw_fd(), 0x4004_2408, program)
            | libc::ioctl(event.as_raw_fd(), 0x2400, 0)
    };
    if err < 0 {
        bail!(
            "failed to attach the empty program to a kprobe: {}",
            std::io::Error::last_os_error()
        );
    }
    Ok(event)
}
