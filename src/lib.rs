//! The crate's map. Arrows run down this list: each module may use those below it, never those above.
//! `tests/layers.rs` compares this map with the `use` lines.
//!
//! | module | what it holds |
//! |---|---|
//! | `cli` | the command line, exit codes |
//! | `tools` | one folder or file per subcommand |
//! | `chain` | the XDP programs of an interface |
//! | `explain` | what a drop means: rules as data |
//! | `run` | a run from its start to its end: pins, signals, the loop, loss, output |
//! | `filter` | packet expressions: libpcap, cBPF, eBPF, injection |
//! | `event` | owned, pure types and their decoders |
//! | `engine` | buffers, drain, merge: bytes in, order of time out |
//! | `kernel` | what the running kernel has and knows: BTF, symbols, features, interfaces |
//! | `bpf` | the skeletons and their plain types |
//! | `recording` | recordings: blocks with events and with what is needed to show them |
//! | `capture` | capture files |
//! | `insn` | eBPF instructions |
//! | `text` | bytes of lines: numbers, escapes, columns, JSON |
//! | `os` | clock, page size, CPUs |
//! | `usage` | wrong requests of the user |

pub mod bpf;
pub mod capture;
pub mod chain;
pub mod cli;
pub mod engine;
pub mod event;
pub mod explain;
pub mod filter;
pub mod insn;
pub mod kernel;
pub mod os;
pub mod recording;
pub mod run;
pub mod text;
pub mod tools;
pub mod usage;
