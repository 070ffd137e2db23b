//! The lines of `netprobe tcp`.

use std::collections::HashMap;
use std::io::Write;
use std::net::SocketAddr;

use crate::kernel::clock::WallClock;
use crate::kernel::containers::ContainerNames;
use crate::run::Flow;
use crate::run::output::Output;
use crate::text::columns::{pad, push_time_of_day};
use crate::text::escape::push_escaped;
use anyhow::Result;

use super::args::Args;
use super::blame::{Blame, End, STORIES, Stories};
use super::connection::{Connection, Limit, Owner, Role};
use super::ending::sentence;
use super::happenings::{Reasons, Words};
use super::json::{NoteRow, Place, Row};
use super::notes::{Note, What};
use crate::bpf::tcp::types::conn_what;

/// Turns connections into lines.
pub struct Presenter {
    details: bool,
    clock: WallClock,
    containers: ContainerNames,
    widths: [usize; 4],
    /// all lines are those of events (--events)
    events: bool,
    words: Words,
    /// why connections take long (--min-ms)
    stories: Option<Stories>,
    /// windows of zero of connections that are open, where they are looked at
    windows: Option<HashMap<End, Windows>>,
}

/// Of a connection's peer.
#[derive(Debug, Clone, Copy, Default)]
struct Windows {
    /// that its window was zero
    times: u32,
    /// until it was open again
    ns: u64,
    /// since when it is zero, ns of CLOCK_MONOTONIC
    shut: Option<u64>,
}

impl Presenter {
    pub fn new(details: bool) -> Result<Self> {
        Ok(Self {
            details,
            clock: WallClock::new()?,
            containers: ContainerNames::default(),
            widths: [18, 7, 21, 21],
            events: false,
            words: Words::default(),
            stories: None,
            windows: None,
        })
    }

    pub fn of_run(args: &Args, reasons: Reasons) -> Result<Self> {
        Ok(Self {
            events: !args.events.is_empty(),
            words: Words::new(reasons),
            stories: args.filter.min_ms.map(|_| Stories::default()),
            windows: (args.notes() & 1 << conn_what::CONN_WHAT_PEER_SHUT.0 != 0).then(HashMap::new),
            ..Self::new(args.details)?
        })
    }

    pub fn header(&self, out: &mut Output) -> Result<()> {
        if out.json() {
            return Ok(());
        }
        let [process, role, local, remote] = self.widths;
        if self.events {
            let line = format!(
                "{:<15} {:<process$} {:<local$} {:<remote$} EVENT",
                "TIME", "PROCESS", "LOCAL", "REMOTE"
            );
            out.line(|b| b.extend_from_slice(line.as_bytes()))?;
            return out.flush();
        }
        let line = format!(
            "{:<process$} {:<role$} {:<local$} {:<remote$} {:>10} {:>9} {:>9} {:>9} {:>8} {:>5} END",
            "PROCESS",
            "ROLE",
            "LOCAL",
            "REMOTE",
            "MS",
            "SETUP_MS",
            "SENT",
            "RECEIVED",
            "RTT_MS",
            "AGAIN"
        );
        out.line(|b| b.extend_from_slice(line.as_bytes()))?;
        out.flush()
    }

    /// Times that the window of a connection's peer was zero, and ns; it has ended. `None`: not looked at, or there was
    /// no room for it.
    pub fn zero_windows(&mut self, c: &Connection) -> Option<(u32, u64)> {
        let windows = self.windows.as_mut()?;
        let full = windows.len() >= STORIES;
        let known = windows.remove(&(c.netns, c.local, c.remote));
        let known = known.or((!full).then_some(Windows::default()))?;
        let rest = known.shut.map_or(0, |since| c.end.saturating_sub(since));
        Some((known.times, known.ns + rest))
    }

    fn count_windows(&mut self, n: &Note) {
        let Some(windows) = &mut self.windows else {
            return;
        };
        let end = (n.netns, n.local, n.remote);
        match n.what {
            What::PeerShut { .. } if windows.len() < STORIES || windows.contains_key(&end) => {
                let known = windows.entry(end).or_default();
                known.times += 1;
                known.shut = Some(n.ts);
            }
            What::PeerOpen(ns) => {
                if let Some(known) = windows.get_mut(&end) {
                    known.ns += ns;
                    known.shut = None;
                }
            }
            _ => {}
        }
    }

    /// Why a connection that has ended took long.
    pub fn blame(&mut self, c: &Connection) -> Option<Blame> {
        self.stories.as_mut()?.blame(c)
    }

    /// Notes about connections that there was no room for.
    pub fn cut(&self) -> u64 {
        self.stories.as_ref().map_or(0, |stories| stories.cut)
    }

    pub fn row(
        &mut self,
        out: &mut Output,
        c: &Connection,
        late: bool,
        blame: Option<Blame>,
    ) -> Result<Flow> {
        self.clock.refresh()?;
        let container = c.owner.and_then(|o| self.containers.of(o.cgroup, o.tgid));
        if out.json() {
            let place = Place::new(
                "connection",
                (c.end, self.clock.wall(c.end), late),
                (c.owner.as_ref(), container),
                c.role,
                (c.netns, c.local, c.remote),
            );
            return out.json_event(&Row::of(c, place, blame));
        }
        let mut line = Vec::with_capacity(200);
        if self.events {
            let ends = (c.local, c.remote);
            self.begin(&mut line, c.end, c.owner.as_ref(), container, ends);
            ended(&mut line, c);
        } else {
            self.text(&mut line, c, container);
        }
        if late {
            line.extend_from_slice(b" [late]");
        }
        if let Some(blame) = blame {
            let _ = write!(line, "\n  {}; {}", blame.text, blame.change);
        }
        if self.details {
            details(&mut line, c);
        }
        out.event(|b| b.extend_from_slice(&line))
    }

    /// What has happened to a connection: a line where it is `shown`. `stack`: see [`Words::of`].
    pub fn note(
        &mut self,
        out: &mut Output,
        (n, stack): (&Note, &[u64]),
        late: bool,
        shown: bool,
    ) -> Result<Flow> {
        self.clock.refresh()?;
        let happening = self.words.of(n, stack);
        self.count_windows(n);
        if let Some(stories) = &mut self.stories {
            stories.learn(n, happening.lost_by());
        }
        if !self.events || !shown {
            return Ok(Flow::Continue);
        }
        let container = n.owner.and_then(|o| self.containers.of(o.cgroup, o.tgid));
        if out.json() {
            let place = Place::new(
                "event",
                (n.ts, self.clock.wall(n.ts), late),
                (n.owner.as_ref(), container),
                n.role,
                (n.netns, n.local, n.remote),
            );
            return out.json_event(&NoteRow { place, happening });
        }
        let mut line = Vec::with_capacity(200);
        self.begin(
            &mut line,
            n.ts,
            n.owner.as_ref(),
            container,
            (n.local, n.remote),
        );
        line.extend_from_slice(happening.text.as_bytes());
        if late {
            line.extend_from_slice(b" [late]");
        }
        out.event(|b| b.extend_from_slice(&line))
    }

    /// Time, process and addresses of a line of --events.
    fn begin(
        &mut self,
        line: &mut Vec<u8>,
        ts: u64,
        owner: Option<&Owner>,
        container: Option<String>,
        ends: (SocketAddr, SocketAddr),
    ) {
        let [process, _, local, remote] = &mut self.widths;
        push_time_of_day(line, self.clock.wall(ts));
        line.push(b' ');
        let start = line.len();
        push_owner(line, owner, container);
        pad(line, start, process);
        for (end, width) in [(ends.0, local), (ends.1, remote)] {
            let start = line.len();
            let _ = write!(line, "{end}");
            pad(line, start, width);
        }
    }

    fn text(&mut self, line: &mut Vec<u8>, c: &Connection, container: Option<String>) {
        let [process, role, local, remote] = &mut self.widths;
        push_owner(line, c.owner.as_ref(), container);
        pad(line, 0, process);
        for (text, width) in [
            (role_word(c.role).to_owned(), role),
            (c.local.to_string(), local),
            (c.remote.to_string(), remote),
        ] {
            let start = line.len();
            line.extend_from_slice(text.as_bytes());
            pad(line, start, width);
        }
        let ms =
            |ns: Option<u64>| ns.map_or("-".to_owned(), |ns| format!("{:.3}", ns as f64 / 1e6));
        let rtt = match c.counters.rtt {
            0 => "-".to_owned(),
            us => format!("{:.3}", f64::from(us) / 1e3),
        };
        let _ = write!(
            line,
            "{:>10} {:>9} {:>9} {:>9} {rtt:>8} {:>5} {}",
            ms(c.duration()),
            ms(c.handshake()),
            c.counters.sent,
            c.counters.received,
            c.counters.retransmitted,
            sentence(c)
        );
        let of = if c.open { " of its sending" } else { "" };
        match c.limit() {
            Some((Limit::PeersWindow, share)) => {
                let _ = write!(line, "; {share} %{of} waited for the peer's window");
            }
            Some((Limit::SendBuffer, share)) => {
                let _ = write!(line, "; {share} %{of} waited for the send buffer");
            }
            _ => {}
        }
        if c.old && !c.open {
            line.extend_from_slice(b"; older than this run");
        }
    }
}

fn push_owner(line: &mut Vec<u8>, owner: Option<&Owner>, container: Option<String>) {
    match owner {
        Some(owner) => {
            push_escaped(line, owner.comm());
            let _ = write!(line, "[{}]", owner.tgid);
        }
        None => line.push(b'-'),
    }
    if let Some(container) = container {
        let _ = write!(line, "@{container}");
    }
}

/// The end of a connection among other events.
fn ended(line: &mut Vec<u8>, c: &Connection) {
    let n = &c.counters;
    let _ = write!(line, "ended: {}", sentence(c));
    if let Some(ns) = c.duration() {
        let _ = write!(line, ", after {:.3} ms", ns as f64 / 1e6);
    }
    let _ = write!(
        line,
        "; {} bytes sent, {} received, {} segments again",
        n.sent, n.received, n.retransmitted
    );
}

fn role_word(role: Role) -> &'static str {
    match role {
        Role::Connect => "connect",
        Role::Accept => "accept",
        Role::Unknown => "-",
    }
}

/// A second line.
fn details(line: &mut Vec<u8>, c: &Connection) {
    let n = &c.counters;
    let ms = |ns: u64| ns as f64 / 1e6;
    let _ = write!(
        line,
        "\n  segments {} out ({} of data), {} in ({} of data); again {} ({} bytes), lost {}, reordered {}, duplicates {}, out of order {}",
        n.segs_out,
        n.data_segs_out,
        n.segs_in,
        n.data_segs_in,
        n.retransmitted,
        n.sent_again,
        n.lost,
        n.reordered,
        n.duplicates,
        n.out_of_order
    );
    let _ = write!(
        line,
        "\n  round trip {} us, varies by {}, least {}; had data to send for {:.3} ms, of these waited for the peer's window {:.3}, for the send buffer {:.3}, for the network {:.3}",
        n.rtt,
        n.rttvar,
        n.min_rtt,
        ms(n.busy),
        ms(n.window_limited),
        ms(n.buffer_limited),
        ms(c.network_limited())
    );
    if let Some((times, ns)) = c.zero_windows {
        let _ = write!(line, "; window of zero {times} times, for {:.3} ms", ms(ns));
    }
    if c.mptcp {
        line.extend_from_slice(b"; a subflow of MPTCP");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_without_room_are_not_told() {
        let any = "10.0.0.1:1".parse().unwrap();
        let of = |netns| Connection {
            netns,
            ..Connection::nothing(any, any)
        };
        let mut presenter = Presenter::new(false).unwrap();
        assert_eq!(presenter.zero_windows(&of(0)), None);
        let seven = Windows {
            times: 1,
            ns: 7,
            shut: None,
        };
        let all = (0..STORIES as u32).map(|netns| ((netns, any, any), seven));
        presenter.windows = Some(all.collect());
        assert_eq!(presenter.zero_windows(&of(u32::MAX)), None);
        assert_eq!(presenter.zero_windows(&of(3)), Some((1, 7)));
        assert_eq!(presenter.zero_windows(&of(3)), Some((0, 0)));
        // Shut still when the connection ends.
        let shut = Windows {
            shut: Some(90),
            ..seven
        };
        presenter.windows = Some([((4, any, any), shut)].into());
        let ended = Connection { end: 100, ..of(4) };
        assert_eq!(presenter.zero_windows(&ended), Some((1, 17)));
    }
}
