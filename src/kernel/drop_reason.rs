//! Why an skb was dropped, in the running kernel's own words: numbers differ from kernel to kernel.
//!
//! The core's reasons are `enum skb_drop_reason` of vmlinux. Since 6.4 the upper 16 bits name a subsystem
//! (`enum skb_drop_reason_subsys`), whose reasons are an enum in its module's BTF.

use std::collections::{HashMap, HashSet};

use super::btf::{self, Btf};

/// Subsystems that register reasons: how `enum skb_drop_reason_subsys` begins to name them, the module, the enum.
const SUBSYSTEMS: [(&str, &str, &str); 2] = [
    ("MAC80211", "mac80211", "mac80211_drop_reason"),
    ("OPENVSWITCH", "openvswitch", "ovs_drop_reason"),
];
/// How the enums' names begin.
const CORE: &str = "SKB_DROP_REASON_";
const SUBSYSTEM: &str = "SKB_DROP_REASON_SUBSYS_";

/// Names of drop reasons.
#[derive(Debug, Default)]
pub struct DropReasons {
    names: HashMap<u32, String>,
    subsystems: HashMap<u32, String>,
    /// modules that were looked at
    modules: HashSet<&'static str>,
}

impl DropReasons {
    /// What the kernel and the loaded modules say; empty on kernels before 5.17.
    pub fn load(btf: &Btf) -> Self {
        let mut reasons = Self {
            names: unsigned(btf.enum_values("skb_drop_reason")),
            subsystems: unsigned(btf.enum_values("skb_drop_reason_subsys")),
            modules: HashSet::new(),
        };
        reasons.load_modules(btf);
        reasons
    }

    /// The kernel says reasons at all.
    pub fn any(&self) -> bool {
        !self.names.is_empty()
    }

    /// The number of one of the core's reasons, by its name without what all have in common.
    pub fn number(&self, short: &str) -> Option<u32> {
        let mut all = self.names.iter();
        all.find(|(_, name)| name.strip_prefix(CORE) == Some(short))
            .map(|(number, _)| *number)
    }

    /// The name of `reason`, in full. A reason of a module that was loaded meanwhile is looked up.
    pub fn name(&mut self, reason: u32) -> String {
        if !self.names.contains_key(&reason) && reason >> 16 != 0 && self.new_module() {
            if let Ok(btf) = Btf::vmlinux(None) {
                self.load_modules(&btf);
            }
        }
        match self.names.get(&reason) {
            Some(name) => name.clone(),
            None => self.unknown(reason),
        }
    }

    /// The name without what all of the core's have in common.
    pub fn short(&mut self, reason: u32) -> String {
        let name = self.name(reason);
        name.strip_prefix(CORE).map_or(name.clone(), str::to_owned)
    }

    /// The subsystem of `reason` in lower case (`openvswitch`); `None` for the core's own.
    pub fn subsystem(&self, reason: u32) -> Option<String> {
        let name = self.subsystems.get(&(reason >> 16))?;
        let name = name.strip_prefix(SUBSYSTEM).unwrap_or(name);
        (name != "CORE").then(|| name.to_ascii_lowercase())
    }

    fn unknown(&self, reason: u32) -> String {
        match self.subsystem(reason) {
            Some(subsystem) => format!("{subsystem} reason {}", reason & 0xffff),
            None => format!("reason {reason:#x}"),
        }
    }

    fn new_module(&self) -> bool {
        let loaded = btf::modules();
        SUBSYSTEMS
            .iter()
            .any(|(_, m, _)| !self.modules.contains(m) && loaded.iter().any(|l| l == m))
    }

    fn load_modules(&mut self, btf: &Btf) {
        let loaded = btf::modules();
        for (prefix, module, name) in SUBSYSTEMS {
            let known = self
                .subsystems
                .values()
                .any(|n| n.starts_with(&format!("{SUBSYSTEM}{prefix}")));
            if !known || self.modules.contains(module) {
                continue;
            }
            // Built in, or a module of its own.
            let mut values = btf.enum_values(name);
            if values.is_empty() && loaded.iter().any(|l| l == module) {
                values = btf.module_enum_values(module, name).unwrap_or_default();
                self.modules.insert(module);
            }
            for (value, name) in unsigned(values) {
                // Their enums begin with values of the core's.
                if value >> 16 != 0 {
                    self.names.insert(value, name);
                }
            }
        }
    }
}

fn unsigned(values: Vec<(i64, String)>) -> HashMap<u32, String> {
    values.into_iter().map(|(v, n)| (v as u32, n)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reasons() -> DropReasons {
        DropReasons {
            names: HashMap::from([
                (11, "SKB_DROP_REASON_NETFILTER_DROP".to_string()),
                (0x3_0001, "OVS_DROP_LAST_ACTION".to_string()),
            ]),
            subsystems: HashMap::from([
                (0, "SKB_DROP_REASON_SUBSYS_CORE".to_string()),
                (3, "SKB_DROP_REASON_SUBSYS_OPENVSWITCH".to_string()),
            ]),
            modules: HashSet::from(["mac80211", "openvswitch"]),
        }
    }

    #[test]
    fn names_of_the_core_and_of_subsystems() {
        let mut r = reasons();
        assert_eq!(r.name(11), "SKB_DROP_REASON_NETFILTER_DROP");
        assert_eq!(r.short(11), "NETFILTER_DROP");
        assert_eq!(r.subsystem(11), None);
        assert_eq!(r.short(0x3_0001), "OVS_DROP_LAST_ACTION");
        assert_eq!(r.subsystem(0x3_0001).as_deref(), Some("openvswitch"));
    }

    #[test]
    fn unknown_ones_keep_their_number() {
        let mut r = reasons();
        assert_eq!(r.name(999), "reason 0x3e7");
        assert_eq!(r.name(0x3_0009), "openvswitch reason 9");
        assert_eq!(r.name(0x7_0001), "reason 0x70001");
    }

    #[test]
    fn the_running_kernels_own() {
        let Ok(btf) = Btf::vmlinux(None) else {
            println!("skipped: this kernel has no BTF");
            return;
        };
        let mut r = DropReasons::load(&btf);
        if !r.any() {
            println!("skipped: this kernel has no drop reasons");
            return;
        }
        let value = btf
            .enum_values("skb_drop_reason")
            .into_iter()
            .find(|(_, n)| n == "SKB_DROP_REASON_NO_SOCKET");
        let (value, name) = value.unwrap();
        assert_eq!(r.name(value as u32), name);
    }
}
