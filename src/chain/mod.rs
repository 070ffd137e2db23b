//! The chain of XDP programs at an interface, which `xdpdump` and `xdpchain` share: its pinned state (`place`), and how it is put
//! in and taken out (`attach`).

pub mod attach;
pub mod place;
