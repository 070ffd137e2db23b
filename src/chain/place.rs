//! The pinned state of an interface's chain: where it is kept, who may change it, its slots and their names.
//!
//! It must not attach or detach anything: `attach` does.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use crossbeam_channel::{RecvTimeoutError, Sender, bounded};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::fcntl::{Flock, FlockArg};

use crate::bpf;
pub use crate::bpf::xdpdump::types::np_chain_state as State;
use crate::bpf::xdpdump::types::{np_chain_kind, np_chain_limit, np_chain_state_limit};
use crate::kernel::bpf_object;
use crate::kernel::netdev;
use crate::kernel::netns::Netns;
use crate::kernel::xdp::{self, Attached};
use crate::run::pins::{ROOT, make_root};

/// Slots of the program array; the last one is for the program that was there before.
const SLOTS: u32 = np_chain_limit::NP_CHAIN_SLOTS.0;
pub const LAST: u32 = np_chain_limit::NP_CHAIN_LAST.0;
pub(super) const NAME_LEN: usize = np_chain_state_limit::NP_CHAIN_NAME.0 as usize;
pub(super) const VERSION: u32 = np_chain_state_limit::NP_CHAIN_STATE_VERSION.0;
pub(super) const OWN_LINK: u32 = np_chain_kind::NP_CHAIN_OWN_LINK.0;
pub(super) const THEIR_NETLINK: u32 = np_chain_kind::NP_CHAIN_THEIR_NETLINK.0;
pub(super) const THEIR_LINK: u32 = np_chain_kind::NP_CHAIN_THEIR_LINK.0;

/// An interface and the folder of its pins.
#[derive(Clone, Debug)]
pub struct Place {
    pub name: String,
    pub ifindex: u32,
    pub(super) netns: u64,
    pub(super) dir: PathBuf,
}

impl Place {
    /// An interface of the current network namespace. The lock keeps the answer true.
    pub fn find(name: &str, _lock: &Lock) -> Result<Self> {
        let (ifindex, netns) = (netdev::index(name)?, u64::from(Netns::current()?.inode));
        let base = Path::new(ROOT).join("xdp");
        let plain = base.join(name);
        // Two namespaces may each have an interface of this name: the second one's folder has the namespace's number in its name.
        let other = base.join(format!("{name}@{netns}"));
        let dir = match read_state(&plain) {
            Some(state) if state.netns != netns && !is_gone(&state) => other,
            _ => plain,
        };
        Ok(Place {
            name: name.to_owned(),
            ifindex,
            netns,
            dir,
        })
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn pin(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    pub fn state(&self) -> Option<State> {
        read_state(&self.dir)
    }
}

/// One process at a time changes chains.
pub struct Lock {
    _file: Flock<File>,
}

impl Lock {
    pub fn take() -> Result<Self> {
        let hint =
            "is bpffs mounted at /sys/fs/bpf? `ip netns exec` hides it: take --netns NAME instead";
        make_root().with_context(|| format!("chains have their pins there ({hint})"))?;
        let dir = Path::new(ROOT).join("xdp");
        DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(&dir)
            .with_context(|| format!("failed to make {} ({hint})", dir.display()))?;
        let file = File::open(&dir).with_context(|| format!("failed to open {}", dir.display()))?;
        let file = Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| anyhow!("failed to lock {}: {error}", dir.display()))?;
        Ok(Lock { _file: file })
    }
}

/// The living process that answers for a chain.
pub fn owner(state: &State) -> Option<u32> {
    let alive = state.owner != 0 && start_time(state.owner) == Some(state.owner_start);
    alive.then_some(state.owner)
}

/// Makes this process answer for a chain.
pub(super) fn own(state: &mut State) -> Result<()> {
    state.owner = std::process::id();
    state.owner_start = start_time(state.owner).context("failed to read our own start time")?;
    Ok(())
}

/// When a process was started, in ticks since boot: with the pid it names a process for good.
pub(super) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold blanks and parentheses.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // A zombie is dead: its parent only has not asked yet.
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

/// The pin of the number by which a capture's program knows whether it is alone.
pub const CHAIN_EMPTY: &str = "chain_empty";
/// The values of that number.
const UNKNOWN: u32 = 0;
pub const EMPTY: u32 = 1;

/// Tells the capture in front, if one is there, whether it may go by the slots without a look. The lock is held.
pub fn note_emptiness(place: &Place) -> Result<()> {
    let known = if used_slots(place)?.is_empty() {
        EMPTY
    } else {
        UNKNOWN
    };
    set_known(place, known)
}

fn set_known(place: &Place, known: u32) -> Result<()> {
    if !place.pin(CHAIN_EMPTY).exists() {
        return Ok(());
    }
    write_known(&open(place, CHAIN_EMPTY)?, known)
}

fn write_known(map: &MapHandle, known: u32) -> Result<()> {
    map.update(&0u32.to_ne_bytes(), &known.to_ne_bytes(), MapFlags::ANY)
        .context("failed to tell the capture's program of the chain")
}

/// Lets running captures go by slots that are empty, and finds programs that others put there: bpftool, an older netprobe. A thread
/// does, as what takes the captured packets may have to wait for its reader.
#[derive(Debug)]
pub struct Watch {
    /// Tells the thread by its end.
    _done: Sender<()>,
}

impl Watch {
    /// How long such a program may wait for its first packet.
    const PERIOD: Duration = Duration::from_millis(50);

    pub fn start<'p>(places: impl Iterator<Item = &'p Place>) -> Result<Self> {
        let mut chains = Vec::new();
        for place in places {
            let _lock = Lock::take()?;
            chains.push((open(place, "next_prog_map")?, open(place, CHAIN_EMPTY)?));
            note_emptiness(place)?;
        }
        let (done, wait) = bounded(0);
        let run = move || {
            while wait.recv_timeout(Self::PERIOD) == Err(RecvTimeoutError::Timeout) {
                for (array, known) in &chains {
                    if let Err(e) = look(array, known) {
                        eprintln!("netprobe: {e:#}");
                        return;
                    }
                }
            }
        };
        thread::Builder::new()
            .name("chain".into())
            .spawn(run)
            .context("failed to start a thread")?;
        Ok(Self { _done: done })
    }
}

/// Never tells that the slots are empty: another process may be about to put a program in.
fn look(array: &MapHandle, known: &MapHandle) -> Result<()> {
    match slots_of(array) {
        Ok(slots) if slots.is_empty() => Ok(()),
        _ => write_known(known, UNKNOWN),
    }
}

/// Slots that hold a program.
pub fn used_slots(place: &Place) -> Result<Vec<u32>> {
    Ok(slots(place)?.into_iter().map(|(slot, _)| slot).collect())
}

/// Slots that hold a program, with the program's id.
pub fn slots(place: &Place) -> Result<Vec<(u32, u32)>> {
    slots_of(&open(place, "next_prog_map")?)
}

/// The same of a chain's program array.
pub fn slots_of(array: &MapHandle) -> Result<Vec<(u32, u32)>> {
    let mut used = Vec::new();
    for slot in 0..SLOTS {
        let id = array
            .lookup(&slot.to_ne_bytes(), MapFlags::ANY)
            .context("failed to read the chain's slots")?;
        if let Some(id) = id.and_then(|bytes| bytes.try_into().ok()) {
            used.push((slot, u32::from_ne_bytes(id)));
        }
    }
    Ok(used)
}

/// Puts a program into a slot, live: the next packet runs it.
pub fn insert(place: &Place, slot: u32, program: BorrowedFd<'_>) -> Result<()> {
    set_known(place, UNKNOWN)?;
    open(place, "next_prog_map")?
        .update(
            &slot.to_ne_bytes(),
            &program.as_raw_fd().to_ne_bytes(),
            MapFlags::ANY,
        )
        .with_context(|| format!("failed to put a program into slot {slot} of {}", place.name))
}

/// Takes a program out of a slot, live.
pub fn take_out(place: &Place, slot: u32) -> Result<()> {
    open(place, "next_prog_map")?
        .delete(&slot.to_ne_bytes())
        .with_context(|| format!("failed to empty slot {slot} of {}", place.name))?;
    note_emptiness(place)
}

pub fn open(place: &Place, map: &str) -> Result<MapHandle> {
    let path = place.pin(map);
    MapHandle::from_pinned_path(&path).with_context(|| format!("failed to open {}", path.display()))
}

/// Names a slot, for lists.
pub fn rename(place: &Place, slot: u32, name: &str) -> Result<()> {
    change(place, |state| set_name(state, slot, name))
}

/// Changes a chain's state. The lock is held.
pub fn change(place: &Place, change: impl FnOnce(&mut State)) -> Result<()> {
    let mut state = place.state().context("the chain has gone")?;
    change(&mut state);
    write_state(place, &state)
}

pub(super) fn set_name(state: &mut State, slot: u32, name: &str) {
    let Some(to) = state.names.get_mut(slot as usize) else {
        return;
    };
    *to = [0; NAME_LEN];
    for (to, from) in to.iter_mut().zip(name.bytes().take(NAME_LEN - 1)) {
        *to = from;
    }
}

/// The name of a slot, as bytes of unknown origin.
pub fn slot_name(state: &State, slot: u32) -> &[u8] {
    state.names.get(slot as usize).map_or(&[], |name| {
        name.split(|b| *b == 0).next().unwrap_or_default()
    })
}

/// The chains of all interfaces of all namespaces: the folders and their states.
pub fn all() -> Vec<(PathBuf, State)> {
    let Ok(entries) = fs::read_dir(Path::new(ROOT).join("xdp")) else {
        return Vec::new();
    };
    let mut found = entries
        .flatten()
        .filter_map(|entry| Some((entry.path(), read_state(&entry.path())?)))
        .collect::<Vec<_>>();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// Removes the folders of interfaces that have gone. The lock is held.
pub fn sweep() {
    for (dir, state) in all() {
        if is_gone(&state) {
            remove_pins(&dir);
        }
    }
}

/// Whether a chain is at no interface any more, as far as it can be told from another namespace.
pub(super) fn is_gone(state: &State) -> bool {
    if owner(state).is_some() {
        return false;
    }
    let Ok(netns) = Netns::parse(&format!("inode:{}", state.netns)) else {
        return false;
    };
    if netns.path.is_none() {
        return true;
    }
    // A question without an answer says nothing.
    let now = netns.run(|| xdp::query(state.ifindex));
    matches!(now, Ok(Ok(now)) if !is_root(state, now))
}

/// Whether the interface runs the chain's own program.
pub(super) fn is_root(state: &State, now: Option<Attached>) -> bool {
    now.is_some_and(|now| [state.root, state.root_next].contains(&now.program))
}

pub(super) fn read_state(dir: &Path) -> Option<State> {
    let map = MapHandle::from_pinned_path(dir.join("chain_state")).ok()?;
    let bytes = map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).ok()??;
    let (state, _) = bpf::read::<State>(&bytes)?;
    (state.version == VERSION).then_some(state)
}

pub(super) fn write_state(place: &Place, state: &State) -> Result<()> {
    open(place, "chain_state")?
        .update(&0u32.to_ne_bytes(), bpf::bytes_of(state), MapFlags::ANY)
        .context("failed to write the chain's state")
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    bpf_object::pin(object, path).with_context(|| format!("failed to pin {}", path.display()))
}

pub(super) fn repin(object: BorrowedFd<'_>, path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("failed to remove {}", path.display()))
        }
        _ => pin(object, path),
    }
}

/// Removes a folder of pins. The order matters nowhere: nothing in it is at the interface any more, or its link goes with it.
pub(super) fn remove_pins(dir: &Path) {
    let _ = fs::remove_dir_all(dir);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_cut_and_kept_apart() {
        let mut state = State::default();
        set_name(&mut state, 2, &"x".repeat(40));
        set_name(&mut state, 3, "echo");
        set_name(&mut state, 99, "nowhere");
        assert_eq!(slot_name(&state, 2).len(), NAME_LEN - 1);
        assert_eq!(slot_name(&state, 3), b"echo");
        assert_eq!(slot_name(&state, 99), b"");
    }

    #[test]
    fn a_process_is_known_by_its_start() {
        let mut state = State::default();
        own(&mut state).unwrap();
        assert_eq!(owner(&state), Some(std::process::id()));
        state.owner_start += 1;
        assert_eq!(owner(&state), None);
    }
}
