#![allow(clippy::unwrap_used)]
use super::*;

const FULL: Report = Report { cpu: 0.3, application_utilization: 0.8, mem: 0.5, qps: 12.5, eps: 0.1 };

fn refused(value: &str) -> Fault {
    parse(value.as_bytes()).unwrap_err()
}

/// A field of the message: number, wire type, content.
fn field(number: u8, kind: u8, content: &[u8]) -> Vec<u8> {
    [&[number << 3 | kind], content].concat()
}

fn bin(message: &[u8]) -> Result<Report, Fault> {
    const LETTERS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits: Vec<u8> = message.iter().flat_map(|byte| (0..8).rev().map(move |bit| byte >> bit & 1)).collect();
    let letters = bits.chunks(6).map(|six| (0..6).fold(0, |value, bit| value << 1 | six.get(bit).unwrap_or(&0)));
    let text = letters.map(|value| *LETTERS.get(usize::from(value)).unwrap());
    parse(&[b"BIN ".as_slice(), &text.collect::<Vec<u8>>()].concat())
}

fn message() -> Vec<u8> {
    [(1, 0.3f64), (2, 0.5), (6, 12.5), (7, 0.1), (9, 0.8)]
        .iter()
        .flat_map(|(number, value)| field(*number, 1, &value.to_le_bytes()))
        .collect()
}

#[test]
fn text_is_a_list_of_names_and_numbers() {
    let text = "TEXT cpu_utilization=0.3,mem_utilization=0.5,application_utilization=0.8,rps_fractional=12.5,eps=0.1";
    assert_eq!(parse(text.as_bytes()), Ok(FULL));
    assert_eq!(parse(text.replace('=', ":").as_bytes()), Ok(FULL));
    assert_eq!(parse(text.replace('=', " = ").replace(',', " , ").as_bytes()), Ok(FULL));
}

#[test]
fn json_takes_both_spellings_and_quoted_numbers() {
    let json = r#"JSON {"cpu_utilization": 0.3, "mem_utilization": 0.5, "application_utilization": 0.8, "rps_fractional": 12.5, "eps": 0.1}"#;
    assert_eq!(parse(json.as_bytes()), Ok(FULL));
    let camel = r#"JSON {"cpuUtilization": "0.3", "memUtilization": 0.5, "applicationUtilization": 0.8, "rpsFractional": "12.5", "eps": 1e-1}"#;
    assert_eq!(parse(camel.as_bytes()), Ok(FULL));
    assert_eq!(parse(br#"JSON {"rps": "7", "eps": null}"#).unwrap().qps, 7.0);
}

#[test]
fn binary_is_the_protobuf_message_in_base64() {
    assert_eq!(bin(&message()), Ok(FULL));
    // Made by another implementation: cpu_utilization 0.5, padded and not.
    for text in ["BIN CQAAAAAAAOA/", "BIN  CQAAAAAAAOA/ "] {
        assert_eq!(parse(text.as_bytes()), Ok(Report { cpu: 0.5, ..Report::default() }));
    }
    for text in ["BIN GAc=", "BIN GAc"] {
        assert_eq!(parse(text.as_bytes()), Ok(Report { qps: 7.0, ..Report::default() }));
    }
}

#[test]
fn names_that_nobody_knows_are_passed_over() {
    let report = Ok(Report { cpu: 0.5, ..Report::default() });
    assert_eq!(parse(b"TEXT named_metrics.x=-1,cpu_utilization=0.5,utilization.disk=nan,new=words"), report);
    assert_eq!(parse(br#"JSON {"named_metrics": {"x": -1}, "cpu_utilization": 0.5, "new": [[{}]]}"#), report);
    let unknown =
        [field(8, 2, b"\x0c\x0a\x01x\x11\0\0\0\0\0\0\xf0\xbf"), field(12, 0, b"\xff\x01"), field(13, 5, b"abcd")]
            .concat();
    let with = [unknown.clone(), field(1, 1, &0.5f64.to_le_bytes()), unknown].concat();
    assert_eq!(bin(&with), report);
}

#[test]
fn the_fractional_rate_goes_before_the_whole_one() {
    assert_eq!(parse(b"TEXT rps=7").unwrap().qps, 7.0);
    assert_eq!(parse(b"TEXT rps=7,rps_fractional=7.5").unwrap().qps, 7.5);
}

#[test]
fn an_empty_report_says_nothing() {
    for text in ["TEXT ", "TEXT , ,", "JSON {}", "BIN "] {
        assert_eq!(parse(text.as_bytes()), Ok(Report::default()), "{text}");
    }
}

#[test]
fn numbers_that_are_negative_or_not_finite_refuse_the_report() {
    for number in ["-0.1", "nan", "inf", "-inf", "infinity", "1e999"] {
        assert_eq!(refused(&format!("TEXT eps=0.1,cpu_utilization={number}")), Fault::Number, "{number}");
        assert_eq!(refused(&format!(r#"JSON {{"eps": "{number}"}}"#)), Fault::Number, "{number}");
    }
    for number in [-1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(bin(&field(9, 1, &number.to_le_bytes())), Err(Fault::Number), "{number}");
    }
}

#[test]
fn what_the_first_word_does_not_promise_is_refused() {
    for value in ["", "TEXT", "text eps=1", "XML <a/>", "eps=1", " TEXT eps=1"] {
        assert_eq!(refused(value), Fault::Format, "{value}");
    }
    for value in [
        "TEXT eps",
        "TEXT eps=",
        "TEXT eps=one",
        "TEXT eps=1;rps=2",
        "JSON ",
        "JSON [0.3]",
        "JSON {\"eps\": 0.1",
        "JSON {\"eps\": true}",
        "JSON {\"eps\": \"\"}",
        "JSON {\"eps\": 1e999}",
        "BIN ?",
        "BIN CQAAAAAAAOA_",
        "BIN CQAAAAAAAOA=/",
        "BIN GAc==",
        "BIN A",
    ] {
        assert_eq!(refused(value), Fault::Syntax, "{value}");
    }
}

#[test]
fn a_name_that_comes_twice_is_refused() {
    assert_eq!(refused("TEXT eps=1,rps=1,eps=1"), Fault::Syntax);
    assert_eq!(refused(r#"JSON {"eps": 1, "eps": 1}"#), Fault::Syntax);
    assert_eq!(refused(r#"JSON {"cpu_utilization": 1, "cpuUtilization": 1}"#), Fault::Syntax);
}

#[test]
fn every_cut_of_a_message_is_refused_or_a_report() {
    let (whole, mut refusals) = (message(), 0);
    for length in 0..whole.len() {
        refusals += usize::from(bin(whole.get(..length).unwrap()).is_err());
    }
    // Five fields of nine bytes: only the cuts between two fields are messages.
    assert_eq!(refusals, 40);
}

#[test]
fn a_message_that_lies_about_its_lengths_is_refused() {
    for message in [
        field(8, 2, b"\x05ab"),
        field(8, 2, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        field(3, 0, b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"),
        field(3, 0, b"\x80"),
        field(13, 5, b"abc"),
        field(8, 3, b""),
        field(0, 0, b"\x01"),
    ] {
        assert_eq!(bin(&message), Err(Fault::Syntax), "{message:?}");
    }
}

#[test]
fn a_value_beyond_four_kibibytes_is_refused_unread() {
    let long = |length: usize| format!("TEXT eps=1{}", " ".repeat(length - 10));
    assert_eq!(parse(long(4096).as_bytes()).unwrap().eps, 1.0);
    assert_eq!(refused(&long(4097)), Fault::TooLong);
}
