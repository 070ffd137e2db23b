//! A constant that BPF programs and Rust share is written once: as a C enum, which the skeleton exports. Rust names its value
//! (`skb_kind::SKB_KIND_DROP.0`) and does not write it again.
//!
//! A `const NAME: TYPE = literal;` of a Rust file is a second copy where
//! - its comment names a constant (`SKB_KIND_DROP`, `SKB_KIND_*`), an enum, a struct or a file of src/bpf, or
//! - a header of src/bpf has a constant with this value whose name ends in `_NAME`, and the comment does not say that the value is the
//!   kernel's (`BPF_PSEUDO_MAP_VALUE`).
//!
//! Macros of files with code (`*.bpf.h`, `*.bpf.c`) do not count: they are facts of protocols and of the kernel.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// What the C files declare.
#[derive(Default)]
struct Contract {
    /// enumerators of all files and macros of headers without code, and their values where these are plain numbers
    constants: BTreeMap<String, Option<u64>>,
    /// those of headers without code
    shared: Vec<String>,
    /// `enum x`, `struct x`, `x.bpf.h`
    others: Vec<String>,
}

fn files(folder: &Path, ends: &[&str], found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, ends, found);
        } else if ends.iter().any(|end| path.to_str().unwrap().ends_with(end)) {
            found.push(path);
        }
    }
}

/// `12`, `0x1f_u32`, `1U << 3`, `(32 << 20)`, as a number.
fn number(text: &str) -> Option<u64> {
    if let Some((value, shift)) = text.split_once("<<") {
        return number(value)?.checked_shl(u32::try_from(number(shift)?).ok()?);
    }
    let text = text.trim().trim_matches(['(', ')']).replace('_', "");
    let text = match text.find(['u', 'i', 'U', 'L']) {
        Some(suffix) => &text[..suffix],
        None => &text,
    };
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

fn word(text: &str) -> &str {
    let end = text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    &text[..end.unwrap_or(text.len())]
}

impl Contract {
    fn add(&mut self, name: &str, text: &str) {
        self.others.push(name.to_owned());
        let has_code = !name.ends_with(".h") || name.ends_with(".bpf.h");
        let mut constant = |name: &str, value: &str| {
            let value = number(value.split("/*").next().unwrap());
            self.constants.insert(name.to_owned(), value);
            if !has_code {
                self.shared.push(name.to_owned());
            }
        };
        let mut in_enum = false;
        for line in text.lines() {
            if let Some(define) = line.strip_prefix("#define ").filter(|_| !has_code) {
                let name = word(define);
                constant(name, &define[name.len()..]);
            } else if in_enum && line.starts_with('\t') {
                if let Some((name, value)) = line.trim().split_once(" = ") {
                    constant(name, value.split(',').next().unwrap());
                }
            }
            in_enum = in_enum && !line.starts_with('}')
                || line.starts_with("enum ") && line.ends_with('{');
        }
        for line in text.lines().filter(|line| line.ends_with('{')) {
            for kind in ["enum ", "struct "] {
                if let Some(rest) = line
                    .strip_prefix(kind)
                    .filter(|rest| !rest.starts_with('{'))
                {
                    self.others.push(format!("{kind}{}", word(rest)));
                }
            }
        }
    }

    /// Whether a comment names something of the contract.
    fn is_named_in(&self, comment: &str) -> bool {
        let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '.';
        let bounded = |name: &str| {
            comment.match_indices(name).any(|(at, _)| {
                let behind = comment[at + name.len()..].trim_start_matches('.');
                !comment[..at].ends_with(is_word) && !behind.starts_with(is_word)
            })
        };
        let words = comment.split(|c: char| !(is_word(c) || c == '*'));
        words.map(|word| word.trim_end_matches('.')).any(|word| {
            let group = word.strip_suffix('*').filter(|group| group.ends_with('_'));
            self.constants.contains_key(word)
                || group.is_some_and(|group| self.constants.keys().any(|c| c.starts_with(group)))
        }) || self.others.iter().any(|name| bounded(name))
    }

    /// The constants of a Rust file that are second copies.
    fn copies(&self, text: &str) -> Vec<String> {
        let (mut found, mut comment, mut was_constant) = (Vec::new(), String::new(), false);
        for line in text.lines().map(str::trim) {
            if let Some(text) = line.strip_prefix("///") {
                if was_constant {
                    comment.clear();
                }
                comment += text;
                was_constant = false;
                continue;
            }
            let Some(constant) = constant(line) else {
                (comment, was_constant) = (String::new(), false);
                continue;
            };
            // A comment holds for all constants in the lines below it.
            was_constant = true;
            let Some(value) = number(constant.1) else {
                continue;
            };
            let end = format!("_{}", constant.0);
            let same = |c: &&String| c.ends_with(&end) && self.constants[*c] == Some(value);
            let is_theirs = comment.contains("BPF_");
            if self.is_named_in(&comment) || !is_theirs && self.shared.iter().any(|c| same(&c)) {
                found.push(line.to_owned());
            }
        }
        found
    }
}

/// Name and value of `pub const NAME: TYPE = value;`
fn constant(line: &str) -> Option<(&str, &str)> {
    let (before, rest) = line.split_once("const ")?;
    let name = word(rest);
    let (_, value) = rest[name.len()..].strip_prefix(':')?.split_once(" = ")?;
    (before.is_empty() || before.starts_with("pub")).then_some((name, value.strip_suffix(';')?))
}

fn contract() -> Contract {
    let mut contract = Contract::default();
    let mut paths = Vec::new();
    files(Path::new("src/bpf"), &[".h", ".bpf.c"], &mut paths);
    for path in paths {
        let name = path.file_name().unwrap().to_str().unwrap();
        contract.add(name, &fs::read_to_string(&path).unwrap());
    }
    contract
}

#[test]
fn no_constant_of_the_contract_is_written_again() {
    let contract = contract();
    assert!(contract.shared.len() > 100 && contract.others.len() > 60);
    let mut paths = Vec::new();
    files(Path::new("src"), &[".rs"], &mut paths);
    let copies = paths.iter().flat_map(|path| {
        let copies = contract.copies(&fs::read_to_string(path).unwrap());
        let of_file = |line| format!("{}: {line}", path.display());
        copies.into_iter().map(of_file).collect::<Vec<_>>()
    });
    assert_eq!(copies.collect::<Vec<_>>(), Vec::<String>::new());
}

#[test]
fn a_violation_is_found() {
    let mut contract = Contract::default();
    let header = "enum x_kind {\n\t/* first */\n\tX_KIND_A = 1, /* one */\n\tX_KIND_B = 1U << 31,\n};\n\
         #define X_SLOTS 8\nstruct x_head {\n\t__u64 ts;\n};\n";
    contract.add("x.h", header);
    contract.add("x.bpf.h", "#define X_PORT 53\n");
    for copy in [
        "/// X_KIND_A\nconst FIRST: u16 = 1;",
        "/// X_KIND_* of the header\npub const OTHER: u32 = 0x7;",
        "/// X_KIND_*\npub const A: u16 = x_kind::X_KIND_A.0;\nconst OTHER: u32 = 7;",
        "/// Bytes of `struct x_head`.\nconst BYTES: usize = 8;",
        "/// As `enum x_kind`.\npub(super) const OTHER: i32 = 9;",
        "/// As x.bpf.h has it.\nconst DNS: u16 = 53;",
        "const KIND_B: u32 = 1 << 31;",
        "const SLOTS: u32 = 8;",
    ] {
        assert_eq!(contract.copies(copy), [copy.lines().last().unwrap()]);
    }
    for fine in [
        "/// X_KIND_A\nconst FIRST: u32 = x_kind::X_KIND_A.0;",
        "/// Bytes of `struct x_head`.\nconst BYTES: usize = size_of::<x_head>();",
        "/// Bytes of `struct x_header`.\nconst BYTES: usize = 8;",
        "/// BPF_X_SLOTS\nconst SLOTS: u32 = 8;",
        "/// Y_KIND_A, max.h\nconst FIRST: u32 = 1;",
        "const SLOTS: u32 = 9;",
        "const PORT: u16 = 53;",
        "/// X_KIND_A\nstruct S;\nconst FIRST: u32 = 1;",
    ] {
        assert_eq!(contract.copies(fine), Vec::<String>::new(), "{fine}");
    }
}
