"""A project with a tiny base model and adapters on it that say something else."""

from __future__ import annotations

from pathlib import Path

import tiny
from models_made import make_model

from loraloop.base_model import resolve_base
from loraloop.lora.model import TrainedModel
from loraloop.lora.registry import LoraModelRegistry
from loraloop.project import Project


def make_project(directory: Path, n_models: int = 1, architecture: str = "llama") -> tuple[Project, Path, list[TrainedModel]]:
    """(project, folder of the base model, its adapters with random weights)."""
    base = tiny.make_model(architecture, directory / "base")
    project = Project(directory / "project")
    return project, base, [add_adapter(project.registry, base, seed) for seed in range(n_models)]


def add_adapter(registry: LoraModelRegistry, base: Path, seed: int) -> TrainedModel:
    """A recorded model whose adapter changes what the base model says."""
    import peft
    import torch
    import transformers

    torch.manual_seed(100 + seed)
    config = peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=["q_proj", "v_proj", "up_proj"])
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), config)
    found = resolve_base(str(base))
    made = make_model(registry.directory, files={}, base_model=str(base), base_sha256=found.sha256)
    model.save_pretrained(made.adapter_path)
    return registry.save(made)
