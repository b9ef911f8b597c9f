//! Is there a place for this call, and how much does it matter?
//!
//! The inbound half of the plan that `admit::queue` works by: how many at once (fixed, or learnt from latency if that is less), how
//! many may wait for that, who is of which priority, and which share of the places each priority may take. A priority is a claim to
//! go before others, so it is the plan that gives it, to callers that are known by their certificates; only callers that the plan names
//! may tell it themselves (`told`), as a gateway does that hands on what users do. Nobody is named: everything is critical, and the shares don't count.
//!
//! Probes are paths that need no place: a service that is full is alive, and an orchestrator that heard otherwise would kill it for
//! being busy. They are judged by the rules all the same.
use std::time::Duration;

use serde::Deserialize;

use crate::admit::adaptive::Adaptive;
use crate::admit::priority::Priority;
use crate::admit::queue::Terms;
use crate::model::AdaptivePlan;
use crate::secure::authorize::{Action, PathPlan, PeerPlan, Question, RulePlan, Rules};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AdmissionPlan {
    in_flight: u32,
    #[serde(deserialize_with = "Option::deserialize")]
    adaptive: Option<AdaptivePlan>,
    /// How many may wait, as a share of the limit.
    queue: f64,
    /// Seconds.
    target: f64,
    interval: f64,
    /// Of the limit, for each priority, the least first.
    shares: [f64; 4],
    priorities: Vec<PriorityPlan>,
    probes: Vec<PathPlan>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PriorityPlan {
    from: Vec<PeerPlan>,
    paths: Vec<PathPlan>,
    #[serde(rename = "as")]
    level: Level,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Level {
    /// What the caller says.
    Told,
    CriticalPlus,
    Critical,
    SheddablePlus,
    Sheddable,
}

/// A compiled one.
#[derive(Debug)]
pub(super) struct Admission {
    in_flight: u32,
    pub adaptive: Option<AdaptivePlan>,
    queue: f64,
    target: Duration,
    interval: Duration,
    shares: [f64; 4],
    /// Of a limit that is not learnt.
    rooms: [u32; 4],
    /// A permission for each entry: the first that holds says which one it is.
    who: Rules,
    levels: Vec<Level>,
    probes: Probes,
}

#[derive(Debug)]
struct Probes {
    exact: Vec<String>,
    /// A bit for each length of a path among them: nearly every path is told to be none of them by this alone.
    lengths: u64,
    /// All of them, if some are patterns.
    patterns: Option<Rules>,
}

impl Admission {
    pub fn compile(plan: AdmissionPlan) -> Result<Self, Vec<String>> {
        let mut mistakes = plan.mistakes();
        let levels: Vec<Level> = plan.priorities.iter().map(|entry| entry.level).collect();
        let rules = plan.priorities.into_iter().enumerate().map(|(place, entry)| RulePlan {
            from: entry.from,
            ..permission(format!("inbound.priority[{place}]"), entry.paths)
        });
        let who = Rules::compile(&rules.collect::<Vec<_>>()).map_err(|found| mistakes.extend(found)).ok();
        let probes = Probes::compile(plan.probes).map_err(|found| mistakes.extend(found)).ok();
        let (Some(who), Some(probes), true) = (who, probes, mistakes.is_empty()) else { return Err(mistakes) };
        let seconds = |seconds: f64| Duration::try_from_secs_f64(seconds).unwrap_or_default();
        let shares = if levels.is_empty() { [1.0; 4] } else { plan.shares };
        Ok(Self {
            in_flight: plan.in_flight,
            // It would have to be unlearnt before it counts.
            adaptive: plan.adaptive.map(|bounds| AdaptivePlan { most: bounds.most.min(plan.in_flight), ..bounds }),
            queue: plan.queue,
            target: seconds(plan.target),
            interval: seconds(plan.interval),
            shares,
            rooms: shares.map(|share| part(share, plan.in_flight)),
            who,
            levels,
            probes,
        })
    }

    /// How many at once: the plan's number, or what was learnt if that is less.
    pub fn limit(&self, learnt: &Adaptive) -> u32 {
        match &self.adaptive {
            Some(plan) => learnt.limit(plan).min(self.in_flight),
            None => self.in_flight,
        }
    }

    /// How many places may be taken for a call of this priority to get one.
    pub fn room(&self, priority: Priority, learnt: &Adaptive) -> u32 {
        match &self.adaptive {
            Some(_) => part(priority.of(&self.shares), self.limit(learnt)),
            None => priority.of(&self.rooms),
        }
    }

    pub fn terms(&self, learnt: &Adaptive) -> Terms {
        let limit = self.limit(learnt);
        Terms {
            rooms: self.shares.map(|share| part(share, limit)),
            longest: part(self.queue, limit),
            target: self.target,
            interval: self.interval,
        }
    }

    /// Is there anything to ask about a call to this path?
    pub fn concerns(&self, path: &str) -> bool {
        !self.levels.is_empty() || self.probes.may_contain(path)
    }

    /// The first entry that matches says it; nobody's is the usual one.
    pub fn priority(&self, question: &Question<'_>, told: Option<Priority>) -> Priority {
        if self.levels.is_empty() {
            return Priority::default();
        }
        match self.who.judge(question).rule.and_then(|place| self.levels.get(place)) {
            Some(Level::Told) => told.unwrap_or_default(),
            Some(Level::CriticalPlus) => Priority::CriticalPlus,
            Some(Level::SheddablePlus) => Priority::SheddablePlus,
            Some(Level::Sheddable) => Priority::Sheddable,
            Some(Level::Critical) | None => Priority::Critical,
        }
    }

    pub fn is_probe(&self, question: &Question<'_>) -> bool {
        self.probes.contain(question)
    }
}

impl AdmissionPlan {
    fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let mut demand = |is_sound: bool, text: &str| {
            if !is_sound {
                mistakes.push(format!("inbound.{text}"));
            }
        };
        let is_share = |share: &f64| (0.0..=1.0).contains(share);
        demand(self.shares.iter().all(is_share), "shares: each is between 0 and 1, a part of the limit");
        demand(
            self.shares.is_sorted(),
            "shares: a priority has no less than the one below it, or what matters less would go first",
        );
        demand((0.0..=1000.0).contains(&self.queue), "queue: a share of the limit, from 0 (nobody waits) to 1000");
        demand(
            0.0 < self.target && self.target <= self.interval && self.interval <= 3600.0,
            "codel: `target` is more than 0 and no more than `interval`, and that is no more than an hour",
        );
        for (place, entry) in self.priorities.iter().enumerate() {
            let is_anybody = entry.from.is_empty() || entry.from.contains(&PeerPlan::Any);
            if entry.level == Level::Told && is_anybody {
                mistakes.push(format!(
                    "inbound.priority[{place}]: `as: told` from anybody lets every caller go before all others; name the callers that are trusted to tell it"
                ));
            }
        }
        mistakes
    }
}

impl Probes {
    fn compile(plans: Vec<PathPlan>) -> Result<Self, Vec<String>> {
        let exact: Vec<String> = plans
            .iter()
            .filter_map(|plan| match plan {
                PathPlan::Exact { value } => Some(value.clone()),
                _ => None,
            })
            .collect();
        let is_plain = exact.len() == plans.len();
        // A permission without a path would be one for every path.
        let rules: Vec<RulePlan> =
            if plans.is_empty() { Vec::new() } else { vec![permission("inbound.probes".to_owned(), plans)] };
        let rules = Rules::compile(&rules)?;
        let lengths = exact.iter().fold(0, |bits, path| bits | bit(path.len()));
        Ok(Self { exact, lengths, patterns: (!is_plain).then_some(rules) })
    }

    fn may_contain(&self, path: &str) -> bool {
        self.lengths & bit(path.len()) != 0 || self.patterns.is_some()
    }

    fn contain(&self, question: &Question<'_>) -> bool {
        self.exact.iter().any(|known| known == question.path.text())
            || self.patterns.as_ref().is_some_and(|rules| rules.judge(question).is_allowed)
    }
}

fn permission(name: String, paths: Vec<PathPlan>) -> RulePlan {
    RulePlan { name, action: Action::Allow, paths, ..RulePlan::default() }
}

fn bit(length: usize) -> u64 {
    1 << length.min(63)
}

/// A share of so many, rounded up: nothing is none only if it is meant to be.
fn part(share: f64, whole: u32) -> u32 {
    // Less than a call is what the multiplication adds.
    (share * f64::from(whole) - 1e-6).ceil() as u32
}
