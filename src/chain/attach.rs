//! The chain of an interface: our program in front, the slots behind it, and the way back to what was there before.
//!
//! All that it takes to put an interface back is pinned in /sys/fs/bpf/netprobe/xdp/IFACE/, before the interface is
//! touched: the program that was there, ours, the program array and [`State`]. So whoever comes next can finish what a killed
//! process left. It must not know what our program does with packets.

use std::fs::{self, DirBuilder};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::MapHandle;

use super::place::{
    LAST, Lock, OWN_LINK, Place, State, THEIR_LINK, THEIR_NETLINK, VERSION, all, insert, is_root,
    own, owner, pin, remove_pins, repin, set_name, sweep, used_slots, write_state,
};
use crate::kernel::bpf_object;
use crate::kernel::netdev;
use crate::kernel::netns::Netns;
use crate::kernel::xdp::{self, Attached, Mode, Traits};

/// What stands at the interface and how our program has to be, found before ours is loaded.
pub struct Plan {
    pub place: Place,
    /// The chain that is there already, with programs of the user's in it.
    pub chain: Option<State>,
    /// The program that is there, when no chain of ours is.
    pub found: Option<Attached>,
    pub traits: Traits,
    original: Option<OwnedFd>,
}

impl Plan {
    /// Looks, after putting back what a dead process left. Words about that go to stderr.
    pub fn make(place: Place, _lock: &Lock) -> Result<Self> {
        if let Some(state) = recover(&place)? {
            if let Some(owner) = owner(&state) {
                bail!(
                    "{} is being captured by process {owner} already",
                    place.name
                );
            }
            let traits = Traits {
                frags: state.frags != 0,
                attach_type: state.attach_type,
            };
            return Ok(Plan {
                place,
                chain: Some(state),
                found: None,
                traits,
                original: None,
            });
        }
        let found = xdp::query(place.ifindex)
            .with_context(|| format!("failed to ask for the XDP program of {}", place.name))?;
        let Some(attached) = found else {
            let traits = Traits::of_kernel();
            return Ok(Plan {
                place,
                chain: None,
                found: None,
                traits,
                original: None,
            });
        };
        if attached.mode == Mode::Offload {
            bail!(
                "the XDP program of {} runs in the network card (offload); nothing in the kernel can be put in front of it",
                place.name
            );
        }
        let original = bpf_object::program_by_id(attached.program).with_context(|| {
            format!(
                "failed to open XDP program {} of {}",
                attached.program, place.name
            )
        })?;
        let traits = xdp::traits_of(original.as_fd()).map_err(|error| {
            // Kernels from 6.13 on, and older ones with its corrections: a program that others extend takes no tail call.
            let extended = error.raw_os_error() == Some(libc::EBUSY);
            let hint = if extended {
                " (others have replaced functions of it, as behind libxdp's dispatcher, and this kernel lets no tail call into such a program: --mode trace works)"
            } else {
                ""
            };
            let (id, name) = (attached.program, &place.name);
            anyhow::Error::new(error)
                .context(format!("cannot chain with XDP program {id} of {name}{hint}"))
        })?;
        Ok(Plan {
            place,
            chain: None,
            found,
            traits,
            original: Some(original),
        })
    }

    /// The map that our program has to share with the chain that is there.
    pub fn shared(&self, name: &str) -> Result<Option<MapHandle>> {
        let Some(_) = self.chain else { return Ok(None) };
        let path = self.place.pin(name);
        MapHandle::from_pinned_path(&path)
            .map(Some)
            .with_context(|| format!("failed to open {}", path.display()))
    }
}

/// Our programs and maps, loaded as the [`Plan`] wants them.
pub struct Parts<'a> {
    /// Runs at the interface from now on.
    pub root: BorrowedFd<'a>,
    /// Takes its place when this process ends and programs of the user's remain; only tail calls.
    pub standby: BorrowedFd<'a>,
    /// Maps to pin, by the names of their pins: next_prog_map, chain_stats, chain_state and what the tool adds.
    pub maps: Vec<(&'static str, BorrowedFd<'a>)>,
    /// Native or generic, in the order to be tried where nothing is attached.
    pub modes: Vec<Mode>,
    /// This process answers for the chain; else it stays by itself (xdpchain).
    pub owned: bool,
}

/// A chain with our program at its head. Dropped, it puts the interface back.
pub struct Chain {
    place: Place,
    link: Option<OwnedFd>,
    mode: Mode,
    released: bool,
}

impl Chain {
    /// Puts our program to the interface: pins first, then one atomic step.
    pub fn install(plan: Plan, parts: &Parts<'_>, _lock: &Lock) -> Result<Self> {
        match plan.chain {
            Some(state) => Self::take_over(plan.place, state, parts),
            None => Self::begin(plan, parts),
        }
    }

    fn begin(plan: Plan, parts: &Parts<'_>) -> Result<Self> {
        let place = plan.place.clone();
        remove_pins(&place.dir);
        let result = Self::begin_pinned(plan, parts);
        if result.is_err() {
            remove_pins(&place.dir);
        }
        result
    }

    fn begin_pinned(plan: Plan, parts: &Parts<'_>) -> Result<Self> {
        let Plan {
            place,
            found,
            traits,
            original,
            ..
        } = plan;
        DirBuilder::new()
            .mode(0o700)
            .create(&place.dir)
            .with_context(|| format!("failed to make {}", place.dir.display()))?;
        for (name, map) in &parts.maps {
            pin(*map, &place.pin(name))?;
        }
        pin(parts.root, &place.pin("root"))?;
        pin(parts.standby, &place.pin("standby"))?;
        let mut state = State {
            version: VERSION,
            netns: place.netns,
            ifindex: place.ifindex,
            root: bpf_object::program_info(parts.root)?.id,
            frags: u32::from(traits.frags),
            attach_type: traits.attach_type,
            ..State::default()
        };
        if parts.owned {
            own(&mut state)?;
        }
        if let (Some(attached), Some(original)) = (found, original) {
            let name = bpf_object::program_info(original.as_fd())?.name;
            set_name(&mut state, LAST, &name);
            pin(original.as_fd(), &place.pin("original"))?;
            insert(&place, LAST, original.as_fd())?;
            state.original = attached.program;
            state.mode = attached.mode.flag();
            return Self::before(place, state, original, parts, attached);
        }
        let (link, mode) = Self::attach(&place, parts)?;
        state.kind = OWN_LINK;
        state.mode = mode.flag();
        state.link = xdp::xdp_link(link.as_fd())?.0;
        if !parts.owned {
            pin(link.as_fd(), &place.pin("link"))?;
        }
        write_state(&place, &state)?;
        Ok(Chain {
            place,
            link: Some(link),
            mode,
            released: false,
        })
    }

    /// Attaches where nothing is attached, in the first mode that works.
    fn attach(place: &Place, parts: &Parts<'_>) -> Result<(OwnedFd, Mode)> {
        let mut refusals = Vec::new();
        for mode in &parts.modes {
            match xdp::link(place.ifindex, parts.root, *mode) {
                Ok(link) => return Ok((link, *mode)),
                Err(error) => refusals.push(format!("{}: {error}", mode.name())),
            }
        }
        bail!(
            "failed to attach to {} ({})",
            place.name,
            refusals.join("; ")
        )
    }

    /// Swaps our program in front of the one that is there.
    fn before(
        place: Place,
        mut state: State,
        original: OwnedFd,
        parts: &Parts<'_>,
        found: Attached,
    ) -> Result<Self> {
        state.kind = THEIR_NETLINK;
        write_state(&place, &state)?;
        let swapped = xdp::replace(
            place.ifindex,
            Some(parts.root),
            original.as_fd(),
            found.mode,
        );
        match swapped {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                state.kind = THEIR_LINK;
                let link = Self::update_link(
                    &place,
                    &mut state,
                    original.as_fd(),
                    parts.root,
                    found.program,
                )?;
                // Closed at once: the link has to end with the process that made it.
                drop(link);
            }
            Err(error) => {
                return Err(error).with_context(|| {
                    format!(
                        "failed to put a program in front of XDP program {} of {}",
                        found.program, place.name
                    )
                });
            }
        }
        Ok(Chain {
            place,
            link: None,
            mode: found.mode,
            released: false,
        })
    }

    /// Finds the link among those that look like it: the interface itself tells which one it was.
    fn update_link(
        place: &Place,
        state: &mut State,
        original: BorrowedFd<'_>,
        root: BorrowedFd<'_>,
        program: u32,
    ) -> Result<OwnedFd> {
        for (id, link) in
            xdp::links(place.ifindex, program).context("failed to list the BPF links")?
        {
            state.link = id;
            write_state(place, state)?;
            if xdp::link_update(link.as_fd(), root, original).is_err() {
                continue;
            }
            if xdp::query(place.ifindex)?.map(|now| now.program) == Some(state.root) {
                return Ok(link);
            }
            // The link of an interface with the same index in another namespace.
            xdp::link_update(link.as_fd(), original, root).context("failed to put a link back")?;
        }
        bail!(
            "failed to update the BPF link that holds XDP program {program} of {}",
            place.name
        )
    }

    /// Puts our program to the head of a chain that is there.
    fn take_over(place: Place, mut state: State, parts: &Parts<'_>) -> Result<Self> {
        let old =
            bpf_object::pinned(&place.pin("root")).context("failed to open the chain's program")?;
        let mode = Mode::from_flag(state.mode).context("the chain's state names no mode")?;
        for (name, map) in &parts.maps {
            let path = place.pin(name);
            if !matches!(*name, "next_prog_map" | "chain_stats" | "chain_state") {
                let _ = fs::remove_file(&path);
                pin(*map, &path)?;
            }
        }
        repin(parts.standby, &place.pin("standby"))?;
        if parts.owned {
            own(&mut state)?;
        }
        let link = swap_root(&place, &mut state, old.as_fd(), parts.root)?;
        Ok(Chain {
            place,
            link,
            mode,
            released: false,
        })
    }

    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Puts the interface back, or leaves the standby program where programs of the user's remain.
    pub fn release(mut self) -> Result<()> {
        self.put_back()
    }

    /// Leaves the chain as it is, for good.
    pub fn leave(mut self) {
        self.released = true;
    }

    fn put_back(&mut self) -> Result<()> {
        if std::mem::replace(&mut self.released, true) {
            return Ok(());
        }
        let _lock = Lock::take()?;
        let result = put_back(&self.place, true);
        drop(self.link.take());
        result
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if let Err(error) = self.put_back() {
            eprintln!("netprobe: {}: {error:#}", self.place.name);
        }
    }
}

/// Makes the chain outlive the process that owns it: pins its link.
pub fn persist(place: &Place, state: &State) -> Result<()> {
    let path = place.pin("link");
    if state.kind != OWN_LINK || path.exists() {
        return Ok(());
    }
    let link = bpf_object::link_by_id(state.link).context("failed to open the chain's link")?;
    pin(link.as_fd(), &path)
}

/// Puts back what a dead process left at an interface. The chain's state where a chain with programs of the user's remains, or
/// where a living process owns it.
pub fn recover(place: &Place) -> Result<Option<State>> {
    if !place.dir.exists() {
        return Ok(None);
    }
    let now = xdp::query(place.ifindex)
        .with_context(|| format!("failed to ask for the XDP program of {}", place.name))?;
    let Some(state) = place.state() else {
        remove_pins(&place.dir);
        return Ok(None);
    };
    let ours = state.ifindex == place.ifindex && state.netns == place.netns && is_root(&state, now);
    if !ours {
        if used_slots(place)?.iter().any(|slot| *slot != LAST) {
            eprintln!(
                "netprobe: {}: the chain is no longer attached; its programs are dropped",
                place.name
            );
        }
        remove_pins(&place.dir);
        return Ok(None);
    }
    if owner(&state).is_some() {
        return Ok(Some(state));
    }
    let state = finish_swap(place, state, now)?;
    if state.owner != 0 {
        eprintln!(
            "netprobe: {}: process {} died in front of this interface; putting it back",
            place.name, state.owner
        );
    }
    put_back(place, false)?;
    Ok(place.state())
}

/// Completes the books of a swap that a dead process began.
fn finish_swap(place: &Place, mut state: State, now: Option<Attached>) -> Result<State> {
    if state.root_next == 0 {
        return Ok(state);
    }
    if now.is_some_and(|now| now.program == state.root_next) {
        let next = place.pin("root_next");
        // Renamed already where the process died right after that.
        if next.exists() {
            fs::rename(&next, place.pin("root")).context("failed to pin our program")?;
        }
        state.root = state.root_next;
    }
    state.root_next = 0;
    write_state(place, &state)?;
    Ok(state)
}

/// Ends the chain, or hands it to the standby program where programs of the user's remain. The lock is held.
fn put_back(place: &Place, own_process: bool) -> Result<()> {
    let Some(mut state) = place.state() else {
        return Ok(());
    };
    ensure!(
        own_process || owner(&state).is_none(),
        "{} is being captured by process {}",
        place.name,
        state.owner
    );
    let root =
        bpf_object::pinned(&place.pin("root")).context("failed to open our pinned program")?;
    if used_slots(place)?.iter().any(|slot| *slot != LAST) {
        persist(place, &state)?;
        let standby = bpf_object::pinned(&place.pin("standby"))
            .context("failed to open the standby program")?;
        (state.owner, state.owner_start) = (0, 0);
        if bpf_object::program_info(standby.as_fd())?.id == state.root {
            return write_state(place, &state);
        }
        return swap_root(place, &mut state, root.as_fd(), standby.as_fd()).map(drop);
    }
    let result = detach(place, &state, root.as_fd());
    remove_pins(&place.dir);
    result
}

/// One atomic step back to what was there.
fn detach(place: &Place, state: &State, root: BorrowedFd<'_>) -> Result<()> {
    let changed = || {
        format!(
            "the XDP program of {} was changed by somebody else, and is left as it is",
            place.name
        )
    };
    match state.kind {
        OWN_LINK => match bpf_object::link_by_id(state.link) {
            Ok(link) => xdp::link_detach(link.as_fd()).with_context(changed),
            // It went with the interface.
            Err(_) => Ok(()),
        },
        THEIR_LINK => {
            // The link may have gone with its process, or the interface.
            let Ok(link) = bpf_object::link_by_id(state.link) else {
                return Ok(());
            };
            let original = bpf_object::pinned(&place.pin("original"))
                .context("failed to open the original program")?;
            xdp::link_update(link.as_fd(), original.as_fd(), root).with_context(changed)
        }
        THEIR_NETLINK => {
            let original = bpf_object::pinned(&place.pin("original"))
                .context("failed to open the original program")?;
            let mode = Mode::from_flag(state.mode).context("the chain's state names no mode")?;
            match xdp::replace(place.ifindex, Some(original.as_fd()), root, mode) {
                // The interface has gone, and its programs with it.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
                other => other.with_context(changed),
            }
        }
        other => bail!("unknown kind {other} of chain at {}", place.name),
    }
}

/// Replaces our program at the head of a chain by another one of ours. The link's fd where it is our own.
fn swap_root(
    place: &Place,
    state: &mut State,
    old: BorrowedFd<'_>,
    new: BorrowedFd<'_>,
) -> Result<Option<OwnedFd>> {
    // Should we die in between, either of the two is known as ours, and pinned.
    let pin_new = place.pin("root_next");
    repin(new, &pin_new)?;
    state.root_next = bpf_object::program_info(new)?.id;
    write_state(place, state)?;
    let failed = || {
        format!(
            "failed to swap the program at the head of the chain of {}",
            place.name
        )
    };
    let link = match state.kind {
        THEIR_NETLINK => {
            let mode = Mode::from_flag(state.mode).context("the chain's state names no mode")?;
            xdp::replace(place.ifindex, Some(new), old, mode).with_context(failed)?;
            None
        }
        _ => {
            let link =
                bpf_object::link_by_id(state.link).context("failed to open the chain's link")?;
            xdp::link_update(link.as_fd(), new, old).with_context(failed)?;
            (state.kind == OWN_LINK).then_some(link)
        }
    };
    fs::rename(&pin_new, place.pin("root")).context("failed to pin our program")?;
    state.root = std::mem::take(&mut state.root_next);
    write_state(place, state)?;
    Ok(link)
}

/// Ends a chain that no process owns. The lock is held.
pub fn dissolve(place: &Place) -> Result<()> {
    put_back(place, false)
}

/// Puts back what dead processes left at any interface of any namespace. Words about failures go to stderr.
pub fn restore_all(lock: &Lock) -> Result<()> {
    sweep();
    for (dir, state) in all() {
        let netns = Netns::parse(&format!("inode:{}", state.netns))?;
        let restored = netns.run(|| -> Result<()> {
            let (_, name) = netdev::all()?
                .into_iter()
                .find(|(index, _)| *index == state.ifindex)
                .with_context(|| format!("the interface of {} has gone", dir.display()))?;
            recover(&Place::find(&name, lock)?).map(drop)
        });
        if let Err(error) = restored.and_then(|inner| inner) {
            eprintln!("netprobe: {}: {error:#}", dir.display());
        }
    }
    Ok(())
}
