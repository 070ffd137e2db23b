//! Addresses in processes to functions, files and lines, by blazesym: ELF symbols and DWARF, demangled, with inlined functions.
//!
//! A process that still runs is asked by its maps. Of one that has gone, the functions of its program are named all the same, where the
//! file can still be opened: the kernel told its path and where its code began.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use blazesym::Pid;
use blazesym::symbolize::source::{Elf, Process, Source};
use blazesym::symbolize::{CodeInfo, Input, Symbolized, Symbolizer};
use serde::Serialize;

/// A call on a user stack.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Frame {
    pub addr: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// bytes from the start of the function
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// the ELF file it is in
    #[serde(skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
    /// functions inlined here, outermost first
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub inlined: Vec<Inlined>,
}

/// A function inlined into the one of its frame.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Inlined {
    pub name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u32>,
}

/// The program of a process, as the kernel saw it.
#[derive(Debug, Clone, Copy)]
pub struct Executable<'a> {
    pub path: &'a Path,
    /// address of its first executable segment, and the end of the last
    pub start_code: u64,
    pub end_code: u64,
}

/// Symbolizes user addresses. What it parses of a file stays in memory.
pub struct UserSymbols {
    symbolizer: Symbolizer,
}

impl Default for UserSymbols {
    fn default() -> Self {
        Self {
            symbolizer: Symbolizer::builder().enable_auto_reload(true).build(),
        }
    }
}

impl UserSymbols {
    /// Names the addresses of a stack, innermost first. `top`: the words on top of the stack, in which the caller of the innermost function
    /// is looked for: a system call's wrapper keeps no frame pointer, so that the frames pass over its caller.
    pub fn frames(
        &self,
        pid: u32,
        stack: &[u64],
        top: &[u64],
        program: Executable<'_>,
    ) -> Vec<Frame> {
        let maps = Maps::of(pid).filter(|m| stack.first().is_none_or(|a| m.contains(*a)));
        let mut addrs = stack.to_vec();
        let caller = top
            .iter()
            .copied()
            .take_while(|w| addrs.get(1) != Some(w))
            .find(|&w| match &maps {
                Some(m) => m.contains(w) && m.is_return(w),
                None => program.is_return(w),
            });
        if let Some(caller) = caller.filter(|_| !addrs.is_empty()) {
            addrs.insert(1, caller);
        }
        // A return address is behind its call: one byte back is in the call, on its line.
        let asked: Vec<u64> = addrs
            .iter()
            .enumerate()
            .map(|(i, a)| if i == 0 { *a } else { a.saturating_sub(1) })
            .collect();
        let named = if maps.is_some() {
            let source = Source::Process(Process::new(Pid::from(pid)));
            self.ask(&source, Input::AbsAddr(&asked))
        } else {
            self.of_program(&asked, program)
        };
        addrs
            .iter()
            .zip(
                named
                    .unwrap_or_default()
                    .into_iter()
                    .map(Some)
                    .chain(std::iter::repeat(None)),
            )
            .map(|(addr, frame)| Frame {
                addr: format!("{addr:#x}"),
                ..frame.unwrap_or_default()
            })
            .collect()
    }

    /// Those of `addrs` that are in the program's own file.
    fn of_program(&self, addrs: &[u64], program: Executable<'_>) -> Option<Vec<Frame>> {
        let bias = program.start_code.wrapping_sub(first_code(program.path)?);
        let inside = |a: &u64| (program.start_code..program.end_code).contains(a);
        let offsets: Vec<u64> = addrs
            .iter()
            .filter(|a| inside(a))
            .map(|a| a.wrapping_sub(bias))
            .collect();
        let source = Source::Elf(Elf::new(program.path));
        let mut named = self.ask(&source, Input::VirtOffset(&offsets))?.into_iter();
        Some(
            addrs
                .iter()
                .map(|a| match inside(a) {
                    true => named.next().unwrap_or_default(),
                    false => Frame::default(),
                })
                .collect(),
        )
    }

    fn ask(&self, source: &Source<'_>, input: Input<&[u64]>) -> Option<Vec<Frame>> {
        // A file that cannot be read is no failure of the run: the address is shown instead.
        let found = self.symbolizer.symbolize(source, input).ok()?;
        Some(found.into_iter().map(frame).collect())
    }
}

fn frame(symbolized: Symbolized<'_>) -> Frame {
    let Symbolized::Sym(sym) = symbolized else {
        return Frame::default();
    };
    let (file, line) = place(sym.code_info.as_deref());
    Frame {
        addr: String::new(),
        name: Some(sym.name.into_owned()),
        offset: Some(sym.offset as u64),
        module: sym.module.map(|m| m.to_string_lossy().into_owned()),
        file,
        line,
        inlined: sym
            .inlined
            .iter()
            .map(|f| {
                let (file, line) = place(f.code_info.as_ref());
                Inlined {
                    name: f.name.to_string(),
                    file,
                    line,
                }
            })
            .collect(),
    }
}

fn place(code: Option<&CodeInfo<'_>>) -> (Option<String>, Option<u32>) {
    (
        code.map(|c| c.to_path().to_string_lossy().into_owned()),
        code.and_then(|c| c.line),
    )
}

impl Executable<'_> {
    fn is_return(&self, addr: u64) -> bool {
        if !(self.start_code..self.end_code).contains(&addr) {
            return false;
        }
        let (Some(first), Some(file)) = (first_code_offset(self.path), File::open(self.path).ok())
        else {
            return false;
        };
        behind_call(&file, addr - self.start_code + first)
    }
}

/// The executable mappings of a process that runs.
struct Maps {
    ranges: Vec<(u64, u64)>,
    memory: Option<File>,
}

impl Maps {
    fn of(pid: u32) -> Option<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
        let ranges = parse_maps(&text);
        (!ranges.is_empty()).then(|| Self {
            ranges,
            memory: File::open(format!("/proc/{pid}/mem")).ok(),
        })
    }

    fn contains(&self, addr: u64) -> bool {
        self.ranges.iter().any(|(a, b)| (*a..*b).contains(&addr))
    }

    fn is_return(&self, addr: u64) -> bool {
        self.memory.as_ref().is_some_and(|m| behind_call(m, addr))
    }
}

/// `START-END rwxp …`: the executable ones.
fn parse_maps(text: &str) -> Vec<(u64, u64)> {
    text.lines()
        .filter_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let (start, end) = range.split_once('-')?;
            let hex = |s| u64::from_str_radix(s, 16).ok();
            (rest.as_bytes().get(2) == Some(&b'x')).then_some((hex(start)?, hex(end)?))
        })
        .collect()
}

/// Whether a call stands right before `at`.
fn behind_call(file: &File, at: u64) -> bool {
    let mut b = [0; 7];
    let Some(start) = at.checked_sub(7) else {
        return false;
    };
    if file.read_exact_at(&mut b, start).is_err() {
        return false;
    }
    match std::env::consts::ARCH {
        "x86_64" => ends_in_call_x86(&b),
        "aarch64" => at % 4 == 0 && is_call_arm64(u32::from_le_bytes([b[3], b[4], b[5], b[6]])),
        _ => false,
    }
}

/// x86-64's `call rel32`, or `call r/m` (FF /2) of 2, 3, 6 or 7 bytes.
fn ends_in_call_x86(b: &[u8; 7]) -> bool {
    b[2] == 0xe8
        || [(5, 2usize), (4, 3), (1, 6), (0, 7)]
            .iter()
            .any(|&(i, _)| b[i] == 0xff && b[i + 1] >> 3 & 7 == 2)
}

/// arm64's BL, BLR, and BLR with pointer authentication (BLRAA, BLRAB, BLRAAZ, BLRABZ).
fn is_call_arm64(instruction: u32) -> bool {
    instruction >> 26 == 0b10_0101
        || instruction & 0xffff_fc1f == 0xd63f_0000
        || instruction & 0xfeff_f800 == 0xd63f_0800
}

/// Virtual address of the first executable segment of a 64-bit little-endian ELF file.
fn first_code(path: &Path) -> Option<u64> {
    segments(path)?.into_iter().map(|(vaddr, _)| vaddr).min()
}

/// Where in the file it is.
fn first_code_offset(path: &Path) -> Option<u64> {
    segments(path)?.into_iter().min().map(|(_, offset)| offset)
}

/// Virtual address and file offset of the executable PT_LOAD segments.
fn segments(path: &Path) -> Option<Vec<(u64, u64)>> {
    const PT_LOAD: u32 = 1;
    const PF_X: u32 = 1;
    let file = File::open(path).ok()?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    if &header[..6] != b"\x7fELF\x02\x01" {
        return None;
    }
    let half = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let start = u64::from_le_bytes(header[32..40].try_into().ok()?);
    let (size, count) = (half(54), half(56));
    let mut found = Vec::new();
    for i in 0..count {
        let mut p = [0; 56];
        file.read_exact_at(&mut p, start.checked_add(i * size)?)
            .ok()?;
        let word = |at: usize| u32::from_le_bytes([p[at], p[at + 1], p[at + 2], p[at + 3]]);
        let long = |at: usize| Some(u64::from_le_bytes(p[at..at + 8].try_into().ok()?));
        if word(0) == PT_LOAD && word(4) & PF_X != 0 {
            found.push((long(16)?, long(8)?));
        }
    }
    (!found.is_empty()).then_some(found)
}

/// Where the path of a process's program can be opened: inside the process's root while it runs, else as it is.
pub fn reachable(pid: u32, path: &Path) -> PathBuf {
    let exe = PathBuf::from(format!("/proc/{pid}/exe"));
    if fs::metadata(&exe).is_ok() {
        return exe;
    }
    path.to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own_program() -> (PathBuf, u64, u64) {
        let path = std::env::current_exe().unwrap();
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let name = path.to_str().unwrap();
        let line = maps
            .lines()
            .find(|l| l.ends_with(name) && l.as_bytes().windows(4).any(|w| w == b"r-xp"))
            .unwrap();
        let range = parse_maps(line)[0];
        // What the kernel calls start_code is not rounded to pages.
        let start = range.0 + (first_code(&path).unwrap() & 4095);
        (path, start, range.1)
    }

    #[inline(never)]
    fn somewhere() -> u64 {
        somewhere as *const () as u64
    }

    #[test]
    fn a_process_that_runs_and_one_that_has_gone() {
        let (path, start_code, end_code) = own_program();
        let program = Executable {
            path: &path,
            start_code,
            end_code,
        };
        let symbols = UserSymbols::default();
        let addr = somewhere() + 4;
        for pid in [std::process::id(), u32::MAX >> 1] {
            let frames = symbols.frames(pid, &[addr], &[], program);
            assert_eq!(frames.len(), 1);
            let f = &frames[0];
            assert!(
                f.name.as_ref().is_some_and(|n| n.contains("somewhere")),
                "{pid}: {f:?}"
            );
            assert!(
                f.file.as_ref().is_some_and(|n| n.ends_with("usyms.rs")),
                "{pid}: {f:?}"
            );
            assert!(f.line.is_some());
        }
    }

    #[test]
    fn calls_of_both_architectures() {
        assert!(ends_in_call_x86(&[0, 0, 0xe8, 1, 2, 3, 4]));
        assert!(ends_in_call_x86(&[0, 0, 0, 0, 0, 0xff, 0xd0]), "call rax");
        assert!(!ends_in_call_x86(&[0x90; 7]));
        for call in [
            0x9400_0001, // bl +4
            0x97ff_ffff, // bl -4
            0xd63f_0100, // blr x8
            0xd73f_0909, // blraa x8, x9
            0xd63f_091f, // blraaz x8
            0xd63f_0d1f, // blrabz x8
        ] {
            assert!(is_call_arm64(call), "{call:x}");
        }
        for other in [
            0x1400_0001, // b
            0xd61f_0100, // br x8
            0xd65f_03c0, // ret
            0xd503_201f, // nop
        ] {
            assert!(!is_call_arm64(other), "{other:x}");
        }
    }

    /// An address in the middle of the function that this becomes a part of.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    fn inlined_here() -> u64 {
        let behind: u64;
        // SAFETY: reads the instruction pointer and touches nothing else.
        unsafe {
            std::arch::asm!("lea {}, [rip]", out(reg) behind, options(nomem, nostack, preserves_flags))
        };
        behind - 1
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(never)]
    fn outer() -> u64 {
        std::hint::black_box(inlined_here())
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn names_are_demangled_and_inlined_functions_told() {
        let (path, start_code, end_code) = own_program();
        let program = Executable {
            path: &path,
            start_code,
            end_code,
        };
        let symbols = UserSymbols::default();
        for pid in [std::process::id(), u32::MAX >> 1] {
            let frames = symbols.frames(pid, &[outer()], &[], program);
            let f = &frames[0];
            // DWARF names it without its path.
            assert_eq!(f.name.as_deref(), Some("outer"), "{pid}: {f:?}");
            let inlined = f.inlined.first().unwrap();
            assert_eq!(inlined.name, "inlined_here", "{pid}: {f:?}");
            assert!(
                inlined
                    .file
                    .as_ref()
                    .is_some_and(|n| n.ends_with("usyms.rs")),
                "{pid}: {f:?}"
            );
            assert!(inlined.line.is_some(), "{pid}: {f:?}");
        }
        // Without DWARF there is the mangled symbol.
        let dir = tempfile::tempdir().unwrap();
        let stripped = dir.path().join("stripped");
        let status = std::process::Command::new("objcopy")
            .arg("--strip-debug")
            .args([&path, &stripped])
            .status()
            .unwrap();
        assert!(status.success());
        let program = Executable {
            path: &stripped,
            ..program
        };
        let f = &symbols.frames(u32::MAX >> 1, &[outer()], &[], program)[0];
        assert_eq!(
            f.name.as_deref(),
            Some("netprobe::kernel::usyms::tests::outer"),
            "{f:?}"
        );
        assert!(f.line.is_none(), "{f:?}");
    }

    #[test]
    fn maps() {
        let text = "\
55d0-55d8 r--p 00000000 fe:00 1 /bin/x
55d8-55e0 r-xp 00001000 fe:00 1 /bin/x
odd
";
        assert_eq!(parse_maps(text), [(0x55d8, 0x55e0)]);
    }
}
