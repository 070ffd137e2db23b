//! Compiles every `src/bpf/*.bpf.c` into a skeleton `OUT_DIR/NAME.skel.rs` (included by `src/bpf.rs`).

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_cargo::SkeletonBuilder;

fn main() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("no manifest folder")?);

    println!("cargo:rerun-if-changed=src/bpf");
    println!("cargo:rerun-if-changed=vmlinux");
    for entry in fs::read_dir(root.join("src/bpf"))? {
        let source = entry?.path();
        let Some(name) = source.file_name().and_then(|n| n.to_str()) else {
            continue;
        };
        if let Some(tool) = name.strip_suffix(".bpf.c") {
            let skeleton = out.join(format!("{tool}.skel.rs"));
            SkeletonBuilder::new()
                .source(&source)
                .clang_args(clang_args(&root, &arch))
                .build_and_generate(&skeleton)
                .with_context(|| format!("failed to build {}", source.display()))?;
        }
    }
    Ok(())
}

/// Arguments for clang: the kernel's types of this architecture, warnings as errors.
fn clang_args(root: &Path, arch: &str) -> Vec<OsString> {
    let mut vmlinux = OsString::from("-I");
    vmlinux.push(root.join("vmlinux").join(arch));
    let mut headers = OsString::from("-I");
    headers.push(root.join("src/bpf"));
    vec![
        vmlinux,
        headers,
        OsString::from("-Wall"),
        OsString::from("-Werror"),
        OsString::from("-Wno-missing-declarations"),
    ]
}
