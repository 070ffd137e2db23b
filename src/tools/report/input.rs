//! Reads recordings: their blocks, in order. What is damaged is counted and told; what can be read is given to the view.

use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use crossbeam_channel::Receiver;
use nix::sys::signal::Signal;

use crate::recording::block::{Bad, Kind};
use crate::recording::chunk::{Item, Items};
use crate::recording::reader::{Damage, Reader};
use crate::run::Flow;
use crate::run::progress::Progress;
use crate::text::json;
use crate::tools::skb::record::{End, Head};

/// What takes the contents of recordings.
pub trait View {
    /// A recording begins; `goes_on`: it is the next file of the one before.
    fn begin(&mut self, head: Head, goes_on: bool) -> Result<()>;
    fn item(&mut self, item: Item<'_>) -> Result<Flow>;
    /// Of a recording with an end. The last one of all files says what was lost.
    fn end(&mut self, end: &End) -> Result<()>;
    /// To be called now and then.
    fn tick(&mut self) -> Result<()>;
}

/// One recording after the other, until all are read, a signal comes, or the view wants no more.
pub fn read(
    files: &[impl AsRef<Path>],
    stop: &Receiver<Signal>,
    view: &mut dyn View,
) -> Result<()> {
    let mut damaged = Vec::new();
    let mut goes_on = false;
    for path in files {
        let path = path.as_ref();
        let mut input = Input::open(path)?;
        let flow = input.read(stop, view, goes_on)?;
        goes_on = input.goes_on;
        if flow == Flow::Stop {
            break;
        }
        if !input.ended {
            eprintln!(
                "netprobe: {} has no end: netprobe was killed, or still records; what was lost is not known",
                path.display()
            );
        }
        let damage = input.reader.damage;
        let cut_alone = Damage {
            cut: damage.cut,
            ..Damage::default()
        };
        if damage != cut_alone {
            damaged.push(format!("{} is damaged: {}", path.display(), words(&damage)));
        }
    }
    match damaged.is_empty() {
        true => Ok(()),
        false => Err(anyhow!("{}", damaged.join("; "))),
    }
}

/// What could not be read.
fn words(damage: &Damage) -> String {
    let mut parts = Vec::new();
    if damage.blocks > 0 {
        let why = damage.why.map_or(String::new(), |why| format!(" ({why})"));
        parts.push(format!("{} blocks could not be read{why}", damage.blocks));
    }
    if damage.missing > 0 {
        parts.push(format!("{} blocks are missing", damage.missing));
    }
    if damage.bytes > 0 {
        parts.push(format!("{} bytes are no block", damage.bytes));
    }
    if damage.cut {
        parts.push("its last block is not whole".to_owned());
    }
    parts.join(", ")
}

struct Input {
    reader: Reader<Box<dyn Read>>,
    name: String,
    size: usize,
    /// its end was read
    ended: bool,
    goes_on: bool,
}

impl Input {
    fn open(path: &Path) -> Result<Self> {
        let name = path.display().to_string();
        let (from, size): (Box<dyn Read>, u64) = if path == Path::new("-") {
            (Box::new(std::io::stdin()), 0)
        } else {
            let file = File::open(path).with_context(|| format!("failed to open {name}"))?;
            let size = file.metadata().map_or(0, |m| m.len());
            (Box::new(file), size)
        };
        Ok(Self {
            reader: Reader::new(from),
            name,
            size: size as usize,
            ended: false,
            goes_on: false,
        })
    }

    fn read(
        &mut self,
        stop: &Receiver<Signal>,
        view: &mut dyn View,
        goes_on: bool,
    ) -> Result<Flow> {
        let failed = || format!("failed to read {}", self.name);
        if !self.reader.is_pcapng().with_context(failed)? {
            bail!("{} is no recording: it is no pcapng file", self.name);
        }
        // On a terminal the lines themselves show how it goes.
        let silent = std::io::stdout().is_terminal();
        let mut progress = (!silent).then(|| Progress::new("reading", self.size));
        let mut begun = false;
        let mut goes_on = goes_on;
        let mut done = 0;
        while let Some((info, contents)) = self
            .reader
            .next_block()
            .with_context(|| format!("failed to read {}", self.name))?
        {
            if stop.try_recv().is_ok() {
                return Ok(Flow::Stop);
            }
            match info.kind {
                Kind::Head => {
                    let head = json::read(contents)
                        .map_err(|_| anyhow!("{}: its head makes no sense", self.name))?;
                    view.begin(head, goes_on)
                        .with_context(|| self.name.clone())?;
                    (begun, self.ended, goes_on) = (true, false, false);
                }
                Kind::Events if begun => {
                    for item in Items(contents) {
                        if view.item(item)? == Flow::Stop {
                            return Ok(Flow::Stop);
                        }
                    }
                    view.tick()?;
                }
                Kind::End if begun => {
                    let end: End = json::read(contents).unwrap_or_default();
                    view.end(&end)?;
                    (self.ended, self.goes_on) = (true, end.goes_on);
                    goes_on = end.goes_on;
                }
                Kind::Events | Kind::End => {}
            }
            done += contents.len() / 8;
            if let Some(progress) = &mut progress {
                progress.at(done.min(self.size));
            }
        }
        if !begun {
            bail!("{}", nothing(&self.name, &self.reader.damage));
        }
        Ok(Flow::Continue)
    }
}

/// Why there is nothing to show.
fn nothing(name: &str, damage: &Damage) -> String {
    match damage.why {
        Some(bad @ Bad::Version(_)) => format!("{name} has {bad}"),
        _ if damage.any() => format!(
            "{name} cannot be shown, its head cannot be read: {}",
            words(damage)
        ),
        _ => format!("{name} is a capture file without events: netprobe record makes recordings"),
    }
}
