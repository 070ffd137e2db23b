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
//! | `engine` | session, pins, drain, merge, loss, signals |
//! | `bpf` | the skeletons and their plain types |

pub mod cli;
