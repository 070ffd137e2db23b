//! Kernel structs of an event as C text (--output-skb, --output-skb-shared-info).

use anyhow::Result;

use crate::kernel::btf::Btf;
use crate::kernel::btf_dump::Dumper;

/// A kernel struct as C text.
#[derive(Default)]
pub struct Dump {
    dumper: Option<Dumper>,
    /// out of a recording: `shown` is what that says
    recorded: bool,
    /// of the event at hand
    pub shown: Option<String>,
}

impl Dump {
    /// Of `struct NAME`.
    pub fn new(btf: &Btf, name: &str) -> Result<Self> {
        let dumper = Some(Dumper::new(btf, name)?);
        Ok(Self {
            dumper,
            ..Self::default()
        })
    }

    /// What a recording says of the events from now on.
    pub fn learn(&mut self, shown: Option<String>) {
        self.recorded = true;
        self.shown = shown;
    }

    /// Makes the text of these bytes; there is none where they could not be read.
    pub fn show(&mut self, bytes: Option<&[u8]>) -> Result<()> {
        if self.recorded {
            return Ok(());
        }
        self.shown = match (&mut self.dumper, bytes) {
            (Some(dumper), Some(bytes)) if !bytes.is_empty() => Some(dumper.text(bytes)?),
            _ => None,
        };
        Ok(())
    }
}
