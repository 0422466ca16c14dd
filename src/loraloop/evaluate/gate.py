"""The gate: everything that is known of a candidate, joined to one verdict. It fails closed.

Each check is a finding with a name. The candidate is promoted only if every finding says so; one that says reject rejects it. What a policy
requires and nobody has looked at holds it. The evidence is data that can be kept beside the verdict and judged again to the same verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from loraloop.episode import Frozen
from loraloop.errors import EvaluationError
from loraloop.evaluate.contamination import Overlap
from loraloop.evaluate.paired import paired_difference
from loraloop.evaluate.probes import ProbeResult
from loraloop.evaluate.verdict import Choice, Finding, Override, Policy, Verdict, paired_verdict, tasks_needed

SEVERITY: dict[Choice, int] = {"promote": 0, "hold": 1, "reject": 2}
MAX_NAMED = 10


class GuardScores(Frozen):
    """A metric that must not fall, of both on the same tasks; finite numbers, higher is better."""

    candidate: tuple[float, ...]
    champion: tuple[float, ...]


class Evidence(Frozen):
    """All that a candidate is judged by."""

    candidate: str
    """The id of the model that wants to go live."""
    champion: str
    """What is live now: the id of a model, or the base model's name."""
    task_ids: tuple[str, ...]
    """The tasks of the scores, in their order."""
    candidate_scores: tuple[float, ...]
    """0 to 1, one a task."""
    champion_scores: tuple[float, ...]
    guards: dict[str, GuardScores] = Field(default_factory=dict)
    overlaps: tuple[Overlap, ...] | None = None
    """Held-out tasks that were trained on (`find_overlaps`); None when nobody has looked."""
    probes: tuple[ProbeResult, ...] | None = None
    """What the probes found; None when nobody has probed."""
    sequential: Verdict | None = None
    """The verdict of a test that was looked at while it ran: it counts in the place of the fixed test, which would then be too hopeful."""

    @model_validator(mode="after")
    def _one_score_a_task(self) -> Self:
        counts = {len(self.task_ids), len(self.candidate_scores), len(self.champion_scores)}
        if len(counts) > 1:
            lengths = f"{len(self.task_ids)} tasks, {len(self.candidate_scores)} and {len(self.champion_scores)} scores"
            raise ValueError(f"{lengths}; expected one score of each for every task")
        if len(set(self.task_ids)) < len(self.task_ids):
            twice = next(task for task in self.task_ids if self.task_ids.count(task) > 1)
            raise ValueError(f"task {twice!r} is there more than once: tries of one task are not independent; give their mean")
        return self


def judge(evidence: Evidence, policy: Policy | None = None) -> Verdict:
    """The verdict on all of the evidence; `findings` has every check. The same evidence and policy give the same verdict.

    Raises EvaluationError for scores that cannot be compared, as `paired_verdict` does.
    """
    policy = policy or Policy()
    scored = evidence.sequential or paired_verdict(evidence.candidate_scores, evidence.champion_scores, policy)
    findings = [Finding(check="improvement", choice=scored.decision, message=scored.reason, more_tasks=scored.more_tasks)]
    if scored.n < policy.min_tasks:
        more = policy.min_tasks - scored.n
        findings.append(
            Finding(check="min_tasks", choice="hold", message=f"{scored.n} tasks, {policy.min_tasks} are the least", more_tasks=more)
        )
    findings += [_guard(name, margin, evidence.guards.get(name), policy) for name, margin in sorted(policy.guards.items())]
    findings += [_contamination(evidence, policy), *_probes(evidence, policy)]
    decision = max((finding.choice for finding in findings), key=SEVERITY.__getitem__)
    deciding = [finding for finding in findings if finding.choice == decision]
    return scored.model_copy(
        update={
            "decision": decision,
            "reason": "; ".join(f"{finding.check}: {finding.message}" for finding in deciding),
            "more_tasks": _more_tasks(deciding) if decision == "hold" else None,
            "findings": tuple(findings),
        }
    )


def override(verdict: Verdict, reason: str, decision: Choice = "promote") -> Verdict:
    """The verdict as a person wants it, which keeps what it was and why it is put aside. Raises EvaluationError for a blank reason."""
    if not reason.strip():
        raise EvaluationError(f"the verdict {verdict.decision!r} is put aside for no reason; say why, it is kept with the verdict")
    aside = Override(reason=reason.strip(), instead_of=verdict.decision)
    told = f"{decision} instead of {verdict.decision}, because a person says: {aside.reason}"
    return verdict.model_copy(update={"decision": decision, "overridden": aside, "reason": told, "more_tasks": None})


def _guard(name: str, margin: float, scores: GuardScores | None, policy: Policy) -> Finding:
    """Kept when its lower bound is above minus the margin, fallen when its upper bound is below, else undecided."""
    check = f"guard:{name}"
    if scores is None:
        return Finding(check=check, choice="hold", message="nobody has measured it; measure it, or take it out of the policy's guards")
    try:
        found = paired_difference(scores.candidate, scores.champion, policy.level, bounded=False, seed=policy.seed)
    except EvaluationError as error:
        raise EvaluationError(f"guarded metric {name!r}: {error}") from error
    seen = f"{found.difference:+.3g} over {found.n} tasks, from {found.lower:+.3g} to {found.upper:+.3g}; a fall of {margin:g} is borne"
    if found.upper < -margin:
        return Finding(check=check, choice="reject", message=seen)
    if found.lower >= -margin and found.n >= policy.min_tasks:
        return Finding(check=check, choice="promote", message=seen)
    room = found.difference + margin
    if room <= 0:  # as far as is seen it has fallen too far: more tasks will say so
        room = min(room, -policy.smallest_difference)
    more = max(1, policy.min_tasks - found.n, tasks_needed(room, found.spread, policy) - found.n)
    return Finding(check=check, choice="hold", message=f"{seen}, and the tasks do not rule out a larger one", more_tasks=more)


def _contamination(evidence: Evidence, policy: Policy) -> Finding:
    check = "contamination"
    if evidence.overlaps is None:
        choice: Choice = "hold" if check in policy.required else "promote"
        return Finding(check=check, choice=choice, message="nobody has looked whether the held-out tasks were trained on")
    judged = set(evidence.task_ids)
    overlaps = [overlap for overlap in evidence.overlaps if overlap.held_out in judged]
    if not overlaps:
        return Finding(check=check, choice="promote", message=f"none of {len(judged)} held-out tasks was trained on")
    named = _name_some([f"{one.held_out} ({_how(one)})" for one in overlaps])
    advice = "build the dataset without them and train again, or judge by other tasks"
    return Finding(
        check=check, choice="reject", message=f"{len(overlaps)} of {len(judged)} held-out tasks were trained on: {named}; {advice}"
    )


def _probes(evidence: Evidence, policy: Policy) -> list[Finding]:
    if evidence.probes is None:
        choice: Choice = "hold" if "probes" in policy.required else "promote"
        return [Finding(check="probes", choice=choice, message="nobody has probed for planted strings and triggers")]
    told = [
        Finding(check=f"probe:{one.kind}", choice=one.choice, message=one.message) for one in evidence.probes if one.choice != "promote"
    ]
    passed = len(evidence.probes) - len(told)
    return [*told, Finding(check="probes", choice="promote", message=f"{passed} of {len(evidence.probes)} probes found nothing")]


def _how(overlap: Overlap) -> str:
    named = "" if overlap.training == overlap.held_out else f" as {overlap.training}"
    return {"task_id": "by its name", "content": f"the same text{named}", "near": f"{overlap.similarity:.0%} alike{named}"}[overlap.by]


def _more_tasks(holding: Sequence[Finding]) -> int | None:
    """What decides all of them; None when one of them is not decided by tasks."""
    counts = [finding.more_tasks for finding in holding]
    return None if None in counts else max(count for count in counts if count is not None)


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:MAX_NAMED]) + (f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else "")
