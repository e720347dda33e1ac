//! One policy from what the operator wrote for a profile and what a job brings.

use crate::draft::{Draft, implied_default};
use crate::policy::{Effect, Mode, Policy, PolicyError, Rule, RuleAction};

/// Why two drafts do not go together.
#[derive(Debug, thiserror::Error)]
pub enum MergeError {
    /// The job would lift what the operator denies.
    #[error(
        "the job's policy has `mode: audit`, which would lift what the profile's policy denies; leave it out, or have \
         the runner's operator set it for the profile"
    )]
    Audit,
    /// Together they are too large.
    #[error("together with the profile's policy: {0}")]
    Policy(#[from] PolicyError),
}

/// Merges a profile's policy of `runner.yaml` with a job's.
///
/// What the operator denies (rules that deny and denied requests) comes first and holds whatever the job says, and with
/// it what the operator excepts from that: rules before it about the same hosts. All else of the operator's is a
/// default: the job's rules come before it, and the job's `default` and `mode` count if it states them. An operator
/// who wants to bound jobs therefore writes denials.
pub fn merge(operator: &Draft, job: &Draft) -> Result<Policy, MergeError> {
    merge_under(&[operator], job)
}

/// Merges a job's policy with those of several operators, the one who comes first above the others: what each denies
/// holds, whatever those after it and the job say; of their defaults the last one's come first.
pub fn merge_under(operators: &[&Draft], job: &Draft) -> Result<Policy, MergeError> {
    let (mut binding, mut defaults) = (Vec::new(), Vec::new());
    for operator in operators {
        let (binds, default) = split(&operator.rules);
        binding.extend(binds);
        defaults.splice(0..0, default);
    }
    let denies = !binding.is_empty();
    let stated = |of: fn(&Draft) -> Option<Mode>| operators.iter().rev().find_map(|one| of(one));
    let operator_mode = stated(|one| one.mode).unwrap_or_default();
    if denies && job.mode == Some(Mode::Audit) && operator_mode == Mode::Enforce {
        return Err(MergeError::Audit);
    }
    let rules: Vec<Rule> = binding
        .into_iter()
        .chain(job.rules.iter().cloned())
        .chain(defaults)
        .collect();
    let default = job
        .default
        .or_else(|| operators.iter().rev().find_map(|one| one.default))
        .unwrap_or_else(|| implied_default(&rules));
    Ok(Policy::new(
        default,
        job.mode.unwrap_or(operator_mode),
        rules,
    )?)
}

/// Parts the operator's rules into those that bind a job and those that it may override; each keeps its order.
fn split(rules: &[Rule]) -> (Vec<Rule>, Vec<Rule>) {
    let (mut binding, mut defaults): (Vec<Rule>, Vec<Rule>) = (Vec::new(), Vec::new());
    // From the last to the first: whatever comes before a binding rule about the same hosts has to stay before it.
    for rule in rules.iter().rev() {
        let precedes = binding.iter().any(|later| later.host.overlaps(&rule.host));
        if precedes || rule.action == RuleAction::Deny {
            binding.push(rule.clone());
        } else {
            if is_denial(rule) {
                binding.push(denied_requests(rule));
            }
            defaults.push(rule.clone());
        }
    }
    binding.reverse();
    defaults.reverse();
    (binding, defaults)
}

/// Whether the rule denies something in so many words. That one with a list of allowed requests allows nothing else is
/// no denial in this sense: a job may extend the list.
fn is_denial(rule: &Rule) -> bool {
    rule.action == RuleAction::Deny || rule.lists(Effect::Deny)
}

/// The rule without what it allows.
fn denied_requests(rule: &Rule) -> Rule {
    let mut denials = rule.clone();
    denials
        .requests
        .retain(|request| request.action == Effect::Deny);
    denials.headers.clear();
    denials.query.clear();
    denials
}
