//! A file that is put aside when it has grown to a size, and begun anew. It knows bytes, and no format: a caller writes
//! whole lines at once, so that none is torn.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use jiff::Timestamp;

use super::stream::Stream;

/// When to put a file aside, and how long such files stay.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Output")]
pub struct RotateArgs {
    /// When --output-file reaches this size, rename it to NAME-TIME.EXTENSION and begin a new file
    #[arg(long, value_name = "MB", default_value_t = 100, requires = "output_file", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    pub output_file_max_size: u64,

    /// Keep only the newest N renamed files (0: all)
    #[arg(long, value_name = "N", default_value_t = 0, requires = "output_file")]
    pub output_file_max_backups: usize,

    /// Delete files that were renamed more than this many days ago (0: none)
    #[arg(
        long,
        value_name = "DAYS",
        default_value_t = 0,
        requires = "output_file"
    )]
    pub output_file_max_age: u64,

    /// Compress renamed files (gzip)
    #[arg(long, requires = "output_file")]
    pub output_file_compress: bool,
}

impl RotateArgs {
    /// No file is put aside by itself ([`Rotating::rotate`] does it), and all stay.
    pub fn never() -> Self {
        Self {
            output_file_max_size: u64::MAX / 1_000_000,
            ..Self::default()
        }
    }
}

/// Names with a time for files that belong to one name.
pub struct Names {
    path: PathBuf,
    /// the time in the name that was given last, ms
    last: u64,
}

/// The writer.
pub struct Rotating {
    names: Names,
    file: Stream,
    written: u64,
    limit: u64,
    rules: RotateArgs,
    /// compresses the file put aside last
    compressing: Option<JoinHandle<io::Result<()>>>,
}

impl Names {
    pub fn of(path: &Path) -> Self {
        Self {
            path: path.to_path_buf(),
            last: 0,
        }
    }

    /// `trace-2026-11-21T22-50-00.123.log` for `trace.log`, one that does not exist, and behind those before: names are in order.
    pub fn free(&mut self) -> PathBuf {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut ms = (now.as_millis() as u64).max(self.last + 1);
        loop {
            let path = self.path.with_file_name(format!(
                "{}{}{}",
                self.prefix(),
                stamp(ms),
                self.extension()
            ));
            let packed = PathBuf::from(format!("{}.gz", path.display()));
            if !path.exists() && !packed.exists() {
                self.last = ms;
                return path;
            }
            ms += 1;
        }
    }

    fn prefix(&self) -> String {
        let stem = self.path.file_stem().unwrap_or_default();
        format!("{}-", stem.to_string_lossy())
    }

    fn extension(&self) -> String {
        let extension = self.path.extension();
        extension.map_or_else(String::new, |e| format!(".{}", e.to_string_lossy()))
    }

    /// Files with such names, the oldest first.
    pub fn existing(&self) -> io::Result<Vec<PathBuf>> {
        let (prefix, end) = (self.prefix(), self.extension());
        let dir = match self.path.parent() {
            Some(d) if !d.as_os_str().is_empty() => d,
            _ => Path::new("."),
        };
        let mut found: Vec<PathBuf> = fs::read_dir(dir)?
            .flatten()
            .filter(|e| {
                let name = e.file_name().to_string_lossy().into_owned();
                let name = name.strip_suffix(".gz").unwrap_or(&name);
                name.strip_prefix(&prefix)
                    .and_then(|n| n.strip_suffix(&end))
                    .is_some_and(is_stamp)
            })
            .map(|e| e.path())
            .collect();
        found.sort();
        Ok(found)
    }

    /// Only the newest `keep` of them stay; 0: all.
    pub fn keep(&self, keep: usize) -> io::Result<()> {
        let existing = self.existing()?;
        let surplus = match keep {
            0 => 0,
            keep => existing.len().saturating_sub(keep),
        };
        existing[..surplus].iter().try_for_each(|path| remove(path))
    }
}

impl Rotating {
    /// Creates the file (an older one of its name is overwritten).
    pub fn create(path: &Path, rules: &RotateArgs) -> Result<Self> {
        let file = create(path)?;
        // A device or a pipe cannot be put aside.
        let limit = match fs::metadata(path) {
            Ok(m) if m.is_file() => rules.output_file_max_size * 1_000_000,
            _ => u64::MAX,
        };
        Ok(Self {
            names: Names::of(path),
            file,
            written: 0,
            limit,
            rules: rules.clone(),
            compressing: None,
        })
    }

    /// Puts the file aside, and begins it anew.
    pub fn rotate(&mut self) -> io::Result<()> {
        let aside = self.names.free();
        fs::rename(&self.names.path, &aside)?;
        self.file = Stream::create(&self.names.path)?;
        self.written = 0;
        self.wait()?;
        if self.rules.output_file_compress {
            self.compressing = Some(std::thread::spawn(move || compress(&aside)));
        }
        self.prune()
    }

    fn prune(&self) -> io::Result<()> {
        self.names.keep(self.rules.output_file_max_backups)?;
        let age = Duration::from_secs(self.rules.output_file_max_age * 86_400);
        for path in self.names.existing()? {
            let old = !age.is_zero()
                && fs::metadata(&path)
                    .and_then(|m| m.modified())
                    .is_ok_and(|t| t.elapsed().is_ok_and(|e| e > age));
            if old {
                remove(&path)?;
            }
        }
        Ok(())
    }

    /// Waits for the compression of the file before.
    fn wait(&mut self) -> io::Result<()> {
        match self.compressing.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(io::Error::other("compression panicked")),
        }
    }
}

impl Write for Rotating {
    /// All of `bytes` goes to one file.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.written > 0 && self.written.saturating_add(bytes.len() as u64) > self.limit {
            self.rotate()?;
        }
        if self.limit == u64::MAX {
            // A pipe or a device takes what it can.
            return self.file.write(bytes);
        }
        self.file.write_all(bytes)?;
        self.written += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Rotating {
    fn drop(&mut self) {
        if let Err(e) = self.wait() {
            eprintln!("netprobe: failed to compress a file: {e}");
        }
    }
}

fn create(path: &Path) -> Result<Stream> {
    Stream::create(path).with_context(|| format!("failed to create {}", path.display()))
}

/// FILE to FILE.gz; FILE goes when that is complete. Under another name until then, which no clean-up takes for a backup.
fn compress(path: &Path) -> io::Result<()> {
    let packed = PathBuf::from(format!("{}.gz", path.display()));
    let part = PathBuf::from(format!("{}.gz.part", path.display()));
    let mut from = match File::open(path) {
        // Too many files: cleaned up already.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        file => file?,
    };
    let mut to = GzEncoder::new(File::create(&part)?, Compression::default());
    io::copy(&mut from, &mut to)?;
    to.finish()?;
    fs::rename(&part, &packed)?;
    remove(path)
}

/// Compression and clean-up may both come to a file: the later one finds nothing.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// `2026-11-21T22-50-00.123`, UTC.
fn stamp(ms: u64) -> String {
    let ms = i64::try_from(ms).unwrap_or(i64::MAX);
    let time = Timestamp::from_millisecond(ms).unwrap_or(Timestamp::MAX);
    time.strftime("%Y-%m-%dT%H-%M-%S.%3f").to_string()
}

fn is_stamp(text: &str) -> bool {
    let form = b"0000-00-00T00-00-00.000";
    text.len() == form.len()
        && text.bytes().zip(form).all(|(b, &f)| match f {
            b'0' => b.is_ascii_digit(),
            f => b == f,
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn rotating(dir: &Path, rules: RotateArgs) -> Rotating {
        let mut r = Rotating::create(&dir.join("trace.log"), &rules).unwrap();
        r.limit = 10;
        r
    }

    #[test]
    fn times() {
        assert_eq!(stamp(0), "1970-01-01T00-00-00.000");
        assert_eq!(stamp(951_782_400_000), "2000-02-29T00-00-00.000");
        assert_eq!(stamp(1_795_305_628_778), "2026-11-22T00-00-28.778");
        assert!(is_stamp(&stamp(1_795_305_628_778)));
        assert!(!is_stamp("2026-11-22T00-00-28x778"));
    }

    #[test]
    fn whole_writes_and_a_number_of_backups() {
        let dir = tempfile::tempdir().unwrap();
        let mut r = rotating(
            dir.path(),
            RotateArgs {
                output_file_max_backups: 2,
                ..RotateArgs::default()
            },
        );
        for n in 0..5 {
            r.write_all(format!("line {n}\n").as_bytes()).unwrap();
        }
        let backups = r.names.existing().unwrap();
        let texts: Vec<String> = backups
            .iter()
            .map(|p| fs::read_to_string(p).unwrap())
            .collect();
        assert_eq!(texts, ["line 2\n", "line 3\n"]);
        let last = fs::read_to_string(dir.path().join("trace.log")).unwrap();
        assert_eq!(last, "line 4\n");
    }

    #[test]
    fn compressed() {
        let dir = tempfile::tempdir().unwrap();
        let mut r = rotating(
            dir.path(),
            RotateArgs {
                output_file_compress: true,
                ..RotateArgs::default()
            },
        );
        for n in 0..3 {
            r.write_all(format!("line {n}\n").as_bytes()).unwrap();
        }
        r.wait().unwrap();
        let backups = r.names.existing().unwrap();
        assert_eq!(backups.len(), 2);
        let mut text = String::new();
        flate2::read::GzDecoder::new(File::open(&backups[0]).unwrap())
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "line 0\n");
    }

    /// Between the list and the removal the thread that compresses may have taken a file away.
    #[test]
    fn a_file_that_is_gone_already() {
        let dir = tempfile::tempdir().unwrap();
        let gone = dir.path().join("trace-2020-01-01T00-00-00.000.log");
        assert!(remove(&gone).is_ok());
        assert!(remove(dir.path()).is_err(), "other errors are told");
    }

    #[test]
    fn old_ones_go_and_other_files_stay() {
        let dir = tempfile::tempdir().unwrap();
        let old = dir.path().join("trace-2020-01-01T00-00-00.000.log");
        let other = dir.path().join("trace-x.log");
        for path in [&old, &other] {
            let file = File::create(path).unwrap();
            file.set_modified(UNIX_EPOCH).unwrap();
        }
        let r = rotating(
            dir.path(),
            RotateArgs {
                output_file_max_age: 1,
                ..RotateArgs::default()
            },
        );
        r.prune().unwrap();
        assert!(!old.exists() && other.exists());
    }
}
