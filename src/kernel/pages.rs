//! The two numbers that lead from a `struct page` to its memory: where the array of pages begins, and the memory of its
//! first page. On x86 both are moved at every boot, and kernel variables (`vmemmap_base`, `page_offset_base`) hold
//! them; on arm64 they are constants of the kernel's build, in the note VMCOREINFO of /proc/kcore
//! (Documentation/admin-guide/kdump/vmcoreinfo.rst).

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

/// 0 where there is none, or where it is hidden.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pages {
    /// addresses of kernel variables
    pub vmemmap_base: u64,
    pub page_offset_base: u64,
    /// the numbers themselves
    pub vmemmap: u64,
    pub page_offset: u64,
}

impl Pages {
    /// From kallsyms, some 20 ms, or from the kernel's note.
    pub fn find() -> Self {
        if cfg!(target_arch = "aarch64") {
            return Self::of_note(&notes("/proc/kcore").unwrap_or_default());
        }
        File::open("/proc/kallsyms")
            .map(|file| Self::of_symbols(BufReader::new(file)))
            .unwrap_or_default()
    }

    fn of_symbols(mut kallsyms: impl BufRead) -> Self {
        let mut found = Self::default();
        let mut line = String::new();
        while found.vmemmap_base == 0 || found.page_offset_base == 0 {
            line.clear();
            match kallsyms.read_line(&mut line) {
                Ok(0) | Err(_) => break,
                Ok(_) => {}
            }
            let mut words = line.split_ascii_whitespace();
            let (Some(address), Some(_), Some(name)) = (words.next(), words.next(), words.next())
            else {
                continue;
            };
            let variable = match name {
                "vmemmap_base" => &mut found.vmemmap_base,
                "page_offset_base" => &mut found.page_offset_base,
                _ => continue,
            };
            *variable = u64::from_str_radix(address, 16).unwrap_or(0);
        }
        found
    }

    /// `NUMBER(VA_BITS)=48` and `NUMBER(VMEMMAP_START)=0xfffffc0000000000` (arch/arm64/kernel/vmcore_info.c, from
    /// 5.19). The memory of the first page is at the lowest address of the kernel's half: PAGE_OFFSET of
    /// arch/arm64/include/asm/memory.h.
    fn of_note(notes: &[u8]) -> Self {
        let number = |name: &str| {
            let name = format!("NUMBER({name})=");
            let at = memchr::memmem::find(notes, name.as_bytes())? + name.len();
            let text = notes[at..].split(|b| *b == b'\n' || *b == 0).next()?;
            let text = std::str::from_utf8(text).ok()?;
            match text.strip_prefix("0x") {
                Some(hex) => u64::from_str_radix(hex, 16).ok(),
                None => text.parse().ok(),
            }
        };
        let bits = number("VA_BITS").filter(|bits| (32..64).contains(bits));
        match (number("VMEMMAP_START"), bits) {
            (Some(vmemmap), Some(bits)) => Self {
                vmemmap,
                page_offset: (1u64 << bits).wrapping_neg(),
                ..Self::default()
            },
            _ => Self::default(),
        }
    }
}

/// The notes of a 64-bit ELF file: the kernel's core has one segment of them, of some kilobytes.
fn notes(path: &str) -> Option<Vec<u8>> {
    const PT_NOTE: u32 = 4;
    const MOST: u64 = 1 << 20;
    let file = File::open(path).ok()?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).ok()?;
    let number = |bytes: &[u8]| Some(u64::from_le_bytes(bytes.try_into().ok()?));
    let (at, count) = (number(&header[32..40])?, header[56]);
    for i in 0..u64::from(count) {
        let mut segment = [0; 56];
        file.read_exact_at(&mut segment, at.checked_add(i * 56)?)
            .ok()?;
        if segment[..4] == PT_NOTE.to_le_bytes() {
            let (from, length) = (number(&segment[8..16])?, number(&segment[32..40])?);
            let mut notes = vec![0; length.min(MOST) as usize];
            file.read_exact_at(&mut notes, from).ok()?;
            return Some(notes);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_variables_are_found() {
        let text = "ffff1 T x\nffffffff82a01230 D vmemmap_base\nnonsense\nffffffff82a01238 D page_offset_base\n";
        let found = Pages::of_symbols(text.as_bytes());
        assert_eq!(found.vmemmap_base, 0xffff_ffff_82a0_1230);
        assert_eq!(found.page_offset_base, 0xffff_ffff_82a0_1238);
        assert_eq!(Pages::of_symbols("0 A y\n".as_bytes()), Pages::default());
    }

    #[test]
    fn the_note_of_arm64() {
        let note = b"\x0b\0VMCOREINFO\0OSRELEASE=6.1.0\nNUMBER(VA_BITS)=48\nNUMBER(VMEMMAP_START)=0xfffffc0000000000\nNUMBER(VMEMMAP_END)=0xfffffe0000000000\n\0";
        let found = Pages::of_note(note);
        assert_eq!(found.vmemmap, 0xffff_fc00_0000_0000);
        assert_eq!(found.page_offset, 0xffff_0000_0000_0000);
        for cut in 0..note.len() {
            let found = Pages::of_note(&note[..cut]);
            assert!(
                found.vmemmap == 0 || found.page_offset == 0xffff_0000_0000_0000,
                "{cut}"
            );
        }
        for bad in [
            "NUMBER(VA_BITS)=64\nNUMBER(VMEMMAP_START)=0x1\n",
            "NUMBER(VA_BITS)=-1\nNUMBER(VMEMMAP_START)=0x1\n",
            "NUMBER(VA_BITS)=48\nNUMBER(VMEMMAP_START)=0xg\n",
        ] {
            assert_eq!(Pages::of_note(bad.as_bytes()), Pages::default());
        }
    }

    #[test]
    fn notes_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = |bytes: &[u8]| {
            let path = dir.path().join("core");
            std::fs::write(&path, bytes).unwrap();
            notes(path.to_str().unwrap())
        };
        let mut core = vec![0; 64 + 56];
        core[32..40].copy_from_slice(&64u64.to_le_bytes());
        core[56] = 1;
        core[64..68].copy_from_slice(&4u32.to_le_bytes());
        core[72..80].copy_from_slice(&120u64.to_le_bytes());
        core[96..104].copy_from_slice(&4u64.to_le_bytes());
        core.extend_from_slice(b"note");
        assert_eq!(file(&core).as_deref(), Some(&b"note"[..]));
        assert_eq!(file(&core[..122]), None, "cut");
        assert_eq!(file(&core[..30]), None, "no header");
        core[32..40].copy_from_slice(&(u64::MAX - 8).to_le_bytes());
        assert_eq!(file(&core), None, "segments nowhere");
    }
}
