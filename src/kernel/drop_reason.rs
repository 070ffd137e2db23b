//! Why an skb was dropped, in the running kernel's own words: numbers differ from kernel to kernel.
//!
//! The core's reasons are `enum skb_drop_reason` of vmlinux. Since 6.4 the upper 16 bits name a subsystem
//! (`enum skb_drop_reason_subsys`). A subsystem has an enum of its own, in vmlinux or in a module: each whose name ends in `drop_reason`.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use super::btf::{self, Btf};

/// How the names of enums of reasons end.
const ENUMS: &str = "drop_reason";
/// A reason that is not known is not looked for more often than this: its module may have been loaded meanwhile.
const AGAIN: Duration = Duration::from_secs(1);
/// How the enums' names begin.
const CORE: &str = "SKB_DROP_REASON_";
const SUBSYSTEM: &str = "SKB_DROP_REASON_SUBSYS_";

/// Names of drop reasons.
#[derive(Debug, Default)]
pub struct DropReasons {
    names: HashMap<u32, String>,
    subsystems: HashMap<u32, String>,
    /// modules, and vmlinux, whose enums are known
    looked_at: HashSet<String>,
    looked: Option<Instant>,
    /// out of a recording: no kernel is asked
    recorded: bool,
    /// reasons were found since [`DropReasons::news`]
    new: bool,
}

impl DropReasons {
    /// What the kernel says; empty on kernels before 5.17. Subsystems are looked up when they drop something.
    pub fn load(btf: &Btf) -> Self {
        Self {
            names: unsigned(btf.enum_values("skb_drop_reason")),
            subsystems: unsigned(btf.enum_values("skb_drop_reason_subsys")),
            ..Self::default()
        }
    }

    /// What a recording says; no kernel is asked.
    pub fn recorded(names: Vec<(u32, String)>, subsystems: Vec<(u32, String)>) -> Self {
        Self {
            names: names.into_iter().collect(),
            subsystems: subsystems.into_iter().collect(),
            recorded: true,
            ..Self::default()
        }
    }

    /// Reasons were found since the last call.
    pub fn news(&mut self) -> bool {
        std::mem::take(&mut self.new)
    }

    /// All names: of reasons, of subsystems.
    pub fn all(&self) -> [Vec<(u32, String)>; 2] {
        [&self.names, &self.subsystems].map(|names| {
            let mut all: Vec<_> = names.iter().map(|(n, name)| (*n, name.clone())).collect();
            all.sort_unstable();
            all
        })
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

    /// The name of `reason`, in full. A reason of a subsystem is looked up when it is first met.
    pub fn name(&mut self, reason: u32) -> String {
        if !self.names.contains_key(&reason) && reason >> 16 != 0 {
            self.look();
        }
        match self.names.get(&reason) {
            Some(name) => name.clone(),
            None => self.unknown(reason),
        }
    }

    /// A name without what all of the core's have in common.
    pub fn shortened(name: &str) -> &str {
        name.strip_prefix(CORE).unwrap_or(name)
    }

    /// The name of `reason`, so shortened.
    pub fn short(&mut self, reason: u32) -> String {
        Self::shortened(&self.name(reason)).to_owned()
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

    /// Takes the reasons of subsystems out of all BTF that was not looked at before.
    fn look(&mut self) {
        if self.recorded || self.looked.is_some_and(|then| then.elapsed() < AGAIN) {
            return;
        }
        self.looked = Some(Instant::now());
        let mut new = btf::modules();
        new.retain(|module| !self.looked_at.contains(module));
        let first = self.looked_at.insert("vmlinux".to_owned());
        if new.is_empty() && !first {
            return;
        }
        let Ok(btf) = Btf::vmlinux(None) else {
            return;
        };
        let mut found = if first {
            btf.values_of_enums(ENUMS)
        } else {
            Vec::new()
        };
        for module in new {
            found.extend(
                btf.module_values_of_enums(&module, ENUMS)
                    .unwrap_or_default(),
            );
            self.looked_at.insert(module);
        }
        for (value, name) in unsigned(found) {
            // Their enums begin with values of the core's.
            if value >> 16 != 0 {
                self.names.entry(value).or_insert(name);
                self.new = true;
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
            ..DropReasons::default()
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
    #[cfg_attr(not(has_drop_reasons), ignore = "this kernel has no drop reasons")]
    fn the_running_kernels_own() {
        let btf = Btf::vmlinux(None).unwrap();
        let mut r = DropReasons::load(&btf);
        let value = btf
            .enum_values("skb_drop_reason")
            .into_iter()
            .find(|(_, n)| n == "SKB_DROP_REASON_NO_SOCKET");
        let (value, name) = value.unwrap();
        assert_eq!(r.name(value as u32), name);
        // Each subsystem that vmlinux itself has an enum of.
        for (value, name) in btf.values_of_enums(ENUMS) {
            if (value as u32) >> 16 != 0 {
                assert_eq!(r.name(value as u32), name);
            }
        }
    }
}
