//! What deploy/ has for Kubernetes and Prometheus, without a cluster: manifests by the API's own types, the plugin with
//! a kubectl that only notes what it is asked, names of metrics against those that there are. deploy/prometheus/test
//! has promtool's part.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Container, Namespace, PodSpec};
use serde::Deserialize;
use serde_json::Value;

const MANIFEST: &str = include_str!("../deploy/kubernetes/netprobe.yaml");
const UNIT: &str = include_str!("../packaging/netprobe-drops.service");

fn documents() -> Vec<Value> {
    serde_yaml_ng::Deserializer::from_str(MANIFEST)
        .map(|document| Value::deserialize(document).expect("YAML"))
        .collect()
}

/// An object of the manifest by the API's type. What the type does not know is lost when it is written again, which
/// shows.
fn typed<T: serde::de::DeserializeOwned + serde::Serialize>(document: &Value) -> T {
    let object: T = serde_json::from_value(document.clone()).expect("an object of the API");
    let again = serde_json::to_value(&object).expect("JSON");
    assert_eq!(&again, document, "a field that the API does not know");
    object
}

fn daemon_set() -> DaemonSet {
    let documents = documents();
    let [namespace, daemons] = documents.as_slice() else {
        panic!("a namespace and a daemon set: {documents:#?}");
    };
    let namespace: Namespace = typed(namespace);
    let daemons: DaemonSet = typed(daemons);
    assert_eq!(namespace.metadata.name, daemons.metadata.namespace);
    daemons
}

fn pod(daemons: &DaemonSet) -> (&PodSpec, &Container) {
    let spec = &daemons.spec;
    let template = &spec.template;
    let labels = template.metadata.as_ref().and_then(|m| m.labels.as_ref());
    assert_eq!(spec.selector.match_labels.as_ref(), labels);
    let pod = template.spec.as_ref().expect("a pod");
    assert_eq!(pod.containers.len(), 1);
    (pod, &pod.containers[0])
}

#[test]
fn the_daemon_set_is_one_of_the_api() {
    let daemons = daemon_set();
    let (pod, container) = pod(&daemons);
    assert_eq!((pod.host_pid, pod.host_network), (Some(true), Some(true)));
    assert_eq!(pod.automount_service_account_token, Some(false));
    let mut volumes: BTreeSet<&str> = pod
        .volumes
        .iter()
        .flatten()
        .map(|v| v.name.as_str())
        .collect();
    for mount in container.volume_mounts.iter().flatten() {
        assert!(
            volumes.remove(mount.name.as_str()),
            "no volume {}",
            mount.name
        );
    }
    assert!(volumes.is_empty(), "nobody mounts {volumes:?}");
    let limits = container.resources.as_ref().and_then(|r| r.limits.as_ref());
    assert!(limits.is_some_and(|l| l.contains_key("memory")));
}

/// The capabilities are those of the systemd unit, which a live test runs.
#[test]
fn the_daemon_set_has_the_capabilities_of_the_unit() {
    let daemons = daemon_set();
    let (_, container) = pod(&daemons);
    let security = container
        .security_context
        .as_ref()
        .expect("a security context");
    assert_eq!(security.privileged, Some(false));
    assert_eq!(security.read_only_root_filesystem, Some(true));
    let capabilities = security.capabilities.as_ref().expect("capabilities");
    assert_eq!(capabilities.drop.as_deref(), Some(&["ALL".to_owned()][..]));
    let added: BTreeSet<String> = capabilities
        .add
        .iter()
        .flatten()
        .map(|c| format!("CAP_{c}"))
        .collect();
    let line = UNIT
        .lines()
        .find_map(|l| l.strip_prefix("AmbientCapabilities="));
    let of_unit: BTreeSet<String> = line
        .expect("capabilities")
        .split(' ')
        .map(str::to_owned)
        .collect();
    assert_eq!(added, of_unit);
}

/// netprobe takes the arguments, as far as it looks at them before it needs a kernel.
#[test]
fn netprobe_takes_the_arguments() {
    let daemons = daemon_set();
    let (_, container) = pod(&daemons);
    let args = container.args.as_ref().expect("arguments");
    let explain = ["--explain", "NO_SOCKET"];
    let netprobe = Command::new(env!("CARGO_BIN_EXE_netprobe"))
        .args(args)
        .args(explain)
        .output();
    let output = netprobe.expect("netprobe");
    assert!(output.status.success(), "{output:?}");
    let port = container
        .ports
        .iter()
        .flatten()
        .next()
        .map(|p| p.container_port);
    let listens = args.iter().find_map(|a| a.strip_prefix("0.0.0.0:"));
    assert_eq!(port.map(|p| p.to_string()).as_deref(), listens);
}

/// Answers as a cluster with the pod prod/web-1 on node n1, where netprobe-abc runs; n2 has no netprobe.
const STUB: &str = r#"#!/bin/sh
{ for word; do printf '<%s>' "$word"; done; echo; } >>"$NOTES"
case "$1 $2" in
"config view") printf prod ;;
"get pod")
	case "$3 $5" in
	"web-1 prod") printf n1 ;;
	"web-2 prod") printf n2 ;;
	"web-3 prod") ;;
	*) echo "Error from server (NotFound): pods \"$3\" not found" >&2; exit 1 ;;
	esac ;;
"get pods") case "$*" in *=n1,*) printf netprobe-abc ;; *) exit 1 ;; esac ;;
"exec "*) cat; exit 7 ;;
*) exit 99 ;;
esac
"#;

struct Cluster(tempfile::TempDir);

impl Cluster {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let stub = dir.path().join("kubectl");
        fs::write(&stub, STUB).expect("a stub");
        fs::set_permissions(&stub, fs::Permissions::from_mode(0o755)).expect("a mode");
        Self(dir)
    }

    fn run(&self, args: &[&str]) -> (Output, Vec<String>) {
        let notes = self.0.path().join("notes");
        let _ = fs::remove_file(&notes);
        let plugin =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes/kubectl-netprobe");
        let path = format!("{}:/usr/bin:/bin", self.0.path().display());
        let mut command = Command::new(plugin);
        command
            .args(args)
            .env("PATH", path)
            .env("NOTES", &notes)
            .env_remove("NETPROBE_NAMESPACE");
        let output = command
            .stdin(std::process::Stdio::null())
            .output()
            .expect("the plugin");
        let asked = fs::read_to_string(&notes).unwrap_or_default();
        (output, asked.lines().map(str::to_owned).collect())
    }
}

#[test]
fn the_plugin_asks_for_the_pod_its_node_and_runs_netprobe_there() {
    let cluster = Cluster::new();
    let (output, asked) = cluster.run(&[
        "why",
        "pod/web-1",
        "--only",
        "lost",
        "--",
        "tcp port 80 or",
        "icmp",
    ]);
    assert_eq!(
        output.status.code(),
        Some(7),
        "netprobe's own exit status: {output:?}"
    );
    assert_eq!(
        asked,
        [
            "<config><view><--minify><-o><jsonpath={..namespace}>",
            "<get><pod><web-1><-n><prod><-o><jsonpath={.spec.nodeName}>",
            "<get><pods><-n><netprobe><-l><app.kubernetes.io/name=netprobe><--field-selector>\
             <spec.nodeName=n1,status.phase=Running><-o><jsonpath={.items[0].metadata.name}>",
            "<exec><-i><-n><netprobe><netprobe-abc><--></netprobe><why><--pod><prod/web-1><--only><lost>\
             <tcp port 80 or><icmp>",
        ]
    );
    // The namespace by flag: nobody is asked for one.
    for flag in [
        &["-n", "prod"][..],
        &["--namespace", "prod"],
        &["--namespace=prod"],
    ] {
        let (_, asked) = cluster.run(&[&["drops"][..], flag, &["pods/web-1"]].concat());
        assert_eq!(asked.len(), 3, "{asked:?}");
        assert!(
            asked[2].ends_with("</netprobe><drops><--pod><prod/web-1>"),
            "{asked:?}"
        );
    }
}

#[test]
fn the_plugin_says_why_it_cannot() {
    let cluster = Cluster::new();
    let refused = |args: &[&str], code: i32, says: &str| {
        let (output, asked) = cluster.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
        assert!(stderr.contains(says), "{args:?}: {stderr}");
        assert!(
            !asked.iter().any(|line| line.starts_with("<exec>")),
            "{asked:?}"
        );
    };
    refused(&[], 2, "which subcommand?");
    refused(
        &["icmp", "pod/web-1"],
        2,
        "icmp: only why, skb, drops and record",
    );
    refused(&["why"], 2, "which pod?");
    refused(&["why", "pod/web-1", "pod/web-2"], 2, "one pod");
    refused(&["why", "pod/web-1", "-n"], 2, "which namespace?");
    refused(&["why", "pod/web-9"], 1, "not found");
    refused(&["why", "pod/web-3"], 1, "pod prod/web-3 is on no node");
    refused(&["why", "pod/web-2"], 1, "no netprobe runs on node n2");
}

/// Metrics that rules and dashboard name are those that netprobe serves.
#[test]
fn rules_and_dashboard_use_metrics_that_there_are() {
    let served = concat!(
        include_str!("../src/tools/drops/metrics.rs"),
        include_str!("../src/tools/latency/metrics.rs"),
    );
    let dashboard: Value =
        serde_json::from_str(include_str!("../deploy/prometheus/dashboard.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("panels");
    let targets = panels
        .iter()
        .flat_map(|p| p["targets"].as_array().expect("targets"));
    let mut texts: Vec<&str> = targets
        .map(|t| t["expr"].as_str().expect("an expression"))
        .collect();
    assert!(texts.len() >= panels.len());
    texts.push(include_str!("../deploy/prometheus/netprobe.rules.yml"));
    let names: BTreeSet<&str> = texts
        .iter()
        .flat_map(|text| text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_'))
        .filter(|word| word.starts_with("netprobe_"))
        .collect();
    assert!(names.len() >= 6, "{names:?}");
    for name in names {
        let family = name.trim_end_matches("_bucket").trim_end_matches("_total");
        assert!(
            served.contains(&format!("\"{family}\"")),
            "{name} is not served"
        );
    }
}
