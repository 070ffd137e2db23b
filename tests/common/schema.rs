//! docs/json/TOOL.json: the JSON Schema of each tool's lines, and a validator of our own for the part of JSON Schema that
//! they use. The crate `jsonschema` would bring some sixty others (an HTTP client among them) for these nine keywords; an
//! unknown keyword in a schema is an error here, so that none is passed over.

use serde_json::{Map, Value};

/// Each subcommand that prints JSON, and its schema.
pub const SCHEMAS: [(&str, &str); 13] = [
    ("why", include_str!("../../docs/json/why.json")),
    ("skb", include_str!("../../docs/json/skb.json")),
    ("tcp", include_str!("../../docs/json/tcp.json")),
    (
        "tcpconnect",
        include_str!("../../docs/json/tcpconnect.json"),
    ),
    ("icmp", include_str!("../../docs/json/icmp.json")),
    ("xdpdump", include_str!("../../docs/json/xdpdump.json")),
    ("xdpchain", include_str!("../../docs/json/xdpchain.json")),
    ("record", include_str!("../../docs/json/skb.json")),
    ("report", include_str!("../../docs/json/report.json")),
    ("join", include_str!("../../docs/json/join.json")),
    ("latency", include_str!("../../docs/json/latency.json")),
    ("drops", include_str!("../../docs/json/drops.json")),
    ("features", include_str!("../../docs/json/features.json")),
];

/// Lines at the begin and at the end of an output that are validated: floods have a hundred thousand of one form.
const MOST: usize = 1000;

/// A schema.
pub struct Schema {
    root: Value,
}

impl Schema {
    /// That of a subcommand; an error where it uses a keyword that is not known here.
    pub fn of(tool: &str) -> Result<Self, String> {
        let text = SCHEMAS.iter().find(|(name, _)| *name == tool);
        let (_, text) = text.ok_or(format!("docs/json has no {tool}.json"))?;
        Self::parse(text)
    }

    pub fn parse(text: &str) -> Result<Self, String> {
        let root = serde_json::from_str(text).map_err(|e| e.to_string())?;
        let schema = Self { root };
        schema.known(&schema.root, "")?;
        Ok(schema)
    }

    /// What is wrong with a value, the first thing.
    pub fn check(&self, value: &Value) -> Result<(), String> {
        self.valid(&self.root, value, "")
    }

    /// The same of the first and the last lines of an output; the last one may not be whole.
    pub fn check_lines(&self, text: &str) -> Result<(), String> {
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let count = whole.lines().count();
        for (i, line) in whole.lines().enumerate() {
            if i >= MOST && i + MOST < count {
                continue;
            }
            let value = serde_json::from_str(line).map_err(|e| format!("not JSON: {e}: {line}"))?;
            self.check(&value).map_err(|e| format!("{e}: {line}"))?;
        }
        Ok(())
    }

    /// Every keyword is one that `valid` looks at, and every reference leads somewhere.
    fn known(&self, schema: &Value, at: &str) -> Result<(), String> {
        let Value::Object(schema) = schema else {
            return Err(format!("{at}: no schema"));
        };
        for (keyword, value) in schema {
            let at = format!("{at}/{keyword}");
            let each = |mut values: Box<dyn Iterator<Item = &Value> + '_>| {
                values.try_for_each(|value| self.known(value, &at))
            };
            match (keyword.as_str(), value) {
                ("$schema" | "title" | "description" | "type", _) => {}
                ("enum" | "required", Value::Array(_))
                | ("additionalProperties", Value::Bool(_)) => {}
                ("properties" | "$defs", Value::Object(of)) => each(Box::new(of.values()))?,
                ("anyOf", Value::Array(of)) => each(Box::new(of.iter()))?,
                ("items" | "additionalProperties", schema) => self.known(schema, &at)?,
                ("$ref", Value::String(to)) => self.referred(to).map(|_| ())?,
                _ => return Err(format!("{at}: not known to tests/common/schema.rs")),
            }
        }
        Ok(())
    }

    fn referred(&self, to: &str) -> Result<&Value, String> {
        let found = to
            .strip_prefix('#')
            .and_then(|path| self.root.pointer(path));
        found.ok_or(format!("{to}: no such schema"))
    }

    fn valid(&self, schema: &Value, value: &Value, at: &str) -> Result<(), String> {
        if let Some(to) = schema["$ref"].as_str() {
            return self.valid(self.referred(to)?, value, at);
        }
        if let Some(of) = schema["anyOf"].as_array() {
            return self.any(of, value, at);
        }
        if let Some(values) = schema["enum"].as_array() {
            if !values.contains(value) {
                return Err(format!("{at}: {value} is none of {}", schema["enum"]));
            }
        }
        let types = match &schema["type"] {
            Value::Array(types) => types.as_slice(),
            Value::Null => &[],
            one => std::slice::from_ref(one),
        };
        if !types.is_empty() && !types.iter().any(|t| is(value, t)) {
            return Err(format!("{at}: {value} is no {}", schema["type"]));
        }
        match value {
            Value::Object(fields) => self.object(schema, fields, at),
            Value::Array(items) if !schema["items"].is_null() => items
                .iter()
                .try_for_each(|item| self.valid(&schema["items"], item, &format!("{at}[]"))),
            _ => Ok(()),
        }
    }

    /// One of these. What is wrong is told of the one that has the value's `type`, if there is one.
    fn any(&self, of: &[Value], value: &Value, at: &str) -> Result<(), String> {
        let mut wrong = Vec::new();
        for schema in of {
            let Err(e) = self.valid(schema, value, at) else {
                return Ok(());
            };
            let target = schema["$ref"]
                .as_str()
                .map_or(Ok(schema), |to| self.referred(to))?;
            let kind = &target["properties"]["type"]["enum"][0];
            if !kind.is_null() && *kind == value["type"] {
                return Err(e);
            }
            wrong.push(e);
        }
        Err(wrong.join("; or "))
    }

    fn object(&self, schema: &Value, fields: &Map<String, Value>, at: &str) -> Result<(), String> {
        for name in schema["required"].as_array().into_iter().flatten() {
            if !name.as_str().is_some_and(|name| fields.contains_key(name)) {
                return Err(format!("{at}: {name} is missing"));
            }
        }
        for (name, value) in fields {
            let at = format!("{at}.{name}");
            match (&schema["properties"][name], &schema["additionalProperties"]) {
                (Value::Null, Value::Bool(false)) => {
                    return Err(format!("{at}: the schema has no such field"));
                }
                (Value::Null, Value::Object(_)) => {
                    self.valid(&schema["additionalProperties"], value, &at)?
                }
                (Value::Null, _) => {}
                (of, _) => self.valid(of, value, &at)?,
            }
        }
        Ok(())
    }
}

/// A value is of this type of JSON Schema.
fn is(value: &Value, name: &Value) -> bool {
    match name.as_str() {
        Some("null") => value.is_null(),
        Some("boolean") => value.is_boolean(),
        Some("integer") => value.is_i64() || value.is_u64(),
        Some("number") => value.is_number(),
        Some("string") => value.is_string(),
        Some("array") => value.is_array(),
        Some("object") => value.is_object(),
        _ => false,
    }
}
