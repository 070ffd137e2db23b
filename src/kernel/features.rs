//! Preflight: what this kernel and this process can do. Detected, not guessed from the version.

use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow};
use libbpf_sys as sys;
use serde::Serialize;

use super::btf::Btf;
use super::caps;
use super::members::{Step, resolve};

/// What was found. Where something is missing, [`Features::require_tracing`] and its like say what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Features {
    /// uname -r
    pub release: String,
    /// capabilities that tracing needs and this process lacks
    pub missing_caps: Vec<&'static str>,
    /// capabilities that some of it needs and this process lacks
    pub missing_optional_caps: Vec<caps::Optional>,
    /// /sys/kernel/btf/vmlinux
    pub btf: bool,
    /// the kernel's BTF of modules
    pub module_btf: bool,
    /// perf_event_open knows the kprobe PMU
    pub kprobe: bool,
    /// links over many kprobes at once (5.18, with CONFIG_FPROBE)
    pub kprobe_multi: bool,
    /// perf_event_open exists
    pub perf: bool,
    /// perf_event_open does not refuse us
    pub perf_open: bool,
    /// bpffs is mounted at /sys/fs/bpf
    pub bpffs: bool,
    /// `none`, `integrity`, `confidentiality`; `None` where the kernel does not say
    pub lockdown: Option<String>,
    /// the list of traceable functions can be read
    pub tracefs: bool,
    /// kernel function bpf_rdonly_cast (6.2): typed loads without a helper call
    pub rdonly_cast: bool,
    /// what programs tell it
    #[serde(skip)]
    pub casts: Option<Casts>,
    /// with it, an sk_buff whose fields lie as src/filter/ebpf/by_cast.rs reads them: all kernels so far
    pub typed_filter: bool,
    /// where they lie, with or without it
    #[serde(skip)]
    pub skb_fields: Option<SkbFields>,
    /// helper bpf_get_func_ip (5.15)
    pub func_ip: bool,
    /// enum skb_drop_reason (5.17)
    pub drop_reasons: bool,
    /// the tracepoint of drops tells the receiving socket (6.11)
    #[serde(skip)]
    pub drop_sock: bool,
    /// the tracepoint devlink:devlink_trap_report
    #[serde(skip)]
    pub devlink_trap: bool,
    /// the tracepoint qdisc:qdisc_drop (7.x)
    #[serde(skip)]
    pub qdisc_drop: bool,
}

/// Structs that programs cast to: `enum np_type` of compat.bpf.h, in its order.
const CAST_TYPES: [&str; 8] = [
    "__kernel_sockaddr_storage",
    "dst_entry",
    "net",
    "net_device",
    "sk_buff",
    "sock",
    "task_struct",
    "timespec64",
];

/// BTF ids of bpf_rdonly_cast and of what it casts to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Casts {
    pub function: i32,
    /// as `enum np_type` of compat.bpf.h has them
    pub types: [i32; CAST_TYPES.len()],
}

impl Casts {
    fn find(btf: &Btf) -> Option<Self> {
        let function = i32::try_from(btf.function_id("bpf_rdonly_cast")?).ok()?;
        let mut types = [0; CAST_TYPES.len()];
        for (id, name) in types.iter_mut().zip(CAST_TYPES) {
            *id = i32::try_from(btf.struct_named(name)?).ok()?;
        }
        Some(Self { function, types })
    }
}

/// Where an sk_buff has what a filter needs to know, in bytes from its beginning. Behind the network header's offset lie, in 8
/// bytes with it, that of the link header and the tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SkbFields {
    /// can be read by typed loads
    pub typed: bool,
    pub data_len: u32,
    pub network_header: u32,
    pub head: u32,
}

impl SkbFields {
    /// How far apart they may be: bytes of the struct through which they are read.
    const REACH: u32 = 126;

    /// None where this kernel has them elsewhere than all have had them. `typed`: there are typed loads.
    fn find(btf: &Btf, typed: bool) -> Option<Self> {
        let at = |name: &str| {
            let path = [Step::Member(name.to_owned())];
            Some(resolve(btf, "sk_buff", &path).ok()?.offset)
        };
        let fields = Self {
            typed,
            data_len: at("data_len")?,
            network_header: at("network_header")?,
            head: at("head")?,
        };
        let fits = btf.struct_named("__kernel_sockaddr_storage").is_some()
            && at("mac_header")? == fields.network_header + 2
            && at("tail")? == fields.network_header + 4
            && fields.network_header >= 2
            && fields.network_header < fields.head
            && fields.head + 8 - fields.network_header <= Self::REACH;
        fits.then_some(fields)
    }
}

impl Features {
    pub fn detect() -> Self {
        Self::with(Btf::vmlinux(None).ok().as_ref())
    }

    /// The same for a caller that has read the kernel's BTF already.
    pub fn with(btf: Option<&Btf>) -> Self {
        let casts = btf.and_then(Casts::find);
        let skb_fields = btf.and_then(|btf| SkbFields::find(btf, casts.is_some()));
        Self {
            release: nix::sys::utsname::uname()
                .map(|u| u.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            missing_caps: missing_caps(),
            missing_optional_caps: caps::missing_optional(),
            btf: btf.is_some(),
            module_btf: !super::btf::modules().is_empty(),
            kprobe: Path::new("/sys/bus/event_source/devices/kprobe/type").exists(),
            kprobe_multi: kprobe_multi(),
            perf: Path::new("/proc/sys/kernel/perf_event_paranoid").exists(),
            perf_open: perf_open(),
            bpffs: nix::sys::statfs::statfs("/sys/fs/bpf")
                .is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC),
            lockdown: lockdown(),
            tracefs: ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"]
                .iter()
                .any(|d| fs::File::open(format!("{d}/available_filter_functions")).is_ok()),
            rdonly_cast: casts.is_some(),
            casts,
            typed_filter: skb_fields.is_some_and(|fields| fields.typed),
            skb_fields,
            func_ip: helper(sys::BPF_FUNC_get_func_ip),
            // It came with the tracepoint's argument.
            drop_sock: btf.is_some_and(|b| b.has_function("sk_skb_reason_drop")),
            drop_reasons: btf.is_some_and(|b| b.has_enum("skb_drop_reason")),
            devlink_trap: btf.is_some_and(|b| b.has_function("__traceiter_devlink_trap_report")),
            qdisc_drop: btf.is_some_and(|b| b.has_function("__traceiter_qdisc_drop")),
        }
    }

    /// What programs tell the kernel of its types, out of the running kernel's BTF: where that of another file was taken for all
    /// else, and may differ.
    pub fn take_casts(&mut self, running: Option<&Btf>) {
        self.casts = running.and_then(Casts::find);
        self.rdonly_cast = self.casts.is_some();
        if let Some(fields) = &mut self.skb_fields {
            fields.typed = self.rdonly_cast;
        }
        self.typed_filter = self.skb_fields.is_some_and(|fields| fields.typed);
    }

    /// One line that says why kprobes cannot be used, and what to do.
    pub fn require_tracing(&self, tool: &str) -> Result<()> {
        match self.why_no_tracing() {
            None => Ok(()),
            Some(why) => Err(anyhow!("{tool} cannot run here: {why}")),
        }
    }

    /// One line that says why raw tracepoints cannot be used, and what to do.
    pub fn require_drops(&self, tool: &str) -> Result<()> {
        let why = self.why_no_load().or_else(|| self.why_no_kernel_memory());
        match why {
            None => Ok(()),
            Some(why) => Err(anyhow!("{tool} cannot run here: {why}")),
        }
    }

    /// One line that says why XDP programs cannot be used, and what to do.
    pub fn require_xdp(&self, tool: &str) -> Result<()> {
        match self.why_no_bpf() {
            None => Ok(()),
            Some(why) => Err(anyhow!("{tool} cannot run here: {why}")),
        }
    }

    /// The first thing that keeps BPF programs from being loaded, or their events from being read; `None` where nothing
    /// does.
    pub fn why_no_bpf(&self) -> Option<String> {
        self.why_no_load()
            .or_else(|| (!self.perf_open).then(caps::why_no_perf))
    }

    /// Why programs cannot be attached to a function by a kprobe of its own; `None`: they can.
    pub fn why_no_kprobe(&self) -> Option<String> {
        if !self.kprobe {
            return Some("this kernel has no kprobes".into());
        }
        (!self.perf_open).then(caps::why_no_perf)
    }

    fn why_no_load(&self) -> Option<String> {
        if !self.missing_caps.is_empty() {
            return Some(format!(
                "not permitted, {} missing: run it as root, or give it that (docs/permissions.md)",
                self.missing_caps.join(", ")
            ));
        }
        if !self.btf {
            return Some(
                "the kernel has no BTF (/sys/kernel/btf/vmlinux): it needs CONFIG_DEBUG_INFO_BTF=y, or --kernel-btf FILE with the \
                 types of this very kernel (BTFHub's archive has them for many distributions; `pahole --btf_encode_detached FILE vmlinux` \
                 makes them from a vmlinux with debug information)"
                    .into(),
            );
        }
        if !self.perf {
            return Some("the kernel has no perf events: it needs CONFIG_PERF_EVENTS=y".into());
        }
        None
    }

    fn why_no_kernel_memory(&self) -> Option<String> {
        (self.lockdown.as_deref() == Some("confidentiality")).then(|| {
            "kernel lockdown is in confidentiality mode, which refuses to show kernel memory: boot with lockdown=integrity or none".into()
        })
    }

    /// The first thing that keeps kprobes from being attached; `None` where nothing does.
    pub fn why_no_tracing(&self) -> Option<String> {
        if let Some(why) = self.why_no_bpf() {
            return Some(why);
        }
        if let Some(why) = self.why_no_kernel_memory() {
            return Some(why);
        }
        if !self.kprobe && !self.kprobe_multi {
            let lockdown = match self.lockdown.as_deref() {
                Some(mode) if mode != "none" => format!(", and lockdown is in {mode} mode"),
                _ => String::new(),
            };
            return Some(format!(
                "kernel {} has no kprobes (CONFIG_KPROBES is off{lockdown}): use a kernel built with CONFIG_KPROBES=y",
                self.release
            ));
        }
        None
    }
}

/// The kernel's lockdown mode: `none`, `integrity` or `confidentiality`; nothing where it has no lockdown.
pub fn lockdown() -> Option<String> {
    let text = fs::read_to_string("/sys/kernel/security/lockdown").ok()?;
    parse_lockdown(&text)
}

fn parse_lockdown(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    Some(mode.to_string())
}

/// Capabilities without which nothing is loaded.
fn missing_caps() -> Vec<&'static str> {
    let mut missing = caps::missing();
    // The helper came with 5.11, as the end of such limits; programs of kprobes are not given it.
    if missing.is_empty()
        && caps::lacks_memlock()
        && !helper_of(
            sys::BPF_PROG_TYPE_SOCKET_FILTER,
            sys::BPF_FUNC_ktime_get_coarse_ns,
        )
    {
        missing.push("CAP_SYS_RESOURCE");
    }
    missing
}

/// perf_event_open lets us open what perf buffers and single kprobes need.
fn perf_open() -> bool {
    let mut attr = sys::perf_event_attr {
        type_: sys::PERF_TYPE_SOFTWARE,
        size: size_of::<sys::perf_event_attr>() as u32,
        config: u64::from(sys::PERF_COUNT_SW_BPF_OUTPUT),
        ..Default::default()
    };
    attr.__bindgen_anon_1.sample_period = 1;
    let (every, flags) = (-1, sys::PERF_FLAG_FD_CLOEXEC);
    // SAFETY: attr is valid for the call; the others are numbers.
    let fd = unsafe { libc::syscall(libc::SYS_perf_event_open, &attr, every, 0, -1, flags) };
    if fd >= 0 {
        // SAFETY: owned here, closed once.
        unsafe { libc::close(fd as i32) };
    }
    fd >= 0 || std::io::Error::last_os_error().raw_os_error() != Some(libc::EACCES)
}

/// The kernel knows this helper in kprobe programs.
fn helper(id: u32) -> bool {
    helper_of(sys::BPF_PROG_TYPE_KPROBE, id)
}

fn helper_of(kind: u32, id: u32) -> bool {
    // SAFETY: plain numbers; opts may be NULL.
    unsafe { sys::libbpf_probe_bpf_helper(kind, id, std::ptr::null()) == 1 }
}

/// Asks for a kprobe.multi link over a list at a bad address: EFAULT where the kernel knows such links; EINVAL (before 5.18) or
/// EOPNOTSUPP (no CONFIG_FPROBE) where it does not.
fn kprobe_multi() -> bool {
    // r0 = 0; exit
    let insns = [
        sys::bpf_insn {
            code: 0xb7,
            ..Default::default()
        },
        sys::bpf_insn {
            code: 0x95,
            ..Default::default()
        },
    ];
    let load = sys::bpf_prog_load_opts {
        sz: size_of::<sys::bpf_prog_load_opts>() as _,
        expected_attach_type: sys::BPF_TRACE_KPROBE_MULTI,
        ..Default::default()
    };
    // SAFETY: all pointers are valid for the call, the count is that of `insns`.
    let prog = unsafe {
        sys::bpf_prog_load(
            sys::BPF_PROG_TYPE_KPROBE,
            c"np_probe".as_ptr(),
            c"GPL".as_ptr(),
            insns.as_ptr(),
            insns.len() as _,
            (&raw const load).cast_mut(),
        )
    };
    if prog < 0 {
        return false;
    }
    let mut opts = sys::bpf_link_create_opts {
        sz: size_of::<sys::bpf_link_create_opts>() as _,
        ..Default::default()
    };
    opts.__bindgen_anon_1.kprobe_multi.cnt = 1;
    opts.__bindgen_anon_1.kprobe_multi.addrs = std::ptr::without_provenance(1);
    // SAFETY: prog is a valid fd, opts valid for the call; the list is read by the kernel alone, which refuses its address.
    let link = unsafe { sys::bpf_link_create(prog, 0, sys::BPF_TRACE_KPROBE_MULTI, &opts) };
    // SAFETY: fds owned here, closed once; `link` is an fd only if not negative.
    unsafe {
        libc::close(prog);
        if link >= 0 {
            libc::close(link);
        }
    }
    link == -libc::EFAULT
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> Features {
        Features {
            release: "6.12.0".into(),
            missing_caps: vec![],
            missing_optional_caps: vec![],
            btf: true,
            module_btf: true,
            kprobe: true,
            kprobe_multi: true,
            perf: true,
            perf_open: true,
            bpffs: true,
            lockdown: Some("none".into()),
            tracefs: true,
            rdonly_cast: true,
            casts: None,
            typed_filter: true,
            skb_fields: None,
            func_ip: true,
            drop_reasons: true,
            drop_sock: true,
            devlink_trap: true,
            qdisc_drop: true,
        }
    }

    #[test]
    fn types_to_cast_to_are_those_of_the_header() {
        let header = include_str!("../bpf/common/compat.bpf.h");
        let list = header.split_once("enum np_type {").unwrap().1;
        let list = list.split_once('}').unwrap().0;
        let names: Vec<&str> = list
            .lines()
            .filter_map(|line| line.trim().strip_prefix("NP_TYPE_"))
            .map(|name| name.split([' ', ',']).next().unwrap())
            .collect();
        assert_eq!(names, CAST_TYPES);
    }

    #[test]
    fn lockdown_modes() {
        assert_eq!(
            parse_lockdown("none [integrity] confidentiality\n").as_deref(),
            Some("integrity")
        );
        assert_eq!(parse_lockdown(""), None);
    }

    #[test]
    fn each_refusal_says_what_is_missing() {
        assert!(all().require_tracing("skb").is_ok());
        let why = |f: Features| f.require_tracing("skb").unwrap_err().to_string();
        assert!(
            why(Features {
                btf: false,
                ..all()
            })
            .contains("CONFIG_DEBUG_INFO_BTF")
        );
        assert!(
            why(Features {
                missing_caps: vec!["CAP_BPF"],
                ..all()
            })
            .contains("as root")
        );
        assert!(
            why(Features {
                lockdown: Some("confidentiality".into()),
                ..all()
            })
            .contains("lockdown")
        );
        assert!(
            why(Features {
                kprobe: false,
                kprobe_multi: false,
                lockdown: Some("integrity".into()),
                ..all()
            })
            .contains("integrity")
        );
        let no_kprobes = Features {
            kprobe: false,
            kprobe_multi: false,
            ..all()
        };
        assert!(no_kprobes.require_xdp("xdpdump").is_ok());
    }
}
