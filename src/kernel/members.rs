//! Members of kernel structs by their path in C (`skb->dev->ifindex`), from BTF: through pointers, embedded structs,
//! unions without a name, arrays; and the constants of enums. Must not know what is done with them.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::btf::{Btf, Member, Shape};

/// One step of a path behind its first name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// `->name` or `.name`
    Member(String),
    /// `[n]`
    Element(u32),
}

/// How to get at a number in kernel memory, from the address of a struct on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Pointers to follow: each is at this distance from the one before.
    pub pointers: Vec<u32>,
    /// Where the number is behind the last pointer, in bytes.
    pub offset: u32,
    pub scalar: Scalar,
}

/// A number in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scalar {
    /// bytes to read: 1, 2, 4 or 8
    pub size: u32,
    pub signed: bool,
    /// of a bit field: bits below it, and its own
    pub bits: Option<(u32, u32)>,
    /// the enum that it is of
    pub enum_id: Option<u32>,
}

impl Scalar {
    /// How many bits its value has.
    pub fn width(&self) -> u32 {
        self.bits.map_or(8 * self.size, |(_, bits)| bits)
    }

    /// Can be read: sizes and bits that a number in memory can have.
    pub fn is_sound(&self) -> bool {
        let sized = matches!(self.size, 1 | 2 | 4 | 8);
        let bits =
            |(below, own): (u32, u32)| own > 0 && below <= 64 && own <= 64 && below + own <= 64;
        sized && self.bits.is_none_or(bits)
    }

    /// The number in `raw`: its bytes as in memory, from the lowest on (little endian, as all kernels that we run on).
    pub fn value(&self, raw: u64) -> i128 {
        let (below, own) = self.bits.unwrap_or((0, 8 * self.size));
        // Its own bits to the top, and down again.
        let top = raw << (64 - below - own).min(63);
        match self.signed {
            true => i128::from(top as i64 >> (64 - own)),
            false => i128::from(top >> (64 - own)),
        }
    }
}

/// Names that are told when one is not there.
const SUGGESTIONS: usize = 5;

/// The number at a path from a `struct NAME *` on.
pub fn resolve(btf: &Btf, name: &str, path: &[Step]) -> Result<Access> {
    let Some(root) = btf.struct_named(name) else {
        bail!("this kernel's BTF has no struct {name}");
    };
    let mut access = Place {
        pointers: Vec::new(),
        bit_offset: 0,
        bits: 0,
    };
    let mut current = root;
    for step in path {
        let mut shape = btf.shape(current);
        // `->` and `.` mean the same: the type says whether there is a pointer to follow.
        if let (Step::Member(_), Shape::Pointer(target)) = (step, &shape) {
            access.follow();
            current = *target;
            shape = btf.shape(current);
        }
        current = match (step, shape) {
            (Step::Member(wanted), Shape::Struct(struct_name)) => {
                let Some((offset, member)) = find(btf, current, wanted) else {
                    bail!(
                        "{struct_name} has no member {wanted}{}",
                        suggest(btf, current, wanted)
                    );
                };
                access.advance(offset)?;
                access.bits = member.bits;
                member.type_id
            }
            (Step::Element(n), Shape::Array { element, count }) => {
                if *n >= count {
                    bail!("element {n} of an array of {count}");
                }
                access.element(*n, btf.size(element))?;
                element
            }
            (Step::Element(n), Shape::Pointer(target)) => {
                access.follow();
                access.element(*n, btf.size(target))?;
                target
            }
            (Step::Member(wanted), _) => {
                bail!("{wanted}: what is before it is no struct, nor a pointer to one")
            }
            (Step::Element(n), _) => bail!("[{n}]: what is before it is no array"),
        };
    }
    access.number(btf, current)
}

/// Where a path has come to.
struct Place {
    pointers: Vec<u32>,
    bit_offset: u32,
    bits: u32,
}

impl Place {
    fn follow(&mut self) {
        self.pointers.push(self.bit_offset / 8);
        self.bit_offset = 0;
        self.bits = 0;
    }

    /// Goes on to element `n` of `size` bytes.
    fn element(&mut self, n: u32, size: u32) -> Result<()> {
        match n.checked_mul(size).and_then(|bytes| bytes.checked_mul(8)) {
            Some(bits) => self.advance(bits),
            None => bail!("element {n} of {size} bytes each is out of reach"),
        }
    }

    fn advance(&mut self, bits: u32) -> Result<()> {
        let sum = self.bit_offset.checked_add(bits);
        self.bit_offset = sum.context("this is out of reach of what is before it")?;
        Ok(())
    }

    /// The number here, if it is one.
    fn number(self, btf: &Btf, type_id: u32) -> Result<Access> {
        let (size, signed, enum_id) = match btf.shape(type_id) {
            Shape::Int { size, signed } => (size, signed, None),
            Shape::Enum { size, signed } => (size, signed, Some(type_id)),
            Shape::Pointer(_) => (8, false, None),
            Shape::Struct(name) => bail!("{name} is not a number: name one of its members"),
            Shape::Array { count, .. } => {
                bail!("an array of {count} is not a number: name an element, [0]")
            }
            Shape::Other => bail!("this is not a number"),
        };
        if !matches!(size, 1 | 2 | 4 | 8) {
            bail!("a number of {size} bytes cannot be compared");
        }
        let mut scalar = Scalar {
            size,
            signed,
            bits: None,
            enum_id,
        };
        let offset = self.bit_offset / 8;
        if self.bits > 0 {
            let below = self.bit_offset % 8;
            let bytes = (below + self.bits).div_ceil(8).next_power_of_two();
            if bytes > 8 {
                bail!("a bit field over {bytes} bytes cannot be compared");
            }
            scalar.size = bytes;
            scalar.bits = Some((below, self.bits));
        }
        Ok(Access {
            pointers: self.pointers,
            offset,
            scalar,
        })
    }
}

/// Structs without a name within one another: no kernel has more than some three, and a broken BTF may have no end of them.
const DEPTH: u32 = 16;

/// A member by its name, and its place in bits; members of structs and unions without a name count as the struct's own.
fn find(btf: &Btf, type_id: u32, wanted: &str) -> Option<(u32, Member)> {
    fn within(btf: &Btf, type_id: u32, wanted: &str, depth: u32) -> Option<(u32, Member)> {
        for member in btf.members(type_id) {
            if member.name == wanted {
                return Some((member.bit_offset, member));
            }
            if member.name.is_empty() && depth > 0 {
                let found = within(btf, member.type_id, wanted, depth - 1);
                if let Some((offset, found)) = found {
                    return Some((member.bit_offset.checked_add(offset)?, found));
                }
            }
        }
        None
    }
    within(btf, type_id, wanted, DEPTH)
}

fn names(btf: &Btf, type_id: u32, depth: u32, into: &mut Vec<String>) {
    for member in btf.members(type_id) {
        if member.name.is_empty() && depth > 0 {
            names(btf, member.type_id, depth - 1, into);
        } else {
            into.push(member.name);
        }
    }
}

/// `; did you mean …?` with the names of a struct that are close.
fn suggest(btf: &Btf, type_id: u32, wanted: &str) -> String {
    let mut all = Vec::new();
    names(btf, type_id, DEPTH, &mut all);
    let close = closest(wanted, all);
    if close.is_empty() {
        return String::new();
    }
    format!("; did you mean {}?", close.join(", "))
}

/// The names that are closest to a wrong one, the closest first.
pub fn closest(wanted: &str, mut names: Vec<String>) -> Vec<String> {
    let far = wanted.len().max(4) / 2;
    names.sort();
    names.dedup();
    let mut ranked: Vec<(usize, String)> = names
        .into_iter()
        .map(|name| {
            let part = wanted.len() >= 3
                && (name.contains(wanted) || wanted.contains(&name) && name.len() >= 3);
            let distance = strsim::levenshtein(wanted, &name);
            (if part { distance.min(2) } else { distance }, name)
        })
        .filter(|(distance, _)| *distance <= far)
        .collect();
    ranked.sort();
    ranked
        .into_iter()
        .take(SUGGESTIONS)
        .map(|(_, name)| name)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> Vec<Step> {
        text.split('.')
            .map(|word| match word.parse() {
                Ok(n) => Step::Element(n),
                Err(_) => Step::Member(word.to_owned()),
            })
            .collect()
    }

    fn sk_buff(text: &str) -> Result<Access> {
        resolve(&Btf::vmlinux(None).unwrap(), "sk_buff", &path(text))
    }

    #[test]
    fn members_of_this_kernel() {
        let mark = sk_buff("mark").unwrap();
        assert!(mark.pointers.is_empty() && mark.scalar.width() == 32 && !mark.scalar.signed);
        let ifindex = sk_buff("dev.ifindex").unwrap();
        assert_eq!(ifindex.pointers.len(), 1);
        assert!(ifindex.scalar.signed && ifindex.scalar.size == 4);
        // Through an embedded struct and two pointers.
        let inum = sk_buff("dev.nd_net.net.ns.inum").unwrap();
        assert_eq!(inum.pointers.len(), 2);
        let cb = sk_buff("cb.3").unwrap();
        assert_eq!(cb.offset, sk_buff("cb.0").unwrap().offset + 3);
        let bits = sk_buff("pkt_type").unwrap();
        assert_eq!(bits.scalar.bits, Some((0, 3)));
        assert_eq!(sk_buff("sk").unwrap().scalar.size, 8);
    }

    #[test]
    fn what_is_not_there_is_told_with_close_names() {
        let error = |text| sk_buff(text).unwrap_err().to_string();
        assert!(
            error("dev.ifindx").contains("did you mean ifindex"),
            "{}",
            error("dev.ifindx")
        );
        assert!(error("makr").contains("mark"), "{}", error("makr"));
        assert!(error("mark.x").contains("no struct"), "{}", error("mark.x"));
        assert!(error("cb").contains("[0]"), "{}", error("cb"));
        assert!(error("cb.48").contains("array of 48"), "{}", error("cb.48"));
        for far in ["dev.536870912.ifindex", "dev.4294967295.ifindex"] {
            assert!(error(far).contains("out of reach"), "{}", error(far));
        }
        assert!(
            error("users").contains("is not a number"),
            "{}",
            error("users")
        );
    }

    #[test]
    fn closeness() {
        let names = ["mark", "mac_len", "len", "data_len", "hash"]
            .map(str::to_owned)
            .to_vec();
        assert_eq!(closest("makr", names.clone())[0], "mark");
        assert_eq!(closest("datalen", names.clone())[0], "data_len");
        assert!(closest("zzzzzz", names).is_empty());
    }
}
