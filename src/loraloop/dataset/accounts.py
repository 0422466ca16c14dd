"""The accounts of a build: what is known of every episode looked at, and why it is in no sample if it is in none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from loraloop.dataset.scan import Scanner, describe_places
from loraloop.dataset.settings import DatasetSettings
from loraloop.dataset.split import TaskText
from loraloop.episode import LICENSE_TAG, Episode
from loraloop.errors import DatasetError
from loraloop.training_data import Refusal, TrainingData

UNKNOWN_LICENSE = "unknown"
_SAYS_NOTHING = {"", "unknown", "none", "noassertion"}


NO_SOURCE = "unknown"


@dataclass(frozen=True)
class Known:
    """What the steps after the conversion need of an episode."""

    task: TaskText
    source: str
    outcome: str
    license: str


@dataclass
class Candidate:
    """A sample that is still in, with what the later steps need of it."""

    sample: TrainingData
    key: str
    """Its own key among the clusters of tasks."""
    source: str
    outcome: str


@dataclass
class Accounts:
    """Every episode looked at is in `known`; those in `refused` are in no sample."""

    scanner: Scanner
    known: dict[str, Known] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    """Samples that were made and left out, by reason."""
    secrets: Counter[str] = field(default_factory=Counter)
    """Episodes with a finding, by its kind."""
    personal_data: Counter[str] = field(default_factory=Counter)

    def admit(self, episodes: Iterable[Episode], settings: DatasetSettings) -> Iterator[Episode]:
        """Take every episode into the accounts; gives those whose terms, secrets and personal data let them in."""
        for episode in episodes:
            said = episode.metadata.tags.get(LICENSE_TAG, "").strip()
            terms = UNKNOWN_LICENSE if said.casefold() in _SAYS_NOTHING else said
            self.known[episode.id] = Known(TaskText.of(episode), _source_of(episode), episode.outcome.kind, terms)
            places = self.scanner.scan(episode)
            secret, personal = ([place for place in places if place.finding.group == group] for group in ("secret", "personal"))
            self.secrets.update({place.finding.kind for place in secret})
            self.personal_data.update({place.finding.kind for place in personal})
            if secret and settings.secrets == "quarantine":
                self.refuse(episode.id, "secret_found", describe_places(secret))
            elif personal and settings.personal_data == "quarantine":
                self.refuse(episode.id, "personal_data_found", describe_places(personal))
            elif terms == UNKNOWN_LICENSE and settings.unknown_license == "refuse":
                self.refuse(episode.id, "license_unknown", "the episode has no tag `license`")
            else:
                yield episode

    def refuse(self, episode_id: str, reason: str, detail: str) -> None:
        """Refuse an episode; the detail never holds a value that the scanner finds."""
        self.refused[episode_id] = Refusal.model_validate({"episode_id": episode_id, "reason": reason, "detail": self.scanner.mask(detail)})

    def add_converted(self, converted: Iterable[TrainingData | Refusal], learn_model: str) -> list[TrainingData]:
        """The samples among `converted`, ordered by their episodes' ids. Raises DatasetError when an episode is lost, or in both."""
        samples: list[TrainingData] = []
        for one in converted:
            ids = one.episode_ids if isinstance(one, TrainingData) else (one.episode_id,)
            if not ids or any(episode_id not in self.known or episode_id in self.refused for episode_id in ids):
                raise DatasetError(f"{learn_model!r} gave {_describe(one)}, which is of no episode that it was given, or of a refused one")
            if isinstance(one, TrainingData):
                samples.append(one)
            else:
                self.refuse(str(one.episode_id), one.reason, one.detail)
        used = {episode_id for sample in samples for episode_id in sample.episode_ids}
        if used & self.refused.keys():
            raise DatasetError(f"{learn_model!r} refused {min(used & self.refused.keys())}, and has it in a sample too; it may do one only")
        if lost := self.known.keys() - used - self.refused.keys():
            raise DatasetError(f"{learn_model!r} lost {len(lost)} episodes, {min(lost)} first; each must be in a sample or refused")
        return sorted(samples, key=lambda sample: (tuple(map(str, sample.episode_ids)), sample.n_prompt, len(sample.messages)))

    def drop(self, candidates: list[Candidate], reasons: dict[int, tuple[str, str]]) -> list[Candidate]:
        """The candidates without those at the positions that have a (reason, detail). Episodes that are in no other are refused."""
        left = [candidate for position, candidate in enumerate(candidates) if position not in reasons]
        still_in = {episode_id for candidate in left for episode_id in candidate.sample.episode_ids}
        for position, (reason, detail) in sorted(reasons.items()):
            self.dropped[reason] += 1
            for episode_id in candidates[position].sample.episode_ids:
                if episode_id not in still_in and episode_id not in self.refused:
                    self.refuse(episode_id, reason, detail)
        return left

    def candidate(self, sample: TrainingData, key: str) -> Candidate:
        """`sample` with what is known of its episodes; a pair has the source of the better one, and both outcomes."""
        known = [self.known[episode_id] for episode_id in sample.episode_ids]
        return Candidate(sample, key, known[0].source, " over ".join(one.outcome for one in known))

    def counts(self) -> dict[str, int]:
        """Refused episodes by reason."""
        return dict(sorted(Counter(refusal.reason for refusal in self.refused.values()).items()))

    def licenses(self, samples: Iterable[TrainingData]) -> dict[str, int]:
        """The episodes of `samples` by their terms."""
        ids = {episode_id for sample in samples for episode_id in sample.episode_ids}
        return dict(sorted(Counter(self.scanner.mask(self.known[episode_id].license) for episode_id in ids).items()))


def _describe(one: TrainingData | Refusal) -> str:
    if isinstance(one, Refusal):
        return f"the refusal {one.reason} of {one.episode_id}"
    return f"a sample of {', '.join(map(str, one.episode_ids)) or 'no episode'}"


def _source_of(episode: Episode) -> str:
    """Where an episode comes from: its tag `source`, else its scenario, else its strategy, else the format of its file."""
    tags = episode.metadata.tags
    return tags.get("source") or episode.metadata.scenario or episode.metadata.strategy or tags.get("format") or NO_SOURCE
