//! The crate's map. Arrows run down this list: each module may use those below it, never those above.
//!
//! | module | what it holds |
//! |---|---|
//! | `cli` | the command line, exit codes |
//! | `tools` | one folder or file per subcommand |
//! | `output` | writers: text, JSON lines, files |
//! | `event` | owned, pure types and their decoders |
//! | `filter` | packet expressions: libpcap, cBPF, eBPF, injection |
//! | `kernel` | what the running kernel has and knows: BTF, symbols, features, interfaces |
//! | `engine` | pins, drain, merge, loss, signals, the loop of a run |
//! | `bpf` | the skeletons and their plain types |

pub mod bpf;
pub mod cli;
pub mod engine;
pub mod event;
pub mod filter;
pub mod kernel;
pub mod output;
pub mod tools;
