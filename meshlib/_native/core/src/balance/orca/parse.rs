//! What does the value of an `endpoint-load-metrics` header say?
//!
//! One of the three formats that Envoy reads, told by the first word: `TEXT` (a list of names and numbers), `JSON` and `BIN` (base64
//! of the protobuf message `xds.data.orca.v3.OrcaLoadReport`; also all there is to gRPC's own `endpoint-load-metrics-bin`). The value
//! comes from the other side: its length is bounded, a number that is negative or not finite refuses the whole report, and so does a
//! name that comes twice. Names that we do not know are passed over, because newer endpoints may say more. Five numbers out of one
//! message need no generated code: a few lines walk over the fields.
use serde::{Deserialize, Deserializer};

use super::Report;

/// Longer values are refused unread.
const LONGEST: usize = 4096;

/// Why a report was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    TooLong,
    /// None of the three first words.
    Format,
    /// Not what the first word promised.
    Syntax,
    /// A number that is negative or not finite.
    Number,
}

pub fn parse(value: &[u8]) -> Result<Report, Fault> {
    if value.len() > LONGEST {
        return Err(Fault::TooLong);
    }
    let end = value.iter().position(|byte| *byte == b' ').ok_or(Fault::Format)?;
    let (format, rest) = value.split_at_checked(end).ok_or(Fault::Format)?;
    let said = match format {
        b"TEXT" => text(rest)?,
        // serde would take a list for the fields in their order.
        b"JSON" if rest.trim_ascii_start().starts_with(b"{") => {
            serde_json::from_slice(rest).map_err(|_| Fault::Syntax)?
        }
        b"JSON" => return Err(Fault::Syntax),
        b"BIN" => binary(&base64(rest.trim_ascii()).ok_or(Fault::Syntax)?).ok_or(Fault::Syntax)?,
        _ => return Err(Fault::Format),
    };
    said.report()
}

/// The fields of the message that we read, as they came. Names in JSON may be those of the message or in camel case.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Said {
    #[serde(alias = "cpuUtilization", deserialize_with = "number")]
    cpu_utilization: Option<f64>,
    #[serde(alias = "memUtilization", deserialize_with = "number")]
    mem_utilization: Option<f64>,
    #[serde(alias = "applicationUtilization", deserialize_with = "number")]
    application_utilization: Option<f64>,
    #[serde(alias = "rpsFractional", deserialize_with = "number")]
    rps_fractional: Option<f64>,
    /// The predecessor of `rps_fractional`, in whole numbers.
    #[serde(deserialize_with = "number")]
    rps: Option<f64>,
    #[serde(deserialize_with = "number")]
    eps: Option<f64>,
}

impl Said {
    fn field(&mut self, name: &[u8]) -> Option<&mut Option<f64>> {
        match name {
            b"cpu_utilization" => Some(&mut self.cpu_utilization),
            b"mem_utilization" => Some(&mut self.mem_utilization),
            b"application_utilization" => Some(&mut self.application_utilization),
            b"rps_fractional" => Some(&mut self.rps_fractional),
            b"rps" => Some(&mut self.rps),
            b"eps" => Some(&mut self.eps),
            _ => None,
        }
    }

    fn report(self) -> Result<Report, Fault> {
        let sound = |number: Option<f64>| match number.unwrap_or(0.0) {
            number if number.is_finite() && number >= 0.0 => Ok(number),
            _ => Err(Fault::Number),
        };
        let (fractional, whole) = (sound(self.rps_fractional)?, sound(self.rps)?);
        Ok(Report {
            cpu: sound(self.cpu_utilization)?,
            application_utilization: sound(self.application_utilization)?,
            mem: sound(self.mem_utilization)?,
            qps: if fractional > 0.0 { fractional } else { whole },
            eps: sound(self.eps)?,
        })
    }
}

/// `name=number`, or `name:number`, which is what Envoy's own parser takes; separated by commas.
fn text(list: &[u8]) -> Result<Said, Fault> {
    let mut said = Said::default();
    for entry in list.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).filter(|entry| !entry.is_empty()) {
        let middle = entry.iter().position(|byte| matches!(byte, b'=' | b':')).ok_or(Fault::Syntax)?;
        let (name, number) = entry.split_at_checked(middle).ok_or(Fault::Syntax)?;
        let Some(field) = said.field(name.trim_ascii_end()) else { continue };
        let number = number.get(1..).and_then(|number| std::str::from_utf8(number.trim_ascii()).ok());
        let number = number.and_then(|number| number.parse().ok()).ok_or(Fault::Syntax)?;
        if field.replace(number).is_some() {
            return Err(Fault::Syntax);
        }
    }
    Ok(said)
}

/// The JSON form of protobuf allows a number to be a string, and has no other way to spell those that are not finite.
fn number<'de, D: Deserializer<'de>>(from: D) -> Result<Option<f64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Plain(f64),
        Quoted(String),
    }
    match Option::deserialize(from)? {
        None => Ok(None),
        Some(Number::Plain(number)) => Ok(Some(number)),
        Some(Number::Quoted(text)) => text.parse().map(Some).map_err(serde::de::Error::custom),
    }
}

/// The standard alphabet; padding may be there or not, as gRPC leaves it out.
fn base64(text: &[u8]) -> Option<Vec<u8>> {
    let bare = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    if bare.len() % 4 == 1 || (bare.len() < text.len() && text.len() % 4 != 0) {
        return None;
    }
    let mut bytes = Vec::with_capacity(bare.len() / 4 * 3 + 2);
    for group in bare.chunks(4) {
        let mut bits = 0u32;
        for (place, letter) in group.iter().enumerate() {
            let value = match letter {
                b'A'..=b'Z' => letter - b'A',
                b'a'..=b'z' => letter - b'a' + 26,
                b'0'..=b'9' => letter - b'0' + 52,
                b'+' => 62,
                b'/' => 63,
                _ => return None,
            };
            bits |= u32::from(value) << (26 - 6 * place);
        }
        bytes.extend(bits.to_be_bytes().into_iter().take(group.len() * 6 / 8));
    }
    Some(bytes)
}

/// Fields that we do not know are passed over by their wire type; groups have been out of use since before the message was made.
fn binary(mut bytes: &[u8]) -> Option<Said> {
    let mut said = Said::default();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        match (tag >> 3, tag & 7) {
            (0, _) => return None,
            (3, 0) => said.rps = Some(varint(&mut bytes)? as f64),
            (_, 0) => drop(varint(&mut bytes)?),
            (field, 1) => {
                let (double, rest) = bytes.split_first_chunk::<8>()?;
                bytes = rest;
                let slot = match field {
                    1 => &mut said.cpu_utilization,
                    2 => &mut said.mem_utilization,
                    6 => &mut said.rps_fractional,
                    7 => &mut said.eps,
                    9 => &mut said.application_utilization,
                    _ => continue,
                };
                *slot = Some(f64::from_le_bytes(*double));
            }
            (_, 2) => {
                let length = usize::try_from(varint(&mut bytes)?).ok()?;
                bytes = bytes.get(length..)?;
            }
            (_, 5) => bytes = bytes.get(4..)?,
            _ => return None,
        }
    }
    Some(said)
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests;
