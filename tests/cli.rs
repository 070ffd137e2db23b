//! The command line as a user meets it: exit codes, one clear line for each wrong value, help and README that agree.
//! Needs no privilege.

use std::process::{Command, Output};

use clap::{CommandFactory, Parser};
use netprobe::cli::Cli;

fn netprobe(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_netprobe"))
        .args(args)
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Exit code 2, nothing on stdout, and a message that names the input.
fn refused(args: &[&str], names: &str) {
    let output = netprobe(args);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
    assert!(
        text.contains(names),
        "{args:?} does not name {names}: {text}"
    );
    assert!(output.stdout.is_empty(), "{args:?} wrote to stdout");
}

#[test]
fn what_wireshark_asks() {
    let ask = |args: &[&str]| {
        let output = netprobe(&[&["extcap"], args].concat());
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    let list = ask(&["--extcap-interfaces", "--extcap-version=4.0"]);
    assert!(
        list.contains("interface {value=netprobe-drops}{display=netprobe: drops}\n"),
        "{list}"
    );
    let of_skb = ["--extcap-interface", "netprobe-skb"];
    let config = ask(&[&of_skb[..], &["--extcap-config"]].concat());
    assert!(config.contains("{call=--filter-func}"), "{config}");
    assert_eq!(
        ask(&[&of_skb[..], &["--extcap-capture-filter", "tcp port 80"]].concat()),
        ""
    );
    let wrong = ask(&[&of_skb[..], &["--extcap-capture-filter", "tcp prt"]].concat());
    assert!(wrong.contains("tcp prt"), "{wrong}");
    refused(
        &["extcap", "--extcap-interface", "eth0", "--extcap-dlts"],
        "eth0",
    );
    refused(
        &["extcap", "--extcap-interface", "netprobe-skb", "--capture"],
        "--fifo",
    );
    let lines = [
        "extcap",
        "--extcap-interface",
        "netprobe-skb",
        "--capture",
        "--fifo",
        "x",
        "--output-json",
    ];
    refused(&lines, "--output-json");
    refused(&["skb", "-w", "-"], "--write -");
}

#[test]
fn wrong_values_of_skb() {
    for (args, names) in [
        (&["--backend", "uprobe"][..], "uprobe"),
        (&["--filter-mark", "0xzz"], "0xzz"),
        (&["--filter-mark", "5/1"], "5/1"),
        (&["--filter-src-ip", "10.0.0.256"], "10.0.0.256"),
        (&["--filter-dst-ip", "10.0.0.1/40"], "10.0.0.1/40"),
        (&["--filter-dst-ip", "host.example"], "host.example"),
        (&["--filter-src-port", "70000"], "70000"),
        (&["--filter-proto", "tpc"], "tpc"),
        (&["--filter-func", "ip_(rcv"], "ip_(rcv"),
        (&["--filter-func", "a)|(b"], "a)|(b"),
        (&["--filter-netns", "/proc/0/ns/net"], "/proc/0/ns/net"),
        (&["--filter-netns", "no-such-name"], "no-such-name"),
        (&["--filter-ifname", "no-such-if0"], "no-such-if0"),
        (&["--timestamp", "yesterday"], "yesterday"),
        (&["--output-limit-lines", "-1"], "-1"),
        (&["--no-such-flag"], "--no-such-flag"),
        // One tracepoint is no function: nothing to attach to in batches or in modules, and no caller.
        (&["--drops", "--output-caller"], "--output-caller"),
        (&["--drops", "--kmods", "veth"], "--kmods"),
        (&["--drops", "--all-kmods"], "--all-kmods"),
        (
            &["--drops", "--filter-kprobe-batch", "5"],
            "--filter-kprobe-batch",
        ),
    ] {
        let mut all = vec!["skb"];
        all.extend(args);
        refused(&all, names);
    }
}

/// What looks at the stages has nothing to show without them.
#[test]
fn icmp_without_stages() {
    for flags in [
        &["--min-us", "5"][..],
        &["--histogram"],
        &["--culprit"],
        &["--histogram", "-i", "1"],
    ] {
        let mut all = vec!["icmp", "--stages=false"];
        all.extend(flags);
        refused(&all, flags[0]);
    }
}

#[test]
fn collectors_that_cannot_be() {
    for (url, names) in [
        ("https://127.0.0.1:4318", "no TLS"),
        ("127.0.0.1:4318", "http://HOST:PORT"),
        ("http://127.0.0.1:4318/v1?key=1", "no query"),
    ] {
        refused(&["skb", "--drops", "--otlp", url], names);
        refused(&["why", "--otlp", url], names);
    }
    refused(
        &["tcp", "--output-json", "--otlp", "http://127.0.0.1:4318"],
        "--output-json",
    );
    refused(
        &[
            "record",
            "-o",
            "/tmp/x.pcapng",
            "--otlp",
            "http://127.0.0.1:4318",
        ],
        "--otlp: a recording prints no rows",
    );
}

#[test]
fn buffers_that_no_kernel_takes() {
    for tool in ["skb", "tcpconnect", "icmp", "xdpdump"] {
        for n in ["0", "3", "x"] {
            refused(&[tool, "--buffer-pages", n], "--buffer-pages");
        }
    }
}

#[test]
fn no_subcommand_and_an_unknown_one() {
    assert_eq!(netprobe(&[]).status.code(), Some(2));
    refused(&["skbb"], "skbb");
}

#[test]
fn every_subcommand_has_help_on_stdout() {
    for sub in Cli::command().get_subcommands() {
        let output = netprobe(&[sub.get_name(), "--help"]);
        assert!(output.status.success(), "{}", sub.get_name());
        let help = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(help.contains("Usage: netprobe"), "{help}");
        for arg in sub.get_arguments().filter(|a| !a.is_hide_set()) {
            assert!(
                arg.get_help().is_some() || arg.get_id() == "help",
                "{} of {} has no help",
                arg.get_id(),
                sub.get_name()
            );
        }
    }
}

#[test]
fn features_needs_no_privilege_and_is_json_on_request() {
    let output = netprobe(&["features", "--output-json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let value: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(
        value["release"].is_string() && value["btf"].is_boolean(),
        "{value}"
    );
}

#[test]
fn a_full_disk_under_stdout_is_an_error() {
    let status = Command::new(env!("CARGO_BIN_EXE_netprobe"))
        .arg("features")
        .stdout(std::fs::File::create("/dev/full").unwrap())
        .output()
        .unwrap();
    assert_eq!(status.status.code(), Some(1));
    assert!(stderr(&status).contains("stdout"), "{}", stderr(&status));
}

/// Each `netprobe …` line in the guide's shell blocks is one that the program understands.
#[test]
fn the_commands_in_the_guide_parse() {
    let guide = include_str!("../docs/guide.md");
    let mut count = 0;
    let mut in_block = false;
    for line in guide.lines() {
        if line.starts_with("```") {
            in_block = !in_block && line.trim() == "```sh";
            continue;
        }
        let line = line.split(" # ").next().unwrap_or_default().trim();
        if !in_block || !line.starts_with("netprobe ") {
            continue;
        }
        let words = split(line);
        if let Err(e) = Cli::try_parse_from(&words) {
            panic!("guide: {line}\n{e}");
        }
        count += 1;
    }
    assert!(count >= 10, "only {count} commands found in docs/guide.md");
}

/// The source of the live tests.
fn live_tests() -> String {
    let mut text = String::new();
    for folder in ["tests/live", "tests/common"] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        for file in std::fs::read_dir(folder).unwrap() {
            text += &std::fs::read_to_string(file.unwrap().path()).unwrap();
        }
    }
    text
}

/// No flag of any subcommand without a live test that uses it, by its long or its short name.
#[test]
fn each_flag_is_in_a_live_test() {
    let tests = live_tests();
    let mut missing = Vec::new();
    for command in Cli::command().get_subcommands() {
        for flag in command.get_arguments().filter(|a| a.get_id() != "help") {
            let Some(long) = flag.get_long() else {
                continue;
            };
            let used = |word: &str| {
                ['"', '=', ' '].iter().any(|end| {
                    tests.contains(&format!("\"{word}{end}"))
                        || tests.contains(&format!(" {word}{end}"))
                })
            };
            let short = flag.get_short().map(|short| format!("-{short}"));
            if !used(&format!("--{long}")) && !short.is_some_and(|short| used(&short)) {
                missing.push(format!("{} --{long}", command.get_name()));
            }
        }
    }
    assert!(missing.is_empty(), "no live test uses {missing:?}");
}

/// Each fault that the live tests provoke has a row in docs/why.md.
#[test]
fn each_fault_is_in_the_document() {
    let document = include_str!("../docs/why.md");
    let names = include_str!("live/faults.toml").lines();
    let names = names.filter_map(|line| line.strip_prefix("name = \"")?.strip_suffix('"'));
    let names: Vec<&str> = names.collect();
    assert!(names.len() > 60, "{names:?}");
    let missing = names
        .iter()
        .filter(|name| !document.contains(&format!("\n| {name} |")));
    let missing: Vec<_> = missing.collect();
    assert!(missing.is_empty(), "docs/why.md has no row for {missing:?}");
}

/// Each row of the table in docs/peers.md has a row in DEVELOPMENT.md that names live tests, and these exist.
#[test]
fn each_row_beside_the_peers_has_its_live_test() {
    let first_cells = |text: &str| -> Vec<String> {
        let rows = text.lines().take_while(|l| l.starts_with('|'));
        rows.skip(2)
            .filter_map(|l| Some(l.trim_matches('|').split(" | ").next()?.trim().to_owned()))
            .collect()
    };
    let (_, table) = include_str!("../docs/peers.md")
        .split_once("| | netprobe skb | pwru | retis | nettrace |\n")
        .expect("the table of peers");
    let rows = first_cells(&format!("|\n{table}"));
    assert!(rows.len() >= 15, "{rows:?}");
    let (_, proofs) = include_str!("../DEVELOPMENT.md")
        .split_once("| | live tests |\n")
        .expect("DEVELOPMENT.md's table of live tests");
    let proofs: Vec<&str> = proofs
        .lines()
        .skip(1)
        .take_while(|l| l.starts_with('|'))
        .collect();
    let cases = live_tests();
    for row in &rows {
        let beginning = format!("| {row} | ");
        assert!(
            proofs.iter().any(|p| p.starts_with(&beginning)),
            "DEVELOPMENT.md names no live test for {row:?}"
        );
    }
    for proof in proofs {
        let named = proof.trim_matches('|').rsplit(" | ").next().unwrap().trim();
        for name in named.split(", ").filter(|n| *n != "none") {
            assert!(
                cases.contains(&format!("\"{name}\"")),
                "there is no live test {name}: {proof}"
            );
        }
    }
}

/// Words of a simple shell line: blanks divide, single quotes keep together; a pipe or redirection ends it.
fn split(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '\'' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            '|' | '>' if !quoted => break,
            c => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|w| !w.is_empty());
    words
}

/// A file of the repository.
fn repository(path: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// docs/reference/TOOL.md is the help of `netprobe TOOL`. NETPROBE_WRITE_REFERENCE=1 writes the files.
#[test]
fn the_reference_is_what_the_help_says() {
    for sub in Cli::command().get_subcommands() {
        let name = sub.get_name();
        let new = reference(sub.clone());
        let path = repository(&format!("docs/reference/{name}.md"));
        if std::env::var_os("NETPROBE_WRITE_REFERENCE").is_some() {
            std::fs::write(&path, &new).unwrap();
        }
        let old = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            old == new,
            "docs/reference/{name}.md is stale: make reference"
        );
    }
}

/// The page of a subcommand, and of its own subcommands.
fn reference(command: clap::Command) -> String {
    let name = command.get_name().to_owned();
    let mut page = format!(
        "# netprobe {name}\n\nThis page is `netprobe {name} --help`, written by `make reference`.\n"
    );
    let mut add = |command: clap::Command, name: &str| {
        let mut command = command.bin_name(format!("netprobe {name}")).term_width(100);
        let help = command.render_long_help().to_string();
        let lines: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
        page += &format!("\n## {name}\n\n```text\n{}\n```\n", lines.join("\n"));
    };
    add(command.clone(), &name);
    for sub in command.get_subcommands() {
        add(sub.clone(), &format!("{name} {}", sub.get_name()));
    }
    page
}

/// Every subcommand but those of the installation and Wireshark has a section with an example in README, and a page in docs/reference that README's table links to.
#[test]
fn readme_shows_every_subcommand() {
    let readme = include_str!("../README.md");
    assert!(
        readme.lines().count() <= 150,
        "README.md has over 150 lines"
    );
    for sub in Cli::command().get_subcommands() {
        let name = sub.get_name();
        assert!(
            ["completions", "extcap", "man"].contains(&name)
                || readme.contains(&format!("# netprobe {name}")),
            "README.md has no example of {name}"
        );
        assert!(
            readme.contains(&format!("docs/reference/{name}.md")),
            "README.md has no link to docs/reference/{name}.md"
        );
    }
}

/// Each subcommand's manual page has examples, and the program understands them.
#[test]
fn the_examples_of_manual_pages_parse() {
    let examples = netprobe::tools::man::EXAMPLES;
    for sub in Cli::command().get_subcommands() {
        let mut of = examples.iter().map(|(of, ..)| *of);
        assert!(of.any(|of| of == sub.get_name()), "{}", sub.get_name());
    }
    for (_, line, _) in examples {
        if let Err(e) = Cli::try_parse_from(split(line)) {
            panic!("{line}\n{e}");
        }
    }
}

/// A shell's script gets candidates of any depth, also those that only a look at this machine gives.
#[test]
fn completions_are_answered() {
    let ask = |words: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_netprobe"))
            .env("NETPROBE_COMPLETE", "bash")
            .env("_CLAP_COMPLETE_INDEX", (words.len() - 1).to_string())
            .env("_CLAP_COMPLETE_COMP_TYPE", "9")
            .args([&["--"][..], words].concat())
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(ask(&["netprobe", "xdpd"]).contains("xdpdump"));
    assert!(ask(&["netprobe", "skb", "--filter-n"]).contains("--filter-netns"));
    assert!(ask(&["netprobe", "xdpdump", "--iface", ""]).contains("lo"));
    assert!(ask(&["netprobe", "why", "--explain", "IP_RP"]).contains("IP_RPFILTER"));
    for shell in ["bash", "zsh", "fish"] {
        let output = netprobe(&["completions", shell]);
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.contains("NETPROBE_COMPLETE"), "{shell}: {script}");
    }
}

/// Each `netprobe …` command of the documents' output blocks (`# netprobe …`) is one that the program understands.
#[test]
fn the_commands_in_output_blocks_parse() {
    for (path, least) in [("README.md", 10), ("docs/cookbook.md", 30)] {
        let text = std::fs::read_to_string(repository(path)).unwrap();
        let (mut count, mut in_block) = (0, false);
        for line in text.lines() {
            if line.starts_with("```") {
                in_block = !in_block;
            }
            let command = line.split_once("# ").filter(|_| in_block);
            let Some((_, command)) = command.filter(|(_, c)| c.starts_with("netprobe ")) else {
                continue;
            };
            if let Err(e) = Cli::try_parse_from(split(command)) {
                panic!("{path}: {line}\n{e}");
            }
            count += 1;
        }
        assert!(count >= least, "only {count} commands found in {path}");
    }
}

/// Lines of the documents fit into 120 columns, but for output and tables.
#[test]
fn lines_of_documents_are_short() {
    let mut paths: Vec<_> = [
        "README.md",
        "DEVELOPMENT.md",
        "CHANGELOG.md",
        "BENCHMARKS.md",
    ]
    .map(repository)
    .into();
    let pages = std::fs::read_dir(repository("docs")).unwrap();
    paths.extend(pages.map(|f| f.unwrap().path()));
    paths.retain(|p| p.extension().is_some_and(|e| e == "md"));
    assert!(paths.len() >= 4, "{paths:?}");
    for path in paths {
        let mut in_block = false;
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            if line.starts_with("```") {
                in_block = !in_block;
            }
            let text = !in_block && !line.starts_with('|') && !line.starts_with('[');
            assert!(
                !text || line.chars().count() <= 120,
                "{}: {line}",
                path.display()
            );
        }
    }
}
