//! The functions that ftrace can trace, out of the kernel's memory: what available_filter_functions_addrs prints, which takes the kernel
//! half a second (a read gives 4 KiB at most, and each begins at the first function again). Two small BPF programs: an iterator
//! gives all functions that have a name (kernels from 6.0), a raw tracepoint's program that is only ever tested copies ftrace's
//! records (`struct ftrace_page`, kernel/trace/ftrace.c; its first is in kallsyms with CONFIG_KALLSYMS_ALL). They are assembled here:
//! for `SEC("iter/ksym")` in a skeleton libbpf reads all of vmlinux's BTF, which [`Btf`] has read already.

use std::collections::HashSet;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use libbpf_sys as sys;

use super::bpf_object::{check, owned};
use super::btf::Btf;
use super::btf_data::Heads;
use crate::insn::asm::{Alu, Assembler, Cond, HELPER_PROBE_READ_KERNEL, Insn, Reg, Size};

/// Bytes of a name that are looked at. One as long as this is told from none that begins like it.
const NAME: usize = 64;
/// MODULE_NAME_LEN of 64 bits
const MODULE: usize = 56;
/// An address, a name, a module's name. Of a function whose name is none of those looked for, the address alone, without [`KERNEL`].
const RECORD: usize = 8 + NAME + MODULE;
/// Set in every address of the kernel's half.
const KERNEL: u64 = 1 << 63;
/// Where the kernel has the first `struct ftrace_page`.
const FIRST_PAGE: &str = "ftrace_pages_start";
/// bpf_seq_write(seq, data, bytes)
const HELPER_SEQ_WRITE: i32 = 127;
/// Bytes that are copied at once.
const CHUNK: usize = 1 << 16;
/// More groups of records than any kernel has: a list that changes while it is read must end.
const PAGES: usize = 1 << 16;
/// How far behind its symbol a function's call of ftrace is at most: FTRACE_MCOUNT_MAX_OFFSET of x86 (behind ENDBR), three
/// instructions elsewhere.
const REACH: u64 = if cfg!(target_arch = "x86_64") { 8 } else { 12 };

/// A function that can be traced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub addr: u64,
    pub name: String,
    pub module: Option<String>,
}

/// Those of the names that are `wanted`. An error: this kernel does not let it be done so.
pub(super) fn traceable(btf: &Btf, wanted: &HashSet<&str>) -> Result<Vec<Found>> {
    let longest = wanted.iter().map(|n| n.len()).max().unwrap_or(0);
    ensure!(longest < NAME, "a name of {longest} bytes");
    // Heads of shorter names are not known before they end.
    let shortest = wanted.iter().map(|n| n.len()).min().unwrap_or(0);
    ensure!(shortest >= 3, "a name of {shortest} bytes");
    let symbols = Symbols::read(btf, wanted.iter().copied(), |name| wanted.contains(name))?;
    let calls = calls(btf, symbols.first_page.context("no ftrace_pages_start")?)?;
    Ok(symbols.at(&calls))
}

/// Where functions of kallsyms begin and end whose names begin with one of `heads` (three bytes at least) and are
/// `wanted`. An error: this kernel does not let it be done so.
pub(super) fn spans<'a>(
    btf: &Btf,
    heads: impl Iterator<Item = &'a str>,
    wanted: impl Fn(&str) -> bool,
) -> Result<Vec<(Found, u64)>> {
    let symbols = Symbols::read(btf, heads, wanted)?;
    let starts = symbols.starts;
    let spans = symbols.wanted.into_iter().filter_map(|found| {
        let next = starts.get(starts.partition_point(|&s| s <= found.addr))?;
        Some((found, *next))
    });
    Ok(spans.collect())
}

/// What kallsyms has.
#[derive(Default)]
struct Symbols {
    /// where functions begin; several may begin at one place
    starts: Vec<u64>,
    /// by where their symbols are
    wanted: Vec<Found>,
    first_page: Option<u64>,
}

impl Symbols {
    fn read<'a>(
        btf: &Btf,
        heads: impl Iterator<Item = &'a str>,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let heads = Heads::new(heads.chain([FIRST_PAGE]));
        let mut symbols = Self::default();
        let mut file = iterate(btf, &heads)?;
        let mut bytes = vec![0; 512 * RECORD];
        let mut held = 0;
        loop {
            let read = match file.read(&mut bytes[held..]) {
                Ok(0) => break,
                Ok(read) => read,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                // Told by the kernel where a whole record did not fit: the next read brings it.
                Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => continue,
                Err(e) => return Err(e).context("failed to read the iterator over kallsyms"),
            };
            held += read;
            let used = symbols.add_all(&bytes[..held], &wanted);
            bytes.copy_within(used..held, 0);
            held -= used;
        }
        ensure!(!symbols.starts.is_empty(), "kallsyms is empty");
        // In order but for those of modules: by a sort that makes use of that.
        symbols.starts.sort();
        Ok(symbols)
    }

    /// Takes all whole records at the beginning of `bytes`. Gives back how many bytes they had.
    fn add_all(&mut self, bytes: &[u8], wanted: &impl Fn(&str) -> bool) -> usize {
        let mut left = bytes;
        while let Some((addr, rest)) = left.split_first_chunk() {
            let addr = u64::from_ne_bytes(*addr);
            if addr & KERNEL == 0 {
                self.starts.push(addr | KERNEL);
                left = rest;
                continue;
            }
            let Some((names, rest)) = rest.split_at_checked(NAME + MODULE) else {
                break;
            };
            self.add(addr, names, wanted);
            left = rest;
        }
        bytes.len() - left.len()
    }

    fn add(&mut self, addr: u64, names: &[u8], wanted: &impl Fn(&str) -> bool) {
        let (name, module) = names.split_at(NAME);
        let text = |bytes| CStr::from_bytes_until_nul(bytes).ok()?.to_str().ok();
        let name = text(name).unwrap_or("");
        if name == FIRST_PAGE {
            self.first_page = Some(addr);
            return;
        }
        self.starts.push(addr);
        if wanted(name) {
            self.wanted.push(Found {
                addr,
                name: name.to_owned(),
                module: text(module).filter(|m| !m.is_empty()).map(str::to_owned),
            });
        }
    }

    /// The wanted ones that have one of these `calls` (in order), with the call's address in place of the symbol's.
    fn at(self, calls: &[u64]) -> Vec<Found> {
        let call = |start: u64| {
            let call = *calls.get(calls.partition_point(|&c| c < start))?;
            let next = self.starts.partition_point(|&s| s <= call);
            // A function that calls none may be shorter than the reach: the next one's call is not its own.
            (call - start <= REACH && self.starts.get(next.checked_sub(1)?) == Some(&start))
                .then_some(call)
        };
        let found = self.wanted.iter();
        found
            .filter_map(|f| {
                Some(Found {
                    addr: call(f.addr)?,
                    ..f.clone()
                })
            })
            .collect()
    }
}

/// Addresses of the calls that ftrace has records of, in order.
fn calls(btf: &Btf, first_page: u64) -> Result<Vec<u64>> {
    let member = |of: &str, name: &str| offset(btf, of, name).map(|at| at as usize);
    let (next, records, index) = (
        member("ftrace_page", "next")?,
        member("ftrace_page", "records")?,
        member("ftrace_page", "index")?,
    );
    let ip = member("dyn_ftrace", "ip")?;
    let size = |name| -> Result<usize> {
        let id = btf
            .struct_named(name)
            .with_context(|| format!("no struct {name}"))?;
        Ok(btf.size(id) as usize)
    };
    let (page_size, record_size) = (size("ftrace_page")?, size("dyn_ftrace")?);
    ensure!(
        (1..=CHUNK).contains(&record_size) && page_size <= CHUNK,
        "strange records"
    );
    let number = |bytes: &[u8], at: usize| -> Result<u64> {
        let word = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
        Ok(u64::from_ne_bytes(word.context("strange records")?))
    };

    let mut memory = Memory::new()?;
    let mut calls = Vec::new();
    let mut page = number(memory.copy(first_page, 8)?, 0)?;
    for _ in 0..PAGES {
        if page == 0 {
            calls.sort();
            return Ok(calls);
        }
        let head = memory.copy(page, page_size)?;
        let (first, count) = (number(head, records)?, number(head, index)? as u32);
        page = number(head, next)?;
        let per_chunk = CHUNK / record_size;
        let mut at = first;
        let mut left = count as usize;
        while left > 0 {
            let now = left.min(per_chunk);
            let bytes = memory.copy(at, now * record_size)?;
            for record in bytes.chunks_exact(record_size) {
                calls.push(number(record, ip)?);
            }
            at += (now * record_size) as u64;
            left -= now;
        }
    }
    bail!("the list of ftrace's records does not end")
}

fn offset(btf: &Btf, of: &str, member: &str) -> Result<i16> {
    let id = btf
        .struct_named(of)
        .with_context(|| format!("no struct {of}"))?;
    let found = btf.members(id).into_iter().find(|m| m.name == member);
    let found = found.with_context(|| format!("struct {of} has no {member}"))?;
    Ok(i16::try_from(found.bit_offset / 8)?)
}

/// A file that gives [`RECORD`]s: functions (kallsyms' types t and w, of either case), and [`FIRST_PAGE`]; those whose names may be
/// one of `heads` with their names.
fn iterate(btf: &Btf, heads: &Heads) -> Result<File> {
    let bits = array(c"np_heads", size_of_val(heads.bits()))?;
    let key = 0u32;
    // SAFETY: the key has the map's four bytes, the bits those of its value.
    check(unsafe {
        sys::bpf_map_update_elem(
            bits.as_raw_fd(),
            (&raw const key).cast(),
            heads.bits().as_ptr().cast(),
            0,
        )
    })?;
    let opts = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as _,
        expected_attach_type: sys::BPF_TRACE_ITER,
        attach_btf_id: btf
            .function_id("bpf_iter_ksym")
            .context("no iterator over kallsyms")?,
        ..Default::default()
    };
    let insns = symbols_program(btf, &bits)?;
    let program = load(sys::BPF_PROG_TYPE_TRACING, c"np_symbols", &insns, opts)?;
    // SAFETY: numbers; opts may be NULL.
    let link = owned(unsafe {
        sys::bpf_link_create(
            program.as_raw_fd(),
            0,
            sys::BPF_TRACE_ITER,
            std::ptr::null(),
        )
    })?;
    // SAFETY: a number.
    let file = owned(unsafe { sys::bpf_iter_create(link.as_raw_fd()) })?;
    Ok(File::from(file))
}

/// The iterator's program: writes a [`RECORD`] with a function's address, and its name where `bits` (those of [`Heads`]) has it.
fn symbols_program(btf: &Btf, bits: &OwnedFd) -> Result<Vec<Insn>> {
    const AT: i16 = -(RECORD as i16);
    let member = |name| offset(btf, "kallsym_iter", name);
    let (kind, value, name, module) = (
        member("type")?,
        member("value")?,
        member("name")?,
        member("module_name")?,
    );
    let (meta, symbol) = (Reg::R6, Reg::R7);
    let mut asm = Assembler::default();
    let (keep, named, write, end) = (asm.label(), asm.label(), asm.label(), asm.label());
    // struct bpf_iter__ksym { struct bpf_iter_meta *meta; struct kallsym_iter *ksym; }
    asm.push(Insn::load(Size::Dw, meta, Reg::R1, 0));
    asm.push(Insn::load(Size::Dw, symbol, Reg::R1, 8));
    asm.jump_if_imm(symbol, Cond::Eq, 0, end);
    asm.push(Insn::load(Size::B, Reg::R2, symbol, kind));
    for kind in *b"tTwW" {
        asm.jump_if_imm(Reg::R2, Cond::Eq, i32::from(kind), keep);
    }
    let mut first = [0; 8];
    first.copy_from_slice(&FIRST_PAGE.as_bytes()[..8]);
    let first = u64::from_ne_bytes(first);
    asm.push(Insn::load(Size::Dw, Reg::R2, symbol, name));
    asm.extend(Insn::load_imm64(
        Reg::R3,
        0,
        first as i32,
        (first >> 32) as i32,
    ));
    asm.jump_if(Reg::R2, Cond::Ne, Reg::R3, end);
    asm.place(named);
    let words = |from: i16, to: i16, bytes: usize| {
        (0..bytes as i16)
            .step_by(8)
            .map(move |i| (from + i, to + i))
    };
    let all = words(value, AT, 8)
        .chain(words(name, AT + 8, NAME))
        .chain(words(module, AT + 8 + NAME as i16, MODULE));
    for (from, to) in all {
        asm.push(Insn::load(Size::Dw, Reg::R2, symbol, from));
        asm.push(Insn::store(Size::Dw, Reg::Fp, to, Reg::R2));
    }
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R3, RECORD as i32));
    asm.jump(write);

    // A function: as Heads::may_begin().
    asm.place(keep);
    asm.push(Insn::load(Size::W, Reg::R2, symbol, name));
    asm.push(Insn::alu32_imm(Alu::Mul, Reg::R2, Heads::FACTOR));
    asm.push(Insn::alu32_imm(Alu::Rsh, Reg::R2, Heads::SHIFT));
    asm.push(Insn::alu64(Alu::Mov, Reg::R3, Reg::R2));
    asm.push(Insn::alu64_imm(Alu::Rsh, Reg::R3, 6));
    asm.push(Insn::alu64_imm(Alu::Lsh, Reg::R3, 3));
    asm.extend(Insn::load_imm64(
        Reg::R4,
        Insn::MAP_VALUE,
        bits.as_raw_fd(),
        0,
    ));
    asm.push(Insn::alu64(Alu::Add, Reg::R4, Reg::R3));
    asm.push(Insn::load(Size::Dw, Reg::R3, Reg::R4, 0));
    asm.push(Insn::alu64_imm(Alu::And, Reg::R2, 63));
    asm.push(Insn::alu64(Alu::Rsh, Reg::R3, Reg::R2));
    asm.push(Insn::alu64_imm(Alu::And, Reg::R3, 1));
    asm.jump_if_imm(Reg::R3, Cond::Ne, 0, named);
    asm.push(Insn::load(Size::Dw, Reg::R2, symbol, value));
    asm.push(Insn::alu64_imm(Alu::Lsh, Reg::R2, 1));
    asm.push(Insn::alu64_imm(Alu::Rsh, Reg::R2, 1));
    asm.push(Insn::store(Size::Dw, Reg::Fp, AT, Reg::R2));
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R3, 8));

    asm.place(write);
    // struct bpf_iter_meta { struct seq_file *seq; ... }
    asm.push(Insn::load(Size::Dw, Reg::R1, meta, 0));
    asm.push(Insn::alu64(Alu::Mov, Reg::R2, Reg::Fp));
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R2, i32::from(AT)));
    asm.push(Insn::call(HELPER_SEQ_WRITE));
    asm.place(end);
    asm.push(Insn::alu64_imm(Alu::Mov, Reg::R0, 0));
    asm.push(Insn::exit());
    asm.finish()
}

/// Copies of kernel memory.
struct Memory {
    program: OwnedFd,
    map: OwnedFd,
    bytes: Vec<u8>,
}

impl Memory {
    fn new() -> Result<Self> {
        let map = array(c"np_memory", CHUNK)?;
        let mut asm = Assembler::default();
        let end = asm.label();
        // The arguments of the tracepoint: an address, bytes.
        asm.push(Insn::load(Size::Dw, Reg::R3, Reg::R1, 0));
        asm.push(Insn::load(Size::Dw, Reg::R2, Reg::R1, 8));
        asm.push(Insn::alu64_imm(Alu::Mov, Reg::R0, -1));
        asm.jump_if_imm(Reg::R2, Cond::Gt, CHUNK as i32, end);
        asm.extend(Insn::load_imm64(
            Reg::R1,
            Insn::MAP_VALUE,
            map.as_raw_fd(),
            0,
        ));
        asm.push(Insn::call(HELPER_PROBE_READ_KERNEL));
        asm.place(end);
        asm.push(Insn::exit());
        let opts = sys::bpf_prog_load_opts {
            sz: size_of::<sys::bpf_prog_load_opts>() as _,
            ..Default::default()
        };
        Ok(Self {
            program: load(
                sys::BPF_PROG_TYPE_RAW_TRACEPOINT,
                c"np_memory",
                &asm.finish()?,
                opts,
            )?,
            map,
            bytes: vec![0; CHUNK],
        })
    }

    /// `count` bytes at `address`, at most [`CHUNK`].
    fn copy(&mut self, address: u64, count: usize) -> Result<&[u8]> {
        let args = [address, count as u64];
        let mut opts = sys::bpf_test_run_opts {
            sz: size_of::<sys::bpf_test_run_opts>() as _,
            ctx_in: args.as_ptr().cast(),
            ctx_size_in: size_of_val(&args) as u32,
            ..Default::default()
        };
        // SAFETY: opts states its own size, and the arguments outlive the call.
        check(unsafe { sys::bpf_prog_test_run_opts(self.program.as_raw_fd(), &mut opts) })?;
        ensure!(opts.retval == 0, "no kernel memory at {address:#x}");
        let key = 0u32;
        // SAFETY: the key has the map's four bytes, the buffer those of a value.
        check(unsafe {
            sys::bpf_map_lookup_elem(
                self.map.as_raw_fd(),
                (&raw const key).cast(),
                self.bytes.as_mut_ptr().cast(),
            )
        })?;
        self.bytes.get(..count).context("too many bytes")
    }
}

/// An array of one value.
fn array(name: &CStr, bytes: usize) -> io::Result<OwnedFd> {
    // SAFETY: the name outlives the call; opts may be NULL.
    owned(unsafe {
        sys::bpf_map_create(
            sys::BPF_MAP_TYPE_ARRAY,
            name.as_ptr(),
            4,
            bytes as u32,
            1,
            std::ptr::null(),
        )
    })
}

fn load(
    kind: sys::bpf_prog_type,
    name: &CStr,
    insns: &[Insn],
    mut opts: sys::bpf_prog_load_opts,
) -> Result<OwnedFd> {
    // SAFETY: name, license and instructions outlive the call, and opts states its own size. An `Insn` has the layout of
    // `bpf_insn`: eight bytes, the registers in one of them.
    let fd = unsafe {
        sys::bpf_prog_load(
            kind,
            name.as_ptr(),
            c"Dual BSD/GPL".as_ptr(),
            insns.as_ptr().cast(),
            insns.len() as _,
            &mut opts,
        )
    };
    owned(fd).with_context(|| format!("failed to load {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(addr: u64, name: &str, module: &str) -> Vec<u8> {
        let mut bytes = addr.to_ne_bytes().to_vec();
        for (text, size) in [(name, NAME), (module, MODULE)] {
            let mut field = vec![b'x'; size];
            field[..text.len()].copy_from_slice(text.as_bytes());
            field[text.len()] = 0;
            bytes.extend(field);
        }
        bytes
    }

    #[test]
    fn a_call_is_of_the_function_that_it_is_in() {
        let mut symbols = Symbols::default();
        let all = [
            (0x1000, "plain", ""),
            (0x1100, "endbr", "mod"),
            (0x1200, "alias", ""),
            (0x1200, "other_name", ""),
            // four bytes, no call; right behind it one that has
            (0x1300, "short", ""),
            (0x1304, "behind", ""),
            (0x1400, "notrace", ""),
            // what is left of a weak function that another replaced
            (0x1500, "far", ""),
            (0x9000, FIRST_PAGE, ""),
        ];
        let others = ["other_name", FIRST_PAGE];
        let wanted: HashSet<&str> = all
            .iter()
            .map(|a| a.1)
            .filter(|n| !others.contains(n))
            .collect();
        for (addr, name, module) in all {
            let mut bytes = record(KERNEL | addr, name, module);
            let whole = bytes.len();
            // One that is not whole yet stays.
            bytes.extend([0x80; 9]);
            assert_eq!(symbols.add_all(&bytes, &|n| wanted.contains(n)), whole);
        }
        // Of what cannot be wanted the address alone.
        let nothing = |_: &str| false;
        assert_eq!(symbols.add_all(&0x1700u64.to_ne_bytes(), &nothing), 8);
        symbols.starts.sort_unstable();
        assert_eq!(symbols.first_page, Some(KERNEL | 0x9000));
        let found = symbols.at(&[0x1000, 0x1104, 0x1200, 0x1304, 0x1600].map(|at| KERNEL | at));
        let found: Vec<_> = found
            .iter()
            .map(|f| (f.addr ^ KERNEL, f.name.as_str(), f.module.as_deref()))
            .collect();
        assert_eq!(
            found,
            [
                (0x1000, "plain", None),
                (0x1104, "endbr", Some("mod")),
                (0x1200, "alias", None),
                (0x1304, "behind", None),
            ]
        );
    }

    #[test]
    fn a_name_without_an_end_is_none() {
        let mut symbols = Symbols::default();
        let mut long = record(KERNEL | 1, "x", "");
        long[8..8 + NAME].fill(b'x');
        assert_eq!(symbols.add_all(&long, &|n| n == "xxxx"), long.len());
        assert!(symbols.wanted.is_empty());
        assert_eq!(symbols.starts, [KERNEL | 1]);
    }
}
