//! Each reason that this kernel can give for a drop or a reset has a sentence.

use std::process::Command;

use anyhow::{Result, ensure};

use netprobe::explain::Rules;
use netprobe::kernel::btf::{self, Btf};

use crate::common::{Case, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("why_reasons_have_sentences", sentences)
            .trace()
            .kernel(5, 17),
    ]
}

/// Enums that hold reasons, by how their names end.
const ENUMS: [&str; 2] = ["drop_reason", "rst_reason"];
/// No reasons: limits of the enums, bits of subsystems, and packets that are not dropped.
const NONE: [&str; 9] = [
    "NOT_DROPPED_YET",
    "CONSUMED",
    "MAX",
    "SUBSYS_MASK",
    "SK_RST_REASON_MAX",
    "OVS_DROP_MAX",
    "QDISC_DROP_MAX",
    "__OVS_DROP_REASON",
    "__QDISC_DROP_REASON",
];

fn sentences() -> Result<()> {
    // Its reasons are in its own BTF. A kernel without the module has none of them.
    let _ = Command::new("modprobe").arg("openvswitch").status();
    let kernel = Btf::vmlinux(None)?;
    let mut names = Vec::new();
    for end in ENUMS {
        names.extend(kernel.values_of_enums(end));
        for module in btf::modules() {
            names.extend(kernel.module_values_of_enums(&module, end)?);
        }
    }
    let short = |name: &str| {
        let name = name
            .strip_prefix("SKB_DROP_REASON_")
            .or(name.strip_prefix("SKB_"));
        name.map(str::to_owned)
    };
    let names: Vec<String> = (names
        .into_iter()
        .map(|(_, name)| short(&name).unwrap_or(name)))
    .collect();
    ensure!(names.len() > 20, "only {} reasons found", names.len());
    let rules = Rules::builtin();
    let missing: Vec<&String> = (names.iter())
        .filter(|name| !NONE.contains(&name.as_str()) && rules.reason(name).is_none())
        .collect();
    ensure!(missing.is_empty(), "no sentence for {missing:?}");
    Ok(())
}
