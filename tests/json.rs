//! docs/json: a schema for each subcommand that prints JSON, which real lines fit and wrong ones do not. The live tests
//! validate what netprobe prints (tests/common/probe.rs).

#[path = "common/schema.rs"]
#[allow(dead_code)]
mod schema;

use std::io::Read;
use std::process::Command;

use clap::CommandFactory;
use netprobe::cli::Cli;
use serde_json::{Value, json};

use schema::{SCHEMAS, Schema};

/// A subcommand, or one of its own, prints JSON.
fn prints_json(command: &clap::Command) -> bool {
    let own = command
        .get_arguments()
        .any(|arg| arg.get_long() == Some("output-json"));
    own || command.get_subcommands().any(prints_json)
}

#[test]
fn each_subcommand_with_json_has_a_schema() {
    for sub in Cli::command().get_subcommands() {
        let has = SCHEMAS.iter().any(|(name, _)| *name == sub.get_name());
        assert_eq!(has, prints_json(sub), "docs/json/{}.json", sub.get_name());
    }
    for (tool, _) in SCHEMAS {
        Schema::of(tool).unwrap();
    }
}

/// The lines of report are those of skb and of why, and one of its own.
#[test]
fn report_has_the_lines_of_skb() {
    let defs = |tool: &str| {
        let (_, text) = SCHEMAS.iter().find(|(name, _)| *name == tool).unwrap();
        let schema: Value = serde_json::from_str(text).unwrap();
        schema["$defs"].as_object().unwrap().clone()
    };
    let report = defs("report");
    for (name, schema) in defs("skb") {
        assert_eq!(report.get(&name), Some(&schema), "{name}");
    }
    // Those of why, whose names are others there.
    let own = report.iter().filter_map(|(name, schema)| {
        let name = name.strip_prefix("why_")?;
        let text = schema.to_string().replace("$defs/why_", "$defs/");
        Some((name, serde_json::from_str::<Value>(&text).unwrap()))
    });
    let why = defs("why");
    let own: Vec<_> = own.collect();
    assert!(own.len() > 3);
    for (name, schema) in own {
        assert_eq!(why.get(name), Some(&schema), "{name}");
    }
}

/// The lines of a recording (bench/data).
fn recorded() -> String {
    let gz: &[u8] = include_bytes!("../bench/data/skb-6.12.json.gz");
    let mut text = String::new();
    flate2::read::GzDecoder::new(gz)
        .read_to_string(&mut text)
        .unwrap();
    text
}

#[test]
fn real_lines_are_valid() {
    let text = recorded();
    assert!(text.lines().count() > 500);
    Schema::of("skb").unwrap().check_lines(&text).unwrap();
    let features = Command::new(env!("CARGO_BIN_EXE_netprobe"))
        .args(["features", "--output-json"])
        .output()
        .unwrap();
    let text = String::from_utf8(features.stdout).unwrap();
    Schema::of("features").unwrap().check_lines(&text).unwrap();
}

#[test]
fn wrong_lines_are_not() {
    let schema = Schema::of("skb").unwrap();
    let text = recorded();
    let line = text.lines().find(|l| l.contains("\"tuple\"")).unwrap();
    let right: Value = serde_json::from_str(line).unwrap();
    schema.check(&right).unwrap();
    let wrong = |change: fn(&mut Value), says: &str| {
        let mut value = right.clone();
        change(&mut value);
        let e = schema.check(&value).unwrap_err();
        assert!(e.contains(says), "{e}");
    };
    wrong(|v| v["cpu"] = json!("1"), ".cpu: \"1\" is no \"integer\"");
    wrong(|v| v["cpu"] = json!(1.5), ".cpu");
    wrong(
        |v| v["type"] = json!("evnt"),
        "\"evnt\" is none of [\"event\"]",
    );
    wrong(
        |v| v["colour"] = json!(1),
        ".colour: the schema has no such field",
    );
    wrong(
        |v| drop(v.as_object_mut().unwrap().remove("skb")),
        "\"skb\" is missing",
    );
    wrong(|v| v["tuple"]["sport"] = json!(null), ".tuple.sport");
    wrong(|v| v["stack"] = json!([{ "addr": 1 }]), ".stack[].addr");
    wrong(
        |v| v["skb_metadata"] = json!({ "skb->mark": "x" }),
        ".skb_metadata.skb->mark",
    );
    wrong(|v| v["ct"] = json!({ "state": "old" }), ".ct.state");
    assert!(schema.check(&json!([])).is_err());
    // The lines of another tool are not ours.
    assert!(Schema::of("icmp").unwrap().check(&right).is_err());
    let lines = format!("{right}\n{{\"type\":\n");
    assert!(schema.check_lines(&lines).unwrap_err().contains("not JSON"));
    // A line that is not whole yet is none.
    schema
        .check_lines(&format!("{right}\n{{\"type\":"))
        .unwrap();
}

/// A keyword that the validator would pass over.
#[test]
fn schemas_say_only_what_is_looked_at() {
    for (text, says) in [
        (r#"{"pattern":"^x"}"#, "/pattern"),
        (
            r#"{"properties":{"a":{"minimum":1}}}"#,
            "/properties/minimum",
        ),
        (r##"{"$ref":"#/$defs/a"}"##, "#/$defs/a"),
        (r#"{"items":[]}"#, "/items"),
    ] {
        let e = Schema::parse(text).err().unwrap();
        assert!(e.contains(says), "{e}");
    }
}
