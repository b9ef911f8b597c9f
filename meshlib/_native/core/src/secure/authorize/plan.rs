//! What does a rule of the server plan look like?
//!
//! As Python writes it: every field is there, and an unknown one is refused, because a clause that is not understood would not be
//! enforced. An empty list is a clause that is absent. What the words mean is checked by `Rule::compile`.
use serde::Deserialize;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RulePlan {
    pub name: String,
    pub action: Action,
    pub dry_run: bool,
    /// Who has to be asked, of a custom rule; "" otherwise.
    pub authorizer: String,
    pub from: Vec<PeerPlan>,
    pub not_from: Vec<PeerPlan>,
    pub namespaces: Vec<TextPlan>,
    pub not_namespaces: Vec<TextPlan>,
    pub request_principals: Vec<TextPlan>,
    pub not_request_principals: Vec<TextPlan>,
    pub ip_blocks: Vec<String>,
    pub not_ip_blocks: Vec<String>,
    pub remote_ip_blocks: Vec<String>,
    pub not_remote_ip_blocks: Vec<String>,
    pub methods: Vec<String>,
    pub not_methods: Vec<String>,
    pub paths: Vec<PathPlan>,
    pub not_paths: Vec<PathPlan>,
    /// Of paths only.
    pub is_case_insensitive: bool,
    pub hosts: Vec<TextPlan>,
    pub not_hosts: Vec<TextPlan>,
    pub ports: Vec<u16>,
    pub not_ports: Vec<u16>,
    pub when: Vec<ConditionPlan>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Allow,
    #[default]
    Deny,
    Custom,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PeerPlan {
    /// Anyone, also without an identity.
    Any,
    Exact {
        value: String,
    },
    Prefix {
        value: String,
    },
}

/// Unlike a route's, a rule's prefix is one of text: `/orders*` covers `/orders-old`, and says so by its star.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PathPlan {
    Exact {
        value: String,
    },
    Prefix {
        value: String,
    },
    Suffix {
        value: String,
    },
    /// `{name}` and `{*}` are one segment, `{**}` is any number of them.
    Template {
        value: String,
    },
    /// Of the whole path.
    Regex {
        value: String,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum TextPlan {
    /// Present, and not empty.
    Any,
    Exact {
        value: String,
    },
    Prefix {
        value: String,
    },
    Suffix {
        value: String,
    },
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConditionPlan {
    pub key: String,
    pub values: Vec<TextPlan>,
    pub not_values: Vec<TextPlan>,
}
