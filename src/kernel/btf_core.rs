//! The part of the kernel's BTF that CO-RE relocations of an object can ask for. libbpf goes through all types once for each struct
//! that an object names: of the kernel's 130,000 that is most of the time that loading takes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::btf::Btf;
use super::btf_data::{
    KIND_ARRAY, KIND_CONST, KIND_ENUM, KIND_ENUM64, KIND_FUNC_PROTO, KIND_PTR, KIND_RESTRICT,
    KIND_STRUCT, KIND_TYPE_TAG, KIND_TYPEDEF, KIND_UNION, KIND_VOLATILE, Type, encode,
};

/// A reduced BTF, in a file without a name: libbpf reads it from [`CoreBtf::path`] while an object is opened and loaded.
#[derive(Debug)]
pub struct CoreBtf {
    file: File,
}

impl CoreBtf {
    /// Of vmlinux's BTF, what objects that know `types` (a name a line: `crate::bpf::*_TYPES`) can ask for.
    pub fn new(btf: &Btf, types: &str) -> Result<Self> {
        Self::write(&reduce(btf, named(btf, types)))
    }

    /// The same with the types of a module.
    pub fn with_module(btf: &Btf, types: &str, module: &str) -> Result<Self> {
        let module = btf.module(module)?;
        let mut ids = named(btf, types);
        ids.extend(named(&module, types));
        Self::write(&reduce(&module, ids))
    }

    /// The same with the types of those modules that are loaded and have BTF.
    pub fn with_modules(btf: &Btf, types: &str, modules: &[&str]) -> Result<Self> {
        let mut reduced = Reduced::default();
        reduced.add(btf, named(btf, types));
        let loaded = super::btf::modules();
        for module in modules.iter().filter(|m| loaded.iter().any(|l| l == *m)) {
            let module = btf.module(module)?;
            reduced.add(&module, named(&module, types));
        }
        Self::write(&reduced.bytes())
    }

    fn write(bytes: &[u8]) -> Result<Self> {
        let file = || -> Result<File> {
            let mut file = File::from(memfd_create("netprobe-btf", MFdFlags::MFD_CLOEXEC)?);
            file.write_all(bytes)?;
            Ok(file)
        };
        let file = file().context("failed to write down the kernel's types")?;
        Ok(Self { file })
    }

    /// For `ObjectBuilder::btf_custom_path`, as long as `self`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

/// Types of these names, of kinds that relocations begin at.
fn named(btf: &Btf, types: &str) -> Vec<u32> {
    btf.ids_of(types.lines(), |kind| {
        (KIND_STRUCT..=KIND_TYPEDEF).contains(&kind) || kind == KIND_ENUM64
    })
}

/// A BTF with these types.
fn reduce(btf: &Btf, types: Vec<u32>) -> Vec<u8> {
    let mut reduced = Reduced::default();
    reduced.add(btf, types);
    reduced.bytes()
}

/// Types out of one BTF or several, and their names. A module's BTF repeats those of vmlinux that its own types consist of.
#[derive(Debug)]
struct Reduced {
    words: Vec<u32>,
    strings: Vec<u8>,
    /// the number of the next type
    next: u32,
}

impl Default for Reduced {
    fn default() -> Self {
        Self {
            words: Vec::new(),
            strings: vec![0],
            next: 1,
        }
    }
}

impl Reduced {
    fn bytes(&self) -> Vec<u8> {
        encode(&self.words, &self.strings)
    }

    /// Adds types, and what they consist of. What a pointer points to is left out where nothing else needs it: no relocation goes
    /// through a pointer. Types have other numbers than the kernel's.
    fn add(&mut self, btf: &Btf, left: Vec<u32>) {
        let mut kept = consist_of(btf, left);
        for new in kept.values_mut() {
            *new = self.next;
            self.next += 1;
        }
        let kept_types = || kept.keys().filter_map(|&id| btf.get(id));
        let mut offsets = BTreeSet::new();
        for t in kept_types() {
            offsets.insert(t.name_off());
            offsets.extend(
                t.words()
                    .enumerate()
                    .filter(|(i, _)| is_name(t, *i))
                    .map(|(_, w)| w),
            );
        }
        let mut places = HashMap::from([(0, 0)]);
        for (offset, string) in offsets.iter().copied().zip(btf.strings(&offsets)) {
            if offset != 0 {
                places.insert(offset, self.strings.len() as u32);
                self.strings.extend(string);
                self.strings.push(0);
            }
        }
        for t in kept_types() {
            write(t, &kept, &places, &mut self.words);
        }
    }
}

/// These types and those that they consist of, by number.
fn consist_of(btf: &Btf, mut left: Vec<u32>) -> BTreeMap<u32, u32> {
    let mut kept = BTreeMap::new();
    while let Some(id) = left.pop() {
        let new = |t: &Type<'_>| t.kind() != KIND_FUNC_PROTO && !kept.contains_key(&id);
        let Some(t) = btf.get(id).filter(new) else {
            continue;
        };
        kept.insert(id, 0);
        match t.kind() {
            // struct btf_member { __u32 name_off; __u32 type; __u32 offset; }
            KIND_STRUCT | KIND_UNION => left.extend((0..t.vlen()).map(|i| t.word(3 * i + 1))),
            // struct btf_array { __u32 type; __u32 index_type; __u32 nelems; }
            KIND_ARRAY => left.extend([t.word(0), t.word(1)]),
            KIND_TYPEDEF | KIND_CONST | KIND_VOLATILE | KIND_RESTRICT | KIND_TYPE_TAG => {
                left.push(t.size_or_type());
            }
            _ => {}
        }
    }
    kept
}

/// The `i`th word behind this type is a string's offset.
fn is_name(t: Type<'_>, i: usize) -> bool {
    match t.kind() {
        KIND_STRUCT | KIND_UNION | KIND_ENUM64 => i % 3 == 0,
        KIND_ENUM => i % 2 == 0,
        _ => false,
    }
}

/// One type, with its names and the types that it refers to by their new places.
fn write(
    t: Type<'_>,
    numbers: &BTreeMap<u32, u32>,
    strings: &HashMap<u32, u32>,
    to: &mut Vec<u32>,
) {
    // 0, which is void and the empty string, for what is not there.
    let number = |id: u32| numbers.get(&id).copied().unwrap_or(0);
    let string = |offset: u32| strings.get(&offset).copied().unwrap_or(0);
    let refers = (KIND_TYPEDEF..=KIND_RESTRICT).contains(&t.kind())
        || matches!(t.kind(), KIND_PTR | KIND_TYPE_TAG);
    let size_or_type = match refers {
        true => number(t.size_or_type()),
        false => t.size_or_type(),
    };
    to.extend([string(t.name_off()), t.info(), size_or_type]);
    to.extend(t.words().enumerate().map(|(i, word)| match (t.kind(), i) {
        (KIND_STRUCT | KIND_UNION, _) if i % 3 == 1 => number(word),
        (KIND_ARRAY, 0 | 1) => number(word),
        _ if is_name(t, i) => string(word),
        _ => word,
    }));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf;
    use crate::kernel::btf_data::Data;

    /// Any Linux with BTF.
    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn types_keep_their_layout() {
        let btf = Btf::vmlinux(None).unwrap();
        let bytes = reduce(&btf, named(&btf, bpf::SKB_TYPES));
        println!("{} of {} bytes", bytes.len(), btf.bytes().unwrap().len());
        assert!(bytes.len() < 500_000);
        let reduced = Btf::of(Data::parse(&bytes).unwrap());
        for name in ["sk_buff", "sock", "net_device", "iphdr"] {
            let id = btf.struct_named(name).unwrap();
            let is = reduced.struct_named(name).unwrap();
            assert_eq!(reduced.size(is), btf.size(id), "{name}");
            let places = |btf: &Btf| {
                let members = btf.members(btf.struct_named(name).unwrap()).into_iter();
                let place = |m: super::super::btf::Member| {
                    let size = btf.size(m.type_id);
                    (m.name, m.bit_offset, m.bits, size)
                };
                members.map(place).collect::<BTreeSet<_>>()
            };
            assert_eq!(places(&reduced), places(&btf), "{name}");
        }
        // Functions are not there, nor are structs that no program names.
        assert!(!reduced.has_function("kfree_skb"));
        assert_eq!(reduced.struct_named("btrfs_key"), None);
    }

    /// Types of several BTFs lie one after another.
    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn types_of_several() {
        let btf = Btf::vmlinux(None).unwrap();
        let mut both = Reduced::default();
        both.add(&btf, named(&btf, "iphdr"));
        both.add(&btf, named(&btf, "sock"));
        let bytes = both.bytes();
        let reduced = Btf::of(Data::parse(&bytes).unwrap());
        for name in ["iphdr", "sock"] {
            let id = btf.struct_named(name).unwrap();
            let is = reduced.struct_named(name).unwrap();
            let names = |btf: &Btf, id| {
                btf.members(id)
                    .into_iter()
                    .map(|m| m.name)
                    .collect::<Vec<_>>()
            };
            assert_eq!(names(&reduced, is), names(&btf, id));
            assert_eq!(reduced.size(is), btf.size(id));
        }
    }

    /// libbpf takes it for a BTF.
    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn libbpf_reads_it() {
        let btf = Btf::vmlinux(None).unwrap();
        let core = CoreBtf::new(&btf, bpf::TCPCONNECT_TYPES).unwrap();
        let read = libbpf_rs::btf::Btf::from_path(core.path()).unwrap();
        let found: libbpf_rs::btf::types::Struct<'_> = read.type_by_name("sock").unwrap();
        assert!(!found.is_empty());
    }
}
