//! What the running kernel has and knows. No tool's knowledge here.

pub mod attach;
pub mod bpf_object;
pub mod btf;
pub mod btf_core;
mod btf_data;
pub mod btf_dump;
pub mod btf_functions;
pub mod cgroup;
pub mod clock;
pub mod drop_reason;
pub mod features;
pub mod frees;
mod ftrace;
pub mod functions;
pub mod ksyms;
pub mod listen;
pub mod members;
pub mod netdev;
pub mod netns;
pub mod pages;
pub mod process;
pub mod program;
pub mod routing;
mod rtnl;
pub mod trampoline;
pub mod usyms;
pub mod xdp;
