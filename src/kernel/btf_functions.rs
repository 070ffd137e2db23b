//! Which functions of the kernel take which arguments, by BTF: those with a pointer to some struct, and those of netfilter's hooks.

use anyhow::Result;
use rustc_hash::FxHashMap;

use super::btf::Btf;
use super::btf_data::{
    KIND_ENUM, KIND_FUNC, KIND_FUNC_PROTO, KIND_INT, KIND_PTR, KIND_STRUCT, KIND_UNION,
};

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

impl Btf {
    /// Functions of vmlinux and of `modules` that take a pointer to `struct NAME` (`const` or not) in one of the first five
    /// argument registers.
    pub fn functions_taking(&self, name: &str, modules: &[String]) -> Result<Vec<Function>> {
        // A module's BTF continues vmlinux's: what that has is looked for once, not once a module.
        let structs = self.struct_ids(name);
        let reasons = self.ids(KIND_ENUM, "skb_drop_reason");
        let sock = self.struct_ids("sock");
        let mut found = self.own_functions_taking(&structs, &reasons, &sock);
        for module in modules {
            let btf = self.module(module)?;
            btf.await_names(&format!("{name}\nskb_drop_reason\nsock"));
            let own = |base: &[u32], more: Vec<u32>| [base, &more].concat();
            found.extend(btf.own_functions_taking(
                &own(&structs, btf.struct_ids(name)),
                &own(&reasons, btf.ids(KIND_ENUM, "skb_drop_reason")),
                &own(&sock, btf.struct_ids("sock")),
            ));
        }
        Ok(found)
    }

    fn own_functions_taking(&self, wanted: &[u32], reasons: &[u32], sock: &[u32]) -> Vec<Function> {
        let mut protos: FxHashMap<u64, Option<(u8, Option<u8>)>> = FxHashMap::default();
        let mut found = Vec::new();
        let mut names = Vec::new();
        for id in self.first..self.count() {
            let Some(func) = self.get(id).filter(|t| t.kind() == KIND_FUNC) else {
                continue;
            };
            let place = *protos
                .entry(func.size_or_type().into())
                .or_insert_with(|| self.argument(func.size_or_type(), wanted, reasons));
            if let Some((arg, reason_arg)) = place {
                names.push(func.name_off());
                found.push(Function {
                    name: String::new(),
                    module: self.module.clone(),
                    arg,
                    reason_arg,
                    returns_number: self.returns_number(func.size_or_type()),
                    sock_first: arg == 2 && self.sock_first(func.size_or_type(), sock),
                });
            }
        }
        for (function, name) in found.iter_mut().zip(self.names(names)) {
            function.name = name;
        }
        found
    }

    /// Names of the functions of vmlinux and of `modules` that netfilter can call at a hook, by their type: `f(void *priv, struct sk_buff *,
    /// const struct nf_hook_state *)`.
    pub fn functions_like_hooks(&self, modules: &[String]) -> Result<Vec<String>> {
        let states = self.struct_ids("nf_hook_state");
        let mut found = self.own_functions_like_hooks(&states);
        for module in modules {
            let btf = self.module(module)?;
            let states = [&states[..], &btf.struct_ids("nf_hook_state")].concat();
            found.extend(btf.own_functions_like_hooks(&states));
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    fn own_functions_like_hooks(&self, states: &[u32]) -> Vec<String> {
        let target = |id: u32| {
            let pointer = self.get(self.skip_modifiers(id))?;
            (pointer.kind() == KIND_PTR).then(|| self.skip_modifiers(pointer.size_or_type()))
        };
        let mut names = Vec::new();
        for id in self.first..self.count() {
            let Some(func) = self.get(id).filter(|t| t.kind() == KIND_FUNC) else {
                continue;
            };
            let proto = self.get(func.size_or_type());
            // struct btf_param { __u32 name_off; __u32 type; } behind the type
            let is_hook = proto.is_some_and(|p| {
                p.kind() == KIND_FUNC_PROTO
                    && p.vlen() == 3
                    && target(p.word(1)) == Some(0)
                    && target(p.word(5)).is_some_and(|id| states.contains(&id))
            });
            if is_hook {
                names.push(func.name_off());
            }
        }
        self.names(names)
    }

    /// How many arguments a function of vmlinux or of this module takes; `None` where it is not there.
    pub fn argument_count(&self, name: &str) -> Option<usize> {
        let func = self.get(*self.ids(KIND_FUNC, name).first()?)?;
        let proto = self.get(func.size_or_type())?;
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
                let target = self.skip_modifiers(t.size_or_type());
                if wanted.contains(&target) {
                    arg = Some(register);
                }
            }
            if reason.is_none() && reasons.contains(&id) {
                reason = Some(register);
            }
            register += match t.kind() {
                // By value: in one or two registers, or on the stack (System V ABI, AAPCS64).
                KIND_STRUCT | KIND_UNION => match t.size_or_type() {
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
        let value = proto.and_then(|p| self.get(self.skip_modifiers(p.size_or_type())));
        value.is_some_and(|t| matches!(t.kind(), KIND_INT | KIND_ENUM))
    }

    fn sock_first(&self, proto: u32, sock: &[u32]) -> bool {
        let first = || {
            let proto = self
                .get(proto)
                .filter(|t| t.kind() == KIND_FUNC_PROTO && t.vlen() > 0)?;
            let pointer = self.get(self.skip_modifiers(proto.word(1)))?;
            (pointer.kind() == KIND_PTR).then_some(())?;
            Some(self.skip_modifiers(pointer.size_or_type()))
        };
        first().is_some_and(|id| sock.contains(&id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Any Linux with BTF: these have been so in every kernel that netprobe supports.
    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn places_of_the_skb_in_well_known_functions() {
        let btf = Btf::vmlinux(None).unwrap();
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
    #[cfg_attr(not(has_drop_reasons), ignore = "this kernel has no drop reasons")]
    fn drop_reasons_and_their_place() {
        let btf = Btf::vmlinux(None).unwrap();
        let reasons = btf.enum_values("skb_drop_reason");
        assert!(
            reasons
                .iter()
                .any(|(_, n)| n == "SKB_DROP_REASON_NETFILTER_DROP")
        );
        let found = btf.functions_taking("sk_buff", &[]).unwrap();
        assert!(found.iter().any(|f| f.reason_arg == Some(f.arg + 1)));
        assert!(btf.enum_values("no_such_enum").is_empty());
    }
}
