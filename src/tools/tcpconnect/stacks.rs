//! The stacks of connects: named while the process is still there, kept until the row is printed.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use crate::kernel::ksyms::{KernelSymbols, Symbol, is_of_a_probe};
use crate::kernel::usyms::{self, Executable, Frame, UserSymbols};
use crate::text::escape::push_escaped;

use super::decode::Connect;

/// Connects that wait for their outcome; past it the stacks of all of them are forgotten.
const WAITING: usize = 65_536;

/// Names addresses, and keeps the stacks of connects that are not decided.
#[derive(Default)]
pub struct StackTable {
    kernel: KernelSymbols,
    user: UserSymbols,
    waiting: HashMap<u64, NamedStacks>,
}

/// Both stacks, innermost call first.
#[derive(Debug, Clone, Serialize)]
pub struct NamedStacks {
    kernel_stack: Vec<KernelFrame>,
    user_stack: Vec<Frame>,
}

#[derive(Debug, Clone, Serialize)]
struct KernelFrame {
    addr: String,
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    symbol: Option<Symbol>,
}

impl StackTable {
    /// Takes in the stacks of a connect, if it brought any.
    pub fn add(&mut self, c: &Connect) -> Result<()> {
        let Some(s) = &c.stacks else {
            return Ok(());
        };
        // The user's part first: its process may end any time.
        let path = usyms::reachable(c.head.tgid, Path::new(OsStr::from_bytes(&s.exe.path)));
        let program = Executable {
            path: &path,
            start_code: s.exe.start_code,
            end_code: s.exe.end_code,
        };
        let user_stack = self.user.frames(c.head.tgid, &s.user, &s.top, program);
        self.kernel.resolve(&s.kernel)?;
        let kernel_stack = self
            .without_probes(&s.kernel)
            .iter()
            .map(|&addr| KernelFrame {
                addr: format!("{addr:#x}"),
                symbol: self.kernel.get(addr).cloned(),
            })
            .collect();
        if self.waiting.len() >= WAITING {
            self.waiting.clear();
        }
        let named = NamedStacks {
            kernel_stack,
            user_stack,
        };
        self.waiting.insert(c.sock, named);
        Ok(())
    }

    /// The stack without what our own probe put on top of it.
    fn without_probes<'a>(&self, stack: &'a [u64]) -> &'a [u64] {
        let ours = |addr: &&u64| {
            let symbol = self.kernel.get(**addr);
            symbol.is_none_or(|s| is_of_a_probe(&s.name))
        };
        let named = stack.iter().any(|&a| self.kernel.get(a).is_some());
        match stack.iter().take_while(ours).count() {
            // All of it, nameless: rather as it is.
            _ if !named => stack,
            n => &stack[n..],
        }
    }

    /// The stacks of a connect whose row is printed now.
    pub fn take(&mut self, c: &Connect) -> Option<NamedStacks> {
        self.waiting.remove(&c.sock)
    }
}

impl NamedStacks {
    /// A line for each call, indented, kernel first.
    pub fn push_text(&self, line: &mut Vec<u8>) {
        for f in &self.kernel_stack {
            line.extend_from_slice(b"\n    ");
            let name = f.symbol.as_ref().map(|s| (s.name.as_str(), s.offset));
            push_name(line, &f.addr, name);
            if let Some(module) = f.symbol.as_ref().and_then(|s| s.module.as_ref()) {
                push_module(line, module);
            }
        }
        for f in &self.user_stack {
            for i in f.inlined.iter().rev() {
                line.extend_from_slice(b"\n    ");
                push_escaped(line, i.name.as_bytes());
                line.extend_from_slice(b" [inlined]");
                push_place(line, i.file.as_ref(), i.line);
            }
            line.extend_from_slice(b"\n    ");
            push_name(line, &f.addr, f.name.as_deref().zip(f.offset));
            if let Some(module) = &f.module {
                push_module(line, module);
            }
            push_place(line, f.file.as_ref(), f.line);
        }
    }
}

/// `name+0x1f`, or the address.
fn push_name(line: &mut Vec<u8>, addr: &str, name: Option<(&str, u64)>) {
    match name {
        Some((name, offset)) => {
            push_escaped(line, name.as_bytes());
            // Writes to a Vec do not fail.
            let _ = write!(line, "+{offset:#x}");
        }
        None => line.extend_from_slice(addr.as_bytes()),
    }
}

fn push_module(line: &mut Vec<u8>, module: &str) {
    line.extend_from_slice(b" [");
    push_escaped(line, module.as_bytes());
    line.push(b']');
}

/// ` file:line`
fn push_place(line: &mut Vec<u8>, file: Option<&String>, number: Option<u32>) {
    if let Some(file) = file {
        line.push(b' ');
        push_escaped(line, file.as_bytes());
        if let Some(number) = number {
            let _ = write!(line, ":{number}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::usyms::Inlined;

    #[test]
    fn names_of_probes() {
        assert!(is_of_a_probe("bpf_trampoline_6442508870"));
        assert!(is_of_a_probe("bpf_prog_8f1_v4_fexit"));
        assert!(!is_of_a_probe("__inet_stream_connect"));
    }

    #[test]
    fn text() {
        let stacks = NamedStacks {
            kernel_stack: vec![KernelFrame {
                addr: "0xff".into(),
                symbol: Some(Symbol {
                    name: "tcp_v4_connect".into(),
                    offset: 5,
                    module: None,
                }),
            }],
            user_stack: vec![
                Frame {
                    addr: "0x10".into(),
                    name: Some("main".into()),
                    offset: Some(32),
                    module: Some("/bin/x".into()),
                    file: Some("x.c".into()),
                    line: Some(7),
                    inlined: vec![Inlined {
                        name: "dial".into(),
                        file: Some("dial.c".into()),
                        line: None,
                    }],
                },
                Frame {
                    addr: "0x20".into(),
                    ..Frame::default()
                },
            ],
        };
        let mut line = Vec::new();
        stacks.push_text(&mut line);
        assert_eq!(
            String::from_utf8(line).unwrap(),
            "\n    tcp_v4_connect+0x5\n    dial [inlined] dial.c\n    main+0x20 [/bin/x] x.c:7\n    0x20"
        );
    }
}
