"""Evaluating a model, put together from the stages: which two sides, measured on what, kept where (evaluator.py)."""

from loraloop.evaluation.evaluator import Evaluator
from loraloop.evaluation.options import EvaluationOptions
from loraloop.evaluation.probing import GivenTrigger, ProbeOptions
from loraloop.evaluation.sides import Sources

__all__ = ["EvaluationOptions", "Evaluator", "GivenTrigger", "ProbeOptions", "Sources"]
