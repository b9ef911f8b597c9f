//! What does this JSON say, if it can say one thing only?
//!
//! Two members of one name mean the first to one reader and the last to another, so they are refused at every level, and so is what
//! nests deeper than anybody needs. Names are compared after their escapes were read: `"\u0061ud"` is `"aud"`. Numbers beyond a
//! double, NaN, and what follows the document are refused by serde_json, which reads it.
use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Levels of objects and lists.
pub const DEEPEST: usize = 64;

/// The document, which must be an object.
pub fn object(text: &[u8]) -> Result<Map<String, Value>, &'static str> {
    let why = Cell::new("it is not JSON");
    let mut reader = serde_json::Deserializer::from_slice(text);
    let read = Strict { left: DEEPEST, why: &why }.deserialize(&mut reader).and_then(|value| {
        reader.end()?;
        Ok(value)
    });
    match read {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Err("it is not a JSON object"),
        Err(_) => Err(why.get()),
    }
}

#[derive(Clone, Copy)]
struct Strict<'a> {
    left: usize,
    why: &'a Cell<&'static str>,
}

impl Strict<'_> {
    fn refuse<E: Error>(&self, why: &'static str) -> E {
        self.why.set(why);
        E::custom(why)
    }

    fn inner<E: Error>(&self) -> Result<Self, E> {
        match self.left.checked_sub(1) {
            Some(left) => Ok(Self { left, ..*self }),
            None => Err(self.refuse("it nests too deep")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: serde::Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let inner = self.inner()?;
        let mut object = Map::new();
        while let Some(name) = members.next_key::<String>()? {
            if object.contains_key(&name) {
                return Err(self.refuse("a member stands in it twice"));
            }
            object.insert(name, members.next_value_seed(inner)?);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_says_one_thing_is_read() {
        let text = br#" {"a": [1, -2, 2.5, "x", null, true], "b": {"a": {}}} "#;
        assert_eq!(Value::Object(object(text).unwrap()), serde_json::from_slice::<Value>(text).unwrap());
    }

    #[test]
    fn a_member_that_stands_twice_is_refused_at_every_level() {
        for text in [r#"{"a":1,"a":1}"#, r#"{"b":{"a":1,"a":2}}"#, r#"{"b":[{"a":1,"\u0061":2}]}"#] {
            assert_eq!(object(text.as_bytes()), Err("a member stands in it twice"), "{text}");
        }
    }

    #[test]
    fn sixty_four_levels_are_read_and_one_more_is_not() {
        let nested = |levels: usize| format!("{{\"a\":{}{}}}", "[".repeat(levels - 1), "]".repeat(levels - 1));
        assert!(object(nested(64).as_bytes()).is_ok());
        assert_eq!(object(nested(65).as_bytes()), Err("it nests too deep"));
        assert_eq!(object(nested(8000).as_bytes()), Err("it nests too deep"));
    }

    #[test]
    fn what_is_no_object_or_no_json_is_refused() {
        for text in ["[]", "null", "1", "\"x\""] {
            assert_eq!(object(text.as_bytes()), Err("it is not a JSON object"), "{text}");
        }
        let bad: [&[u8]; 9] = [
            b"",
            b"{",
            b"{}{}",
            b"{\"a\":NaN}",
            b"{\"a\":1e999}",
            b"{'a':1}",
            b"{\"a\":1,}",
            b"{\"a\":\"\xff\"}",
            b"\xef\xbb\xbf{}",
        ];
        for text in bad {
            assert_eq!(object(text), Err("it is not JSON"), "{}", String::from_utf8_lossy(text));
        }
    }
}
