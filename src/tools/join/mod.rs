//! `netprobe join`: two recordings of the same time from two hosts (or namespaces): which packets got from one to the other, how long that
//! took, and where the others ended.

pub mod args;
mod clock;
mod fate;
mod matching;
mod present;
mod side;
mod wire;

use std::path::Path;

use anyhow::{Context, Result, bail};

use crate::run::output::Output;
use crate::run::signals;
use crate::tools::report::filter::Filter;
use crate::tools::report::input;

use args::Args;
use fate::Joined;
use side::Side;

pub fn run(args: &Args) -> Result<()> {
    let stop = signals::stop_channel()?;
    let names = names(&args.a, &args.b);
    let mut damage = Ok(());
    let mut sides = Vec::new();
    for (path, name) in [&args.a, &args.b].into_iter().zip(names) {
        let mut side = Side::new(name, Filter::new(&args.filter)?);
        let read = input::read(&[path], &stop, &mut side);
        if side.packets.is_empty() {
            read?;
            bail!(
                "{}: there is no IP packet with its headers in it",
                path.display()
            );
        }
        damage = damage.and(read);
        side.finish();
        sides.push(side);
    }
    let [a, b] = <[Side; 2]>::try_from(sides)
        .map_err(|_| ())
        .ok()
        .context("two recordings")?;
    let mut out = Output::open(&args.output())?;
    let joined = Joined::new(a, b);
    present::present(&mut out, &joined, args.packets)?;
    out.flush()?;
    damage
}

/// What the ends are called: by their files, where these differ.
fn names(a: &Path, b: &Path) -> [String; 2] {
    let stem = |path: &Path| {
        let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned());
        stem.filter(|s| s != "-").unwrap_or_default()
    };
    match (stem(a), stem(b)) {
        (a, b) if a != b && !a.is_empty() && !b.is_empty() => [a, b],
        _ => ["a".to_owned(), "b".to_owned()],
    }
}
