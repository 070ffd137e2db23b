//! What a column is: all that is known of one section of an event, or of the flag that asks for it.

use anyhow::Result;

use crate::kernel::btf::Btf;
use crate::text::json::Object;
use crate::tools::skb::event::Event;
use crate::tools::skb::view::View;

/// Takes a section from the front of the bytes and gives what follows it; `None` where they are too few. `snap_len`: bytes of each
/// packet that events carry.
pub type Decode = for<'b> fn(&mut Event, &'b [u8], snap_len: usize) -> Option<&'b [u8]>;
/// Appends a part of an event's text.
pub type Text = fn(&mut View, &Event, &mut Vec<u8>);
/// Adds the fields of an event's JSON.
pub type Json = fn(&mut View, &Event, &mut Object<'_>);

/// A row of the table.
pub struct Column {
    /// SKB_SECTION_* of src/bpf/skb.h: the bits' order is the order of the sections in an event
    pub section: u32,
    /// what asks for it; `None`: it follows from other flags (`Args::sections`)
    pub flag: Option<Flag>,
    pub of: Of,
    /// what of the kernel's types its C code reads; an error with one clear line where the kernel does not have it
    pub types: fn(&Btf) -> Result<Types>,
    pub decode: Decode,
    /// bytes in an event; 0: as many as the packet or the stack has
    pub size: usize,
    /// looks up what text and JSON of the event need
    pub prepare: Option<fn(&mut View, &Event) -> Result<()>>,
    /// in front of the function's name
    pub before: Option<Before>,
    /// behind the function's name: columns with a low rank come first
    pub behind: Option<(u8, Text)>,
    /// lines below the event's
    pub below: Option<Text>,
    pub json: Option<Json>,
}

/// A flag of the command line.
pub struct Flag {
    /// without the dashes
    pub name: &'static str,
    pub help: &'static str,
    pub default: Default,
}

/// Whether a column is there without its flag; `=false` switches it off then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Default {
    No,
    Yes,
    /// with --drops, where the kernel has what it needs
    WithDrops,
}

impl Flag {
    pub const fn new(name: &'static str, help: &'static str) -> Self {
        let default = Default::No;
        Self {
            name,
            help,
            default,
        }
    }
}

/// Which events have a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Of {
    /// those of functions, not of tc and XDP programs
    Functions,
    /// those with an sk_buff, not of XDP programs
    Skbs,
    All,
}

/// Where the kernel's types are that the C code of a section reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Types {
    Kernel,
    /// in the BTF of modules, where libbpf has to look for them itself
    Modules,
}

/// Columns of the text in front of the function's name.
pub struct Before {
    /// titles, with the least width of each
    pub titles: &'static [(&'static str, usize)],
    /// writes as many columns, each with the blank behind it; [`View::widths`] has their widths
    pub text: Text,
}

impl Column {
    /// A section of `size` bytes that shows nothing.
    pub const fn new(section: u32, size: usize, decode: Decode) -> Self {
        Self {
            section,
            flag: None,
            of: Of::All,
            types: |_| Ok(Types::Kernel),
            decode,
            size,
            prepare: None,
            before: None,
            behind: None,
            below: None,
            json: None,
        }
    }

    /// The number of its bit.
    pub const fn bit(&self) -> usize {
        self.section.trailing_zeros() as usize
    }
}

/// A section of 8 bytes.
pub fn word(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (word, rest) = bytes.split_first_chunk()?;
    Some((u64::from_ne_bytes(*word), rest))
}
