//! What this program was built from: for `--version` and for reports of faults.

use std::ffi::CStr;
use std::sync::LazyLock;

use serde::Serialize;

/// The build.
#[derive(Debug, Serialize)]
pub struct Build {
    /// version of the package
    pub netprobe: &'static str,
    /// as `make` told it; `None`: cargo alone built it
    pub commit: Option<&'static str>,
    pub libbpf: String,
    pub arch: &'static str,
    /// glibc is in it
    pub static_glibc: bool,
}

impl Build {
    pub fn get() -> Self {
        // SAFETY: libbpf gives a string that it never changes.
        let libbpf = unsafe { CStr::from_ptr(libbpf_sys::libbpf_version_string()) };
        let libbpf = libbpf.to_string_lossy();
        Self {
            netprobe: env!("CARGO_PKG_VERSION"),
            commit: option_env!("NETPROBE_COMMIT"),
            libbpf: libbpf.trim_start_matches('v').to_owned(),
            arch: std::env::consts::ARCH,
            static_glibc: cfg!(target_feature = "crt-static"),
        }
    }
}

/// What `--version` prints after the program's name.
pub fn long_version() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let build = Build::get();
        let commit = build
            .commit
            .map_or("commit unknown: built without make".to_owned(), |c| {
                format!("commit {c}")
            });
        let glibc = if build.static_glibc {
            "static"
        } else {
            "dynamic glibc"
        };
        format!(
            "{} ({commit}, libbpf {}, {}, {glibc})",
            build.netprobe, build.libbpf, build.arch
        )
    });
    &TEXT
}
