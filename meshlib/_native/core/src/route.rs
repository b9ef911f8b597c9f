//! Which backend is this call for, and under which policy?
//!
//! Routes are tried in the order in which the user wrote them; the first whose path, method and headers all match wins, as in
//! Envoy and Gateway API with explicit order. The weight then draws one backend. It knows nothing of endpoints.
use crate::model::{HeaderKind, PathKind, PathPlan, RoutePlan};
use crate::random::Random;

/// A path pattern, compiled once.
#[derive(Debug, Clone)]
pub struct PathPattern {
    kind: PathKind,
    value: String,
    segments: Vec<Segment>,
}

#[derive(Debug, Clone, PartialEq)]
enum Segment {
    Literal(String),
    /// A variable, by its name.
    Any(String),
}

impl PathPattern {
    pub fn compile(plan: &PathPlan) -> Self {
        let segments = match plan.kind {
            PathKind::Template => plan
                .value
                .split('/')
                .map(|s| match s.strip_prefix('{').and_then(|s| s.strip_suffix('}')) {
                    Some(name) => Segment::Any(name.to_owned()),
                    None => Segment::Literal(s.to_owned()),
                })
                .collect(),
            _ => Vec::new(),
        };
        Self { kind: plan.kind, value: plan.value.clone(), segments }
    }

    pub fn matches(&self, path: &str) -> bool {
        match self.kind {
            PathKind::Exact => path == self.value,
            PathKind::Prefix => is_segment_prefix(&self.value, path),
            PathKind::Template => {
                let mut found = path.split('/');
                self.segments.iter().all(|wanted| match (wanted, found.next()) {
                    (Segment::Literal(literal), Some(segment)) => literal == segment,
                    (Segment::Any(_), Some(segment)) => !segment.is_empty(),
                    (_, None) => false,
                }) && found.next().is_none()
            }
        }
    }

    /// What a variable of the template stands for in this path.
    pub fn variable<'a>(&self, name: &str, path: &'a str) -> Option<&'a str> {
        let place = self.segments.iter().position(|segment| matches!(segment, Segment::Any(known) if known == name))?;
        path.split('/').nth(place)
    }

    pub fn text(&self) -> &str {
        &self.value
    }
}

/// `/a` is a prefix of `/a` and `/a/b`, not of `/ab`.
fn is_segment_prefix(prefix: &str, path: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The headers of a request as a phase may look at them; names compare without case.
pub trait Headers {
    fn any(&self, name: &str, check: &mut dyn FnMut(&[u8]) -> bool) -> bool;
}

impl Headers for Vec<(Vec<u8>, Vec<u8>)> {
    fn any(&self, name: &str, check: &mut dyn FnMut(&[u8]) -> bool) -> bool {
        self.iter().any(|(n, v)| n.eq_ignore_ascii_case(name.as_bytes()) && check(v))
    }
}

/// One route of a Service: match, backends, and its policy.
#[derive(Debug)]
pub struct Route {
    pub path: PathPattern,
    total: u32,
    pub plan: RoutePlan,
}

impl Route {
    pub fn compile(plan: RoutePlan) -> Self {
        let weights = plan.backends.iter().map(|backend| backend.weight);
        let total = weights.fold(0, u32::saturating_add);
        Self { path: PathPattern::compile(&plan.matches.path), total, plan }
    }

    pub fn name(&self) -> &str {
        &self.plan.name
    }

    pub fn matches(&self, method: &str, path: &str, headers: &dyn Headers) -> bool {
        let wanted = &self.plan.matches;
        self.path.matches(path)
            && (wanted.methods.is_empty() || wanted.methods.iter().any(|m| m == method))
            && wanted.headers.iter().all(|wanted| {
                headers.any(&wanted.name, &mut |value| match wanted.kind {
                    HeaderKind::Present => true,
                    HeaderKind::Exact => value == wanted.value.as_bytes(),
                    HeaderKind::Prefix => value.starts_with(wanted.value.as_bytes()),
                })
            })
    }

    /// Draw a backend by weight. With one backend no chance is spent, so that adding a second changes nothing else.
    pub fn backend(&self, random: &Random) -> usize {
        if self.plan.backends.len() < 2 || self.total == 0 {
            return 0;
        }
        let mut left = random.below(self.total as usize) as u32;
        for (index, backend) in self.plan.backends.iter().enumerate() {
            if left < backend.weight {
                return index;
            }
            left -= backend.weight;
        }
        0
    }
}

/// The host of an authority: lower case, without port and trailing dot.
pub fn host_of(authority: &str) -> String {
    let host = match authority.rfind(']') {
        Some(end) => authority.get(..=end).unwrap_or(authority),
        None => authority.split(':').next().unwrap_or(authority),
    };
    host.trim_end_matches('.').to_ascii_lowercase()
}

/// A target that every URL parser leaves as it is: no escapes, no dot segments, nothing that would have to be quoted.
pub fn is_plain_target(target: &str) -> bool {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_~./?=&,:@+;".contains(byte);
    target.starts_with('/') && target.as_bytes().iter().all(plain) && !target.contains("/.") && !target.contains("//")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing)]
    use super::*;
    use crate::model::{BackendPlan, HeaderPlan, MatchPlan};

    fn pattern(kind: PathKind, value: &str) -> PathPattern {
        PathPattern::compile(&PathPlan { kind, value: value.into() })
    }

    #[test]
    fn prefix_matches_whole_segments_only() {
        let p = pattern(PathKind::Prefix, "/a");
        assert!(p.matches("/a") && p.matches("/a/b") && !p.matches("/ab"));
        assert!(pattern(PathKind::Prefix, "/").matches("/anything"));
    }

    #[test]
    fn template_matches_one_segment_a_name() {
        let p = pattern(PathKind::Template, "/items/{id}");
        assert!(p.matches("/items/7"));
        assert!(!p.matches("/items/") && !p.matches("/items/7/parts") && !p.matches("/items"));
    }

    #[test]
    fn a_variable_of_a_template_is_found_by_its_name() {
        let p = pattern(PathKind::Template, "/users/{user}/items/{id}");
        assert_eq!(
            (p.variable("user", "/users/7/items/9"), p.variable("id", "/users/7/items/9")),
            (Some("7"), Some("9"))
        );
        assert_eq!(p.variable("other", "/users/7/items/9"), None);
    }

    #[test]
    fn authority_loses_port_dot_and_case() {
        assert_eq!(host_of("Orders.:8080"), "orders");
        assert_eq!(host_of("[::1]:80"), "[::1]");
    }

    fn route(weights: &[u32]) -> Route {
        let backends = weights
            .iter()
            .map(|w| BackendPlan { name: String::new(), labels: Default::default(), weight: *w })
            .collect();
        Route::compile(RoutePlan {
            name: "r".into(),
            matches: MatchPlan {
                path: PathPlan { kind: PathKind::Prefix, value: "/".into() },
                methods: vec!["GET".into()],
                headers: vec![HeaderPlan { name: "x-beta".into(), kind: HeaderKind::Exact, value: "1".into() }],
            },
            backends,
            retry: crate::model::RetryPlan {
                attempts: 1,
                backoff_base: 0.025,
                backoff_max: 0.25,
                statuses: vec![503],
                idempotency_key: false,
                idempotent: false,
                on: Vec::new(),
                per_try: 0.0,
                hedge: None,
            }
            .into(),
            deadline: 15.0,
            stream_idle: 60.0,
        })
    }

    #[test]
    fn method_and_header_both_count() {
        let r = route(&[1]);
        let beta = vec![(b"X-Beta".to_vec(), b"1".to_vec())];
        assert!(r.matches("GET", "/x", &beta));
        assert!(!r.matches("POST", "/x", &beta));
        assert!(!r.matches("GET", "/x", &Vec::new()));
    }

    #[test]
    fn only_targets_that_no_parser_changes_are_plain() {
        for target in ["/", "/items/7", "/a.b/c?x=1&y=2", "/a:b@c,d;e+f~g"] {
            assert!(is_plain_target(target), "{target}");
        }
        for target in ["", "items", "/a%20b", "/a b", "/a/../b", "/./a", "//a", "/ä", "/a#b", "/a'b", "/a\\b", "/a{b}"]
        {
            assert!(!is_plain_target(target), "{target}");
        }
    }

    #[test]
    fn weights_split_the_calls() {
        let (r, random) = (route(&[90, 10]), Random::new(3));
        let second = (0..10_000).filter(|_| r.backend(&random) == 1).count();
        assert!((850..1150).contains(&second), "{second}");
    }
}
