//! `netprobe ctl`: runs in progress and their field filters, seen and changed through the pinned config map (config.h)
//! while the probes stay attached.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle};

use crate::bpf::skb::types::{np_config, np_field};
use crate::bpf::{bytes_of, read};
use crate::event::tuple::proto_name;
use crate::kernel::netns::Netns;
use crate::run::pins::{self, Session};
use crate::text::escape::escaped;
use crate::tools::fields;
use crate::usage::usage;

/// The key of the map's only value.
const KEY: [u8; 4] = 0u32.to_ne_bytes();
/// What a field is set to so that it does not filter.
const OFF: &str = "off";

/// List running netprobes, and change their field filters.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// List the runs in progress, one per line
    List,
    /// Show the field filters of a run
    Show {
        /// Its name as `list` shows it (skb-1234), or its process id
        session: String,
    },
    /// Change field filters of a run, from the next packet on
    Set {
        /// Its name as `list` shows it (skb-1234), or its process id
        session: String,
        /// mark=MARK[/MASK] netns=NETNS ifname=NAME proto=PROTO src-ip=ADDR[/LEN] dst-ip=ADDR[/LEN] src-port=PORT
        /// dst-port=PORT, with values as the --filter-… flags take them; the value `off` removes a filter
        #[arg(required = true, value_name = "FIELD=VALUE")]
        changes: Vec<String>,
    },
}

pub fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::List => list(),
        Command::Show { session } => show(&find(session)?),
        Command::Set { session, changes } => {
            let session = find(session)?;
            let (map, mut config) = open(&session)?;
            for change in changes {
                set(&mut config, change)?;
            }
            if config.fields & np_field::NP_ENDED.0 == 0 {
                // Not ours: a run that stands still is told so again by its heartbeat.
                config.fields &= !np_field::NP_PAUSED.0;
            }
            map.update(&KEY, bytes_of(&config), MapFlags::ANY)
                .with_context(|| format!("failed to change the filter of {}", session.name))?;
            show(&session)
        }
    }
}

/// The runs that are alive.
fn sessions() -> Vec<Session> {
    let mut sessions = pins::sessions(Path::new(pins::ROOT));
    sessions.retain(|session| session.alive);
    sessions
}

fn find(text: &str) -> Result<Session> {
    let sessions = sessions();
    let names: Vec<String> = sessions
        .iter()
        .map(|session| session.name.clone())
        .collect();
    let found = sessions
        .into_iter()
        .find(|session| session.name == text || session.pid.to_string() == text);
    match found {
        Some(session) => Ok(session),
        None if names.is_empty() => Err(usage(format!("no session {text}: none is in progress"))),
        None => Err(usage(format!(
            "no session {text}: there is {}",
            names.join(", ")
        ))),
    }
}

fn open(session: &Session) -> Result<(MapHandle, np_config)> {
    let path = session.dir.join("config");
    if !path.exists() {
        bail!("{} has no field filters to change", session.name);
    }
    let map = MapHandle::from_pinned_path(&path)
        .with_context(|| format!("failed to open {}", path.display()))?;
    let value = map
        .lookup(&KEY, MapFlags::ANY)
        .with_context(|| format!("failed to read {}", path.display()))?;
    match value.as_deref().and_then(read::<np_config>) {
        Some((config, [])) if config.version == fields::VERSION => Ok((map, config)),
        _ => bail!("{} is a run of another version of netprobe", session.name),
    }
}

fn list() -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{:<20} {:<40} FIELDS", "SESSION", "COMMAND")?;
    for session in sessions() {
        let fields = match open(&session) {
            Ok((_, config)) => one_line(&config),
            Err(_) => "-".to_owned(),
        };
        let command = std::fs::read(format!("/proc/{}/cmdline", session.pid)).unwrap_or_default();
        let words: Vec<String> = command
            .split(|byte| *byte == 0)
            .filter(|word| !word.is_empty())
            .map(escaped)
            .collect();
        writeln!(out, "{:<20} {:<40} {fields}", session.name, words.join(" "))?;
    }
    Ok(out.flush()?)
}

fn show(session: &Session) -> Result<()> {
    let (_, config) = open(session)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{}: {}", session.name, one_line(&config))?;
    Ok(out.flush()?)
}

fn one_line(config: &np_config) -> String {
    let fields = describe(config);
    if fields.is_empty() {
        return "any".to_owned();
    }
    let fields: Vec<String> = fields
        .into_iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    fields.join(" ")
}

/// The fields that filter, as `set` would take them.
fn describe(c: &np_config) -> Vec<(&'static str, String)> {
    let mut found = Vec::new();
    let mut field = |bit: u32, name, value: &dyn Fn() -> String| {
        if c.fields & bit != 0 {
            found.push((name, value()));
        }
    };
    field(fields::MARK, "mark", &|| match c.mark_mask {
        u32::MAX => format!("{:#x}", c.mark),
        mask => format!("{:#x}/{mask:#x}", c.mark),
    });
    field(fields::NETNS, "netns", &|| format!("inode:{}", c.netns));
    field(fields::IFINDEX, "ifindex", &|| c.ifindex.to_string());
    field(fields::PROTO, "proto", &|| {
        proto_name(c.l4_proto).map_or_else(|| c.l4_proto.to_string(), str::to_owned)
    });
    field(fields::SADDR, "src-ip", &|| {
        fields::show_prefix(c.saddr, c.saddr_mask)
    });
    field(fields::DADDR, "dst-ip", &|| {
        fields::show_prefix(c.daddr, c.daddr_mask)
    });
    field(fields::SPORT, "src-port", &|| c.sport.to_string());
    field(fields::DPORT, "dst-port", &|| c.dport.to_string());
    found
}

/// `FIELD=VALUE` into the config.
fn set(c: &mut np_config, change: &str) -> Result<()> {
    let Some((name, value)) = change.split_once('=') else {
        return Err(usage(format!("{change}: not FIELD=VALUE")));
    };
    let bits = match name {
        "mark" => fields::MARK,
        "netns" => fields::NETNS,
        "ifname" | "ifindex" => fields::IFINDEX,
        "proto" => fields::PROTO,
        "src-ip" => fields::SADDR,
        "dst-ip" => fields::DADDR,
        "src-port" => fields::SPORT,
        "dst-port" => fields::DPORT,
        _ => {
            return Err(usage(format!(
                "{change}: no field {name}; the fields are mark, netns, ifname, ifindex, proto, src-ip, dst-ip, \
                 src-port and dst-port"
            )));
        }
    };
    if value == OFF {
        c.fields &= !bits;
        return Ok(());
    }
    let port = || {
        value
            .parse::<u16>()
            .map_err(|_| usage(format!("{change}: {value:?} is no port")))
    };
    match name {
        "mark" => fields::set_mark(c, value)?,
        "proto" => fields::set_proto(c, value)?,
        "src-ip" => fields::set_saddr(c, value)?,
        "dst-ip" => fields::set_daddr(c, value)?,
        "netns" => c.netns = Netns::parse(value)?.inode,
        "ifindex" => {
            c.ifindex = value
                .parse()
                .map_err(|_| usage(format!("{change}: {value:?} is no interface's number")))?;
        }
        "ifname" => {
            // An index means something only within its namespace.
            let netns = Netns::current()?;
            c.ifindex = netns.ifindex(value)?;
            c.netns = netns.inode;
            c.fields |= fields::NETNS;
        }
        "src-port" => c.sport = port()?,
        _ => c.dport = port()?,
    }
    c.fields |= bits;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::usage::UsageError;

    #[test]
    fn what_is_shown_can_be_set() {
        let changes = [
            "mark=0x10/0xf0",
            "netns=inode:4026531840",
            "ifindex=3",
            "proto=tcp",
            "src-ip=10.0.0.0/8",
            "dst-ip=2001:db8::1",
            "src-port=1024",
            "dst-port=443",
        ];
        let mut config = np_config::default();
        for change in changes {
            set(&mut config, change).unwrap();
        }
        assert_eq!(one_line(&config), changes.join(" "));
        for change in changes {
            let (name, _) = change.split_once('=').unwrap();
            set(&mut config, &format!("{name}=off")).unwrap();
        }
        assert_eq!(one_line(&config), "any");
    }

    #[test]
    fn wrong_changes_are_told() {
        let mut config = np_config::default();
        for wrong in [
            "mark",
            "marks=1",
            "mark=x",
            "dst-port=70000",
            "src-ip=1.2.3",
            "proto=foo",
            "ifindex=lo",
        ] {
            let error = set(&mut config, wrong).unwrap_err();
            assert!(error.is::<UsageError>(), "{wrong}: {error}");
        }
        assert_eq!(config.fields, 0);
    }
}
