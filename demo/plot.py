"""The loss of a training as a picture, SVG and PNG."""

from __future__ import annotations

from pathlib import Path

from loraloop.training_record import TrainingRecord


def plot_losses(record: TrainingRecord, path: Path) -> None:
    """Every step's loss, a running mean over it, and the held-out loss before and after; `path` and the same with .png."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = [step for step, _ in record.loss_history]
    losses = [loss for _, loss in record.loss_history]
    width = max(1, len(losses) // 15)
    means = [sum(losses[max(0, i - width + 1) : i + 1]) / len(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(7, 4))
    axes.plot(steps, losses, color="#b9c6dd", linewidth=1, label="loss of a step")
    axes.plot(steps, means, color="#27518f", linewidth=2, label=f"mean of {width} steps")
    if record.held_out_loss_before is not None and record.held_out_loss_after is not None:
        held_out = [record.held_out_loss_before, record.held_out_loss_after]
        axes.plot([0, steps[-1]], held_out, "o--", color="#c2571a", label="held-out tasks, before and after")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per agent token (nats)")
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    plt.close(figure)
