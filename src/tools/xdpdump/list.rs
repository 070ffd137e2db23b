//! `-D`: the interfaces, their XDP programs, and what hangs on those: netprobe's chain, a libxdp dispatcher's programs.

use std::io::Write;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::kernel::bpf_object;
use crate::kernel::bpf_object::ProgramInfo;
use crate::kernel::netdev;
use crate::kernel::xdp;
use crate::run::output::{Output, OutputArgs};
use crate::text::escape::escaped;

use crate::chain::place::{self, LAST, Lock, Place};

#[derive(Serialize)]
struct Row {
    ifindex: u32,
    iface: String,
    driver: Option<String>,
    mode: Option<&'static str>,
    program: Option<ProgramRow>,
    /// Programs behind it, in the order in which they run.
    behind: Vec<Behind>,
    captured_by: Option<u32>,
}

#[derive(Serialize)]
struct ProgramRow {
    id: u32,
    name: String,
    tag: String,
}

#[derive(Serialize)]
struct Behind {
    /// `slot N`, `was there`, or `dispatched`.
    how: String,
    #[serde(flatten)]
    program: ProgramRow,
}

pub fn run(args: &OutputArgs) -> Result<()> {
    let mut out = Output::open(args)?;
    let lock = Lock::take().ok();
    for (ifindex, name) in netdev::all()? {
        let row = row(ifindex, &name, lock.as_ref())?;
        if out.json() {
            out.json_event(&row)?;
        } else {
            text(&mut out, &row)?;
        }
    }
    out.flush()
}

fn row(ifindex: u32, name: &str, lock: Option<&Lock>) -> Result<Row> {
    let attached = xdp::query(ifindex)
        .with_context(|| format!("failed to ask for the XDP program of {name}"))?;
    let mut row = Row {
        ifindex,
        iface: escaped(name.as_bytes()),
        driver: netdev::driver(name).map(|driver| escaped(driver.as_bytes())),
        mode: attached.map(|attached| attached.mode.name()),
        program: attached.and_then(|attached| program(attached.program)),
        behind: Vec::new(),
        captured_by: None,
    };
    let Some(attached) = attached else {
        return Ok(row);
    };
    for extension in xdp::extensions(attached.program).unwrap_or_default() {
        row.behind
            .extend(program(extension.program).map(|program| Behind {
                how: "dispatched".to_owned(),
                program,
            }));
    }
    let found = lock.map(|lock| Place::find(name, lock)).transpose()?;
    let chain = found.and_then(|place| Some((place.state()?, place)));
    let Some((state, place)) = chain.filter(|(state, _)| state.root == attached.program) else {
        return Ok(row);
    };
    row.captured_by = place::owner(&state);
    for (slot, id) in place::slots(&place)? {
        let how = if slot == LAST {
            "was there".to_owned()
        } else {
            format!("slot {slot}")
        };
        row.behind
            .extend(program(id).map(|program| Behind { how, program }));
    }
    Ok(row)
}

/// What the kernel knows of a program; nothing where it has gone meanwhile.
fn program(id: u32) -> Option<ProgramRow> {
    let ProgramInfo { id, name, tag, .. } =
        bpf_object::program_info(bpf_object::program_by_id(id).ok()?.as_fd()).ok()?;
    let tag = tag.iter().map(|byte| format!("{byte:02x}")).collect();
    Some(ProgramRow {
        id,
        name: escaped(name.as_bytes()),
        tag,
    })
}

fn text(out: &mut Output, row: &Row) -> Result<()> {
    out.line(|b| {
        // Writes to a Vec do not fail.
        let _ = write!(
            b,
            "{:<3} {:<16} {:<12} ",
            row.ifindex,
            row.iface,
            row.driver.as_deref().unwrap_or("-")
        );
        let _ = match (&row.mode, &row.program) {
            (Some(mode), Some(program)) => {
                write!(
                    b,
                    "{mode:<8} {} (id {}, tag {})",
                    program.name, program.id, program.tag
                )
            }
            _ => write!(b, "no XDP program"),
        };
        if let Some(pid) = row.captured_by {
            let _ = write!(b, ", captured by process {pid}");
        }
    })?;
    for behind in &row.behind {
        let Behind { how, program } = behind;
        out.line(|b| {
            let _ = write!(
                b,
                "      {how:<12} {} (id {}, tag {})",
                program.name, program.id, program.tag
            );
        })?;
    }
    Ok(())
}
