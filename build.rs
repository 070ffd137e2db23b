//! Compiles every `src/bpf/*/*.bpf.c` into a skeleton `OUT_DIR/NAME.skel.rs` (included by `src/bpf.rs`), with the names
//! of the types that its relocations can ask for in `OUT_DIR/NAME.types` (for `src/kernel/btf_core.rs`), and every
//! `examples/*.bpf.c` and `tests/data/*.bpf.c` into `OUT_DIR/NAME.o` (which the live tests take).

use std::collections::BTreeSet;
use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::Linker;
use libbpf_rs::btf::{Btf, BtfType, TypeId};
use object::{Object, ObjectSection};

fn main() -> Result<()> {
    let out = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let arch = env::var("CARGO_CFG_TARGET_ARCH")?;
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").context("no manifest folder")?);

    link_libpcap()?;
    what_tests_find_here();
    println!("cargo:rerun-if-changed=src/bpf");
    println!("cargo:rerun-if-changed=vmlinux");
    println!("cargo:rerun-if-changed=examples");
    println!("cargo:rerun-if-changed=tests/data");
    for (source, name) in bpf_sources_below(&root.join("src/bpf"))? {
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

/// Where the `.BTF.ext` of an object is (tools/lib/bpf/libbpf_internal.h, struct btf_ext_header), and the numbers in it.
struct BtfExt {
    bytes: Vec<u8>,
    at: usize,
}

impl BtfExt {
    /// Bytes of the part with source lines; where the part with CO-RE relocations is from the header's end on, and its bytes.
    const LINES: usize = 20;
    const RELOCATIONS: usize = 24;
    const RELOCATION_BYTES: usize = 28;

    fn of(path: &Path) -> Result<Self> {
        let bytes = fs::read(path)?;
        let elf = object::File::parse(&*bytes)?;
        let section = elf.section_by_name(".BTF.ext").context("no .BTF.ext")?;
        let (at, _) = section.file_range().context("an empty .BTF.ext")?;
        let at = usize::try_from(at)?;
        Ok(Self { bytes, at })
    }

    fn word(&self, offset: usize) -> Result<usize> {
        number(&self.bytes, self.at + offset, 4).context(".BTF.ext ends too early")
    }

    /// Numbers of the types, in the object's BTF, that relocations begin at.
    fn relocated(&self) -> Result<BTreeSet<u32>> {
        let mut at = self.word(4)? + self.word(Self::RELOCATIONS)?;
        let end = at + self.word(Self::RELOCATION_BYTES)?;
        let mut found = BTreeSet::new();
        // Bytes of a record; then for each section of the program its name, a count, and as many records of instruction, type, ...
        let size = if at < end { self.word(at)? } else { 0 };
        at += 4;
        while at < end {
            let count = self.word(at + 4)?;
            for i in 0..count {
                found.insert(u32::try_from(self.word(at + 8 + i * size + 4)?)?);
            }
            at += 8 + count * size;
        }
        Ok(found)
    }
}

/// `size` bytes of an object as a number.
fn number(bytes: &[u8], at: usize, size: usize) -> Option<usize> {
    let mut number = [0; 8];
    number[..size].copy_from_slice(bytes.get(at..at + size)?);
    usize::try_from(u64::from_le_bytes(number)).ok()
}

/// Takes from an object which source lines its instructions are of, and their text: netprobe changes the instructions
/// (src/filter/inject.rs), and the kernel would check each line.
fn without_lines(object: &Path) -> Result<()> {
    let mut ext = BtfExt::of(object)?;
    let length = ext.at + BtfExt::LINES;
    ext.bytes[length..length + 4].fill(0);
    let with_text = object.with_extension("text.o");
    fs::write(&with_text, ext.bytes)?;
    // What nothing refers to is left out.
    let mut linker = Linker::new(object)?;
    linker.add_file(&with_text)?;
    linker.link()?;
    fs::remove_file(with_text)?;
    Ok(())
}

/// Names of the types that relocations of an object begin at, without what follows `___` (a variant of the same type), a line each.
fn types(object: &Path) -> Result<String> {
    let btf = Btf::from_path(object).with_context(|| object.display().to_string())?;
    let mut names = BTreeSet::new();
    for id in BtfExt::of(object)?.relocated()? {
        let found = btf.type_by_id::<BtfType<'_>>(TypeId::from(id));
        let name = found.and_then(|found| found.name()?.to_str().map(str::to_owned));
        let name = name.with_context(|| format!("type {id} has no name"))?;
        let name = name.split_once("___").map_or(&*name, |(name, _)| name);
        names.insert(name.to_owned() + "\n");
    }
    Ok(names.into_iter().collect())
}

/// What this machine has that some unit tests need, as `cfg`s: a test without it is ignored, with the reason.
fn what_tests_find_here() {
    println!(
        "cargo::rustc-check-cfg=cfg(is_root, has_btf, has_drop_reasons, has_tshark, has_chromium)"
    );
    let btf = fs::read("/sys/kernel/btf/vmlinux").unwrap_or_default();
    let names = |name: &[u8]| btf.windows(name.len()).any(|bytes| bytes == name);
    let paths = env::var_os("PATH").unwrap_or_default();
    let program = |name: &str| env::split_paths(&paths).any(|folder| folder.join(name).exists());
    let is_root = fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    for (name, is_here) in [
        ("is_root", is_root),
        ("has_btf", !btf.is_empty()),
        ("has_drop_reasons", names(b"SKB_DROP_REASON_NO_SOCKET")),
        ("has_tshark", program("tshark")),
        ("has_chromium", program("chromium")),
    ] {
        if is_here {
            println!("cargo::rustc-cfg={name}");
        }
    }
}

/// The `NAME.bpf.c` in the folders of a folder, and their names.
fn bpf_sources_below(folder: &Path) -> Result<Vec<(PathBuf, String)>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        sources.append(&mut bpf_sources(&entry?.path())?);
    }
    Ok(sources)
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

/// Arguments for clang: examples include the kernel's own headers, as a user's program does; those of another
/// architecture are in the sysroot that the compiler for it takes.
fn example_args(root: &Path, arch: &str) -> Vec<OsString> {
    let mut headers = OsString::from("-I");
    headers.push(root.join("src/bpf/xdp"));
    println!("cargo:rerun-if-env-changed=PKG_CONFIG_SYSROOT_DIR");
    let sysroot = env::var("PKG_CONFIG_SYSROOT_DIR").unwrap_or_default();
    vec![
        headers,
        OsString::from("-idirafter"),
        OsString::from(format!("{sysroot}/usr/include/{arch}-linux-gnu")),
        OsString::from("-Wall"),
        OsString::from("-Werror"),
    ]
}

/// libpcap as an archive, searched for where libelf's is (.cargo/config.toml; packaging/cross has a variable for each
/// architecture, of the name that libbpf-sys takes), so that the program needs no libpcap.so.
fn link_libpcap() -> Result<()> {
    let everywhere = "LIBBPF_SYS_LIBRARY_PATH".to_owned();
    let target = env::var("TARGET")?.replace('-', "_");
    let for_target = format!("{everywhere}_{target}");
    println!("cargo:rerun-if-env-changed={everywhere}");
    println!("cargo:rerun-if-env-changed={for_target}");
    if let Some(folders) = env::var_os(for_target).or_else(|| env::var_os(everywhere)) {
        for folder in env::split_paths(&folders) {
            println!("cargo:rustc-link-search=native={}", folder.display());
        }
    }
    println!("cargo:rustc-link-lib=static=pcap");
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
