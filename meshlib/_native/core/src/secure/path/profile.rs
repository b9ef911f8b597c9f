//! How do other meshes read this path? And where does `paths: redirect` send a caller?
//!
//! Istio's `pathNormalization` and Envoy's `path_with_escaped_slashes_action`, step for step, for policies that were written for
//! them. They keep the query, and leave escaped what need not be decoded. Our own servers read paths by `canonical` alone, which is
//! stricter than all of these; nothing here decides what they let in.
//!
//! A place to be sent to begins with exactly one slash and has no control byte, whatever the target was: it never leads to another
//! host, and never into another header.
use super::{absolute, before_query, digit, has_raw_byte, merged, resolved, Path};

/// Istio's four profiles, each with the steps of the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    None,
    /// What is escaped for no reason is decoded, `\` is `/`, and dot segments are resolved.
    Base,
    MergeSlashes,
    /// Escaped slashes and backslashes are decoded before all that.
    DecodeAndMergeSlashes,
}

/// What becomes of a path with an escaped slash or backslash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EscapedSlashes {
    Keep,
    Reject,
    Redirect,
    Forward,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Normalized {
    /// The path, with its query.
    Path(String),
    /// 307, to this place.
    Redirect(String),
    /// 400; for gRPC INTERNAL (13).
    Refused,
}

impl Profile {
    /// As Istio writes it.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "NONE" => Self::None,
            // What a mesh gets that says nothing.
            "BASE" | "DEFAULT" => Self::Base,
            "MERGE_SLASHES" => Self::MergeSlashes,
            "DECODE_AND_MERGE_SLASHES" => Self::DecodeAndMergeSlashes,
            _ => return None,
        })
    }

    /// None: it has no form that a server reads in one way.
    pub fn apply(self, target: &str) -> Option<String> {
        let target = target.split('#').next().unwrap_or(target);
        let (path, query) = target.split_at_checked(before_query(target).len())?;
        if path.contains("%00") {
            return None;
        }
        Some(self.normalize(path) + query)
    }

    fn normalize(self, path: &str) -> String {
        if self == Self::None {
            return path.to_owned();
        }
        let path = if self == Self::DecodeAndMergeSlashes { unescaped(path) } else { path.to_owned() };
        let path = decoded_unreserved(&path).replace('\\', "/");
        let path = resolved(&if path.starts_with('/') { path } else { format!("/{path}") });
        if self >= Self::MergeSlashes {
            merged(&path)
        } else {
            path
        }
    }
}

impl EscapedSlashes {
    /// As Envoy writes it.
    pub fn parse(word: &str) -> Option<Self> {
        Some(match word {
            "KEEP_UNCHANGED" | "IMPLEMENTATION_SPECIFIC_DEFAULT" => Self::Keep,
            "REJECT_REQUEST" => Self::Reject,
            "UNESCAPE_AND_REDIRECT" => Self::Redirect,
            "UNESCAPE_AND_FORWARD" => Self::Forward,
            _ => return None,
        })
    }
}

/// A target as a mesh with these two settings reads it; an error names a word that is none of theirs.
pub fn normalized(target: &str, profile: &str, escaped_slashes: &str, is_grpc: bool) -> Result<Normalized, String> {
    let profile = Profile::parse(profile).ok_or_else(|| {
        format!("{profile:?} is no profile; write NONE, BASE, MERGE_SLASHES or DECODE_AND_MERGE_SLASHES")
    })?;
    let action = EscapedSlashes::parse(escaped_slashes).ok_or_else(|| {
        format!(
            "{escaped_slashes:?} is no way with escaped slashes; write KEEP_UNCHANGED, REJECT_REQUEST, UNESCAPE_AND_REDIRECT or \
             UNESCAPE_AND_FORWARD"
        )
    })?;
    Ok(normalize(target, profile, action, is_grpc))
}

/// The order is Envoy's: escaped slashes first, then the profile; a redirect leads to what came out in the end.
pub fn normalize(target: &str, profile: Profile, action: EscapedSlashes, is_grpc: bool) -> Normalized {
    let path = before_query(target);
    let has_escaped = action != EscapedSlashes::Keep && has_escaped_slash(path);
    // A gRPC client follows no redirect.
    if has_escaped && (action == EscapedSlashes::Reject || (is_grpc && action == EscapedSlashes::Redirect)) {
        return Normalized::Refused;
    }
    let open = has_escaped.then(|| unescaped(path) + target.get(path.len()..).unwrap_or(""));
    match profile.apply(open.as_deref().unwrap_or(target)) {
        None => Normalized::Refused,
        Some(path) if has_escaped && action == EscapedSlashes::Redirect => {
            if is_place(&path) {
                Normalized::Redirect(path)
            } else {
                Normalized::Refused
            }
        }
        Some(path) => Normalized::Path(path),
    }
}

/// Where `paths: redirect` sends the caller of this target, whose canonical form is `path`: there, with its own query. None: the
/// target is canonical as it stands.
pub fn redirect(target: &[u8], path: &Path) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    // An absolute target has the path that stands in it, or the root.
    let target = absolute(target).map_or(target, |(_, _, path)| path);
    let whole = before_query(target);
    if path.text() == "*" || whole == path.raw() || (whole.is_empty() && path.raw() == "/") {
        return None;
    }
    let query = target.get(whole.len()..).and_then(|rest| rest.split('#').next()).unwrap_or("");
    Some(format!("{}{query}", path.raw())).filter(|place| is_place(place))
}

/// A path of this very host, safe in a header.
fn is_place(text: &str) -> bool {
    let is_local = text.starts_with('/') && !text.starts_with("//") && !text.starts_with("/\\");
    is_local && !has_raw_byte(text.as_bytes())
}

fn has_escaped_slash(path: &str) -> bool {
    path.as_bytes().windows(3).any(|bytes| escaped_slash(bytes).is_some())
}

fn escaped_slash(bytes: &[u8]) -> Option<char> {
    match bytes {
        [b'%', b'2', b'f' | b'F', ..] => Some('/'),
        [b'%', b'5', b'c' | b'C', ..] => Some('\\'),
        _ => None,
    }
}

fn unescaped(path: &str) -> String {
    replaced(path, escaped_slash)
}

/// Letters, digits, `-._~`: nobody has to escape them, so that escaped and plain they mean the same.
fn decoded_unreserved(path: &str) -> String {
    replaced(path, |bytes| match bytes {
        [b'%', high, low, ..] => {
            let byte = digit(*high)? * 16 + digit(*low)?;
            (byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)).then(|| char::from(byte))
        }
        _ => None,
    })
}

/// Each escape that stands for a character here, by that character; once, from left to right.
fn replaced(path: &str, meaning: impl Fn(&[u8]) -> Option<char>) -> String {
    let mut made = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(first) = rest.chars().next() {
        let (shown, length) = match meaning(rest.as_bytes()) {
            Some(found) => (found, 3),
            None => (first, first.len_utf8()),
        };
        made.push(shown);
        rest = rest.get(length..).unwrap_or("");
    }
    made
}

#[cfg(test)]
mod tests;
