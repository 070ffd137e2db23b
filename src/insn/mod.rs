//! eBPF instructions: how they are made and printed (`asm`), and what they do (`effects`). It knows nothing of packets.

pub mod asm;
pub mod effects;
