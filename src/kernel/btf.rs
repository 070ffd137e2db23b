//! The kernel's own type information: which function takes which argument where, and the names of enum values.
//!
//! Reads BTF through libbpf (vmlinux and, by split BTF, modules). Kind numbers and layouts: include/uapi/linux/btf.h.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString};
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{Context, Result, anyhow};
use libbpf_sys as sys;

use super::members::Member;

const KIND_INT: u32 = 1;
const KIND_PTR: u32 = 2;
const KIND_ARRAY: u32 = 3;
const KIND_STRUCT: u32 = 4;
const KIND_UNION: u32 = 5;
const KIND_ENUM: u32 = 6;
const KIND_TYPEDEF: u32 = 8;
const KIND_VOLATILE: u32 = 9;
const KIND_CONST: u32 = 10;
const KIND_RESTRICT: u32 = 11;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;
const KIND_TYPE_TAG: u32 = 18;
const KIND_ENUM64: u32 = 19;

/// BTF_INT_SIGNED among an integer's encoding bits
const INT_SIGNED: u32 = 1 << 24;

/// Where vmlinux and the modules show their BTF.
const SYSFS: &str = "/sys/kernel/btf";

/// Names that are asked for at almost every start.
const COMMON: [&str; 7] = [
    "__kernel_sockaddr_storage",
    "bpf_rdonly_cast",
    "fprobe",
    "sk_buff",
    "skb_drop_reason",
    "skb_drop_reason_subsys",
    "udp_recvmsg",
];

/// A function that takes a pointer to a struct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    pub name: String,
    /// the module it is in; `None` for vmlinux
    pub module: Option<String>,
    /// position of the struct's pointer among the argument registers, from 1
    pub arg: u8,
    /// position of an `enum skb_drop_reason`, where it has one
    pub reason_arg: Option<u8>,
    /// gives back an integer, a bool or an enum
    pub returns_number: bool,
    /// the first argument is a `struct sock *`
    pub sock_first: bool,
}

/// BTF of vmlinux, or of a module on top of it.
#[derive(Debug)]
pub struct Btf {
    raw: NonNull<sys::btf>,
    /// ids of the types that have a name which was asked for
    named: RefCell<BTreeMap<String, Vec<u32>>>,
    /// first type id that is not the base's
    first: u32,
    module: Option<String>,
}

impl Btf {
    /// The running kernel's, or that of `file` (--kernel-btf).
    pub fn vmlinux(file: Option<&Path>) -> Result<Self> {
        let raw = match file {
            None => {
                // SAFETY: takes no argument; the result is owned by the value made below.
                unsafe { sys::btf__load_vmlinux_btf() }
            }
            Some(path) => {
                let c = CString::new(path.as_os_str().as_encoded_bytes())
                    .context("a path with a NUL byte")?;
                // SAFETY: `c` is a NUL-terminated string that outlives the call.
                unsafe { sys::btf__parse(c.as_ptr(), std::ptr::null_mut()) }
            }
        };
        Ok(Self {
            raw: NonNull::new(raw).ok_or_else(|| {
                let e = std::io::Error::last_os_error();
                match file {
                    Some(path) => anyhow!(
                        "no BTF in {}: {e} (a vmlinux with a .BTF section, or the section alone)",
                        path.display()
                    ),
                    None => anyhow!(
                        "no BTF of the kernel ({SYSFS}/vmlinux: {e}): it needs CONFIG_DEBUG_INFO_BTF=y"
                    ),
                }
            })?,
            named: RefCell::default(),
            first: 1,
            module: None,
        })
    }

    /// BTF of the loaded module `name`; `self` is vmlinux's. Kernels from 5.11.
    fn module(&self, name: &str) -> Result<Self> {
        let c = CString::new(name).context("a module name with a NUL byte")?;
        // SAFETY: `c` and the base are valid; the callers (of this file) drop the result before `self` can go.
        let raw = unsafe { sys::btf__load_module_btf(c.as_ptr(), self.raw.as_ptr()) };
        Ok(Self {
            raw: NonNull::new(raw).ok_or_else(|| {
                anyhow!(
                    "no BTF of the module {name}: {}",
                    std::io::Error::last_os_error()
                )
            })?,
            named: RefCell::default(),
            first: self.count(),
            module: Some(name.to_string()),
        })
    }

    /// Functions of vmlinux and of `modules` that take a pointer to `struct NAME` (`const` or not) in one of the first five
    /// argument registers.
    pub fn functions_taking(&self, name: &str, modules: &[String]) -> Result<Vec<Function>> {
        // A module's BTF continues vmlinux's: what that has is looked for once, not once a module.
        let structs = self.struct_ids(name);
        let reasons = self.ids(KIND_ENUM, "skb_drop_reason");
        let mut found = self.own_functions_taking(&structs, &reasons);
        for module in modules {
            let btf = self.module(module)?;
            let own = |base: &[u32], more: Vec<u32>| [base, &more].concat();
            found.extend(btf.own_functions_taking(
                &own(&structs, btf.struct_ids(name)),
                &own(&reasons, btf.ids(KIND_ENUM, "skb_drop_reason")),
            ));
        }
        Ok(found)
    }

    fn own_functions_taking(&self, wanted: &[u32], reasons: &[u32]) -> Vec<Function> {
        let mut protos: HashMap<u32, Option<(u8, Option<u8>)>> = HashMap::new();
        let mut found = Vec::new();
        for id in self.first..self.count() {
            let Some(func) = self.get(id).filter(|t| t.kind() == KIND_FUNC) else {
                continue;
            };
            let place = *protos
                .entry(func.size_or_type)
                .or_insert_with(|| self.argument(func.size_or_type, wanted, reasons));
            if let Some((arg, reason_arg)) = place {
                found.push(Function {
                    name: self.name(func),
                    module: self.module.clone(),
                    arg,
                    reason_arg,
                    returns_number: self.returns_number(func.size_or_type),
                    sock_first: arg == 2 && self.sock_first(func.size_or_type),
                });
            }
        }
        found
    }

    /// Values and names of an enum of vmlinux; empty where there is none.
    pub fn enum_values(&self, name: &str) -> Vec<(i64, String)> {
        let Some(&id) = self.ids(KIND_ENUM, name).first() else {
            return Vec::new();
        };
        let Some(t) = self.get(id) else {
            return Vec::new();
        };
        // struct btf_enum { __u32 name_off; __s32 val; } behind the type
        (0..t.vlen())
            .map(|i| {
                let name = self.string(t.word(2 * i));
                (i64::from(t.word(2 * i + 1) as i32), name)
            })
            .collect()
    }

    /// The same of an enum of the loaded module `module`.
    pub fn module_enum_values(&self, module: &str, name: &str) -> Result<Vec<(i64, String)>> {
        Ok(self.module(module)?.enum_values(name))
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
                size: t.size_or_type,
                signed: t.word(0) & INT_SIGNED != 0,
            },
            KIND_PTR => Shape::Pointer(t.size_or_type),
            // struct btf_array { __u32 type; __u32 index_type; __u32 nelems; } behind the type
            KIND_ARRAY => Shape::Array {
                element: t.word(0),
                count: t.word(2),
            },
            KIND_STRUCT => Shape::Struct(format!("struct {}", self.name(t))),
            KIND_UNION => Shape::Struct(format!("union {}", self.name(t))),
            KIND_ENUM | KIND_ENUM64 => Shape::Enum {
                size: t.size_or_type,
                signed: t.kind_flag(),
            },
            _ => Shape::Other,
        }
    }

    /// Bytes that a value of the type takes.
    pub fn size(&self, id: u32) -> u32 {
        // SAFETY: the BTF is valid as long as self; an id that is not there gives an error, less than 0.
        let size = unsafe { sys::btf__resolve_size(self.raw.as_ptr(), id) };
        u32::try_from(size).unwrap_or(0)
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
        (0..t.vlen())
            .map(|i| {
                let (name, type_id, offset) = (t.word(3 * i), t.word(3 * i + 1), t.word(3 * i + 2));
                let (bit_offset, bits) = if t.kind_flag() {
                    (offset & 0xff_ffff, offset >> 24)
                } else {
                    (offset, 0)
                };
                Member {
                    name: self.string(name),
                    type_id,
                    bit_offset,
                    bits,
                }
            })
            .collect()
    }

    /// The value of an enum's constant: of the enum given, else of any.
    pub fn constant(&self, of: Option<u32>, name: &str) -> Option<i64> {
        let own = of.and_then(|id| self.constant_of(self.skip_modifiers(id), name));
        own.or_else(|| (1..self.count()).find_map(|id| self.constant_of(id, name)))
    }

    fn constant_of(&self, id: u32, name: &str) -> Option<i64> {
        let t = self.get(id)?;
        // Entries of two words, or three: name, value (lower and upper half).
        let words = match t.kind() {
            KIND_ENUM => 2,
            KIND_ENUM64 => 3,
            _ => return None,
        };
        let i =
            (0..t.vlen()).find(|&i| self.str(t.word(words * i)).to_bytes() == name.as_bytes())?;
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
            let t: &Type = self.get(id)?;
            let words = match t.kind() {
                KIND_ENUM => 2,
                KIND_ENUM64 => 3,
                _ => return None,
            };
            Some((0..t.vlen()).map(move |i| self.string(t.word(words * i))))
        };
        (1..self.count()).filter_map(of).flatten().collect()
    }

    /// For libbpf; valid as long as `self`.
    pub(super) fn raw(&self) -> *const sys::btf {
        self.raw.as_ptr()
    }

    /// vmlinux has a function of this name.
    pub fn has_function(&self, name: &str) -> bool {
        !self.ids(KIND_FUNC, name).is_empty()
    }

    /// How many arguments a function of vmlinux or of this module takes; `None` where it is not there.
    pub fn argument_count(&self, name: &str) -> Option<usize> {
        let func = self.get(*self.ids(KIND_FUNC, name).first()?)?;
        let proto = self.get(func.size_or_type)?;
        (proto.kind() == KIND_FUNC_PROTO).then(|| proto.vlen())
    }

    /// Registers that the arguments of a prototype take: the place of the wanted pointer, and of a drop reason.
    fn argument(&self, proto: u32, wanted: &[u32], reasons: &[u32]) -> Option<(u8, Option<u8>)> {
        let proto = self.get(proto).filter(|t| t.kind() == KIND_FUNC_PROTO)?;
        let (mut register, mut arg, mut reason) = (1u8, None, None);
        // struct btf_param { __u32 name_off; __u32 type; } behind the type
        for i in 0..proto.vlen() {
            let id = self.skip_modifiers(proto.word(2 * i + 1));
            let Some(t) = self.get(id) else {
                break; // `...`
            };
            if arg.is_none() && t.kind() == KIND_PTR {
                let target = self.skip_modifiers(t.size_or_type);
                if wanted.contains(&target) {
                    arg = Some(register);
                }
            }
            if reason.is_none() && reasons.contains(&id) {
                reason = Some(register);
            }
            register += match t.kind() {
                // By value: in one or two registers, or on the stack (System V ABI, AAPCS64).
                KIND_STRUCT | KIND_UNION => match t.size_or_type {
                    0..=8 => 1,
                    9..=16 => 2,
                    _ => 0,
                },
                _ => 1,
            };
            if register > 5 {
                break;
            }
        }
        arg.map(|arg| (arg, reason))
    }

    fn returns_number(&self, proto: u32) -> bool {
        let proto = self.get(proto).filter(|t| t.kind() == KIND_FUNC_PROTO);
        let value = proto.and_then(|p| self.get(self.skip_modifiers(p.size_or_type)));
        value.is_some_and(|t| matches!(t.kind(), KIND_INT | KIND_ENUM))
    }

    fn sock_first(&self, proto: u32) -> bool {
        let first = || {
            let proto = self
                .get(proto)
                .filter(|t| t.kind() == KIND_FUNC_PROTO && t.vlen() > 0)?;
            let pointer = self.get(self.skip_modifiers(proto.word(1)))?;
            (pointer.kind() == KIND_PTR).then_some(())?;
            self.get(self.skip_modifiers(pointer.size_or_type))
        };
        first().is_some_and(|t| self.str(t.name_off) == c"sock")
    }

    fn skip_modifiers(&self, mut id: u32) -> u32 {
        // A chain of modifiers has no loops in valid BTF; the bound keeps a broken one finite.
        for _ in 0..32 {
            match self.get(id) {
                Some(t)
                    if matches!(
                        t.kind(),
                        KIND_TYPEDEF | KIND_VOLATILE | KIND_CONST | KIND_RESTRICT | KIND_TYPE_TAG
                    ) =>
                {
                    id = t.size_or_type;
                }
                _ => break,
            }
        }
        id
    }

    /// Ids of all structs (and forward declarations of one, in a module) called `name`, without the base's.
    fn struct_ids(&self, name: &str) -> Vec<u32> {
        self.ids_where(name, |kind| kind == KIND_STRUCT || kind == 7)
    }

    fn ids(&self, kind: u32, name: &str) -> Vec<u32> {
        self.ids_where(name, |k| k == kind)
    }

    fn ids_where(&self, name: &str, kind: impl Fn(u32) -> bool) -> Vec<u32> {
        let mut named = self.named.borrow_mut();
        if !named.contains_key(name) {
            // A pass over all types costs 5 million instructions: the names that most runs ask for are looked for in one.
            for name in COMMON.into_iter().chain([name]) {
                named.entry(name.to_owned()).or_default();
            }
            for id in self.first..self.count() {
                let Some(t) = self.get(id).filter(|t| t.name_off != 0) else {
                    continue;
                };
                let bytes = self.str(t.name_off).to_bytes();
                if let Some((_, ids)) = named.iter_mut().find(|(n, _)| n.as_bytes() == bytes) {
                    if !ids.contains(&id) {
                        ids.push(id);
                    }
                }
            }
        }
        let ids = named.get(name).into_iter().flatten().copied();
        ids.filter(|&id| self.get(id).is_some_and(|t| kind(t.kind())))
            .collect()
    }

    fn count(&self) -> u32 {
        // SAFETY: the BTF is valid as long as self.
        unsafe { sys::btf__type_cnt(self.raw.as_ptr()) }
    }

    fn get(&self, id: u32) -> Option<&Type> {
        // SAFETY: the BTF is valid; libbpf gives NULL for an id that is not there, else a pointer into memory that lives as long as
        // the BTF. `struct btf_type` begins with the three words of Type, in this order.
        unsafe {
            sys::btf__type_by_id(self.raw.as_ptr(), id)
                .cast::<Type>()
                .as_ref()
        }
    }

    fn str(&self, offset: u32) -> &CStr {
        // SAFETY: as above; libbpf gives NULL for an offset out of bounds, else a NUL-terminated string of the BTF.
        unsafe {
            let s = sys::btf__str_by_offset(self.raw.as_ptr(), offset);
            if s.is_null() { c"" } else { CStr::from_ptr(s) }
        }
    }

    fn string(&self, offset: u32) -> String {
        self.str(offset).to_string_lossy().into_owned()
    }

    fn name(&self, t: &Type) -> String {
        self.string(t.name_off)
    }
}

impl Drop for Btf {
    fn drop(&mut self) {
        // SAFETY: owned, freed once. A split BTF does not own its base.
        unsafe { sys::btf__free(self.raw.as_ptr()) };
    }
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

/// `struct btf_type`: what follows it in memory depends on its kind.
#[repr(C)]
struct Type {
    name_off: u32,
    info: u32,
    size_or_type: u32,
}

impl Type {
    fn kind(&self) -> u32 {
        (self.info >> 24) & 0x1f
    }

    fn vlen(&self) -> usize {
        (self.info & 0xffff) as usize
    }

    /// What it means depends on the kind: of a struct, that members' offsets have a bit field's size in the upper byte; of
    /// an enum, that it is signed.
    fn kind_flag(&self) -> bool {
        self.info >> 31 != 0
    }

    /// The `i`th 32-bit word behind the type.
    fn word(&self, i: usize) -> u32 {
        let words = match self.kind() {
            KIND_INT => 1,
            KIND_ARRAY => 3,
            KIND_STRUCT | KIND_UNION | KIND_ENUM64 => 3 * self.vlen(),
            _ => 2 * self.vlen(),
        };
        debug_assert!(i < words);
        // SAFETY: callers ask for words that a type of this kind has behind it (see the assertion); libbpf checked that they
        // are within the BTF when it loaded it.
        unsafe { std::ptr::from_ref(self).add(1).cast::<u32>().add(i).read() }
    }
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
    use super::*;

    /// Any Linux with BTF: these have been so in every kernel that netprobe supports.
    #[test]
    fn places_of_the_skb_in_well_known_functions() {
        let Ok(btf) = Btf::vmlinux(None) else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let found = btf.functions_taking("sk_buff", &[]).unwrap();
        let arg = |name: &str| found.iter().find(|f| f.name == name).map(|f| f.arg);
        assert_eq!(arg("ip_rcv"), Some(1));
        assert_eq!(arg("tcp_v4_do_rcv"), Some(2));
        assert_eq!(arg("ip_queue_xmit"), Some(2));
        assert_eq!(arg("ip_local_out"), Some(3));
        assert_eq!(arg("printk"), None);
        assert!(found.len() > 1000, "{}", found.len());
        let returns = |name: &str| {
            found
                .iter()
                .find(|f| f.name == name)
                .map(|f| f.returns_number)
        };
        assert_eq!(returns("ip_rcv"), Some(true));
        assert_eq!(returns("consume_skb"), Some(false));
        assert_eq!(returns("skb_clone"), Some(false));
        // `const struct sk_buff *`
        assert_eq!(arg("skb_checksum"), Some(1));
    }

    #[test]
    fn drop_reasons_and_their_place() {
        let Ok(btf) = Btf::vmlinux(None) else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let reasons = btf.enum_values("skb_drop_reason");
        if reasons.is_empty() {
            println!("skipped: this kernel has no drop reasons");
            return;
        }
        assert!(
            reasons
                .iter()
                .any(|(_, n)| n == "SKB_DROP_REASON_NETFILTER_DROP")
        );
        let found = btf.functions_taking("sk_buff", &[]).unwrap();
        assert!(found.iter().any(|f| f.reason_arg == Some(f.arg + 1)));
        assert!(btf.enum_values("no_such_enum").is_empty());
    }

    #[test]
    fn a_file_without_btf_is_named() {
        let e = Btf::vmlinux(Some(Path::new("/dev/null"))).unwrap_err();
        assert!(format!("{e:#}").contains("/dev/null"), "{e:#}");
    }
}
