//! The part of the kernel's BTF that CO-RE relocations of an object can ask for. libbpf goes through all types once for each struct
//! that an object names: of the kernel's 130,000 that is most of the time that loading takes.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::btf::Btf;
use super::btf_data::{
    Heads, KIND_ARRAY, KIND_CONST, KIND_ENUM, KIND_ENUM64, KIND_FLOAT, KIND_FUNC_PROTO, KIND_PTR,
    KIND_RESTRICT, KIND_STRUCT, KIND_TYPE_TAG, KIND_TYPEDEF, KIND_UNION, KIND_VOLATILE, Type,
    encode,
};

/// A reduced BTF, in a file without a name: libbpf reads it from [`CoreBtf::path`] while an object is opened and loaded.
#[derive(Debug)]
pub struct CoreBtf {
    file: File,
}

impl CoreBtf {
    /// Of vmlinux's BTF, what objects that know `types` (a name a line: `crate::bpf::*_TYPES`) can ask for.
    pub fn new(btf: &Btf, types: &str) -> Result<Self> {
        let file = || -> Result<File> {
            let mut file = File::from(memfd_create("netprobe-btf", MFdFlags::MFD_CLOEXEC)?);
            file.write_all(&reduce(btf, types))?;
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

/// A BTF with the types of these names, and with what they consist of. What a pointer points to is left out where nothing else needs
/// it: no relocation goes through a pointer. Those behind a `=` keep their number, which programs tell the kernel
/// (bpf_core_type_id_kernel); all others take the lowest that is free.
fn reduce(btf: &Btf, types: &str) -> Vec<u8> {
    let wanted: HashSet<&[u8]> = types.lines().map(str::as_bytes).collect();
    let heads = Heads::new(types.lines());
    let mut kept = vec![false; btf.count() as usize];
    let mut left: Vec<u32> = (1..btf.count())
        .filter(|&id| btf.get(id).is_some_and(|t| named(btf, t, &heads, &wanted)))
        .collect();
    while let Some(id) = left.pop() {
        let new = |t: &Type<'_>| t.kind() != KIND_FUNC_PROTO && !kept[id as usize];
        let Some(t) = btf.get(id).filter(new) else {
            continue;
        };
        kept[id as usize] = true;
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
    let numbers = Numbers::new(btf, types, &kept);
    let mut strings = Strings::default();
    let mut words = Vec::new();
    for id in &numbers.old {
        match id.and_then(|id| btf.get(id)) {
            // A number that nothing has.
            None => words.extend([0, KIND_FLOAT << 24, 4]),
            Some(t) => write(btf, t, &numbers, &mut strings, &mut words),
        }
    }
    encode(&words, &strings.bytes)
}

/// One type, with its names and the types that it refers to by their new places.
fn write(btf: &Btf, t: Type<'_>, numbers: &Numbers, strings: &mut Strings, to: &mut Vec<u32>) {
    let refers = (KIND_TYPEDEF..=KIND_RESTRICT).contains(&t.kind())
        || matches!(t.kind(), KIND_PTR | KIND_TYPE_TAG);
    let size_or_type = match refers {
        true => numbers.of(t.size_or_type()),
        false => t.size_or_type(),
    };
    to.extend([strings.add(btf, t.name_off()), t.info(), size_or_type]);
    to.extend(t.words().enumerate().map(|(i, word)| match (t.kind(), i) {
        (KIND_STRUCT | KIND_UNION, _) if i % 3 == 1 => numbers.of(word),
        (KIND_STRUCT | KIND_UNION | KIND_ENUM64, _) if i % 3 == 0 => strings.add(btf, word),
        (KIND_ENUM, _) if i % 2 == 0 => strings.add(btf, word),
        (KIND_ARRAY, 0 | 1) => numbers.of(word),
        _ => word,
    }));
}

/// Which type has which number in the BTF that is written.
struct Numbers {
    /// the one that has number 1, and so on
    old: Vec<Option<u32>>,
    new: HashMap<u32, u32>,
}

impl Numbers {
    fn new(btf: &Btf, types: &str, kept: &[bool]) -> Self {
        let names = types.lines().filter_map(|name| name.strip_prefix('='));
        let names: HashSet<&[u8]> = names.map(str::as_bytes).collect();
        let fixed: HashSet<u32> = (1..kept.len() as u32)
            .filter(|&id| kept[id as usize])
            .filter(|&id| {
                let t = btf.get(id).filter(|t| t.kind() == KIND_STRUCT);
                t.is_some_and(|t| names.contains(btf.str(t.name_off()).to_bytes()))
            })
            .collect();
        let mut old: Vec<Option<u32>> = vec![None; fixed.iter().max().map_or(0, |&id| id as usize)];
        for &id in &fixed {
            old[id as usize - 1] = Some(id);
        }
        let mut free = 0;
        for id in (1..kept.len() as u32).filter(|&id| kept[id as usize] && !fixed.contains(&id)) {
            while old.get(free).is_some_and(Option::is_some) {
                free += 1;
            }
            match old.get_mut(free) {
                Some(place) => *place = Some(id),
                None => old.push(Some(id)),
            }
            free += 1;
        }
        let numbered = old.iter().zip(1..);
        let new = numbered
            .filter_map(|(id, number)| Some(((*id)?, number)))
            .collect();
        Self { old, new }
    }

    /// 0, which is void, for what is not there.
    fn of(&self, id: u32) -> u32 {
        self.new.get(&id).copied().unwrap_or(0)
    }
}

/// A type of one of these names, of a kind that relocations begin at.
fn named(btf: &Btf, t: Type<'_>, heads: &Heads, wanted: &HashSet<&[u8]>) -> bool {
    let kinds = KIND_STRUCT..=KIND_TYPEDEF;
    (kinds.contains(&t.kind()) || t.kind() == KIND_ENUM64)
        && t.name_off() != 0
        && heads.may_begin(btf.string_from(t.name_off()))
        && wanted.contains(btf.str(t.name_off()).to_bytes())
}

/// The strings of a BTF that is written, and where those of the one that it is made from are.
struct Strings {
    bytes: Vec<u8>,
    places: HashMap<u32, u32>,
}

impl Default for Strings {
    fn default() -> Self {
        Self {
            bytes: vec![0],
            places: HashMap::from([(0, 0)]),
        }
    }
}

impl Strings {
    fn add(&mut self, btf: &Btf, offset: u32) -> u32 {
        *self.places.entry(offset).or_insert_with(|| {
            let place = self.bytes.len() as u32;
            self.bytes
                .extend_from_slice(btf.str(offset).to_bytes_with_nul());
            place
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::bpf;
    use crate::kernel::btf_data::Data;

    /// Any Linux with BTF.
    #[test]
    fn types_keep_their_layout_and_some_their_number() {
        let Ok(btf) = Btf::vmlinux(None) else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let bytes = reduce(&btf, bpf::SKB_TYPES);
        let all = btf.bytes().len();
        println!("{} of {all} bytes", bytes.len());
        assert!(bytes.len() < all / 2);
        let reduced = Btf::of(Data::parse(bytes).unwrap());
        for name in ["sk_buff", "sock", "net_device", "iphdr"] {
            let id = btf.struct_named(name).unwrap();
            let is = reduced.struct_named(name).unwrap();
            if name != "iphdr" {
                assert_eq!(is, id, "{name}: its number");
            }
            assert_eq!(reduced.size(is), btf.size(id), "{name}");
            let places = |btf: &Btf| {
                let members = btf.members(btf.struct_named(name).unwrap()).into_iter();
                let place = |m: super::super::members::Member| {
                    let size = btf.size(m.type_id);
                    (m.name, m.bit_offset, m.bits, size)
                };
                members.map(place).collect::<BTreeSet<_>>()
            };
            assert_eq!(places(&reduced), places(&btf), "{name}");
        }
        // Without casts only what is needed is there, however high the numbers were.
        let free = reduce(&btf, bpf::TCPCONNECT_TYPES);
        println!("{} without casts", free.len());
        assert!(free.len() < 500_000);
        // Functions are not there, nor are structs that no program names.
        assert!(!reduced.has_function("kfree_skb"));
        assert_eq!(reduced.struct_named("btrfs_key"), None);
    }

    /// libbpf takes it for a BTF.
    #[test]
    fn libbpf_reads_it() {
        let Ok(btf) = Btf::vmlinux(None) else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let core = CoreBtf::new(&btf, bpf::TCPCONNECT_TYPES).unwrap();
        let read = libbpf_rs::btf::Btf::from_path(core.path()).unwrap();
        let found: libbpf_rs::btf::types::Struct<'_> = read.type_by_name("sock").unwrap();
        assert!(!found.is_empty());
    }
}
