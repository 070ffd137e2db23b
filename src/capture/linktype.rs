//! Link types: what the first header of a packet is, by libpcap's numbers and names.

use std::ffi::{CStr, CString, c_char, c_int};

/// A link type's number (DLT_*).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Linktype(pub c_int);

unsafe extern "C" {
    fn pcap_datalink_name_to_val(name: *const c_char) -> c_int;
    fn pcap_datalink_val_to_name(linktype: c_int) -> *const c_char;
}

impl Linktype {
    /// BSD's loopback: an address family in the byte order of the machine that captured.
    pub const NULL: Linktype = Linktype(0);
    /// Packets that begin with an Ethernet header.
    pub const ETHERNET: Linktype = Linktype(1);
    pub const PPP: Linktype = Linktype(9);
    /// Packets that begin with an IPv4 or IPv6 header.
    pub const RAW_IP: Linktype = Linktype(12);
    pub const PPP_SERIAL: Linktype = Linktype(50);
    pub const CISCO_HDLC: Linktype = Linktype(104);
    /// OpenBSD's loopback: an address family in network byte order.
    pub const LOOP: Linktype = Linktype(108);
    /// Linux's header in place of the device's own (`tcpdump -i any`).
    pub const LINUX_SLL: Linktype = Linktype(113);
    pub const IPV4: Linktype = Linktype(228);
    pub const IPV6: Linktype = Linktype(229);
    pub const LINUX_SLL2: Linktype = Linktype(276);

    /// The type of an interface's packets, by the kernel's number for its kind (ARPHRD_*), as XDP and packet sockets see them.
    /// None where netprobe does not know what a packet begins with.
    pub fn of_device(hatype: u16) -> Option<Self> {
        match hatype {
            // ARPHRD_ETHER, ARPHRD_LOOPBACK
            1 | 772 => Some(Linktype::ETHERNET),
            // ARPHRD_RAWIP, _TUNNEL, _TUNNEL6, _SIT, _IPGRE, _IP6GRE, _VOID and _NONE (tun, WireGuard), PPP (its header is taken off)
            519 | 768 | 769 | 776 | 778 | 823 | 0xffff | 0xfffe | 512 => Some(Linktype::RAW_IP),
            _ => None,
        }
    }

    /// From a name (`EN10MB`, `RAW`) as `tcpdump -L` prints it.
    pub fn from_name(name: &str) -> Option<Self> {
        let name = CString::new(name).ok()?;
        // SAFETY: `name` is a string that ends in NUL.
        let number = unsafe { pcap_datalink_name_to_val(name.as_ptr()) };
        (number >= 0).then_some(Linktype(number))
    }

    /// Its name, or its number where libpcap knows none.
    pub fn name(self) -> String {
        // SAFETY: the answer is null or a constant string of libpcap's.
        let name = unsafe {
            pcap_datalink_val_to_name(self.0)
                .as_ref()
                .map(|c| CStr::from_ptr(c))
        };
        name.map_or_else(
            || self.0.to_string(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// The number that a file has for it (LINKTYPE_*), of a type that netprobe writes.
    pub fn in_file(self) -> u16 {
        match self {
            Linktype::RAW_IP => 101,
            Linktype(number) => number as u16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_both_ways() {
        for linktype in [
            Linktype::ETHERNET,
            Linktype::RAW_IP,
            Linktype::LINUX_SLL2,
            Linktype::LOOP,
        ] {
            assert_eq!(Linktype::from_name(&linktype.name()), Some(linktype));
        }
        assert_eq!(Linktype::from_name("no such"), None);
        assert_eq!(Linktype(9999).name(), "9999");
    }
}
