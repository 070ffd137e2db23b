//! Capture files: written by `pcapng`, read by libpcap (`savefile`) together with what pcapng says beside the bytes (`notes`).

pub mod linktype;
mod notes;
pub mod pcapng;
pub mod savefile;

pub use notes::Note;
