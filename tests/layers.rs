//! The layers of src/lib.rs hold: no module uses one that stands above it in the map, and no two files use each other in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// A file's module path (`filter::inject`; a folder's mod.rs is the folder) and its code without tests and comments.
type Files = BTreeMap<String, String>;

fn collect(folder: &Path, module: &str, files: &mut Files) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let inner = |name: &str| [module, name].join("::").trim_start_matches(':').to_owned();
        if path.is_dir() {
            if stem != "bpf" && stem != "tests" {
                collect(&path, &inner(&stem), files);
            }
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let name = match stem.as_str() {
                "mod" => module.to_owned(),
                "lib" | "main" | "tests" => continue,
                other => inner(other),
            };
            files.insert(name, production(&fs::read_to_string(&path).unwrap()));
        }
    }
}

/// The code in front of a file's tests, without comments.
fn production(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = code.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<Vec<_>>().join("\n")
}

/// All paths that begin with `crate::` or `super::` in the code of `module`, from the crate's root on, with groups (`a::{b, c}`) taken
/// apart.
fn paths(module: &str, code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            // The parent of a file's module; of mod.rs too, where `super` is what its folder lies in.
            let mut base: Vec<&str> = module.split("::").collect();
            let mut rest = &code[at..];
            if let Some(inner) = rest.strip_prefix("crate::") {
                (base, rest) = (Vec::new(), inner);
            }
            while let Some(inner) = rest.strip_prefix("super::") {
                base.pop();
                rest = inner;
            }
            expand(&base.join("::"), rest, &mut found);
        }
    }
    found
}

/// One tree of names behind `base`; gives back how many bytes of `rest` it takes.
fn expand(base: &str, rest: &str, found: &mut Vec<String>) -> usize {
    let name_len = rest
        .find(|c: char| !(c.is_alphanumeric() || c == '_'))
        .unwrap_or(rest.len());
    let path = match (base, &rest[..name_len]) {
        (base, "" | "self") => base.to_owned(),
        ("", name) => name.to_owned(),
        (base, name) => format!("{base}::{name}"),
    };
    let after = &rest[name_len..];
    if let Some(group) = after
        .strip_prefix("::{")
        .or_else(|| after.strip_prefix('{'))
    {
        let mut at = name_len + (after.len() - group.len());
        while let Some(c) = rest[at..].chars().next() {
            match c {
                '}' => return at + 1,
                c if c.is_alphanumeric() || c == '_' => at += expand(&path, &rest[at..], found),
                _ => at += c.len_utf8(),
            }
        }
        return at;
    }
    match after.strip_prefix("::") {
        Some(inner) if inner.starts_with(|c: char| c.is_alphabetic() || c == '_') => {
            name_len + 2 + expand(&path, inner, found)
        }
        _ => {
            found.push(path);
            name_len
        }
    }
}

/// The file that defines what a path names: its longest beginning that is a file's module.
fn file_of<'a>(path: &str, files: &'a Files) -> Option<&'a str> {
    let mut module = path;
    loop {
        if let Some((name, _)) = files.get_key_value(module) {
            return Some(name);
        }
        module = module.rsplit_once("::")?.0;
    }
}

/// Which files each file uses.
fn uses(files: &Files) -> BTreeMap<&str, BTreeSet<&str>> {
    let of_file = |(module, code): (&String, &String)| {
        let used = paths(module, code);
        let used = used.iter().filter_map(|path| file_of(path, files));
        used.filter(|used| used != module).collect()
    };
    files
        .iter()
        .map(|entry| (entry.0.as_str(), of_file(entry)))
        .collect()
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap()
}

/// The modules in the order of the map in src/lib.rs, the highest first.
fn map(lib: &str) -> Vec<&str> {
    lib.lines()
        .filter_map(|line| line.strip_prefix("//! | `")?.split('`').next())
        .collect()
}

/// Uses that point upwards in `map`.
fn upwards(files: &Files, map: &[&str]) -> Vec<String> {
    let place = |module: &str| map.iter().position(|m| *m == top(module));
    let mut wrong = Vec::new();
    for (module, used) in uses(files) {
        for used in used {
            match (place(module), place(used)) {
                (Some(own), Some(other)) if own <= other => {}
                (None, _) | (_, None) => wrong.push(format!("{module} -> {used}: not in the map")),
                _ => wrong.push(format!("{module} uses {used}, which stands above it")),
            }
        }
    }
    wrong
}

/// A circle of files, if there is one. What a file says of the modules in its own folder without `crate::` or `super::` does not count.
fn circle(files: &Files) -> Option<Vec<String>> {
    let uses = uses(files);
    let mut done = BTreeSet::new();
    for &start in uses.keys() {
        let mut way = Vec::new();
        if let Some(found) = walk(start, &uses, &mut way, &mut done) {
            return Some(found);
        }
    }
    None
}

fn walk<'a>(
    at: &'a str,
    uses: &BTreeMap<&'a str, BTreeSet<&'a str>>,
    way: &mut Vec<&'a str>,
    done: &mut BTreeSet<&'a str>,
) -> Option<Vec<String>> {
    if let Some(first) = way.iter().position(|m| *m == at) {
        return Some(way[first..].iter().map(ToString::to_string).collect());
    }
    if done.contains(at) {
        return None;
    }
    way.push(at);
    for next in &uses[at] {
        if let Some(found) = walk(next, uses, way, done) {
            return Some(found);
        }
    }
    way.pop();
    done.insert(at);
    None
}

fn source() -> Files {
    let mut files = Files::new();
    collect(Path::new("src"), "", &mut files);
    files
}

#[test]
fn no_module_uses_one_above_it() {
    let lib = fs::read_to_string("src/lib.rs").unwrap();
    let wrong = upwards(&source(), &map(&lib));
    assert!(wrong.is_empty(), "{wrong:#?}");
    // ... and every module is in the map.
    let declared: BTreeSet<&str> = lib
        .lines()
        .filter_map(|line| line.strip_prefix("pub mod ")?.strip_suffix(';'))
        .collect();
    assert_eq!(declared, map(&lib).into_iter().collect());
}

#[test]
fn no_files_use_each_other_in_a_circle() {
    assert_eq!(circle(&source()), None);
}

/// What is JSON on stdout or in a file goes through text::json, whose own exception is floating-point numbers.
#[test]
fn json_has_one_writer() {
    let users = |files: &Files| {
        let uses = files.iter().filter(|(_, code)| code.contains("serde_json"));
        uses.map(|(name, _)| name.clone()).collect::<Vec<_>>()
    };
    // It reads the rows that were written.
    let reader = "run::otlp::rows";
    assert!(!source()[reader].contains("serde_json::to_"));
    assert_eq!(users(&source()), [reader, "text::json"]);
}

#[test]
fn a_violation_is_found() {
    let lines = "use crate::high::thing;\nfn f() { super::b::g() }";
    let mut files = Files::from([
        ("high".to_owned(), String::new()),
        ("low::a".to_owned(), production(lines)),
        ("low::b".to_owned(), "use super::{c, d::{E, F}};".to_owned()),
        ("low::d".to_owned(), String::new()),
    ]);
    assert_eq!(
        upwards(&files, &["high", "low"]),
        ["low::a uses high, which stands above it"]
    );
    assert_eq!(circle(&files), None);
    files.insert("low::d".to_owned(), "use crate::low::a::X;".to_owned());
    assert_eq!(circle(&files).unwrap(), ["low::a", "low::b", "low::d"]);
}
