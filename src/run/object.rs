//! BPF objects from their skeletons: opened with the types of the running kernel, and loaded.

use std::mem::MaybeUninit;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use libbpf_rs::OpenObject;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};

use super::log;

/// Opens an object. `btf`: a file with the kernel's types, for libbpf's relocations; none: libbpf looks for them itself.
pub fn open<'o, B: SkelBuilder<'o>>(
    mut builder: B,
    btf: Option<PathBuf>,
    storage: &'o mut MaybeUninit<OpenObject>,
) -> Result<B::Output> {
    if let Some(btf) = btf {
        let failed = format!("failed to use the types of {}", btf.display());
        builder
            .object_builder_mut()
            .btf_custom_path(btf)
            .context(failed)?;
    }
    builder
        .open(storage)
        .context("failed to open the BPF object")
}

/// Loads an object that is configured.
pub fn load<'o, S: OpenSkel<'o>>(open: S) -> Result<S::Output> {
    open.load().map_err(|e| failed(e.into()))
}

/// An error of loading, with libbpf's and the verifier's last words.
pub fn failed(e: anyhow::Error) -> anyhow::Error {
    anyhow!("failed to load the BPF programs: {e:?}\n{}", log::take())
}
