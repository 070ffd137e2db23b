//! Compiles every `src/bpf/*.bpf.c` into a skeleton `OUT_DIR/NAME.skel.rs` (included by `src/bpf.rs`), with the names of the types
//! that its relocations can ask for in `OUT_DIR/NAME.types` (for `src/kernel/btf_core.rs`), and every
//! `examples/*.bpf.c` and `tests/data/*.bpf.c` into `OUT_DIR/NAME.o` (which the live tests take).

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::btf::{Btf, BtfKind, BtfType, TypeId};

fn main() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("no manifest folder")?);

    link_libpcap();
    println!("cargo:rerun-if-changed=src/bpf");
    println!("cargo:rerun-if-changed=vmlinux");
    println!("cargo:rerun-if-changed=examples");
    println!("cargo:rerun-if-changed=tests/data");
    for (source, name) in bpf_sources(&root.join("src/bpf"))? {
        let object = out.join(format!("{name}.bpf.o"));
        let mut builder = SkeletonBuilder::new();
        builder
            .source(&source)
            .obj(&object)
            .clang_args(clang_args(&root, &arch));
        builder
            .build()
            .and_then(|()| without_lines(&object))
            .and_then(|()| builder.generate(out.join(format!("{name}.skel.rs"))))
            .with_context(|| format!("failed to build {}", source.display()))?;
        fs::write(out.join(format!("{name}.types")), types(&object)?)?;
    }
    let examples = bpf_sources(&root.join("examples"))?;
    for (source, name) in examples
        .into_iter()
        .chain(bpf_sources(&root.join("tests/data"))?)
    {
        SkeletonBuilder::new()
            .source(&source)
            .obj(out.join(format!("{name}.o")))
            .clang_args(example_args(&root, &arch))
            .build()
            .with_context(|| format!("failed to build {}", source.display()))?;
    }
    Ok(())
}

/// Takes from an object which source lines its instructions are of: netprobe changes the instructions (src/filter/inject.rs), and
/// the kernel would check each line.
fn without_lines(object: &Path) -> Result<()> {
    // .BTF.ext begins with struct btf_ext_header (tools/lib/bpf/libbpf_internal.h): magic, version 1, flags, 32 bytes or more;
    // the length of the lines' part is its sixth word.
    const LENGTH: usize = 20;
    let mut bytes = fs::read(object)?;
    let number = |at: usize, size: usize| -> Option<usize> {
        let mut number = [0; 8];
        number[..size].copy_from_slice(bytes.get(at..at + size)?);
        usize::try_from(u64::from_le_bytes(number)).ok()
    };
    // ELF-64: where section headers are, how long and how many; of each, where the section is in the file.
    let section = |i: usize| number(number(0x28, 8)? + i * number(0x3a, 2)? + 0x18, 8);
    let begins = |&at: &usize| {
        let head = bytes.get(at..at + 4)?;
        let size = number(at + 4, 4)?;
        (head == [0x9f, 0xeb, 1, 0] && size >= 32).then_some(())
    };
    let mut sections = (1..number(0x3c, 2).unwrap_or(0)).filter_map(section);
    let at = sections
        .find(|at| begins(at).is_some())
        .context("no .BTF.ext")?;
    bytes[at + LENGTH..at + LENGTH + 4].fill(0);
    fs::write(object, bytes)?;
    Ok(())
}

/// Names of the structs, unions, enums and typedefs of an object, without what follows `___` (a variant of the same type).
fn types(object: &Path) -> Result<String> {
    let btf = Btf::from_path(object).with_context(|| object.display().to_string())?;
    let mut names = BTreeSet::new();
    for id in 1..btf.len() as u32 {
        let found = btf.type_by_id::<BtfType<'_>>(TypeId::from(id));
        let Some(found) =
            found.filter(|t| t.is_composite() || t.is_any_enum() || t.kind() == BtfKind::Typedef)
        else {
            continue;
        };
        if let Some(name) = found.name().and_then(|name| name.to_str()) {
            let name = name.split_once("___").map_or(name, |(name, _)| name);
            names.insert(name.to_owned() + "\n");
        }
    }
    Ok(names.into_iter().collect())
}

/// The `NAME.bpf.c` of a folder, and their names.
fn bpf_sources(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let source = entry?.path();
        let name = source.file_name().and_then(|name| name.to_str());
        if let Some(name) = name.and_then(|name| name.strip_suffix(".bpf.c")) {
            let name = name.to_owned();
            sources.push((source, name));
        }
    }
    Ok(sources)
}

/// Arguments for clang: examples include the kernel's own headers, as a user's program does.
fn example_args(root: &Path, arch: &str) -> Vec<OsString> {
    let mut headers = OsString::from("-I");
    headers.push(root.join("src/bpf"));
    vec![
        headers,
        OsString::from("-idirafter"),
        OsString::from(format!("/usr/include/{arch}-linux-gnu")),
        OsString::from("-Wall"),
        OsString::from("-Werror"),
    ]
}

/// libpcap as an archive, searched for where libelf's is (.cargo/config.toml), so that the program needs no libpcap.so.
fn link_libpcap() {
    println!("cargo:rerun-if-env-changed=LIBBPF_SYS_LIBRARY_PATH");
    if let Some(folders) = env::var_os("LIBBPF_SYS_LIBRARY_PATH") {
        for folder in env::split_paths(&folders) {
            println!("cargo:rustc-link-search=native={}", folder.display());
        }
    }
    println!("cargo:rustc-link-lib=static=pcap");
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
