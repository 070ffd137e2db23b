//! Pods of Kubernetes on this node, by name: kubelet's log folders (`/var/log/pods/NAMESPACE_NAME_UID`) name them, and
//! the paths of cgroups have their uids. Nobody is asked.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use anyhow::Result;

use super::cgroup::{self, Place};
use super::process;
use crate::text::escape::escaped;
use crate::usage::usage;

/// kubelet's folders, below the root.
const LOGS: &str = "var/log/pods";
/// Pods that an error names.
const NAMED: usize = 8;

/// The pod `NAMESPACE/NAME` that runs on this node.
pub fn find(text: &str) -> Result<Place> {
    let wrong = |why: String| usage(format!("pod {text}: {why}"));
    if text.split('/').filter(|part| !part.is_empty()).count() != 2
        || text.matches('/').count() != 1
    {
        return Err(wrong("give NAMESPACE/NAME".into()));
    }
    let names = names(Path::new("/"));
    let mut running = running();
    let uids = names.iter().filter(|(_, name)| *name == text);
    // A pod of this name may have been here before: its folder is there, its cgroup is not.
    let found: Vec<&String> = uids.map(|(uid, _)| uid).collect();
    for uid in &found {
        if let Some(place) = running.remove(*uid) {
            return Ok(place);
        }
    }
    if !found.is_empty() {
        return Err(wrong("it does not run on this node".into()));
    }
    let mut known: Vec<String> = running
        .keys()
        .map(|uid| names.get(uid).unwrap_or(uid))
        .map(|name| escaped(name.as_bytes()))
        .collect();
    known.sort_unstable();
    let more = if known.len() > NAMED { ", ..." } else { "" };
    known.truncate(NAMED);
    Err(wrong(match known.is_empty() {
        true => format!("no pod runs here, as far as cgroups and /{LOGS} tell"),
        false => format!("none has this name; there are {}{more}", known.join(", ")),
    }))
}

/// The names of pods that run here.
pub fn running_names() -> Vec<String> {
    let mut names = names(Path::new("/"));
    let uids = running().into_keys();
    let mut running: Vec<String> = uids.filter_map(|uid| names.remove(&uid)).collect();
    running.sort_unstable();
    running
}

/// `NAMESPACE/NAME` by uid.
pub(super) fn names(root: &Path) -> HashMap<String, String> {
    let folders = fs::read_dir(root.join(LOGS))
        .into_iter()
        .flatten()
        .flatten();
    folders
        .filter_map(|entry| {
            let folder = entry.file_name().into_string().ok()?;
            // None of the three may have a `_`.
            match folder.split('_').collect::<Vec<_>>()[..] {
                [space, name, uid] => Some((uid.to_owned(), format!("{space}/{name}"))),
                _ => None,
            }
        })
        .collect()
}

/// Pods that run, by uid: from the tree of cgroups, else from the cgroups (v1) of processes.
fn running() -> BTreeMap<String, Place> {
    let mut all = BTreeMap::new();
    for folder in cgroup::mount().map(cgroup::below).unwrap_or_default() {
        let uid = folder.file_name().and_then(|n| of_folder(n.to_str()?));
        if let Some(uid) = uid {
            all.entry(uid).or_insert(Place::Cgroup(folder));
        }
    }
    if !all.is_empty() {
        return all;
    }
    for pid in process::all() {
        let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        // number:controllers:path
        let paths = text.lines().filter_map(|l| l.splitn(3, ':').nth(2));
        if let Some(uid) = paths.filter_map(of_path).next() {
            let place = all
                .entry(uid)
                .or_insert(Place::Processes(Default::default()));
            if let Place::Processes(pids) = place {
                pids.insert(pid);
            }
        }
    }
    all
}

/// The uid of the pod in the path of a cgroup.
pub(super) fn of_path(path: &str) -> Option<String> {
    if !path.contains("kubepods") {
        return None;
    }
    path.rsplit('/').find_map(of_folder)
}

/// The uid in a cgroup's folder: `podUID` (driver cgroupfs), or `kubepods-QOS-podUID.slice` with `_` for `-` (driver
/// systemd).
fn of_folder(folder: &str) -> Option<String> {
    let uid = match folder.strip_suffix(".slice") {
        Some(slice) => slice
            .strip_prefix("kubepods")?
            .rsplit_once("-pod")?
            .1
            .replace('_', "-"),
        None => folder.strip_prefix("pod")?.to_owned(),
    };
    let fits = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    (uid.len() >= 32 && uid.bytes().all(fits)).then_some(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UID: &str = "0b3c1d52-4a7e-4f0e-9d5f-2f6c1d0e7a11";

    #[test]
    fn uids_in_paths_of_cgroups() {
        let systemd = UID.replace('-', "_");
        for path in [
            format!("/kubepods/burstable/pod{UID}/{}", "a".repeat(64)),
            format!("/kubepods.slice/kubepods-pod{systemd}.slice/cri-containerd-a.scope"),
            format!("/x/kubepods-besteffort.slice/kubepods-besteffort-pod{systemd}.slice"),
        ] {
            assert_eq!(of_path(&path).as_deref(), Some(UID), "{path}");
        }
        // A static pod's uid is a hash.
        let hash = "c".repeat(32);
        let path = format!("/kubepods/pod{hash}");
        assert_eq!(of_path(&path).as_deref(), Some(&*hash));
        let short = "/kubepods/pod1";
        let other = format!("/user.slice/pod{UID}");
        for path in ["/kubepods.slice", short, "/kubepods/podcast", "/", &other] {
            assert_eq!(of_path(path), None, "{path}");
        }
    }

    #[test]
    fn names_that_kubelet_leaves() {
        let root = tempfile::tempdir().unwrap();
        for folder in [&format!("prod_web-1_{UID}"), "odd", "a_b_c_d"] {
            fs::create_dir_all(root.path().join(LOGS).join(folder)).unwrap();
        }
        let names = names(root.path());
        assert_eq!(names.len(), 1);
        assert_eq!(names[UID], "prod/web-1");
    }

    #[test]
    fn a_wrong_name_is_a_usage_error() {
        for text in ["web", "", "/", "a/", "a/b/c", "no-such/pod"] {
            let e = find(text).unwrap_err();
            assert!(e.is::<crate::usage::UsageError>(), "{e:#}");
        }
    }
}
