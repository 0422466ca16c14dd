"""Measuring a model: plays in an environment, exact intervals for what came out, and the verdict."""

from loraloop.evaluate.verdict import Policy, Verdict, paired_verdict

__all__ = ["Policy", "Verdict", "paired_verdict"]
