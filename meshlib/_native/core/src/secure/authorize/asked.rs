//! What has to be worked out about a question, once for all rules?
//!
//! A thousand rules may look at one path without its case, at one host, and at one header as a list of values. Whoever sends it chooses how long
//! it is, before anybody knows who that is; so it is folded and split once for each question, and only if a rule asks. What nearly
//! all calls are (a path without capitals, a few short headers without a comma) is compared as it stands, and costs no memory.
//!
//! It decides nothing: what follows from it is said in `clause`.
use core::ops::Deref;
use std::cell::OnceCell;
use std::collections::BTreeMap;

use super::pattern::{folded, host_of};
use super::Question;
use crate::secure::path::Path;

/// A list with more values is as good as unknown: nobody writes one, and to compare it with every rule would cost too much.
pub(super) const MOST_PARTS: usize = 64;
/// Up to here headers are compared as they stand.
const FEW: usize = 8;
const BRIEF: usize = 256;

#[derive(Debug)]
pub(super) struct Asked<'a> {
    question: &'a Question<'a>,
    /// None: it is the path itself.
    folded: OnceCell<Option<Path>>,
    /// None: not known.
    host: OnceCell<Option<&'a str>>,
    /// None: they are plain.
    headers: OnceCell<Option<BTreeMap<&'a str, List<'a>>>>,
}

/// What a header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header<'a> {
    /// Its value, if it stands once.
    pub lone: Option<&'a [u8]>,
    /// What it may be besides: the parts between its commas; if it stands more than once, also each field. Empty if it has none.
    pub others: &'a [&'a [u8]],
    /// There are more, and they were not looked at.
    pub is_too_long: bool,
}

#[derive(Debug, Default)]
struct List<'a> {
    fields: usize,
    lone: Option<&'a [u8]>,
    others: Vec<&'a [u8]>,
    is_too_long: bool,
}

impl<'a> Asked<'a> {
    pub fn new(question: &'a Question<'a>) -> Self {
        Self { question, folded: OnceCell::new(), host: OnceCell::new(), headers: OnceCell::new() }
    }

    /// The path, case apart.
    pub fn folded_path(&self) -> &Path {
        self.differently_folded_path().unwrap_or(self.question.path)
    }

    /// None: it is the same as the path itself.
    pub fn differently_folded_path(&self) -> Option<&Path> {
        let path = self.question.path;
        let is_folded = |text: &str| text.bytes().all(|byte| byte.is_ascii() && !byte.is_ascii_uppercase());
        self.folded
            .get_or_init(|| {
                if is_folded(path.text()) {
                    return None;
                }
                Some(path.mapped(folded)).filter(|folded| folded.text() != path.text())
            })
            .as_ref()
    }

    /// As rules compare it, but for case. None: not known, or it can be read in two ways.
    pub fn known_host(&self) -> Option<&'a str> {
        *self.host.get_or_init(|| self.question.host.and_then(host_of))
    }

    /// None: it isn't there.
    pub fn header(&self, name: &str) -> Option<Header<'_>> {
        match self.headers.get_or_init(|| self.lists()) {
            Some(lists) => lists.get(name).map(List::header),
            None => self.question.headers.iter().find(|(known, _)| **known == *name).map(|(_, value)| plain(value)),
        }
    }

    /// As often as it stands.
    pub fn count(&self, name: &str) -> usize {
        self.question.headers.iter().filter(|(known, _)| **known == *name).count()
    }

    /// All that are there, each once.
    pub fn each_header(&self, mut see: impl FnMut(&str, Header<'_>)) {
        match self.headers.get_or_init(|| self.lists()) {
            Some(lists) => lists.iter().for_each(|(name, list)| see(name, list.header())),
            None => self.question.headers.iter().for_each(|(name, value)| see(name, plain(value))),
        }
    }

    fn lists(&self) -> Option<BTreeMap<&'a str, List<'a>>> {
        let fields = self.question.headers;
        let is_plain = fields.len() <= FEW
            && fields.iter().enumerate().all(|(place, (name, value))| {
                value.len() <= BRIEF
                    && !value.contains(&b',')
                    && fields.iter().take(place).all(|(earlier, _)| earlier != name)
            });
        if is_plain {
            return None;
        }
        let mut lists: BTreeMap<&str, List<'_>> = BTreeMap::new();
        for (name, value) in fields {
            lists.entry(name).or_default().add(value.trim_ascii());
        }
        Some(lists)
    }
}

impl<'a> Deref for Asked<'a> {
    type Target = Question<'a>;

    fn deref(&self) -> &Self::Target {
        self.question
    }
}

fn plain(value: &[u8]) -> Header<'_> {
    Header { lone: Some(value.trim_ascii()), others: &[], is_too_long: false }
}

impl<'a> List<'a> {
    fn add(&mut self, value: &'a [u8]) {
        self.fields += 1;
        let first = self.lone.take();
        if self.is_too_long {
            return;
        }
        match (self.fields, first) {
            (1, _) => self.lone = Some(value),
            (_, Some(first)) => self.others.extend([first, value]),
            (_, None) => self.others.push(value),
        }
        if value.contains(&b',') {
            self.others.extend(value.split(|byte| *byte == b',').map(<[u8]>::trim_ascii).take(MOST_PARTS + 1));
        }
        if self.others.len() > MOST_PARTS {
            (self.others, self.is_too_long) = (Vec::new(), true);
        }
    }

    fn header(&self) -> Header<'_> {
        Header { lone: self.lone, others: &self.others, is_too_long: self.is_too_long }
    }
}
