//! Conditions on members of kernel structs (`skb->dev->ifindex == 3 && skb->mark & 0xff != 1`): the language, and the
//! eBPF that decides them. What a path means, `kernel::members` knows from BTF.
//!
//! ```text
//! condition  = and { "||" and }
//! and        = term { "&&" term }
//! term       = "!" term | "(" condition ")" | comparison
//! comparison = value [ ("==" | "!=" | "<" | "<=" | ">" | ">=") constant ]     alone: not 0
//! value      = path [ "&" number ] | "(" value ")"
//! path       = "skb" { ("->" | ".") name | "[" number "]" }
//! constant   = number | enum constant | "NULL" | ("htons" | "htonl") "(" number ")"
//! ```
//!
//! A comparison reads memory by bpf_probe_read_kernel. Where a pointer on the way is NULL or cannot be read, it does not
//! hold, whatever it compares.

use anyhow::{Result, anyhow, bail, ensure};

use crate::insn::asm::{Alu, Assembler, Cond, HELPER_PROBE_READ_KERNEL, Insn, Label, Reg, Size};
use crate::kernel::btf::Btf;
use crate::kernel::members::{Access, Scalar, Step, closest, resolve};

/// A condition with its paths and constants looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    Compare(Comparison),
    Not(Box<Condition>),
    All(Vec<Condition>),
    Any(Vec<Condition>),
}

/// A member, as much of it as the mask says, beside a constant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    access: Access,
    mask: Option<u64>,
    cond: Cond,
    constant: u64,
}

/// The deepest nesting of brackets and `!`.
const DEPTH: u32 = 32;

impl Condition {
    /// `root`: the name that paths begin with, and the struct that it points to.
    pub fn parse(text: &str, root: (&str, &str), btf: &Btf) -> Result<Self> {
        let tokens = tokens(text)?;
        let mut parser = Parser {
            tokens: &tokens,
            at: 0,
            depth: 0,
            root,
            btf,
        };
        let condition = parser.any()?;
        match parser.peek() {
            None => Ok(condition),
            Some(token) => bail!("{token} was not expected"),
        }
    }

    /// The body of a subprogram `u64 stub(struct address)`.
    pub fn translate(&self) -> Result<Vec<Insn>> {
        let mut asm = Assembler::default();
        let (yes, no) = (asm.label(), asm.label());
        asm.push(Insn::alu64(Alu::Mov, ROOT, Reg::R1));
        write(&mut asm, self, yes, no);
        asm.place(yes);
        asm.push(Insn::alu32_imm(Alu::Mov, Reg::R0, 1));
        asm.push(Insn::exit());
        asm.place(no);
        asm.push(Insn::alu32_imm(Alu::Mov, Reg::R0, 0));
        asm.push(Insn::exit());
        asm.finish()
    }
}

/// Where the number at a path is: `root` as in [`Condition::parse`].
pub fn path(text: &str, root: (&str, &str), btf: &Btf) -> Result<Access> {
    let tokens = tokens(text)?;
    let mut parser = Parser {
        tokens: &tokens,
        at: 0,
        depth: 0,
        root,
        btf,
    };
    let access = parser.path()?;
    match parser.peek() {
        None => Ok(access),
        Some(token) => bail!("{token} was not expected"),
    }
}

/// The address of the struct.
const ROOT: Reg = Reg::R6;
/// Where values are read to.
const SLOT: i16 = -8;

/// Code that goes to `yes`, which is what follows it unless something is between, or to `no`.
fn write(asm: &mut Assembler, condition: &Condition, yes: Label, no: Label) {
    match condition {
        Condition::Compare(comparison) => {
            compare(asm, comparison, yes, no);
        }
        Condition::Not(inner) => write(asm, inner, no, yes),
        Condition::All(parts) => {
            for part in parts {
                let next = asm.label();
                write(asm, part, next, no);
                asm.place(next);
            }
            asm.jump(yes);
        }
        Condition::Any(parts) => {
            for part in parts {
                let next = asm.label();
                write(asm, part, yes, next);
                asm.place(next);
            }
            asm.jump(no);
        }
    }
}

fn compare(asm: &mut Assembler, comparison: &Comparison, yes: Label, no: Label) {
    let Comparison {
        access,
        mask,
        cond,
        constant,
    } = comparison;
    let mut base = ROOT;
    for offset in &access.pointers {
        read(asm, base, *offset, 8, no);
        base = Reg::R3;
        asm.push(Insn::load(Size::Dw, base, Reg::Fp, SLOT));
        asm.jump_if_imm(base, Cond::Eq, 0, no);
    }
    let Scalar {
        size, signed, bits, ..
    } = access.scalar;
    read(asm, base, access.offset, size, no);
    let value = Reg::R1;
    let width = match size {
        1 => Size::B,
        2 => Size::H,
        4 => Size::W,
        _ => Size::Dw,
    };
    asm.push(Insn::load(width, value, Reg::Fp, SLOT));
    // The member's bits to the top, and down again: that cuts what is not its own, and extends its sign.
    let (below, own) = bits.unwrap_or((0, 8 * size));
    let down = if signed { Alu::Arsh } else { Alu::Rsh };
    if bits.is_some() || signed {
        asm.push(Insn::alu64_imm(Alu::Lsh, value, (64 - below - own) as i32));
        asm.push(Insn::alu64_imm(down, value, (64 - own) as i32));
    }
    if let Some(mask) = mask {
        constant_to(asm, Reg::R2, *mask);
        asm.push(Insn::alu64(Alu::And, value, Reg::R2));
    }
    constant_to(asm, Reg::R2, *constant);
    asm.jump_if(value, *cond, Reg::R2, yes);
    asm.jump(no);
}

/// Bytes at base + offset to the stack; to `no` where they cannot be read.
fn read(asm: &mut Assembler, base: Reg, offset: u32, size: u32, no: Label) {
    if base != Reg::R3 {
        asm.push(Insn::alu64(Alu::Mov, Reg::R3, base));
    }
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R3, offset as i32));
    asm.push(Insn::alu64(Alu::Mov, Reg::R1, Reg::Fp));
    asm.push(Insn::alu64_imm(Alu::Add, Reg::R1, SLOT.into()));
    asm.push(Insn::alu32_imm(Alu::Mov, Reg::R2, size));
    asm.push(Insn::call(HELPER_PROBE_READ_KERNEL));
    asm.jump_if_imm(Reg::R0, Cond::Ne, 0, no);
}

/// A 64-bit constant without the instruction that takes two places, which a line of the old body might point into.
fn constant_to(asm: &mut Assembler, to: Reg, value: u64) {
    let (high, low) = ((value >> 32) as u32, value as u32);
    asm.push(Insn::alu32_imm(
        Alu::Mov,
        to,
        if high == 0 { low } else { high },
    ));
    if high != 0 {
        asm.push(Insn::alu64_imm(Alu::Lsh, to, 32));
        asm.push(Insn::alu32_imm(Alu::Mov, Reg::R4, low));
        asm.push(Insn::alu64(Alu::Or, to, Reg::R4));
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Name(String),
    Number(i128),
    Sign(&'static str),
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Token::Name(name) => write!(f, "'{name}'"),
            Token::Number(number) => write!(f, "'{number}'"),
            Token::Sign(sign) => write!(f, "'{sign}'"),
        }
    }
}

/// Longer ones before those that they begin with.
const SIGNS: [&str; 17] = [
    "->", "==", "!=", "<=", ">=", "&&", "||", "<", ">", "!", "&", "(", ")", "[", "]", ".", "-",
];

fn tokens(text: &str) -> Result<Vec<Token>> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = rest
            .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        let length = if first.is_ascii_digit() {
            tokens.push(Token::Number(number(&rest[..word])?));
            word
        } else if word > 0 {
            tokens.push(Token::Name(rest[..word].to_owned()));
            word
        } else if let Some(sign) = SIGNS.iter().find(|sign| rest.starts_with(**sign)) {
            tokens.push(Token::Sign(sign));
            sign.len()
        } else {
            bail!("'{first}' has no meaning here");
        };
        rest = rest[length..].trim_start();
    }
    Ok(tokens)
}

fn number(text: &str) -> Result<i128> {
    let parsed = match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => i128::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed
        .ok()
        .filter(|n| *n <= i128::from(u64::MAX))
        .ok_or_else(|| anyhow!("'{text}' is no 64-bit number, decimal or 0x…"))
}

struct Parser<'a> {
    tokens: &'a [Token],
    at: usize,
    depth: u32,
    root: (&'a str, &'a str),
    btf: &'a Btf,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<&'a Token> {
        self.tokens.get(self.at)
    }

    /// Takes the sign if it is what comes next.
    fn take(&mut self, sign: &str) -> bool {
        let there = matches!(self.peek(), Some(Token::Sign(s)) if *s == sign);
        self.at += usize::from(there);
        there
    }

    fn expect(&mut self, sign: &str) -> Result<()> {
        if self.take(sign) {
            return Ok(());
        }
        match self.peek() {
            Some(token) => bail!("'{sign}' is missing before {token}"),
            None => bail!("'{sign}' is missing at the end"),
        }
    }

    fn any(&mut self) -> Result<Condition> {
        let mut parts = vec![self.all()?];
        while self.take("||") {
            parts.push(self.all()?);
        }
        Ok(if parts.len() == 1 {
            parts.remove(0)
        } else {
            Condition::Any(parts)
        })
    }

    fn all(&mut self) -> Result<Condition> {
        let mut parts = vec![self.term()?];
        while self.take("&&") {
            parts.push(self.term()?);
        }
        Ok(if parts.len() == 1 {
            parts.remove(0)
        } else {
            Condition::All(parts)
        })
    }

    fn term(&mut self) -> Result<Condition> {
        self.depth += 1;
        ensure!(
            self.depth <= DEPTH,
            "more than {DEPTH} brackets and '!' inside each other"
        );
        let term = self.term_inside();
        self.depth -= 1;
        term
    }

    fn term_inside(&mut self) -> Result<Condition> {
        if self.take("!") {
            return Ok(Condition::Not(Box::new(self.term()?)));
        }
        // `(skb->mark & 1) == 1` and `(skb->mark == 1)` begin alike.
        let start = self.at;
        if self.take("(") {
            if let Ok(value) = self.value() {
                if self.take(")") {
                    return self.comparison(value);
                }
            }
            self.at = start + 1;
            let condition = self.any()?;
            self.expect(")")?;
            return Ok(condition);
        }
        let value = self.value()?;
        self.comparison(value)
    }

    /// A path and the mask behind it.
    fn value(&mut self) -> Result<(Access, Option<u64>)> {
        let access = self.path()?;
        if !self.take("&") {
            return Ok((access, None));
        }
        match self.peek() {
            Some(Token::Number(mask)) => {
                self.at += 1;
                Ok((access, Some(*mask as u64)))
            }
            _ => bail!("a number is missing behind '&'"),
        }
    }

    fn path(&mut self) -> Result<Access> {
        let (name, structure) = self.root;
        match self.peek() {
            Some(Token::Name(first)) if first == name => self.at += 1,
            Some(token) => bail!("{token}: a path begins with {name}, as in {name}->MEMBER"),
            None => bail!("something is missing at the end"),
        }
        let mut shown = name.to_owned();
        let mut steps = Vec::new();
        loop {
            if self.take("->") || self.take(".") {
                let Some(Token::Name(member)) = self.peek() else {
                    bail!("a member's name is missing behind {shown}");
                };
                self.at += 1;
                shown += &format!("->{member}");
                steps.push(Step::Member(member.clone()));
            } else if self.take("[") {
                let Some(Token::Number(n)) = self.peek() else {
                    bail!("a number is missing behind {shown}[");
                };
                self.at += 1;
                self.expect("]")?;
                shown += &format!("[{n}]");
                steps.push(Step::Element(u32::try_from(*n)?));
            } else {
                break;
            }
        }
        ensure!(
            !steps.is_empty(),
            "{name} alone is no number: name a member, as in {name}->MEMBER"
        );
        resolve(self.btf, structure, &steps).map_err(|e| anyhow!("{shown}: {e}"))
    }

    fn comparison(&mut self, (access, mask): (Access, Option<u64>)) -> Result<Condition> {
        let scalar = access.scalar;
        let signed = scalar.signed && mask.is_none();
        let compare = |cond, constant| {
            Condition::Compare(Comparison {
                access,
                mask,
                cond,
                constant,
            })
        };
        let Some(Token::Sign(sign)) = self.peek() else {
            return Ok(compare(Cond::Ne, 0));
        };
        let cond = match (*sign, signed) {
            ("==", _) => Cond::Eq,
            ("!=", _) => Cond::Ne,
            ("<", false) => Cond::Lt,
            ("<=", false) => Cond::Le,
            (">", false) => Cond::Gt,
            (">=", false) => Cond::Ge,
            ("<", true) => Cond::Slt,
            ("<=", true) => Cond::Sle,
            (">", true) => Cond::Sgt,
            (">=", true) => Cond::Sge,
            _ => return Ok(compare(Cond::Ne, 0)),
        };
        self.at += 1;
        let constant = self.constant(scalar)?;
        Ok(compare(cond, fit(constant, scalar, signed)?))
    }

    fn constant(&mut self, scalar: Scalar) -> Result<i128> {
        let negative = self.take("-");
        let Some(token) = self.peek() else {
            bail!("a number is missing at the end");
        };
        self.at += 1;
        let value = match token {
            Token::Number(number) => *number,
            Token::Name(name) if name == "NULL" => 0,
            Token::Name(name) if name == "htons" || name == "htonl" => {
                self.expect("(")?;
                let Some(Token::Number(number)) = self.peek() else {
                    bail!("a number is missing behind {name}(");
                };
                self.at += 1;
                self.expect(")")?;
                if name == "htons" {
                    i128::from(u16::try_from(*number)?.to_be())
                } else {
                    i128::from(u32::try_from(*number)?.to_be())
                }
            }
            Token::Name(name) => i128::from(self.enum_constant(scalar, name)?),
            Token::Sign(sign) => bail!("'{sign}': a number is missing before it"),
        };
        Ok(if negative { -value } else { value })
    }

    fn enum_constant(&self, scalar: Scalar, name: &str) -> Result<i64> {
        if let Some(value) = self.btf.constant(scalar.enum_id, name) {
            return Ok(value);
        }
        let close = closest(name, self.btf.constants());
        match close.is_empty() {
            true => bail!("{name}: no enum of this kernel has a constant of this name"),
            false => bail!(
                "{name}: no such constant; did you mean {}?",
                close.join(", ")
            ),
        }
    }
}

/// The constant as the member's value is compared: 64 bits, extended as the member is.
fn fit(constant: i128, scalar: Scalar, signed: bool) -> Result<u64> {
    let width = scalar.width();
    let (low, high) = (-(1i128 << (width - 1)), (1i128 << width) - 1);
    ensure!(
        (low..=high).contains(&constant),
        "{constant} does not fit the member's {width} bits: it would never be equal"
    );
    // 0xffffffff and -1 are the same 32 bits.
    let bits = constant as u64;
    let rest = 64 - width;
    Ok(if signed {
        (((bits << rest) as i64) >> rest) as u64
    } else {
        bits << rest >> rest
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Condition> {
        Condition::parse(text, ("skb", "sk_buff"), &Btf::vmlinux(None).unwrap())
    }

    /// What they mean is for the live tests filter_members_*.
    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn each_form_of_condition_becomes_instructions() {
        for text in [
            "skb->mark",
            "skb->mark == 0x10",
            "skb->dev->ifindex == 3 && skb->len > 100 || !skb->sk",
            "(skb->mark & 0xff) == 3",
            "skb->mark & 0xff != 3",
            "!(skb->pkt_type == 4 || skb->cb[3] >= 0x80)",
            "skb->dev->reg_state == NETREG_REGISTERED",
            "skb->dev->nd_net.net->ns.inum == 4026531840",
            "skb->protocol == htons(0x0800)",
            "skb->sk == NULL",
            "skb->dev->name[0] == 118",
        ] {
            let condition = parse(text).unwrap_or_else(|e| panic!("{text}: {e:#}"));
            assert!(condition.translate().unwrap().len() > 8, "{text}");
        }
    }

    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn what_is_wrong_is_told() {
        for (text, words) in [
            ("", "missing at the end"),
            ("skb", "alone is no number"),
            ("mark == 1", "a path begins with skb"),
            ("skb->mark ==", "missing at the end"),
            ("skb->mark = 1", "'='"),
            ("skb->mark == 1 skb->len", "not expected"),
            ("(skb->mark == 1", "')' is missing"),
            (
                "skb->dev->ifindx == 1",
                "skb->dev->ifindx: struct net_device has no member ifindx; did you mean ifindex",
            ),
            (
                "skb->dev->reg_state == NETREG_REGISTRED",
                "did you mean NETREG_REGISTERED",
            ),
            ("skb->mark == NO_SUCH_CONSTANT", "no such constant"),
            ("skb->pkt_type == 8", "does not fit"),
            ("skb->mark == 0x1ffffffff", "does not fit"),
            ("skb->cb[48]", "array of 48"),
            ("skb->mark == 99999999999999999999", "64-bit"),
        ] {
            let error = format!("{:#}", parse(text).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
        let deep = format!("{}skb->mark{}", "(".repeat(60), ")".repeat(60));
        assert!(
            parse(&deep)
                .unwrap_err()
                .to_string()
                .contains("inside each other")
        );
    }

    #[test]
    fn constants_are_extended_as_members_are() {
        let scalar = |size, signed| Scalar {
            size,
            signed,
            bits: None,
            enum_id: None,
        };
        assert_eq!(fit(-1, scalar(4, false), false).unwrap(), 0xffff_ffff);
        assert_eq!(fit(-1, scalar(4, true), true).unwrap(), u64::MAX);
        assert_eq!(fit(0xffff_ffff, scalar(4, true), true).unwrap(), u64::MAX);
        assert_eq!(
            fit(i128::from(u64::MAX), scalar(8, false), false).unwrap(),
            u64::MAX
        );
        assert!(fit(256, scalar(1, false), false).is_err());
    }
}
