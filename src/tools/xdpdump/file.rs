//! `-w`: packets into capture files, one or a rotating row of them.

use std::collections::VecDeque;
use std::fs;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::capture::linktype::Linktype;
use crate::capture::pcapng::{Counters, Format, Interface, Packet, Section, Writer};
use crate::run::stream::Stream;

/// Bytes gathered before a write; a tick writes what there is.
const BUFFER: usize = 1 << 20;

/// When to begin another file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rotation {
    pub bytes: Option<u64>,
    pub time: Option<Duration>,
    /// Files kept.
    pub keep: Option<usize>,
}

impl Rotation {
    fn is_on(&self) -> bool {
        self.bytes.is_some() || self.time.is_some()
    }
}

type Sink = Writer<BufWriter<Stream>>;

/// Writes packets, and begins another file when the rotation says so: each file can be read alone.
pub struct CaptureFile {
    path: PathBuf,
    rotation: Rotation,
    format: Format,
    section: Section,
    interfaces: Vec<Interface>,
    /// For classic pcap: one of each for the whole file.
    head: (u32, Linktype),
    writer: Sink,
    begun: Instant,
    number: u32,
    kept: VecDeque<PathBuf>,
}

impl CaptureFile {
    pub fn create(
        path: &Path,
        format: Format,
        rotation: Rotation,
        interfaces: Vec<Interface>,
        snaplen: u32,
        linktype: Linktype,
    ) -> Result<Self> {
        let section = section();
        let first = if rotation.is_on() {
            numbered(path, 0)
        } else {
            path.to_owned()
        };
        let writer = begin(&first, format, &section, &interfaces, (snaplen, linktype))?;
        Ok(CaptureFile {
            path: path.to_owned(),
            rotation,
            format,
            section,
            interfaces,
            head: (snaplen, linktype),
            writer,
            begun: Instant::now(),
            number: 0,
            kept: VecDeque::from([first]),
        })
    }

    pub fn packet(&mut self, packet: &Packet<'_>) -> Result<()> {
        let full = self
            .rotation
            .bytes
            .is_some_and(|most| self.writer.written() >= most);
        if full
            || self
                .rotation
                .time
                .is_some_and(|most| self.begun.elapsed() >= most)
        {
            self.rotate()?;
        }
        self.writer.packet(packet).with_context(|| self.failed())
    }

    fn rotate(&mut self) -> Result<()> {
        self.writer.flush().with_context(|| self.failed())?;
        self.number += 1;
        self.begun = Instant::now();
        let next = numbered(&self.path, self.number);
        self.writer = begin(
            &next,
            self.format,
            &self.section,
            &self.interfaces,
            self.head,
        )?;
        self.kept.push_back(next);
        while self
            .rotation
            .keep
            .is_some_and(|keep| self.kept.len() > keep)
        {
            if let Some(oldest) = self.kept.pop_front() {
                fs::remove_file(&oldest)
                    .with_context(|| format!("failed to remove {}", oldest.display()))?;
            }
        }
        Ok(())
    }

    pub fn statistics(&mut self, interface: u32, counters: &Counters) -> Result<()> {
        self.writer
            .statistics(interface, counters)
            .with_context(|| self.failed())
    }

    pub fn flush(&mut self) -> Result<()> {
        self.writer.flush().with_context(|| self.failed())
    }

    fn failed(&self) -> String {
        format!(
            "failed to write to {}",
            self.kept.back().unwrap_or(&self.path).display()
        )
    }
}

fn begin(
    path: &Path,
    format: Format,
    section: &Section,
    interfaces: &[Interface],
    (snaplen, linktype): (u32, Linktype),
) -> Result<Sink> {
    let out =
        Stream::create(path).with_context(|| format!("failed to create {}", path.display()))?;
    let failed = || format!("failed to write to {}", path.display());
    let mut writer = Writer::new(
        BufWriter::with_capacity(BUFFER, out),
        format,
        section,
        snaplen,
        linktype,
    )
    .with_context(failed)?;
    for interface in interfaces {
        writer.add_interface(interface).with_context(failed)?;
    }
    // The head is there before the first packet: a reader of a pipe waits for it.
    writer.flush().with_context(failed)?;
    Ok(writer)
}

/// `dir/name.pcapng` → `dir/name-00003.pcapng`.
fn numbered(path: &Path, number: u32) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let name = match path.extension() {
        Some(extension) => format!("{stem}-{number:05}.{}", extension.to_string_lossy()),
        None => format!("{stem}-{number:05}"),
    };
    path.with_file_name(name)
}

fn section() -> Section {
    let system = nix::sys::utsname::uname().ok();
    let text = |s: &std::ffi::OsStr| s.to_string_lossy().into_owned();
    Section {
        hardware: system.as_ref().map(|u| text(u.machine())),
        os: system
            .as_ref()
            .map(|u| format!("{} {}", text(u.sysname()), text(u.release()))),
        application: Some(format!("netprobe xdpdump {}", env!("CARGO_PKG_VERSION"))),
        comment: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::savefile::Reader;

    #[test]
    fn names_of_numbered_files() {
        assert_eq!(
            numbered(Path::new("/a/b.pcapng"), 3),
            Path::new("/a/b-00003.pcapng")
        );
        assert_eq!(numbered(Path::new("b"), 0), Path::new("b-00000"));
    }

    #[test]
    fn each_file_of_a_rotation_reads_alone_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.pcapng");
        let rotation = Rotation {
            bytes: Some(400),
            time: None,
            keep: Some(2),
        };
        let interfaces = vec![Interface::new("v0", Linktype::ETHERNET)];
        let mut file = CaptureFile::create(
            &path,
            Format::Pcapng,
            rotation,
            interfaces,
            0,
            Linktype::ETHERNET,
        )
        .unwrap();
        for id in 0..20 {
            file.packet(&Packet {
                id: Some(id),
                data: &[1; 60],
                len: 60,
                ..Packet::default()
            })
            .unwrap();
        }
        file.flush().unwrap();
        let mut names = fs::read_dir(dir.path())
            .unwrap()
            .map(|e| e.unwrap().path())
            .collect::<Vec<_>>();
        names.sort();
        assert_eq!(names.len(), 2);
        let mut last = None;
        for name in names {
            let mut reader = Reader::open(&name).unwrap();
            while let Some(packet) = reader.next_packet().unwrap() {
                last = packet.note.id.max(last);
            }
        }
        assert_eq!(last, Some(19));
    }
}
