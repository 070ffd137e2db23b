//! The one writer of JSON: a serde serializer to compact JSON, byte for byte what serde_json writes, at a third of its
//! cost: names of fields are the program's own and are not searched for what must be escaped, and a string is searched
//! eight bytes at a time. Only floating-point numbers go to serde_json (tests/layers.rs holds the rest to it).

use std::fmt;

use serde::de::DeserializeOwned;
use serde::ser::{self, Serialize};

use super::format::{push_dec, push_signed};

/// Appends `value` as JSON.
pub fn push<T: Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) -> Result<(), Error> {
    value.serialize(Json(out))
}

/// A value from JSON, which may be anything.
pub fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(bytes).map_err(|e| Error(e.to_string()))
}

/// What a type's own `Serialize` says is wrong.
#[derive(Debug)]
pub struct Error(String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

impl ser::Error for Error {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }
}

/// Appends a string in quotes.
#[inline]
pub fn push_str(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let bytes = text.as_bytes();
    if clean(bytes) {
        out.extend_from_slice(bytes);
    } else {
        push_escaped(out, bytes);
    }
    out.push(b'"');
}

/// Appends a string in quotes that is known to have nothing to escape.
fn push_clean(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    out.extend_from_slice(text.as_bytes());
    out.push(b'"');
}

/// No byte is a control character, a quote or a backslash.
#[inline]
fn clean(bytes: &[u8]) -> bool {
    const LOW: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = LOW << 7;
    // The high bit of each byte that is (below 0x80 and) less than n, or 0.
    let below = |word: u64, n: u64| word.wrapping_sub(LOW * n) & !word & HIGH;
    let odd = |word: u64| {
        below(word, 0x20)
            | below(word ^ (LOW * u64::from(b'"')), 1)
            | below(word ^ (LOW * u64::from(b'\\')), 1)
    };
    let words = bytes.chunks_exact(8);
    let rest = words.remainder();
    words
        .filter_map(|w| w.try_into().ok())
        .all(|w| odd(u64::from_ne_bytes(w)) == 0)
        && rest.iter().all(|&b| b >= 0x20 && b != b'"' && b != b'\\')
}

#[cold]
fn push_escaped(out: &mut Vec<u8>, bytes: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    for &b in bytes {
        let short = match b {
            b'"' | b'\\' => b,
            0x08 => b'b',
            0x09 => b't',
            0x0a => b'n',
            0x0c => b'f',
            0x0d => b'r',
            0x00..0x20 => {
                let (high, low) = (HEX[usize::from(b >> 4)], HEX[usize::from(b & 15)]);
                out.extend_from_slice(&[b'\\', b'u', b'0', b'0', high, low]);
                continue;
            }
            _ => {
                out.push(b);
                continue;
            }
        };
        out.extend_from_slice(&[b'\\', short]);
    }
}

struct Json<'a>(&'a mut Vec<u8>);

/// The inside of an array or object.
struct Inside<'a> {
    out: &'a mut Vec<u8>,
    /// what comes before the next element: what opens it, then a comma
    before: u8,
    /// what closes it
    end: &'static [u8],
}

impl<'a> Inside<'a> {
    #[inline]
    fn new(out: &'a mut Vec<u8>, begin: u8, end: &'static [u8]) -> Self {
        Self {
            out,
            before: begin,
            end,
        }
    }

    #[inline]
    fn separate(&mut self) {
        self.out.push(self.before);
        self.before = b',';
    }

    fn element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.separate();
        value.serialize(Json(self.out))
    }

    /// `,"NAME":VALUE`. Inlined, so that the name is known to the compiler and all in front of the value is one store.
    #[inline(always)]
    fn field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) -> Result<(), Error> {
        const MOST: usize = 28;
        let (bytes, n) = (name.as_bytes(), name.len());
        if n <= MOST {
            let mut key = [b'"'; MOST + 4];
            key[0] = self.before;
            key[2..2 + n].copy_from_slice(bytes);
            key[3 + n] = b':';
            self.out.extend_from_slice(&key[..4 + n]);
            self.before = b',';
        } else {
            self.separate();
            push_clean(self.out, name);
            self.out.push(b':');
        }
        value.serialize(Json(self.out))
    }

    #[inline]
    fn close(self) -> Result<(), Error> {
        if self.before != b',' {
            self.out.push(self.before);
        }
        self.out.extend_from_slice(self.end);
        Ok(())
    }
}

/// A JSON object, written field by field.
pub struct Object<'a> {
    inside: Inside<'a>,
    failed: Result<(), Error>,
}

impl<'a> Object<'a> {
    #[inline]
    pub fn new(out: &'a mut Vec<u8>) -> Self {
        Self {
            inside: Inside::new(out, b'{', b"}"),
            failed: Ok(()),
        }
    }

    /// One more field. What is wrong with a value [`Object::close`] says.
    #[inline]
    pub fn field<T: Serialize + ?Sized>(&mut self, name: &'static str, value: &T) {
        if let Err(e) = self.inside.field(name, value) {
            self.failed = Err(e);
        }
    }

    /// One more field, where there is a value.
    #[inline]
    pub fn some<T: Serialize>(&mut self, name: &'static str, value: Option<&T>) {
        if let Some(value) = value {
            self.field(name, value);
        }
    }

    pub fn close(self) -> Result<(), Error> {
        self.inside.close()?;
        self.failed
    }
}

/// `{"VARIANT":` and what follows.
fn variant<'a>(out: &'a mut Vec<u8>, name: &str) -> &'a mut Vec<u8> {
    out.push(b'{');
    push_clean(out, name);
    out.push(b':');
    out
}

macro_rules! numbers {
    ($($name:ident $type:ty, $push:ident $wide:ty;)*) => {
        $(#[inline]
        fn $name(self, v: $type) -> Result<(), Error> {
            $push(self.0, <$wide>::from(v));
            Ok(())
        })*
    };
}

impl<'a> ser::Serializer for Json<'a> {
    type Ok = ();
    type Error = Error;
    type SerializeSeq = Inside<'a>;
    type SerializeTuple = Inside<'a>;
    type SerializeTupleStruct = Inside<'a>;
    type SerializeTupleVariant = Inside<'a>;
    type SerializeMap = Inside<'a>;
    type SerializeStruct = Inside<'a>;
    type SerializeStructVariant = Inside<'a>;

    numbers! {
        serialize_u8 u8, push_dec u64;
        serialize_u16 u16, push_dec u64;
        serialize_u32 u32, push_dec u64;
        serialize_u64 u64, push_dec u64;
        serialize_i8 i8, push_signed i64;
        serialize_i16 i16, push_signed i64;
        serialize_i32 i32, push_signed i64;
        serialize_i64 i64, push_signed i64;
    }

    fn serialize_i128(self, v: i128) -> Result<(), Error> {
        self.0.extend_from_slice(v.to_string().as_bytes());
        Ok(())
    }

    fn serialize_u128(self, v: u128) -> Result<(), Error> {
        self.0.extend_from_slice(v.to_string().as_bytes());
        Ok(())
    }

    fn serialize_bool(self, v: bool) -> Result<(), Error> {
        let text: &[u8] = if v { b"true" } else { b"false" };
        self.0.extend_from_slice(text);
        Ok(())
    }

    fn serialize_f32(self, v: f32) -> Result<(), Error> {
        serde_json::to_writer(self.0, &v).map_err(ser::Error::custom)
    }

    fn serialize_f64(self, v: f64) -> Result<(), Error> {
        serde_json::to_writer(self.0, &v).map_err(ser::Error::custom)
    }

    fn serialize_char(self, v: char) -> Result<(), Error> {
        push_str(self.0, v.encode_utf8(&mut [0; 4]));
        Ok(())
    }

    #[inline]
    fn serialize_str(self, v: &str) -> Result<(), Error> {
        push_str(self.0, v);
        Ok(())
    }

    fn serialize_bytes(self, v: &[u8]) -> Result<(), Error> {
        self.collect_seq(v)
    }

    fn serialize_none(self) -> Result<(), Error> {
        self.serialize_unit()
    }

    #[inline]
    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_unit(self) -> Result<(), Error> {
        self.0.extend_from_slice(b"null");
        Ok(())
    }

    fn serialize_unit_struct(self, _: &'static str) -> Result<(), Error> {
        self.serialize_unit()
    }

    fn serialize_unit_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
    ) -> Result<(), Error> {
        push_clean(self.0, name);
        Ok(())
    }

    #[inline]
    fn serialize_newtype_struct<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        value.serialize(self)
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        let out = variant(self.0, name);
        value.serialize(Json(out))?;
        out.push(b'}');
        Ok(())
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(self.0, b'[', b"]"))
    }

    fn serialize_tuple(self, _: usize) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(self.0, b'[', b"]"))
    }

    fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(self.0, b'[', b"]"))
    }

    fn serialize_tuple_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
        _: usize,
    ) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(variant(self.0, name), b'[', b"]}"))
    }

    fn serialize_map(self, _: Option<usize>) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(self.0, b'{', b"}"))
    }

    #[inline]
    fn serialize_struct(self, _: &'static str, _: usize) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(self.0, b'{', b"}"))
    }

    fn serialize_struct_variant(
        self,
        _: &'static str,
        _: u32,
        name: &'static str,
        _: usize,
    ) -> Result<Inside<'a>, Error> {
        Ok(Inside::new(variant(self.0, name), b'{', b"}}"))
    }
}

impl ser::SerializeSeq for Inside<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

impl ser::SerializeTuple for Inside<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

impl ser::SerializeTupleStruct for Inside<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

impl ser::SerializeTupleVariant for Inside<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.element(value)
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

impl ser::SerializeMap for Inside<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), Error> {
        self.separate();
        let start = self.out.len();
        key.serialize(Json(self.out))?;
        // A key is a string: a number or a bool is put in quotes.
        if self.out.get(start) != Some(&b'"') {
            self.out.insert(start, b'"');
            self.out.push(b'"');
        }
        Ok(())
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.out.push(b':');
        value.serialize(Json(self.out))
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

impl ser::SerializeStruct for Inside<'_> {
    type Ok = ();
    type Error = Error;

    #[inline(always)]
    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        self.field(name, value)
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

impl ser::SerializeStructVariant for Inside<'_> {
    type Ok = ();
    type Error = Error;

    fn serialize_field<T: Serialize + ?Sized>(
        &mut self,
        name: &'static str,
        value: &T,
    ) -> Result<(), Error> {
        self.field(name, value)
    }

    fn end(self) -> Result<(), Error> {
        self.close()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use proptest::prelude::*;
    use serde::Serialize;

    #[derive(Serialize)]
    enum Variant {
        Unit,
        New(u8),
        Pair(i8, bool),
        Named { a: char },
    }

    #[derive(Serialize)]
    struct Row<'a> {
        #[serde(rename = "type")]
        text: &'a str,
        #[serde(skip_serializing_if = "Option::is_none")]
        maybe: Option<u32>,
        null: Option<i64>,
        wide: i128,
        wider: u128,
        float: f64,
        small: f32,
        pair: (u16, i16),
        list: Vec<Variant>,
        empty: [u8; 0],
        bytes: &'a [u8],
        by_number: BTreeMap<u64, ()>,
        by_name: BTreeMap<&'a str, u8>,
        #[serde(flatten)]
        inner: Inner,
    }

    #[derive(Serialize)]
    struct Inner {
        name: String,
        unit: (),
    }

    proptest! {
        #[test]
        fn as_serde_json_has_it(text in any::<String>(), ascii in "[ -~\\x00-\\x1f\\x7f]{0,40}", n in any::<u64>(), i in any::<i64>(), w in any::<i128>(), f in any::<f64>(), c in any::<char>(), b in any::<bool>()) {
            let row = Row {
                text: &ascii,
                maybe: b.then_some(n as u32),
                null: (!b).then_some(i),
                wide: w,
                wider: w as u128,
                float: f,
                small: f as f32,
                pair: (n as u16, i as i16),
                list: vec![Variant::Unit, Variant::New(n as u8), Variant::Pair(i as i8, b), Variant::Named { a: c }],
                empty: [],
                bytes: text.as_bytes(),
                by_number: [(n, ()), (0, ())].into(),
                by_name: [(text.as_str(), 1), ("", 2)].into(),
                inner: Inner { name: text.clone(), unit: () },
            };
            let mut ours = Vec::new();
            push(&mut ours, &row).unwrap();
            prop_assert_eq!(String::from_utf8(ours).unwrap(), serde_json::to_string(&row).unwrap());
        }
    }

    #[test]
    fn every_byte_at_every_place_of_a_word() {
        for b in 0..=0x7f_u8 {
            for at in 0..9 {
                let mut text = *b"abcdefghi";
                text[at] = b;
                let text = std::str::from_utf8(&text).unwrap();
                let mut ours = Vec::new();
                push_str(&mut ours, text);
                assert_eq!(ours, serde_json::to_vec(text).unwrap(), "{text:?}");
            }
        }
    }
}
