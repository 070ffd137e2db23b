//! What this machine can do, found out from the kernel's own files: netprobe is under test, so it is not asked.

use std::collections::HashSet;
use std::fmt;
use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// A look at the environment, taken once.
pub struct Env {
    /// As `uname -r` says it.
    pub release: String,
    /// Major and minor number.
    pub kernel: (u32, u32),
    root: bool,
    btf: bool,
    kprobes: bool,
    lockdown: Option<String>,
    functions: HashSet<String>,
}

impl Env {
    /// Looks.
    pub fn look() -> Self {
        let release = read("/proc/sys/kernel/osrelease");
        let mut numbers = release
            .split(['.', '-'])
            .map(|part| part.parse().unwrap_or(0));
        Self {
            kernel: (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)),
            root: nix::unistd::geteuid().is_root(),
            btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            kprobes: Path::new("/sys/bus/event_source/devices/kprobe/type").exists(),
            lockdown: lockdown(),
            functions: functions(),
            release,
        }
    }

    pub fn lacks_root(&self) -> Option<String> {
        (!self.root).then(|| "needs root".to_owned())
    }

    pub fn lacks_tracing(&self) -> Option<String> {
        if !self.kprobes {
            Some("this kernel has no kprobes (CONFIG_KPROBES, CONFIG_KPROBE_EVENTS)".to_owned())
        } else if !self.btf {
            Some("this kernel has no BTF".to_owned())
        } else {
            let mode = self.lockdown.as_deref()?;
            (mode == "confidentiality").then(|| format!("the kernel is locked down ({mode})"))
        }
    }

    pub fn lacks_xdp(&self) -> Option<String> {
        self.lacks_root().or_else(|| {
            (!self.has_function("bpf_xdp_link_attach"))
                .then(|| "this kernel has no XDP links".to_owned())
        })
    }

    pub fn lacks_kprobe_multi(&self) -> Option<String> {
        // bpf_kprobe_multi_link_attach is there without CONFIG_FPROBE too, as a stub.
        self.lacks_tracing().or_else(|| {
            (!self.has_function("register_fprobe_ips"))
                .then(|| "this kernel has no kprobe.multi (CONFIG_FPROBE)".to_owned())
        })
    }

    pub fn lacks_fentry(&self) -> Option<String> {
        let locked = self.lockdown.as_deref().is_some_and(|mode| mode != "none");
        if locked {
            return Some("the kernel's lockdown refuses fentry programs".to_owned());
        }
        (!self.has_function("bpf_tracing_prog_attach"))
            .then(|| "this kernel has no fentry".to_owned())
    }

    /// Whether kallsyms has a function of the kernel proper or of a module by this name.
    pub fn has_function(&self, name: &str) -> bool {
        self.functions.contains(name)
    }
}

impl fmt::Display for Env {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |lacks: Option<String>| lacks.unwrap_or_else(|| "yes".to_owned());
        writeln!(f, "live: kernel {}", self.release)?;
        writeln!(f, "live: tracing: {}", yes(self.lacks_tracing()))?;
        writeln!(f, "live: kprobe.multi: {}", yes(self.lacks_kprobe_multi()))?;
        writeln!(f, "live: fentry: {}", yes(self.lacks_fentry()))?;
        write!(f, "live: XDP: {}", yes(self.lacks_xdp()))
    }
}

/// A small file's text without the line's end; empty when it cannot be read.
fn read(path: &str) -> String {
    fs::read_to_string(path)
        .unwrap_or_default()
        .trim_end()
        .to_owned()
}

/// The lockdown mode, `none` included; nothing when this kernel has no lockdown. Where securityfs is not mounted it is mounted
/// for the look alone, in a mount namespace that ends with its thread.
fn lockdown() -> Option<String> {
    let mut text = read("/sys/kernel/security/lockdown");
    if text.is_empty() {
        text = std::thread::spawn(|| -> nix::Result<String> {
            let none: Option<&str> = None;
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(
                Some("securityfs"),
                "/sys/kernel/security",
                Some("securityfs"),
                MsFlags::empty(),
                none,
            )?;
            Ok(read("/sys/kernel/security/lockdown"))
        })
        .join()
        .ok()?
        .ok()?;
    }
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Mounts bpffs where a fresh machine has none.
pub fn mount_bpffs() {
    let path = "/sys/fs/bpf";
    let is_there = nix::sys::statfs::statfs(path)
        .is_ok_and(|fs| fs.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC);
    if !is_there {
        let none: Option<&str> = None;
        // Who is not root has no case that needs it.
        let _ = mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none);
    }
}

/// The names of all functions in kallsyms.
fn functions() -> HashSet<String> {
    let text = read("/proc/kallsyms");
    let fields = text.lines().map(|line| line.split_whitespace());
    fields
        .filter_map(|mut fields| {
            let kind = fields.nth(1)?;
            matches!(kind, "t" | "T" | "w" | "W").then(|| fields.next().map(str::to_owned))?
        })
        .collect()
}
