//! Capture files, written (`pcapng`) and read (`pcap_read`).

pub mod pcap_read;
pub mod pcapng;
