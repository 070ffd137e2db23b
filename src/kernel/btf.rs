//! The kernel's own type information: which function takes which argument where, and the names of enum values.
//!
//! Of vmlinux and, by split BTF, of modules. Read here and not by libbpf, which holds it twice while it reads it, and looks at each type more than
//! once. Names are looked for in one pass over all strings, many at a time; of others, only those are read that are asked for.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::File;
use std::path::Path;
use std::ptr::NonNull;
use std::rc::Rc;

use anyhow::{Context, Result, anyhow};
use libbpf_sys as sys;
use rustc_hash::FxHashMap;

use super::btf_data::{
    Data, KIND_ARRAY, KIND_CONST, KIND_ENUM, KIND_ENUM64, KIND_FUNC, KIND_FUNC_PROTO, KIND_FWD,
    KIND_INT, KIND_PTR, KIND_RESTRICT, KIND_STRUCT, KIND_TYPE_TAG, KIND_TYPEDEF, KIND_UNION,
    KIND_VOLATILE, Type, Words,
};

/// BTF_INT_SIGNED among an integer's encoding bits
const INT_SIGNED: u32 = 1 << 24;

/// Where vmlinux and the modules show their BTF.
const SYSFS: &str = "/sys/kernel/btf";

/// Names that are asked for at almost every start.
const COMMON: [&str; 27] = [
    "__kernel_sockaddr_storage",
    "__traceiter_devlink_trap_report",
    "__traceiter_qdisc_drop",
    "bpf_fentry_test1",
    "bpf_iter_ksym",
    "bpf_rdonly_cast",
    "dst_entry",
    "dyn_ftrace",
    "fprobe",
    "ftrace_page",
    "kallsym_iter",
    "net",
    "net_device",
    "nft_chain",
    "register_ftrace_direct",
    "register_ftrace_direct_cb",
    "rethook",
    "sk_buff",
    "sk_skb_reason_drop",
    "skb_drop_reason",
    "skb_drop_reason_subsys",
    "sock",
    "task_struct",
    "tcp_v4_connect",
    "tcp_v6_connect",
    "timespec64",
    "udp_recvmsg",
];

/// BTF of vmlinux, or of a module on top of it.
#[derive(Debug)]
pub struct Btf {
    own: Rc<Data>,
    /// what a module's goes on from, in types and in strings
    base: Option<Rc<Data>>,
    /// ids of the types that have a name which was asked for
    named: RefCell<BTreeMap<String, Vec<u32>>>,
    /// names to look for together with the first that is asked for
    awaited: RefCell<BTreeSet<String>>,
    /// first type id that is not the base's
    pub(super) first: u32,
    pub(super) module: Option<String>,
}

/// The kernel has types of its own, which it needs for programs whose arguments have types. A file tells us, not it.
pub fn is_in_the_kernel() -> bool {
    Path::new(SYSFS).join("vmlinux").exists()
}

impl Btf {
    /// The running kernel's, or that of `file` (--kernel-btf).
    pub fn vmlinux(file: Option<&Path>) -> Result<Self> {
        let sysfs = format!("{SYSFS}/vmlinux");
        let data = match file {
            None => match File::open(&sysfs) {
                Ok(file) => Data::read(file),
                Err(_) => by_libbpf(None).and_then(|bytes| Data::parse(&bytes)),
            }
            .map_err(|e| {
                anyhow!("no BTF of the kernel ({sysfs}: {e}): it needs CONFIG_DEBUG_INFO_BTF=y")
            }),
            Some(path) => by_libbpf(Some(path))
                .and_then(|bytes| Data::parse(&bytes))
                .map_err(|e| {
                    anyhow!(
                        "no BTF in {}: {e} (a vmlinux with a .BTF section, or the section alone)",
                        path.display()
                    )
                }),
        };
        Ok(Self::of(data?))
    }

    pub(super) fn of(data: Data) -> Self {
        Self {
            own: Rc::new(data),
            base: None,
            named: RefCell::default(),
            awaited: RefCell::new(COMMON.into_iter().map(str::to_owned).collect()),
            first: 1,
            module: None,
        }
    }

    /// BTF of the loaded module `name`; `self` is vmlinux's. Kernels from 5.11.
    pub(super) fn module(&self, name: &str) -> Result<Self> {
        // Held, as the module may go while it is used.
        let bytes = std::fs::read(Path::new(SYSFS).join(name));
        let data = bytes.map_err(anyhow::Error::from);
        let data = data.and_then(|bytes| Data::parse(&bytes));
        Ok(Self {
            own: Rc::new(data.map_err(|e| anyhow!("no BTF of the module {name}: {e}"))?),
            base: Some(self.own.clone()),
            named: RefCell::default(),
            awaited: RefCell::default(),
            first: self.count(),
            module: Some(name.to_string()),
        })
    }

    /// Values and names of an enum of vmlinux; empty where there is none.
    pub fn enum_values(&self, name: &str) -> Vec<(i64, String)> {
        let Some(&id) = self.ids(KIND_ENUM, name).first() else {
            return Vec::new();
        };
        self.get(id).map_or_else(Vec::new, |t| self.values(t))
    }

    /// Values and names of an enum.
    fn values(&self, t: Type<'_>) -> Vec<(i64, String)> {
        // struct btf_enum { __u32 name_off; __s32 val; } behind the type
        let values = (0..t.vlen()).map(|i| i64::from(t.word(2 * i + 1) as i32));
        let names = self.names((0..t.vlen()).map(|i| t.word(2 * i)).collect());
        values.zip(names).collect()
    }

    /// Values and names of all enums of vmlinux whose names end so.
    pub fn values_of_enums(&self, end: &str) -> Vec<(i64, String)> {
        let enums: Vec<Type<'_>> = (self.first..self.count())
            .filter_map(|id| self.get(id))
            .filter(|t| t.kind() == KIND_ENUM && t.vlen() > 0)
            .collect();
        let names = self.names(enums.iter().map(|t| t.name_off()).collect());
        let named = enums.into_iter().zip(names);
        named
            .filter(|(_, name)| name.ends_with(end))
            .flat_map(|(t, _)| self.values(t))
            .collect()
    }

    /// The same of the loaded module `module`.
    pub fn module_values_of_enums(&self, module: &str, end: &str) -> Result<Vec<(i64, String)>> {
        Ok(self.module(module)?.values_of_enums(end))
    }

    /// The struct of this name.
    pub fn struct_named(&self, name: &str) -> Option<u32> {
        self.ids(KIND_STRUCT, name).first().copied()
    }

    /// What kind of type it is, behind typedefs and qualifiers.
    pub fn shape(&self, id: u32) -> Shape {
        let Some(t) = self.get(self.skip_modifiers(id)) else {
            return Shape::Other;
        };
        match t.kind() {
            KIND_INT => Shape::Int {
                size: t.size_or_type(),
                signed: t.word(0) & INT_SIGNED != 0,
            },
            KIND_PTR => Shape::Pointer(t.size_or_type()),
            // struct btf_array { __u32 type; __u32 index_type; __u32 nelems; } behind the type
            KIND_ARRAY => Shape::Array {
                element: t.word(0),
                count: t.word(2),
            },
            KIND_STRUCT => Shape::Struct(format!("struct {}", self.name(t))),
            KIND_UNION => Shape::Struct(format!("union {}", self.name(t))),
            KIND_ENUM | KIND_ENUM64 => Shape::Enum {
                size: t.size_or_type(),
                signed: t.kind_flag(),
            },
            _ => Shape::Other,
        }
    }

    /// Bytes that a value of the type takes.
    pub fn size(&self, id: u32) -> u32 {
        let (mut id, mut count) = (id, 1u32);
        // Arrays of arrays have no loops in valid BTF; the bound keeps a broken one finite.
        for _ in 0..32 {
            let Some(t) = self.get(self.skip_modifiers(id)) else {
                return 0;
            };
            match t.kind() {
                KIND_ARRAY => (id, count) = (t.word(0), count.saturating_mul(t.word(2))),
                KIND_PTR => return count.saturating_mul(8),
                KIND_FUNC | KIND_FUNC_PROTO | KIND_FWD => return 0,
                _ => return count.saturating_mul(t.size_or_type()),
            }
        }
        0
    }

    /// Members of a struct or union, behind typedefs and qualifiers; none of another type.
    pub fn members(&self, id: u32) -> Vec<Member> {
        let Some(t) = self.get(self.skip_modifiers(id)) else {
            return Vec::new();
        };
        if !matches!(t.kind(), KIND_STRUCT | KIND_UNION) {
            return Vec::new();
        }
        // struct btf_member { __u32 name_off; __u32 type; __u32 offset; } behind the type
        let names = self.names((0..t.vlen()).map(|i| t.word(3 * i)).collect());
        (0..t.vlen())
            .zip(names)
            .map(|(i, name)| {
                let (type_id, offset) = (t.word(3 * i + 1), t.word(3 * i + 2));
                let (bit_offset, bits) = if t.kind_flag() {
                    (offset & 0xff_ffff, offset >> 24)
                } else {
                    (offset, 0)
                };
                Member {
                    name,
                    type_id,
                    bit_offset,
                    bits,
                }
            })
            .collect()
    }

    /// The value of an enum's constant: of the enum given, else of any.
    pub fn constant(&self, of: Option<u32>, name: &str) -> Option<i64> {
        let places = self.places(&[name].into());
        let own = of.and_then(|id| self.constant_of(self.skip_modifiers(id), &places));
        own.or_else(|| (1..self.count()).find_map(|id| self.constant_of(id, &places)))
    }

    fn constant_of(&self, id: u32, names: &FxHashMap<u64, &str>) -> Option<i64> {
        let t = self.get(id)?;
        // Entries of two words, or three: name, value (lower and upper half).
        let words = match t.kind() {
            KIND_ENUM => 2,
            KIND_ENUM64 => 3,
            _ => return None,
        };
        let i = (0..t.vlen()).find(|&i| names.contains_key(&t.word(words * i).into()))?;
        let low = t.word(words * i + 1);
        Some(match (words, t.kind_flag()) {
            (3, _) => (u64::from(t.word(words * i + 2)) << 32 | u64::from(low)) as i64,
            (_, true) => i64::from(low as i32),
            (_, false) => i64::from(low),
        })
    }

    /// Names of the constants of all enums.
    pub fn constants(&self) -> Vec<String> {
        let of = |id| {
            let t = self.get(id)?;
            let words = match t.kind() {
                KIND_ENUM => 2,
                KIND_ENUM64 => 3,
                _ => return None,
            };
            Some((0..t.vlen()).map(move |i| t.word(words * i)))
        };
        self.names((1..self.count()).filter_map(of).flatten().collect())
    }

    /// The bytes of vmlinux's, for libbpf.
    pub(super) fn bytes(&self) -> std::io::Result<Vec<u8>> {
        self.own.bytes()
    }

    /// Names, a line each, that will be asked for: the first look-up finds these too.
    pub fn await_names(&self, names: &str) {
        let mut awaited = self.awaited.borrow_mut();
        awaited.extend(names.lines().map(str::to_owned));
    }

    /// vmlinux has a function of this name.
    pub fn has_function(&self, name: &str) -> bool {
        !self.ids(KIND_FUNC, name).is_empty()
    }

    /// vmlinux has an enum of this name.
    pub fn has_enum(&self, name: &str) -> bool {
        !self.ids(KIND_ENUM, name).is_empty()
    }

    /// The number of a typedef of vmlinux.
    pub(super) fn typedef_id(&self, name: &str) -> Option<u32> {
        self.ids(KIND_TYPEDEF, name).first().copied()
    }

    /// The number of a function of vmlinux.
    pub(super) fn function_id(&self, name: &str) -> Option<u32> {
        self.ids(KIND_FUNC, name).first().copied()
    }

    pub(super) fn skip_modifiers(&self, mut id: u32) -> u32 {
        // A chain of modifiers has no loops in valid BTF; the bound keeps a broken one finite.
        for _ in 0..32 {
            match self.get(id) {
                Some(t)
                    if matches!(
                        t.kind(),
                        KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG
                    ) =>
                {
                    id = t.size_or_type();
                }
                _ => break,
            }
        }
        id
    }

    /// Ids of all structs (and forward declarations of one, in a module) called `name`, without the base's.
    pub(super) fn struct_ids(&self, name: &str) -> Vec<u32> {
        self.ids_where(name, |kind| matches!(kind, KIND_STRUCT | KIND_FWD))
    }

    pub(super) fn ids(&self, kind: u32, name: &str) -> Vec<u32> {
        self.ids_where(name, |k| k == kind)
    }

    fn ids_where(&self, name: &str, kind: impl Fn(u32) -> bool) -> Vec<u32> {
        self.look_up([name].into_iter());
        let named = self.named.borrow();
        let ids = named.get(name).into_iter().flatten().copied();
        ids.filter(|&id| self.get(id).is_some_and(|t| kind(t.kind())))
            .collect()
    }

    /// Types of these names that are of one of the `kinds`.
    pub(super) fn ids_of<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
        kinds: impl Fn(u32) -> bool,
    ) -> Vec<u32> {
        self.look_up(names.clone());
        let named = self.named.borrow();
        let ids = names.filter_map(|name| named.get(name)).flatten().copied();
        ids.filter(|&id| self.get(id).is_some_and(|t| kinds(t.kind())))
            .collect()
    }

    /// Brings what has these names into `named`.
    fn look_up<'a>(&self, names: impl Iterator<Item = &'a str>) {
        let mut named = self.named.borrow_mut();
        let asked: BTreeSet<&str> = names.filter(|&n| !named.contains_key(n)).collect();
        if asked.is_empty() {
            return;
        }
        let awaited = self.awaited.take();
        let awaited = awaited.iter().map(String::as_str);
        let new: BTreeSet<&str> = awaited
            .filter(|&n| !named.contains_key(n))
            .chain(asked)
            .collect();
        for name in &new {
            named.insert((*name).to_owned(), Vec::new());
        }
        let places = self.places(&new);
        let mut offsets = Words::default();
        for &offset in places.keys() {
            offsets.add(offset as u32);
        }
        for (id, t) in (self.first..).zip(self.own.types()) {
            let name_off = t.name_off();
            if !offsets.may_have(name_off) {
                continue;
            }
            if let Some(ids) = places
                .get(&name_off.into())
                .and_then(|name| named.get_mut(*name))
            {
                ids.push(id);
            }
        }
    }

    /// Where the strings have these names: offset, name.
    fn places<'a>(&self, names: &BTreeSet<&'a str>) -> FxHashMap<u64, &'a str> {
        let mut places = FxHashMap::default();
        for (data, from) in self.parts() {
            // vmlinux's stay in kernel memory, others are held: there is nothing that could fail.
            let own = data.places(names).unwrap_or_default();
            places.extend(own.iter().map(|(at, name)| (u64::from(from + at), *name)));
        }
        places
    }

    /// The strings at these offsets.
    pub(super) fn strings(&self, offsets: &BTreeSet<u32>) -> Vec<Vec<u8>> {
        let mut found = Vec::new();
        for (data, from) in self.parts() {
            let end = from + data.string_bytes();
            let own = offsets.range(from..end).map(|offset| offset - from);
            found.extend(data.strings(own).unwrap_or_default());
        }
        // There is none where an offset is behind all.
        found.resize(offsets.len(), Vec::new());
        found
    }

    /// The base and this, and from which offset on the strings are its own.
    fn parts(&self) -> impl Iterator<Item = (&Data, u32)> {
        let from = self.base.as_ref().map_or(0, |base| base.string_bytes());
        let base = self.base.iter().map(|base| (&**base, 0));
        base.chain([(&*self.own, from)])
    }

    /// One more than the last type id.
    pub(super) fn count(&self) -> u32 {
        self.first + self.own.len()
    }

    pub(super) fn get(&self, id: u32) -> Option<Type<'_>> {
        match (id.checked_sub(self.first), &self.base) {
            (Some(index), _) => self.own.get(index),
            (None, Some(base)) => base.get(id.checked_sub(1)?),
            (None, None) => None,
        }
    }

    /// The strings at these offsets, one for each.
    pub(super) fn names(&self, offsets: Vec<u32>) -> Vec<String> {
        let places = offsets.iter().copied().collect();
        let strings = self.strings(&places);
        let strings: FxHashMap<u64, &Vec<u8>> =
            places.into_iter().map(u64::from).zip(&strings).collect();
        let name =
            |offset: &u32| String::from_utf8_lossy(strings[&u64::from(*offset)]).into_owned();
        offsets.iter().map(name).collect()
    }

    fn name(&self, t: Type<'_>) -> String {
        self.names(vec![t.name_off()]).remove(0)
    }
}

/// The BTF of a file (ELF, or the section alone), or the running kernel's where libbpf finds it (/boot/vmlinux-RELEASE and its like).
fn by_libbpf(file: Option<&Path>) -> Result<Vec<u8>> {
    let raw = match file {
        None => {
            // SAFETY: takes no argument.
            unsafe { sys::btf__load_vmlinux_btf() }
        }
        Some(path) => {
            let c = CString::new(path.as_os_str().as_encoded_bytes())
                .context("a path with a NUL byte")?;
            // SAFETY: `c` is a NUL-terminated string that outlives the call.
            unsafe { sys::btf__parse(c.as_ptr(), std::ptr::null_mut()) }
        }
    };
    let raw = NonNull::new(raw).ok_or_else(std::io::Error::last_os_error)?;
    let mut size = 0;
    // SAFETY: the BTF is valid; what is given lives as long as it, and is copied before it is freed, once.
    unsafe {
        let data = sys::btf__raw_data(raw.as_ptr(), &mut size);
        let bytes = if data.is_null() {
            Vec::new()
        } else {
            std::slice::from_raw_parts(data.cast::<u8>(), size as usize).to_vec()
        };
        sys::btf__free(raw.as_ptr());
        Ok(bytes)
    }
}

/// A member of a struct as BTF has it.
#[derive(Debug, Clone)]
pub struct Member {
    pub name: String,
    pub type_id: u32,
    pub bit_offset: u32,
    /// 0: no bit field
    pub bits: u32,
}

/// A type, as far as reading a value needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// to a type
    Pointer(u32),
    /// a struct or union, by its name
    Struct(String),
    Array {
        element: u32,
        count: u32,
    },
    Int {
        size: u32,
        signed: bool,
    },
    Enum {
        size: u32,
        signed: bool,
    },
    Other,
}

/// Loaded modules that have BTF.
pub fn modules() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(SYSFS)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .filter(|n| n != "vmlinux")
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::kernel::btf_data::{encode, tail};

    use super::*;

    /// What is not among them costs each start one more look through all types: 11 million instructions on 6.12.
    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn detection_asks_for_common_names() {
        let btf = Btf::vmlinux(None).unwrap();
        crate::kernel::features::Features::with(Some(&btf));
        let named = btf.named.borrow();
        let mut others = named.keys().filter(|n| !COMMON.contains(&n.as_str()));
        assert_eq!(others.next(), None);
    }

    #[test]
    fn a_file_without_btf_is_named() {
        let e = Btf::vmlinux(Some(Path::new("/dev/null"))).unwrap_err();
        assert!(format!("{e:#}").contains("/dev/null"), "{e:#}");
    }

    /// What a file says of its types may be anything: each question ends, and without harm.
    fn ask(types: &[u32]) {
        let strings = b"\0sk_buff\0sock\0len\0typedef_of\0";
        let Ok(data) = Data::parse(&encode(types, strings)) else {
            return;
        };
        let btf = Btf::of(data);
        for name in ["sk_buff", "sock", "len", "typedef_of"] {
            let _ = (
                btf.struct_named(name),
                btf.has_function(name),
                btf.has_enum(name),
            );
            let _ = (btf.enum_values(name), btf.argument_count(name));
            let _ = (btf.typedef_id(name), btf.constant(None, name));
            let _ = btf.functions_taking(name, &[]);
        }
        let _ = (btf.constants(), btf.functions_like_hooks(&[]));
        for id in 0..20 {
            let _ = (btf.shape(id), btf.size(id), btf.members(id));
            let _ = btf.constant(Some(id), "len");
        }
    }

    proptest! {
        #[test]
        fn any_types(all in prop::collection::vec(
            (0u32..30, 0u32..20, 0u32..4, any::<bool>(), 0u32..20, prop::collection::vec(0u32..40, 16)),
            0..16,
        )) {
            let mut types = Vec::new();
            for (name, kind, entries, flag, refers, words) in all {
                types.extend([name, u32::from(flag) << 31 | kind << 24 | entries, refers]);
                let info = types[types.len() - 2];
                types.extend(&words[..tail(info).unwrap_or(0)]);
            }
            ask(&types);
        }

        #[test]
        fn any_words(words in prop::collection::vec(any::<u32>(), 0..40)) {
            ask(&words);
        }
    }
}
