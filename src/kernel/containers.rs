//! Containers: by the paths of cgroups, and by what their runtimes leave on disk. No daemon is asked. What has no name there is known by its
//! id.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::cgroup::{self, CgroupNames, Place};
use super::{pods, process};
use crate::text::escape::escaped;
use crate::text::json;
use crate::usage::usage;

/// Characters of an id that are shown.
const SHORT: usize = 12;
/// An id of docker, containerd, CRI-O, podman.
const ID: usize = 64;
/// Files of runtimes are read up to here.
const MOST: u64 = 16 << 20;
/// Names are read again for an unknown id, but not more often than this.
const AGAIN: Duration = Duration::from_secs(1);
/// Answers that are kept.
const KNOWN: usize = 4096;
/// Containers that an error names.
const NAMED: usize = 8;

/// The container that has this name, or the only one whose id begins so.
pub fn find(text: &str) -> Result<Place> {
    let names = names(Path::new("/"));
    let running = running();
    let ids: HashSet<&String> = names.keys().chain(running.keys()).collect();
    let name = |id: &str| names.get(id).map_or("", String::as_str);
    let mut found: Vec<&String> = ids
        .iter()
        .copied()
        .filter(|id| is_named(name(id), text))
        .collect();
    if found.is_empty() && !text.is_empty() {
        found = ids
            .iter()
            .copied()
            .filter(|id| id.starts_with(text))
            .collect();
    }
    // A name may be used again: what runs is meant.
    if found.len() > 1 && found.iter().any(|id| running.contains_key(*id)) {
        found.retain(|id| running.contains_key(*id));
    }
    let list = |ids: Vec<&String>| {
        let mut list: Vec<String> = ids.into_iter().map(|id| described(id, name(id))).collect();
        list.sort_unstable();
        let more = if list.len() > NAMED { ", ..." } else { "" };
        list.truncate(NAMED);
        format!("{}{more}", list.join(", "))
    };
    match found.as_slice() {
        [] if running.is_empty() => Err(usage(format!(
            "container {text}: no container runs here, as far as cgroups tell"
        ))),
        [] => Err(usage(format!(
            "container {text}: none has this name, and no id begins so; there are {}",
            list(running.keys().collect())
        ))),
        [id] => running.get(*id).map_or_else(
            || {
                Err(usage(format!(
                    "container {}: it does not run",
                    described(id, name(id))
                )))
            },
            |place| Ok(place.clone().into()),
        ),
        several => Err(usage(format!(
            "container {text}: {} are meant: {}",
            several.len(),
            list(several.to_vec())
        ))),
    }
}

fn described(id: &str, name: &str) -> String {
    let short = id.get(..SHORT).unwrap_or(id);
    match name {
        "" => escaped(short.as_bytes()),
        name => escaped(format!("{name} ({short})").as_bytes()),
    }
}

/// Is this what the user calls it? `namespace/pod/container` may lose its beginning, and `namespace/pod` is all of a pod.
fn is_named(name: &str, text: &str) -> bool {
    if name.is_empty() || text.is_empty() {
        return false;
    }
    let of_pod = text.contains('/') && name.starts_with(&format!("{text}/"));
    name == text
        || name.ends_with(&format!("/{text}"))
        || of_pod
        || name.contains(&format!("/{text}/"))
}

#[derive(Debug, Clone)]
struct Runs {
    folder: Option<PathBuf>,
    pids: HashSet<u32>,
}

impl From<Runs> for Place {
    fn from(runs: Runs) -> Self {
        match runs.folder {
            Some(folder) => Self::Cgroup(folder),
            None => Self::Processes(runs.pids),
        }
    }
}

/// Containers that run, by id: from the tree of cgroups, else from the cgroups (v1) of processes.
fn running() -> BTreeMap<String, Runs> {
    let mut all: BTreeMap<String, Runs> = BTreeMap::new();
    if let Some(root) = cgroup::mount() {
        for folder in cgroup::below(root) {
            let id = folder.file_name().and_then(|n| of_folder(n.to_str()?));
            if let Some(id) = id {
                all.entry(id).or_insert(Runs {
                    folder: Some(folder),
                    pids: HashSet::new(),
                });
            }
        }
    }
    if !all.is_empty() {
        return all;
    }
    for pid in process::all() {
        if let Some(id) = of_process(pid) {
            let runs = all.entry(id).or_insert(Runs {
                folder: None,
                pids: HashSet::new(),
            });
            runs.pids.insert(pid);
        }
    }
    all
}

/// The container of a process, by /proc/PID/cgroup.
fn of_process(pid: u32) -> Option<String> {
    path_of_process(pid).and_then(|path| of_path(&path))
}

/// The path in /proc/PID/cgroup that has a container.
fn path_of_process(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    // number:controllers:path
    let mut paths = text.lines().filter_map(|l| l.splitn(3, ':').nth(2));
    paths
        .find(|path| of_path(path).is_some())
        .map(str::to_owned)
}

/// The innermost container in the path of a cgroup.
fn of_path(path: &str) -> Option<String> {
    path.rsplit('/').find_map(of_folder)
}

/// The container that a cgroup's folder is named after: `docker-ID.scope`, `cri-containerd-ID.scope`, `crio-ID.scope`, `libpod-ID.scope`, `ID`,
/// `lxc.payload.NAME`, `machine-NAME.scope`, `systemd-nspawn@NAME.service`. The monitor beside a container is no part of it.
fn of_folder(folder: &str) -> Option<String> {
    if folder.contains("conmon") {
        return None;
    }
    if let Some(name) = folder.strip_prefix("lxc.payload.") {
        return Some(name.to_owned());
    }
    let unit = folder
        .strip_suffix(".scope")
        .or_else(|| folder.strip_suffix(".service"));
    if let Some(name) = unit.and_then(|u| {
        u.strip_prefix("machine-")
            .or_else(|| u.strip_prefix("systemd-nspawn@"))
    }) {
        return Some(name.replace("\\x2d", "-"));
    }
    let id = unit.unwrap_or(folder).rsplit(['-', ':']).next()?;
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (id.len() == ID && id.bytes().all(hex)).then(|| id.to_owned())
}

/// Names of containers by id, as runtimes have written them below `root`.
fn names(root: &Path) -> HashMap<String, String> {
    let mut names = HashMap::new();
    for dir in folders(&root.join("var/lib/docker/containers")) {
        docker(&dir, &mut names);
    }
    let mut stores = vec![
        root.join("var/lib/containers/storage"),
        root.join("run/containers/storage"),
    ];
    let homes = folders(&root.join("home"))
        .into_iter()
        .chain([root.join("root")]);
    stores.extend(homes.map(|h| h.join(".local/share/containers/storage")));
    for store in stores.iter().flat_map(|s| folders(s)) {
        if store.to_string_lossy().ends_with("-containers") {
            for file in ["containers.json", "volatile-containers.json"] {
                stored(&store.join(file), &mut names);
            }
        }
    }
    for space in folders(&root.join("run/containerd/io.containerd.runtime.v2.task")) {
        for dir in folders(&space) {
            containerd(&dir, &mut names);
        }
    }
    for entry in fs::read_dir(root.join("var/log/containers"))
        .into_iter()
        .flatten()
        .flatten()
    {
        kubelet(&entry.file_name().to_string_lossy(), &mut names);
    }
    names
}

fn folders(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|e| e.path()).filter(|p| p.is_dir()).collect()
}

fn json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let mut bytes = Vec::new();
    let file = File::open(path).ok()?;
    file.take(MOST).read_to_end(&mut bytes).ok()?;
    json::read(&bytes).ok()
}

/// config.v2.json
#[derive(Deserialize)]
struct Docker {
    #[serde(rename = "ID")]
    id: String,
    #[serde(rename = "Name")]
    name: String,
}

fn docker(dir: &Path, names: &mut HashMap<String, String>) {
    if let Some(config) = json::<Docker>(&dir.join("config.v2.json")) {
        insert(names, &config.id, config.name.trim_start_matches('/'));
    }
}

#[derive(Deserialize)]
struct Stored {
    id: String,
    names: Option<Vec<String>>,
}

/// containers.json of containers/storage: podman and CRI-O.
fn stored(path: &Path, names: &mut HashMap<String, String>) {
    for container in json::<Vec<Stored>>(path).into_iter().flatten() {
        if let Some(name) = container.names.iter().flatten().next() {
            insert(names, &container.id, name);
        }
    }
}

/// config.json of the OCI
#[derive(Deserialize)]
struct Bundle {
    annotations: Option<HashMap<String, String>>,
}

/// The OCI bundle of a container: the folder is named by its id.
fn containerd(dir: &Path, names: &mut HashMap<String, String>) {
    let bundle = json::<Bundle>(&dir.join("config.json"));
    let notes = bundle.and_then(|b| b.annotations).unwrap_or_default();
    let note = |key: &str| notes.get(key);
    let id = dir.file_name().unwrap_or_default().to_string_lossy();
    if let Some(name) = note("nerdctl/name") {
        insert(names, &id, name);
    }
    let cri = |key: &str| note(&format!("io.kubernetes.cri.{key}"));
    if let (Some(space), Some(pod), Some(name)) = (
        cri("sandbox-namespace"),
        cri("sandbox-name"),
        cri("container-name"),
    ) {
        insert(names, &id, &format!("{space}/{pod}/{name}"));
    }
}

/// `POD_NAMESPACE_CONTAINER-ID.log`
fn kubelet(file: &str, names: &mut HashMap<String, String>) {
    let Some((rest, id)) = file.strip_suffix(".log").and_then(|f| f.rsplit_once('-')) else {
        return;
    };
    if let [pod, space, name] = rest.split('_').collect::<Vec<_>>()[..] {
        insert(names, id, &format!("{space}/{pod}/{name}"));
    }
}

fn insert(names: &mut HashMap<String, String>, id: &str, name: &str) {
    // k8s_CONTAINER_POD_NAMESPACE_UID_ATTEMPT, as docker and CRI-O call them; POD is a pod's sandbox.
    let name = match name.split('_').collect::<Vec<_>>()[..] {
        ["k8s", "POD", ..] => return,
        ["k8s", name, pod, space, ..] => format!("{space}/{pod}/{name}"),
        _ => name.to_owned(),
    };
    names.entry(id.to_owned()).or_insert(name);
}

/// Names of the containers that processes are in.
#[derive(Debug, Default)]
pub struct ContainerNames {
    cgroups: CgroupNames,
    names: HashMap<String, String>,
    /// pods by uid
    pods: HashMap<String, String>,
    read: Option<Instant>,
    /// by cgroup and, where that is not known, process
    known: HashMap<(u64, u32), Option<String>>,
}

impl ContainerNames {
    /// By the cgroup (v2) of a socket, or of a process where that is not known (0): the name, or the beginning of the id; escaped. `None`: none.
    pub fn of(&mut self, cgroup: u64, pid: u32) -> Option<String> {
        let key = (cgroup, if cgroup == 0 { pid } else { 0 });
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let name = self.look(cgroup, pid);
        if self.known.len() >= KNOWN {
            self.known.clear();
        }
        self.known.insert(key, name.clone());
        name
    }

    fn look(&mut self, cgroup: u64, pid: u32) -> Option<String> {
        let by_cgroup = match cgroup {
            0 => None,
            id => self.cgroups.get(id).filter(|path| of_path(path).is_some()),
        };
        let path = by_cgroup
            .map(str::to_owned)
            .or_else(|| path_of_process(pid))?;
        let id = of_path(&path)?;
        let old = self.read.is_none_or(|at| at.elapsed() >= AGAIN);
        if !self.names.contains_key(&id) && old {
            self.names = names(Path::new("/"));
            self.pods = pods::names(Path::new("/"));
            self.read = Some(Instant::now());
        }
        if let Some(name) = self.names.get(&id) {
            return Some(escaped(name.as_bytes()));
        }
        let short = id.get(..SHORT).unwrap_or(&id);
        // What no runtime names may still have a pod with a name.
        let pod = pods::of_path(&path).and_then(|uid| self.pods.get(&uid));
        let name = pod.map_or_else(|| short.to_owned(), |pod| format!("{pod}/{short}"));
        Some(escaped(name.as_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(digit: char) -> String {
        std::iter::repeat_n(digit, ID).collect()
    }

    #[test]
    fn folders_of_cgroups() {
        let a = id('a');
        for folder in [
            a.clone(),
            format!("docker-{a}.scope"),
            format!("cri-containerd-{a}.scope"),
            format!("crio-{a}.scope"),
            format!("libpod-{a}.scope"),
            format!("kubepods-besteffort-pod1.slice:cri-containerd:{a}"),
        ] {
            assert_eq!(of_folder(&folder).as_ref(), Some(&a), "{folder}");
        }
        for (folder, name) in [
            ("lxc.payload.web", "web"),
            ("machine-my\\x2dbox.scope", "my-box"),
            ("systemd-nspawn@box.service", "box"),
        ] {
            assert_eq!(of_folder(folder).as_deref(), Some(name));
        }
        let conmon = format!("libpod-conmon-{a}.scope");
        for folder in [
            "system.slice",
            "",
            "ssh.service",
            &a[1..],
            &conmon,
            "lxc.monitor.web",
        ] {
            assert_eq!(of_folder(folder), None, "{folder}");
        }
        let nested = format!("/machine.slice/libpod-{a}.scope/container");
        assert_eq!(of_path(&nested), Some(a));
    }

    #[test]
    fn names_that_runtimes_leave() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: String| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let ids: Vec<String> = "abcdef0".chars().map(id).collect();
        let docker = format!("{{\"ID\":\"{}\",\"Name\":\"/web\"}}", ids[0]);
        write(
            &format!("var/lib/docker/containers/{}/config.v2.json", ids[0]),
            docker,
        );
        let stored = |id: &str, name: &str| format!("[{{\"id\":\"{id}\",\"names\":[\"{name}\"]}}]");
        let overlay = "storage/overlay-containers";
        write(
            &format!("var/lib/containers/{overlay}/containers.json"),
            stored(&ids[1], "db"),
        );
        write(
            &format!("home/me/.local/share/containers/{overlay}/containers.json"),
            stored(&ids[2], "k8s_app_pod-1_space_uid_0"),
        );
        let bundle = "{\"annotations\":{\"io.kubernetes.cri.sandbox-namespace\":\"s\",\"io.kubernetes.cri.sandbox-name\":\"p\",\"io.kubernetes.cri.container-name\":\"c\"}}";
        let task = "run/containerd/io.containerd.runtime.v2.task";
        write(
            &format!("{task}/k8s.io/{}/config.json", ids[3]),
            bundle.to_owned(),
        );
        write(
            &format!("{task}/default/{}/config.json", ids[4]),
            "{\"annotations\":{\"nerdctl/name\":\"n\"}}".to_owned(),
        );
        write(
            &format!("var/log/containers/web-0_prod_nginx-{}.log", ids[5]),
            String::new(),
        );
        write(
            &format!("var/lib/docker/containers/{}/config.v2.json", ids[6]),
            "no JSON".to_owned(),
        );
        let names = names(root.path());
        let of = |i: usize| names.get(&ids[i]).map(String::as_str);
        let all: Vec<Option<&str>> = (0..7).map(of).collect();
        let expected = [
            Some("web"),
            Some("db"),
            Some("space/pod-1/app"),
            Some("s/p/c"),
            Some("n"),
            Some("prod/web-0/nginx"),
            None,
        ];
        assert_eq!(all, expected);
    }

    #[test]
    fn what_users_call_them() {
        for text in [
            "prod/web-0/nginx",
            "nginx",
            "web-0/nginx",
            "web-0",
            "prod/web-0",
        ] {
            assert!(is_named("prod/web-0/nginx", text), "{text}");
        }
        for text in ["", "prod", "ngin", "web"] {
            assert!(!is_named("prod/web-0/nginx", text), "{text}");
        }
        assert!(is_named("web", "web") && !is_named("", "web"));
    }
}
