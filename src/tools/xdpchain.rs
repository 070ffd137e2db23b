//! `netprobe xdpchain`: the user's XDP programs in the slots of an interface's chain, put in and taken out while packets and
//! captures run. What a chain is and how it gets to the interface is `xdpdump::chain`'s.

use std::io::Write;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use libbpf_rs::skel::OpenSkel;
use libbpf_rs::{
    MapCore, MapFlags, MapHandle, Object, ObjectBuilder, OpenObject, OpenProgramMut, ProgramType,
};
use serde::Serialize;

use crate::bpf;
use crate::bpf::xdpdump::types::{np_chain_state, np_chain_stats};
use crate::chain::attach::{self as chain, Chain, Parts, Plan};
use crate::chain::place::{self, LAST, Lock, Place};
use crate::kernel::features::Features;
use crate::kernel::netdev;
use crate::kernel::netns::Netns;
use crate::kernel::xdp::{self, Mode, Traits};
use crate::run::log;
use crate::run::output::{Output, OutputArgs};
use crate::text::escape::escaped;
use crate::tools::xdpdump::args::XdpMode;
use crate::tools::xdpdump::probes::{open, set_traits};
use crate::usage::usage;

/// Programs that work together at XDP: list, add, remove, while packets flow.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Look for the interface in this network namespace: a name under /run/netns, a path, or inode:N
    #[arg(long, value_name = "NETNS", global = true)]
    netns: Option<String>,

    /// Show libbpf's log
    #[arg(long, global = true)]
    verbose: bool,

    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// Show the chains: slots in their order, names, runs and verdicts
    List {
        /// Only this interface
        iface: Option<String>,
        #[command(flatten)]
        output: OutputArgs,
    },
    /// Load an XDP program and put it into a slot; makes the chain where there is none
    Add(AddArgs),
    /// Take the program out of a slot; the chain goes with its last program
    Remove {
        iface: String,
        /// The slot to empty
        #[arg(long, value_name = "N", default_value_t = 0)]
        slot: u32,
    },
    /// Remove all programs, and restore the program that was at the interface before
    Clear { iface: String },
}

#[derive(Debug, clap::Args)]
struct AddArgs {
    iface: String,
    /// An object file as clang makes it
    file: PathBuf,
    /// The section or function of the program; the default is the only one, or the first
    #[arg(long, value_name = "S")]
    section: Option<String>,
    /// 0 to 6, run in this order; the default is the first free one
    #[arg(long, value_name = "N")]
    slot: Option<u32>,
    /// Replace the program that is in the slot
    #[arg(long)]
    replace: bool,
    /// The name to be listed; the default is the program's
    #[arg(long)]
    name: Option<String>,
    /// How to attach if the interface has neither a chain nor an XDP program
    #[arg(long, value_enum, default_value_t = XdpMode::Auto)]
    xdp_mode: XdpMode,
}

pub fn run(args: &Args) -> Result<()> {
    if let Some(netns) = &args.netns {
        Netns::parse(netns)?.enter()?;
    }
    log::init(args.verbose);
    Features::detect().require_xdp("xdpchain")?;
    match &args.action {
        Action::List { iface, output } => list(iface.as_deref(), output),
        Action::Add(add) => add_program(add),
        Action::Remove { iface, slot } => remove(iface, Some(*slot)),
        Action::Clear { iface } => remove(iface, None),
    }
}

fn add_program(args: &AddArgs) -> Result<()> {
    if args.slot.is_some_and(|slot| slot >= LAST) {
        return Err(usage(format!(
            "--slot: 0 to {}; the last one is for the program that was there before",
            LAST - 1
        )));
    }
    let lock = Lock::take()?;
    let place = Place::find(&args.iface, &lock)?;
    place::sweep();
    // A chain that is there, with a capture in front or not, is left in place; else one is made.
    let (state, made) = match chain::recover(&place)? {
        Some(state) => (state, None),
        None => {
            let made = begin(&place, args, &lock)?;
            (place.state().context("the chain has gone")?, Some(made))
        }
    };
    let result = put_in(&place, &state, args);
    match (made, result) {
        // Dropped before the lock is free it would wait for it for ever.
        (Some(chain), Err(error)) => {
            chain.leave();
            chain::dissolve(&place)?;
            Err(error)
        }
        (made, result) => {
            if let Some(chain) = made {
                chain.leave();
            }
            result
        }
    }
}

/// A chain with nothing but our program that hands on.
fn begin(place: &Place, args: &AddArgs, lock: &Lock) -> Result<Chain> {
    let plan = Plan::make(place.clone(), lock)?;
    let mut storage = MaybeUninit::uninit();
    let mut opened = open(&plan, &mut storage)?;
    opened.progs.xdp_dump.set_autoload(false);
    opened.progs.xdp_alone.set_autoload(false);
    let skel = opened.load().map_err(|error| {
        anyhow!(
            "failed to load the chain's program: {error:?}\n{}",
            log::take()
        )
    })?;
    let parts = Parts {
        root: skel.progs.xdp_chain.as_fd(),
        standby: skel.progs.xdp_chain.as_fd(),
        maps: vec![
            ("next_prog_map", skel.maps.next_prog_map.as_fd()),
            ("chain_stats", skel.maps.chain_stats.as_fd()),
            ("chain_state", skel.maps.chain_state.as_fd()),
            ("event_map", skel.maps.events.as_fd()),
        ],
        modes: args.xdp_mode.modes(netdev::driver(&place.name).as_deref()),
        owned: false,
    };
    Chain::install(plan, &parts, lock)
}

fn put_in(place: &Place, state: &np_chain_state, args: &AddArgs) -> Result<()> {
    let used = place::used_slots(place)?;
    let slot = match args.slot {
        Some(slot) => slot,
        None => (0..LAST)
            .find(|slot| !used.contains(slot))
            .context("all slots are in use")?,
    };
    if used.contains(&slot) && !args.replace {
        bail!(
            "slot {slot} of {} holds {} already (--replace takes its place)",
            place.name,
            escaped(place::slot_name(state, slot))
        );
    }
    let traits = Traits {
        frags: state.frags != 0,
        attach_type: state.attach_type,
    };
    let loaded = load(&args.file, args.section.as_deref(), slot, place, traits)?;
    reset_counters(place, slot)?;
    place::rename(place, slot, args.name.as_deref().unwrap_or(&loaded.name))?;
    let program = loaded
        .object
        .progs()
        .find(|program| program.name() == loaded.function.as_str());
    let program = program.context("the program was not loaded")?;
    place::insert(place, slot, program.as_fd())?;
    chain::persist(place, state)?;
    eprintln!(
        "netprobe: {} is in slot {slot} of {} ({} XDP)",
        escaped(loaded.name.as_bytes()),
        place.name,
        Mode::from_flag(state.mode).map_or("unknown", Mode::name)
    );
    if !loaded.cooperates && used.iter().any(|other| *other > slot) {
        eprintln!(
            "netprobe: it knows nothing of the chain: the programs in later slots do not run"
        );
    }
    Ok(())
}

struct Loaded {
    object: Object,
    /// As listed.
    name: String,
    function: String,
    /// Includes netprobe_chain.h.
    cooperates: bool,
}

/// Loads one program of an object file, on the maps of the chain where it names them.
fn load(
    file: &Path,
    section: Option<&str>,
    slot: u32,
    place: &Place,
    traits: Traits,
) -> Result<Loaded> {
    let failed = |error: libbpf_rs::Error| {
        anyhow!(
            "failed to load {}: {error:?}\n{}",
            file.display(),
            log::take()
        )
    };
    let mut object = ObjectBuilder::default().open_file(file).map_err(failed)?;
    let function =
        choose(&mut object, section, traits).with_context(|| file.display().to_string())?;
    let mut cooperates = false;
    for mut map in object.maps_mut() {
        let name = map.name().to_string_lossy().into_owned();
        match name.as_str() {
            "next_prog_map" | "chain_stats" => {
                cooperates = true;
                let shared = place::open(place, &name)?;
                map.reuse_fd(shared.as_fd()).with_context(|| {
                    format!("{}: its map {name} is not the chain's", file.display())
                })?;
            }
            ".rodata.netprobe" => {
                let value = map.initial_value_mut().and_then(|bytes| bytes.get_mut(..4));
                value
                    .context("np_chain_slot has no value")?
                    .copy_from_slice(&slot.to_ne_bytes());
            }
            _ => {}
        }
    }
    let object = object.load().map_err(failed)?;
    Ok(Loaded {
        object,
        name: function.clone(),
        function,
        cooperates,
    })
}

/// Marks one program to be loaded, and the others not to be. Its name.
fn choose(object: &mut OpenObject, section: Option<&str>, traits: Traits) -> Result<String> {
    let fits = |program: &OpenProgramMut<'_>| match section {
        Some(wanted) => program.section() == wanted || program.name() == wanted,
        None => true,
    };
    let mut chosen: Option<String> = None;
    let mut names = Vec::new();
    for mut program in object.progs_mut() {
        names.push(format!(
            "{} ({})",
            program.section().to_string_lossy(),
            program.name().to_string_lossy()
        ));
        let take = chosen.is_none() && fits(&program);
        program.set_autoload(take);
        if take {
            chosen = Some(program.name().to_string_lossy().into_owned());
            // Sections need not be named "xdp": those of old loaders are not.
            program.set_prog_type(ProgramType::Xdp);
            set_traits(&mut program, traits);
        }
    }
    chosen.ok_or_else(|| {
        usage(match section {
            Some(wanted) => format!(
                "no program in section {wanted}; there are: {}",
                names.join(", ")
            ),
            None => "no program in it".to_owned(),
        })
    })
}

/// One slot, or all.
fn remove(iface: &str, slot: Option<u32>) -> Result<()> {
    let lock = Lock::take()?;
    let place = Place::find(iface, &lock)?;
    let Some(state) = chain::recover(&place)? else {
        ensure!(slot.is_none(), "{iface} has no chain");
        eprintln!("netprobe: {iface} has no chain");
        return Ok(());
    };
    let used = place::used_slots(&place)?;
    let slots = slot.map_or_else(
        || used.iter().copied().filter(|slot| *slot != LAST).collect(),
        |slot| vec![slot],
    );
    for slot in &slots {
        ensure!(
            *slot != LAST,
            "slot {LAST} holds the program that was there before; it is not netprobe's to remove"
        );
        ensure!(used.contains(slot), "slot {slot} of {iface} is empty");
        place::take_out(&place, *slot)?;
        place::rename(&place, *slot, "")?;
        xdp::settle();
        reset_counters(&place, *slot)?;
        eprintln!("netprobe: slot {slot} of {iface} is empty");
    }
    // With a capture in front the chain stays until that ends.
    if place::owner(&state).is_none() && place::used_slots(&place)?.iter().all(|slot| *slot == LAST)
    {
        chain::dissolve(&place)?;
    }
    Ok(())
}

/// From now on the slot's counters are told from 0.
fn reset_counters(place: &Place, slot: u32) -> Result<()> {
    let now = counters(place.dir())?;
    let now = now.slot.get(slot as usize).copied().unwrap_or_default();
    place::change(place, |state| {
        if let Some(base) = state.base.get_mut(slot as usize) {
            *base = now;
        }
    })
}

#[derive(Serialize)]
struct ChainRow {
    iface: String,
    mode: &'static str,
    /// Program at the interface.
    program: u32,
    /// Process that captures there.
    #[serde(skip_serializing_if = "Option::is_none")]
    captured_by: Option<u32>,
    slots: Vec<SlotRow>,
}

#[derive(Serialize)]
struct SlotRow {
    slot: u32,
    program: u32,
    name: String,
    /// It was there before the chain.
    original: bool,
    runs: u64,
    /// ABORTED, DROP, PASS, TX, REDIRECT, others; of programs that tell them.
    verdicts: [u64; 6],
}

fn list(iface: Option<&str>, args: &OutputArgs) -> Result<()> {
    let mut out = Output::open(args)?;
    let lock = Lock::take()?;
    let wanted = iface.map(|name| Place::find(name, &lock)).transpose()?;
    for (dir, state) in place::all() {
        if wanted.as_ref().is_some_and(|place| place.dir() != dir) {
            continue;
        }
        let row = chain_row(&dir, &state)?;
        if out.json() {
            out.json_event(&row)?;
        } else {
            text(&mut out, &row)?;
        }
    }
    out.flush()
}

fn chain_row(dir: &Path, state: &np_chain_state) -> Result<ChainRow> {
    let stats = counters(dir)?;
    let map = MapHandle::from_pinned_path(dir.join("next_prog_map"))
        .context("failed to open a chain's programs")?;
    let slots = place::slots_of(&map)?
        .into_iter()
        .map(|(slot, program)| {
            let counters = stats.slot.get(slot as usize).copied().unwrap_or_default();
            let base = state.base.get(slot as usize).copied().unwrap_or_default();
            let mut verdicts = counters.verdicts;
            for (count, base) in verdicts.iter_mut().zip(base.verdicts) {
                *count = count.wrapping_sub(base);
            }
            SlotRow {
                slot,
                program,
                name: escaped(place::slot_name(state, slot)),
                original: slot == LAST,
                runs: counters.runs.wrapping_sub(base.runs),
                verdicts,
            }
        })
        .collect();
    Ok(ChainRow {
        iface: escaped(dir.file_name().unwrap_or_default().as_encoded_bytes()),
        mode: Mode::from_flag(state.mode).map_or("unknown", Mode::name),
        program: state.root,
        captured_by: place::owner(state),
        slots,
    })
}

/// The counters of all CPUs together.
fn counters(dir: &Path) -> Result<np_chain_stats> {
    let map = MapHandle::from_pinned_path(dir.join("chain_stats"))
        .context("failed to open a chain's counters")?;
    let per_cpu = map
        .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
        .context("failed to read the counters")?;
    let mut sum = np_chain_stats::default();
    for bytes in per_cpu.unwrap_or_default() {
        let (stats, _) = bpf::read::<np_chain_stats>(&bytes).unwrap_or_default();
        for (sum, one) in sum.slot.iter_mut().zip(stats.slot) {
            sum.runs += one.runs;
            for (sum, one) in sum.verdicts.iter_mut().zip(one.verdicts) {
                *sum += one;
            }
        }
    }
    Ok(sum)
}

fn text(out: &mut Output, row: &ChainRow) -> Result<()> {
    let capture = row
        .captured_by
        .map_or(String::new(), |pid| format!(", captured by process {pid}"));
    out.line(|b| {
        // Writes to a Vec do not fail.
        let _ = write!(
            b,
            "{}: {} XDP, program {}{capture}",
            row.iface, row.mode, row.program
        );
    })?;
    out.line(|b| {
        let _ = write!(
            b,
            "  {:<4} {:<24} {:>7} {:>12} {:>10} {:>10} {:>10} {:>10} {:>10}",
            "SLOT", "NAME", "PROGRAM", "RUNS", "ABORTED", "DROP", "PASS", "TX", "REDIRECT"
        );
    })?;
    for slot in &row.slots {
        let name = if slot.original {
            format!("{} (was there)", slot.name)
        } else {
            slot.name.clone()
        };
        let told = slot.verdicts.iter().any(|count| *count > 0);
        out.line(|b| {
            let _ = write!(
                b,
                "  {:<4} {name:<24} {:>7} {:>12}",
                slot.slot, slot.program, slot.runs
            );
            for count in &slot.verdicts[..5] {
                // A program that knows nothing of the chain tells no verdicts.
                let _ = if told {
                    write!(b, " {count:>10}")
                } else {
                    write!(b, " {:>10}", "-")
                };
            }
        })?;
    }
    Ok(())
}
