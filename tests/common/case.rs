//! Cases: a name, what it needs, a function; and how libtest's lines come of them. It knows no tool.

use std::collections::HashSet;
use std::panic::{self, AssertUnwindSafe};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use anyhow::Result;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use super::{Env, probe};

/// One live test.
pub struct Case {
    name: &'static str,
    needs: Vec<Need>,
    limit: Duration,
    body: fn() -> Result<()>,
}

/// The names of `tests/vm/fetch --list`.
const VM_KERNELS: [&str; 4] = ["5.10", "6.1", "6.12", "newest"];

/// What `tests/vm` calls a kernel of this version.
fn vm_kernel(version: (u32, u32)) -> &'static str {
    match version {
        (5, 10) => "5.10",
        (6, 1) => "6.1",
        (6, 12) => "6.12",
        _ => "newest",
    }
}

/// Gives the reason why a case cannot run in this environment, or nothing.
type Need = Box<dyn Fn(&Env) -> Option<String> + Send>;

/// A case that needs root, and nothing else as yet.
pub fn case(name: &'static str, body: fn() -> Result<()>) -> Case {
    Case {
        name,
        needs: vec![Box::new(Env::lacks_root)],
        limit: Duration::from_secs(180),
        body,
    }
}

impl Case {
    /// Needs kprobes that can be attached, and BTF.
    pub fn trace(self) -> Self {
        self.when(Env::lacks_tracing)
    }

    /// Needs XDP programs that can be loaded and attached (to interfaces of the test's own).
    pub fn xdp(self) -> Self {
        self.when(Env::lacks_xdp)
    }

    /// Needs kprobe.multi links (CONFIG_FPROBE).
    pub fn kprobe_multi(self) -> Self {
        self.when(Env::lacks_kprobe_multi)
    }

    /// Needs fentry and fexit programs that can be attached (to BPF programs, with tracing not locked down).
    pub fn fentry(self) -> Self {
        self.when(Env::lacks_fentry)
    }

    /// Needs this kernel or a newer one; the last resort where no feature can be looked up.
    pub fn kernel(self, major: u32, minor: u32) -> Self {
        self.when(move |env| {
            (env.kernel < (major, minor)).then(|| {
                format!(
                    "needs kernel {major}.{minor} or newer, this is {}",
                    env.release
                )
            })
        })
    }

    /// Needs a kernel older than this one.
    pub fn kernel_before(self, major: u32, minor: u32) -> Self {
        self.when(move |env| {
            (env.kernel >= (major, minor)).then(|| {
                format!(
                    "needs a kernel before {major}.{minor}, this is {}",
                    env.release
                )
            })
        })
    }

    /// In CI on this one of `tests/vm/fetch --list` alone: what it looks at is done in user space, or another case looks at
    /// its kernel side on more of them. Such cases are spread over the kernels, which run side by side.
    pub fn once_on(self, kernel: &'static str) -> Self {
        assert!(VM_KERNELS.contains(&kernel), "{kernel}");
        self.short_form(format!("on {kernel} alone"), move |k| {
            vm_kernel(k) == kernel
        })
    }

    /// Where the kernels differ in it, the oldest and the newest do: in CI on these two.
    pub fn old_and_new(self) -> Self {
        let which = "on the oldest and the newest kernel alone".to_owned();
        self.short_form(which, |k| ["5.10", "newest"].contains(&vm_kernel(k)))
    }

    /// NETPROBE_LIVE_SHORT, which `tests/vm/live all` sets: runs on such kernels alone.
    fn short_form(self, which: String, on: impl Fn((u32, u32)) -> bool + Send + 'static) -> Self {
        self.when(move |env| {
            let short = std::env::var_os("NETPROBE_LIVE_SHORT").is_some();
            (short && !on(env.kernel)).then(|| format!("{which} (`make live-everywhere`: on each)"))
        })
    }

    /// Needs a kernel function by this name (in kallsyms).
    pub fn function(self, name: &'static str) -> Self {
        self.when(move |env| {
            (!env.has_function(name)).then(|| format!("this kernel has no function {name}"))
        })
    }

    /// Needs a program on the PATH.
    pub fn program(self, name: &'static str) -> Self {
        self.when(move |_| {
            which(name)
                .is_none()
                .then(|| format!("needs the program {name}"))
        })
    }

    /// Any other need: gives the reason why the case cannot run, or `None`.
    pub fn when(mut self, lacks: impl Fn(&Env) -> Option<String> + Send + 'static) -> Self {
        self.needs.push(Box::new(lacks));
        self
    }

    /// Another time limit than 180 s for the whole case.
    pub fn limit(mut self, seconds: u64) -> Self {
        self.limit = Duration::from_secs(seconds);
        self
    }

    /// Why it cannot run here.
    fn lacks(&self, env: &Env) -> Option<String> {
        self.needs.iter().find_map(|lacks| lacks(env))
    }

    fn into_trial(self, env: &Env) -> Trial {
        let lacks = self.lacks(env);
        Trial::ignorable_test(self.name, move || match lacks {
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => bounded(self.body, self.limit).map(|()| Completion::Completed),
        })
    }
}

/// The `main` of a live test binary: runs the cases in order, one at a time unless `--test-threads` says otherwise, and
/// ends the process. `NETPROBE_LIVE_REQUIRE=trace,xdp` makes it an error when this environment lacks one of them,
/// so that a broken guest does not pass by ignoring everything.
pub fn run(cases: Vec<Case>) -> ! {
    let mut args = Arguments::from_args();
    args.test_threads = args.test_threads.or(Some(1));
    let env = Env::look();
    if !args.list {
        eprintln!("{env}");
        require(&env);
    }
    let mut names = HashSet::new();
    for case in &cases {
        assert!(
            names.insert(case.name),
            "two live tests are named {}",
            case.name
        );
    }
    let trials = cases
        .into_iter()
        .map(|case| case.into_trial(&env))
        .collect();
    libtest_mimic::run(&args, trials).exit()
}

/// Ends the process when something demanded by NETPROBE_LIVE_REQUIRE is missing.
fn require(env: &Env) {
    let wanted = std::env::var("NETPROBE_LIVE_REQUIRE").unwrap_or_default();
    for want in wanted.split(',').filter(|want| !want.is_empty()) {
        let lacks = match want {
            "root" => env.lacks_root(),
            "trace" => env.lacks_tracing(),
            "xdp" => env.lacks_xdp(),
            other => Some(format!("unknown requirement {other:?}")),
        };
        if let Some(reason) = lacks {
            eprintln!("live: NETPROBE_LIVE_REQUIRE={wanted}: {reason}");
            std::process::exit(1);
        }
    }
}

/// Runs a body in a thread of its own (it may enter namespaces), at most for `limit`. Past it the case fails, its netprobe
/// processes are killed and its thread is left behind.
fn bounded(body: fn() -> Result<()>, limit: Duration) -> Result<(), Failed> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let result = panic::catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|payload| {
            let text = payload.downcast_ref::<String>().cloned();
            let text = text.or_else(|| payload.downcast_ref::<&str>().map(|s| s.to_string()));
            Err(anyhow::anyhow!("panicked: {}", text.unwrap_or_default()))
        });
        // The receiver is gone when the case took too long.
        let _ = sender.send(result);
    });
    match receiver.recv_timeout(limit) {
        Ok(result) => result.map_err(|error| Failed::from(format!("{error:?}"))),
        Err(RecvTimeoutError::Timeout) => {
            probe::kill_all();
            Err(Failed::from(format!("over its time limit of {limit:?}")))
        }
        Err(RecvTimeoutError::Disconnected) => {
            Err(Failed::from("the test's thread ended without a result"))
        }
    }
}

/// Where a program is, as the shell would find it.
pub fn which(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
