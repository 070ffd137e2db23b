//! Where the kernel keeps the two numbers that lead from a `struct page` to its memory (x86: `vmemmap_base` and
//! `page_offset_base`, both moved at every boot).

use std::fs::File;
use std::io::{BufRead, BufReader};

/// Addresses of kernel variables; 0 where there is none or kallsyms hides it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PageVariables {
    pub vmemmap_base: u64,
    pub page_offset_base: u64,
}

impl PageVariables {
    /// From kallsyms; some 20 ms.
    pub fn find() -> Self {
        File::open("/proc/kallsyms")
            .map(|file| Self::read(BufReader::new(file)))
            .unwrap_or_default()
    }

    fn read(mut kallsyms: impl BufRead) -> Self {
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_variables_are_found() {
        let text = "ffff1 T x\nffffffff82a01230 D vmemmap_base\nnonsense\nffffffff82a01238 D page_offset_base\n";
        let found = PageVariables::read(text.as_bytes());
        assert_eq!(found.vmemmap_base, 0xffff_ffff_82a0_1230);
        assert_eq!(found.page_offset_base, 0xffff_ffff_82a0_1238);
        assert_eq!(
            PageVariables::read("0 A y\n".as_bytes()),
            PageVariables::default()
        );
    }
}
