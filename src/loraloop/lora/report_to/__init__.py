"""Sends the figures of a training to trackio, MLflow or TensorBoard, each an extra: `pip install 'loraloop[tensorboard]'`."""

from loraloop.lora.report_to.messages import REPORTERS
from loraloop.lora.report_to.reporter import Reporter, open_reporter

__all__ = ["REPORTERS", "Reporter", "open_reporter"]
