//! What reaches what in a program: which loads need not be brought to host order, and where X is the length of an IPv4 header. cBPF jumps
//! forward only, so that one pass over the operations is enough.

use super::super::cbpf::{self, Acc, Op, Operand, Operand2};

/// A set of operations.
#[derive(Clone, Default, PartialEq)]
struct Set(Vec<u64>);

impl Set {
    fn insert(&mut self, at: usize) {
        if self.0.len() <= at / 64 {
            self.0.resize(at / 64 + 1, 0);
        }
        self.0[at / 64] |= 1 << (at % 64);
    }

    fn merge(&mut self, other: &Set) {
        if self.0.len() < other.0.len() {
            self.0.resize(other.0.len(), 0);
        }
        for (to, from) in self.0.iter_mut().zip(&other.0) {
            *to |= from;
        }
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let words = self.0.iter().enumerate();
        words.flat_map(|(i, word)| {
            (0..64)
                .filter(move |b| word >> b & 1 != 0)
                .map(move |b| i * 64 + b)
        })
    }
}

/// For each operation what is known.
pub(super) struct Known {
    /// The load leaves A in network order, and the comparison takes it so: bytes of the load.
    pub network: Vec<Option<u32>>,
    /// X is 4 * (a byte & 15), whatever the way here.
    pub header: Vec<bool>,
}

/// Where an operation goes on.
fn ways(op: &Op, at: usize) -> impl Iterator<Item = usize> {
    let next: [Option<usize>; 2] = match *op {
        Op::Return(_) => [None, None],
        Op::Jump { k } => [Some(k as usize), None],
        Op::Branch { jt, jf, .. } => [Some(jt.into()), Some(jf.into())],
        _ => [Some(0), None],
    };
    next.into_iter().flatten().map(move |k| at + 1 + k)
}

/// Does it read A in another way than by comparing it with a constant for equality?
fn reads_value(op: &Op) -> bool {
    match op {
        Op::Branch { cond, operand, .. } => {
            *cond != cbpf::JMP_EQ || !matches!(operand, Operand::K(_))
        }
        Op::Store { from, .. } => matches!(from, Acc::A),
        Op::Return(value) => matches!(value, Operand2::A),
        Op::Alu { .. } | Op::Neg | Op::GiveX => true,
        _ => false,
    }
}

impl Known {
    pub fn of(ops: &[Op], reachable: &[bool]) -> Self {
        // Who may have set A, and whether only header lengths set X. The start counts as an operation behind the last one.
        let start = ops.len();
        let mut setters = vec![Set::default(); ops.len()];
        setters[0].insert(start);
        let mut header = vec![true; ops.len()];
        header[0] = false;
        for (at, op) in ops.iter().enumerate().filter(|(at, _)| reachable[*at]) {
            let mut a = setters[at].clone();
            let mut x = header[at];
            match op {
                Op::HeaderLength { .. } => x = true,
                Op::GiveX | Op::Set { to: Acc::X, .. } => x = false,
                Op::Load { .. } | Op::Alu { .. } | Op::Neg | Op::TakeX | Op::Set { .. } => {
                    a = Set::default();
                    a.insert(at);
                }
                _ => {}
            }
            for next in ways(op, at) {
                setters[next].merge(&a);
                header[next] &= x;
            }
        }

        let size = |at: usize| match ops.get(at) {
            Some(Op::Load { size, .. }) if *size > 1 => Some(*size),
            _ => None,
        };
        let mut network: Vec<Option<u32>> = (0..ops.len()).map(size).collect();
        loop {
            let mut changed = false;
            for (at, op) in ops.iter().enumerate().filter(|(at, _)| reachable[*at]) {
                let compares = matches!(op, Op::Branch { .. }) && !reads_value(op);
                if !compares && !reads_value(op) {
                    continue;
                }
                let mut sizes = setters[at]
                    .iter()
                    .map(|s| network.get(s).copied().flatten());
                let first = sizes.next().flatten();
                let same = first.is_some() && sizes.all(|size| size == first);
                if compares && same {
                    continue;
                }
                for setter in setters[at].iter().filter(|setter| *setter < start) {
                    changed |= network[setter].take().is_some();
                }
            }
            if !changed {
                break;
            }
        }
        for (at, op) in ops.iter().enumerate() {
            if let (true, Op::Branch { .. }) = (reachable[at], op) {
                let setter = setters[at].iter().next();
                network[at] = setter.and_then(|setter| network.get(setter).copied().flatten());
            }
        }
        Known { network, header }
    }
}
