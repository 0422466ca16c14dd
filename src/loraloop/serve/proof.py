"""Proof that a version's adapter is applied by the server that answers for it.

Probe prompts are scored by the server, with and without the adapter, and by transformers and PEFT, with and without it (`reference`). The
adapter counts as applied when all three hold, for the natural log-probabilities of the likeliest next tokens behind each prompt:

1. On the server, the version differs from the base model: by more than 3 times what the base model differs from itself, and by 1e-5.
2. The version differs from the reference, in the mean, by at most twice what the base model differs from it, or by 5e-3: a server that
   computes with fewer bits is as far off with the adapter as without.
3. What the adapter changes on the server is what it changes in the reference: the two changes correlate with at least 0.9 (about zero),
   and one is 0.8 to 1.25 times the other. A wrong scale changes the factor, wrongly ordered rows the correlation.

What cannot be measured, as no reference can be computed, is not proven.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from loraloop.episode import Frozen
from loraloop.errors import TAIL_LINES, ServingError
from loraloop.files import content_hash
from loraloop.serve.applier import Applier, Endpoint, Version

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

PROBE_TEXTS = (
    "You are a helpful assistant. What is the capital of France, and how many people live there?",
    '{"name": "search_orders", "arguments": {"customer": "C-1042", "status": "open"}}\n',
    "def mean(values: list[float]) -> float:\n    return",
    "The user asks to cancel the booking. First I have to check whether it can be",
    "Question: a train leaves at 9:40 and arrives at 12:05. How long does it take?\nAnswer: it takes",
    "To be, or not to be, that is the",
)
"""What is scored where a model's own samples give no prompts."""
MAX_PROMPT_TOKENS = 96
FORMAT = 1
"""Of the files that keep references; another number makes them anew."""
KEPT_REFERENCES = 40
KEPT_BASE_SCORES = 16
MAX_SECONDS = 1800.0
MIN_NOISE_FACTOR, MIN_EFFECT = 3.0, 1e-5
MAX_ERROR_FACTOR, MAX_ERROR = 2.0, 5e-3
MIN_CORRELATION, MIN_SLOPE, MAX_SLOPE = 0.9, 0.8, 1.25
MAX_NOISE_SHARE = 0.3
"""From such a share on of what the adapter changes, the distance of the base model alone explains a low correlation: 1/sqrt(1 + 2 * 0.3**2)
is 0.92."""
MIN_TOKENS = 20
"""So many tokens must be likely with and without the adapter for a comparison of what it changes."""


Prompts = tuple[tuple[int, ...], ...]
Scores = tuple[Mapping[int, float], ...]


class Proof(Frozen):
    """What was measured, and whether it shows that the adapter is applied."""

    proven: bool
    reason: str
    """In words with the figures."""
    figures: dict[str, float] = Field(default_factory=dict)


Prove = Callable[[Applier, Endpoint, Endpoint], Awaitable[Proof]]
"""Measures through (applier, the base model's endpoint, the version's endpoint). Raises ServingError when it cannot measure."""


class ReferencePlan(Frozen):
    """What the child process is to compute."""

    base: str
    """As `resolve_base` takes it."""
    base_sha256: str | None
    """What the adapter was trained on, when that is known: any other base model is refused."""
    adapter: Path
    texts: tuple[str, ...]
    max_tokens: int
    target: Path
    """Where the arrays go: `tokens` (prompts, tokens; -1 behind the end), `base` and `adapter` (prompts, vocabulary)."""


@dataclass(frozen=True)
class Reference:
    """Log-probabilities of every next token behind each prompt, by transformers and PEFT."""

    prompts: tuple[tuple[int, ...], ...]
    base: NDArray[np.float32]
    """(prompts, vocabulary)"""
    adapter: NDArray[np.float32]
    """(prompts, vocabulary)"""


class Prover:
    """Proves versions of one base model; keeps references in `folder`.

    `base` is what transformers is to load; without it, what the adapter's own configuration names.
    """

    def __init__(self, folder: Path, base: str | None = None, texts: Callable[[Version], Sequence[str]] = lambda version: ()) -> None:
        self._folder = folder
        self._base = base
        self._texts = texts
        self._base_scores: OrderedDict[tuple[str, str, Prompts], tuple[Scores, Scores]] = OrderedDict()

    async def prove(self, applier: Applier, base: Endpoint, green: Endpoint) -> Proof:
        """Whether `green` answers with its adapter. Raises ServingError when that cannot be measured."""
        reference = await self._find_reference(green.version)
        first, again = await self._score_base(applier, base, reference.prompts)
        version = (await applier.score(green, reference.prompts)).top
        return judge(reference, first, again, version)

    async def _score_base(self, applier: Applier, base: Endpoint, prompts: Prompts) -> tuple[Scores, Scores]:
        """The base model's scores, and its scores again; what one server of it said is not asked for twice."""
        key = (base.url, base.version.name, prompts)
        if key not in self._base_scores:
            self._base_scores[key] = ((await applier.score(base, prompts)).top, (await applier.score(base, prompts)).top)
            while len(self._base_scores) > KEPT_BASE_SCORES:
                self._base_scores.popitem(last=False)
        return self._base_scores[key]

    async def _find_reference(self, version: Version) -> Reference:
        if version.adapter_path is None:
            raise ServingError(f"{version.name} has no adapter to be shown")
        texts = (*self._texts(version), *PROBE_TEXTS)[: 2 * len(PROBE_TEXTS)]
        base = self._base or _base_of(version.adapter_path)
        key = content_hash([FORMAT, base, version.base_sha256, version.adapter_sha256, list(texts), MAX_PROMPT_TOKENS])
        target = self._folder / f"{key}.npz"
        found = await asyncio.to_thread(_load, target)
        if found is not None:
            return found
        plan = ReferencePlan(
            base=base,
            base_sha256=version.base_sha256,
            adapter=version.adapter_path,
            texts=texts,
            max_tokens=MAX_PROMPT_TOKENS,
            target=target,
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        await _compute(plan)
        for old in sorted(self._folder.glob("*.npz"), key=lambda path: path.stat().st_mtime)[:-KEPT_REFERENCES]:
            old.unlink(missing_ok=True)
        found = await asyncio.to_thread(_load, target)
        if found is None:
            raise ServingError(f"the reference {target} cannot be read though it was just written")
        return found


def judge(
    reference: Reference, first: Sequence[Mapping[int, float]], again: Sequence[Mapping[int, float]], version: Sequence[Mapping[int, float]]
) -> Proof:
    """Whether these scores (the base model's, the base model's again, the version's) show the adapter that `reference` computed."""
    noise = _mean_difference(first, again)
    effect = _mean_difference(first, version)
    base_error = _mean_error(reference.base, first)
    error = _mean_error(reference.adapter, version)
    ours, theirs = _changes(reference, first, version)
    figures = {"noise": noise, "effect": effect, "base_error": base_error, "error": error, "tokens": float(len(ours))}
    if len(ours) < MIN_TOKENS:
        return _fails(f"only {len(ours)} tokens are likely both with and without it, {MIN_TOKENS} are needed to compare", figures)
    size = float(np.sqrt(np.mean(theirs**2)))
    figures["reference_effect"] = float(np.mean(np.abs(theirs)))
    if size <= MIN_EFFECT:
        return _fails("it changes nothing, by transformers and PEFT neither; what has no effect cannot be shown to be applied", figures)
    slope = float(np.dot(ours, theirs) / np.dot(theirs, theirs))
    correlation = float(np.dot(ours, theirs) / max(np.linalg.norm(ours) * np.linalg.norm(theirs), 1e-30))
    figures |= {"slope": slope, "correlation": correlation}
    if effect <= max(MIN_NOISE_FACTOR * noise, MIN_EFFECT):
        return _fails(f"it answers as the base model does: they differ by {effect:.2g}, the base model from itself by {noise:.2g}", figures)
    told = f"what it changes on the server is {slope:.2f} times what it changes by transformers and PEFT, correlation {correlation:.3f}"
    if correlation < MIN_CORRELATION or not MIN_SLOPE <= slope <= MAX_SLOPE:
        expected = f"expected {MIN_SLOPE:g} to {MAX_SLOPE:g} times, at least {MIN_CORRELATION:g}"
        return _fails(f"{told}; {expected}{_describe_noise(figures)}", figures)
    most = max(MAX_ERROR_FACTOR * base_error, MAX_ERROR)
    if error > most:
        return _fails(f"it is off transformers and PEFT by {error:.2g} in the mean; at most {most:.2g} is expected", figures)
    return Proof(
        proven=True, reason=f"{told}; off by {error:.2g} in the mean, the base model by {base_error:.2g}", figures=_rounded(figures)
    )


def _fails(reason: str, figures: dict[str, float]) -> Proof:
    return Proof(proven=False, reason=reason, figures=_rounded(figures))


def _describe_noise(figures: dict[str, float]) -> str:
    """What to do where the server's own arithmetic hides what the adapter changes; nothing where it does not."""
    off, changes = figures["base_error"], figures["reference_effect"]
    if off < MAX_NOISE_SHARE * changes:
        return ""
    noise = f"the base model alone is off by {off:.2g} there, and the adapter changes {changes:.2g}"
    return f"; {noise}: serve a base model of more bits (F16, Q8_0)"


def _rounded(figures: dict[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def _mean_difference(first: Sequence[Mapping[int, float]], second: Sequence[Mapping[int, float]]) -> float:
    found = [abs(one[token] - two[token]) for one, two in zip(first, second, strict=True) for token in one.keys() & two.keys()]
    return float(np.mean(found)) if found else float("inf")


def _mean_error(reference: NDArray[np.float32], scored: Sequence[Mapping[int, float]]) -> float:
    rows = zip(reference, scored, strict=True)
    return float(np.mean([abs(float(row[token]) - value) for row, top in rows for token, value in top.items()]))


def _changes(
    reference: Reference, first: Sequence[Mapping[int, float]], version: Sequence[Mapping[int, float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the adapter changes: on the server, and in the reference; one figure for each token that is likely both ways."""
    both = [(row, token) for row, (one, two) in enumerate(zip(first, version, strict=True)) for token in sorted(one.keys() & two.keys())]
    ours = [version[row][token] - first[row][token] for row, token in both]
    theirs = [float(reference.adapter[row, token]) - float(reference.base[row, token]) for row, token in both]
    return np.array(ours, np.float64), np.array(theirs, np.float64)


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_bytes()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ServingError(f"the adapter's configuration cannot be read ({error})") from error
    if not base:
        raise ServingError("the adapter's configuration does not name its base model, which it is compared with")
    return str(base)


async def _compute(plan: ReferencePlan) -> None:
    """Run `reference` in a process of its own: it needs torch, much memory for a moment, and may crash."""
    n_threads = max(1, (os.cpu_count() or 2) - 1)  # one processor is left to the servers that answer, and nothing spins for theirs
    environment = {"OMP_NUM_THREADS": str(n_threads), "GOMP_SPINCOUNT": "0", **os.environ, "HF_HUB_OFFLINE": "1"}
    argv = [sys.executable, "-m", "loraloop.serve.reference"]
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=asyncio.subprocess.DEVNULL, stderr=pipe, env=environment)
    try:
        async with asyncio.timeout(MAX_SECONDS):
            _, said = await process.communicate(plan.model_dump_json().encode())
    except TimeoutError as error:
        raise ServingError(f"the reference by transformers and PEFT took more than {MAX_SECONDS:g} s") from error
    finally:
        if process.returncode is None:
            process.kill()
            await asyncio.shield(process.wait())
    if process.returncode != 0:
        tail = "\n".join(said.decode(errors="replace").splitlines()[-TAIL_LINES:])
        raise ServingError(f"the reference by transformers and PEFT cannot be computed (exit {process.returncode}):\n{tail}")


def _load(path: Path) -> Reference | None:
    """What was computed before; None when it was not, or cannot be read."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            tokens, base, adapter = (arrays[name] for name in ("tokens", "base", "adapter"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Reference(tuple(tuple(int(token) for token in row if token >= 0) for row in tokens), base, adapter)
