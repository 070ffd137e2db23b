//! What events carry, as owned, pure types. Knows neither libbpf nor any tool.

pub mod dns;
pub mod head;
pub mod layout;
pub mod line;
pub mod link;
pub mod packet;
pub mod tuple;
