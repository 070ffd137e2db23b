//! Recordings: pcapng files whose local-use blocks carry events as the kernel wrote them, and the news that is needed to show them
//! (docs/recording.md). It knows no tool: what events and news mean is the business of the tool that a recording names.
//!
//! | module | what it holds |
//! |---|---|
//! | `block` | one block: its head, its checksum, its compression |
//! | `chunk` | what is in a block of events: events and news in their order |
//! | `reader` | the blocks of a file that may be damaged, cut off, foreign or hostile |

pub mod block;
pub mod chunk;
pub mod reader;
