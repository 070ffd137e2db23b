//! Kernel structs as C text: bytes copied from kernel memory, and BTF to say what is in them.

use std::ffi::{c_char, c_int, c_void};
use std::ptr::NonNull;

use anyhow::{Context, Result, anyhow};
use libbpf_sys as sys;

use super::btf::Btf;

unsafe extern "C" {
    /// libc's; libbpf hands over its va_list as this pointer (so it is on x86-64, and on aarch64, which passes a large
    /// struct by reference).
    fn vsnprintf(
        to: *mut c_char,
        size: usize,
        format: *const c_char,
        args: *mut sys::__va_list_tag,
    ) -> c_int;
}

/// Longest piece that libbpf prints at once: a member's name and value.
const PIECE: usize = 1024;

/// Prints one type.
pub struct Dumper {
    dump: NonNull<sys::btf_dump>,
    /// where the callback puts the text; by pointer only, since libbpf has it too. Owned.
    text: NonNull<Vec<u8>>,
    id: u32,
    /// what `dump` uses; owned
    btf: NonNull<sys::btf>,
}

impl Dumper {
    /// For `struct NAME` of the running kernel.
    pub fn new(btf: &Btf, name: &str) -> Result<Self> {
        let id = btf
            .struct_named(name)
            .with_context(|| format!("the kernel's BTF has no struct {name}"))?;
        let bytes = btf.bytes().context("failed to read the kernel's BTF")?;
        // SAFETY: libbpf copies the bytes, and gives NULL where it does not like them.
        let raw = unsafe { sys::btf__new(bytes.as_ptr().cast(), bytes.len() as _) };
        let failed = || {
            anyhow!(
                "failed to print BTF types: {}",
                std::io::Error::last_os_error()
            )
        };
        let raw = NonNull::new(raw).ok_or_else(failed)?;
        let text = NonNull::from(Box::leak(Box::<Vec<u8>>::default()));
        // SAFETY: the BTF is valid and goes into the result; the context lives as long; opts may be NULL.
        let dump = unsafe {
            sys::btf_dump__new(
                raw.as_ptr(),
                Some(print),
                text.as_ptr().cast(),
                std::ptr::null(),
            )
        };
        let Some(dump) = NonNull::new(dump) else {
            let e = failed();
            // SAFETY: made above, and nothing else has them.
            unsafe {
                drop(Box::from_raw(text.as_ptr()));
                sys::btf__free(raw.as_ptr());
            }
            return Err(e);
        };
        Ok(Self {
            dump,
            text,
            id,
            btf: raw,
        })
    }

    /// The struct in `bytes` as C text, with members that are 0: without them libbpf (1.7) leaves out each inner struct whose first
    /// member is 0, mark and all.
    pub fn text(&mut self, bytes: &[u8]) -> Result<String> {
        let opts = sys::btf_dump_type_data_opts {
            sz: size_of::<sys::btf_dump_type_data_opts>() as _,
            compact: true,
            emit_zeroes: true,
            ..Default::default()
        };
        // SAFETY: owned by this value; nothing else uses it between calls of libbpf.
        unsafe { self.text.as_mut() }.clear();
        // SAFETY: the dump is valid, bytes and opts outlive the call; libbpf reads at most bytes.len() bytes. The callback
        // writes to `text`, which nothing else uses meanwhile.
        let err = unsafe {
            sys::btf_dump__dump_type_data(
                self.dump.as_ptr(),
                self.id,
                bytes.as_ptr().cast(),
                bytes.len() as _,
                &opts,
            )
        };
        if err < 0 {
            let e = std::io::Error::from_raw_os_error(-err);
            return Err(e).context("failed to print a kernel struct");
        }
        // SAFETY: as above.
        Ok(String::from_utf8_lossy(unsafe { self.text.as_ref() }).into_owned())
    }
}

impl Drop for Dumper {
    fn drop(&mut self) {
        // SAFETY: made by btf_dump__new, freed once, before the BTF that it uses.
        unsafe { sys::btf_dump__free(self.dump.as_ptr()) };
        // SAFETY: made by btf__new, freed once.
        unsafe { sys::btf__free(self.btf.as_ptr()) };
        // SAFETY: made from a box, freed once; libbpf has it no more.
        drop(unsafe { Box::from_raw(self.text.as_ptr()) });
    }
}

/// libbpf's printf. It must not panic (it is called from C).
unsafe extern "C" fn print(ctx: *mut c_void, format: *const c_char, args: *mut sys::__va_list_tag) {
    let mut piece = [0u8; PIECE];
    // SAFETY: the buffer has PIECE bytes; format and args are libbpf's own and fit each other.
    let len = unsafe { vsnprintf(piece.as_mut_ptr().cast(), PIECE, format, args) };
    let len = usize::try_from(len).unwrap_or(0).min(PIECE - 1);
    // SAFETY: ctx is the text of the Dumper whose method runs.
    let text = unsafe { &mut *ctx.cast::<Vec<u8>>() };
    text.extend_from_slice(&piece[..len]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg_attr(not(has_btf), ignore = "this kernel has no BTF")]
    fn an_sk_buff() {
        let btf = Btf::vmlinux(None).unwrap();
        let mut dumper = Dumper::new(&btf, "sk_buff").unwrap();
        for (byte, value) in [(1, 0x0101_0101), (0, 0)] {
            let text = dumper.text(&[byte; 512]).unwrap();
            for member in [
                "len = (unsigned int)",
                "truesize = (unsigned int)",
                "mark = (__u32)",
            ] {
                assert!(
                    text.contains(&format!(".{member}{value},")),
                    "{member}: {text}"
                );
            }
        }
        let e = Dumper::new(&btf, "no_such_struct");
        assert!(e.is_err());
    }
}
