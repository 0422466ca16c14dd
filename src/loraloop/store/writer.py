"""What changes a store: episodes added and continued, labels, forgetting. Each call is one transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from sqlalchemy import Connection, bindparam, delete, func, insert, or_, select, update

from loraloop.episode import Episode, EpisodeDto, Label, now_ms
from loraloop.errors import StoreError
from loraloop.store.database import Database
from loraloop.store.labelling import Followed, as_kept, follow_labelled, from_json, labelled, recorded_label, to_json
from loraloop.store.parts import Encoded, Packer, Unpacker, digest_of, encode, split_keys
from loraloop.store.rows import chunks, insert_new, to_row
from loraloop.store.schema import blobs, bodies, episodes, generation, labels, tombstones
from loraloop.store.text import from_body, to_body

MAX_KNOWN = 50_000
"""How many keys a process remembers to be in the database, so that a prompt that all episodes have is not looked up for each."""

FindKept = Callable[[Connection, str], Episode | None]


class Writer:
    """The writing half of a SqlEpisodeStore."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()  # of the three below
        self._known: set[bytes] = set()
        self._generation = -1  # in which they were there
        self._kept_out: tuple[frozenset[str], frozenset[bytes]] = (frozenset(), frozenset())  # ids, digests

    def append(self, given: Sequence[Episode], find: FindKept) -> list[bool]:
        """Of each whether it was added or continues what was there; `find` gives that."""
        if not given:
            return []
        packer = Packer()
        taken_apart = [encode(episode) for episode in given]  # before the writer's lock is taken: the work is here
        rows = [to_row(0, episode, encoded, packer) for episode, encoded in zip(given, taken_apart, strict=True)]
        packed_bodies = [packer.pack(encoded.body) for encoded in taken_apart]
        packed = {key: packer.pack(text) for key, text in _all_blobs(taken_apart).items() if key not in self._known}
        added = [False] * len(given)
        with self._database.writing() as connection:
            seen = self._refresh(connection)
            kept_out = [self._is_kept_out(episode, encoded) for episode, encoded in zip(given, taken_apart, strict=True)]
            there = _find_ids(connection, [str(episode.id) for episode in given])
            seq = connection.scalar(select(func.max(episodes.c.seq))) or 0
            new_rows, new_bodies, again, keys = [], [], [], set[bytes]()
            for number, episode in enumerate(given):
                if kept_out[number]:
                    continue
                if episode.id in there:
                    again.append(number)
                    continue
                there.add(episode.id)
                seq += 1
                new_rows.append(rows[number] | {"seq": seq})
                new_bodies.append({"seq": seq, "body": packed_bodies[number]})
                keys.update(taken_apart[number].keys)
                added[number] = True
            texts = _all_blobs(taken_apart)
            missing = keys - self._known
            insert_new(connection, blobs, [{"key": key, "data": packed.get(key) or packer.pack(texts[key])} for key in missing])
            if new_rows:
                connection.execute(insert(episodes), new_rows)
                connection.execute(insert(bodies), new_bodies)
            for number in again:
                added[number] = self._follow(connection, given[number], find)
        self._remember(missing, seen)
        return added

    def add_labels(self, given: Sequence[Label]) -> None:
        """Add them and put the newest outcome and terms into each episode's row."""
        texts = [to_json(label) for label in given]
        packer, unpacker = Packer(), Unpacker()
        with self._database.writing() as connection:
            for pairs in chunks(zip(given, texts, strict=True)):
                ids = {str(label.episode_id) for label, _ in pairs}
                found = connection.execute(select(episodes.c.id, episodes.c.meta).where(episodes.c.id.in_(ids)))
                metas = {row.id: from_body(EpisodeDto, unpacker.unpack(row.meta)) for row in found}
                have_labels = set(connection.scalars(select(labels.c.episode_id).where(labels.c.episode_id.in_(ids)).distinct()))
                rows = []
                for label, text in pairs:
                    dto = metas.get(label.episode_id)
                    if dto is None:
                        raise StoreError(f"no episode {str(label.episode_id)!r} in {self._database.where}; none of these labels was stored")
                    if dto.id not in have_labels:
                        have_labels.add(dto.id)
                        rows.append({"episode_id": dto.id, "label": to_json(recorded_label(dto))})
                    kept = as_kept(label, dto.outcome)
                    rows.append({"episode_id": dto.id, "label": text if kept is label else to_json(kept)})
                    metas[dto.id] = labelled(dto, kept)
                connection.execute(insert(labels), rows)
                changed = [
                    {"changed": each.id, "outcome": each.outcome.kind, "meta": packer.pack(to_body(each).encode())}
                    for each in metas.values()
                ]
                connection.execute(update(episodes).where(episodes.c.id == bindparam("changed")), changed)

    def forget(self, episode_ids: Sequence[str], *, by_content: bool) -> int:
        """Remove them, and leave tombstones."""
        unpacker, now = Unpacker(), now_ms()
        with self._database.writing() as connection:
            removed: dict[int, bytes] = {}  # joined keys by seq
            stones = {str(each): b"" for each in episode_ids}
            for ids in chunks(dict.fromkeys(map(str, episode_ids))):
                where = episodes.c.id.in_(ids)
                whole = select(episodes.c.seq, episodes.c.id, episodes.c.blob_keys, bodies.c.body).join(
                    bodies, bodies.c.seq == episodes.c.seq
                )
                for row in connection.execute(whole.where(where)):
                    removed[row.seq] = row.blob_keys
                    if by_content:
                        stones[row.id] = digest_of(unpacker.unpack(row.body), row.blob_keys)
                connection.execute(delete(episodes).where(where))
                connection.execute(delete(labels).where(labels.c.episode_id.in_(ids)))
            for numbers in chunks(removed):
                connection.execute(delete(bodies).where(bodies.c.seq.in_(numbers)))
            self._drop_unused(connection, {key for joined in removed.values() for key in split_keys(joined)})
            rows = [{"episode_id": each, "digest": digest, "forgotten_at": now} for each, digest in stones.items()]
            insert_new(connection, tombstones, rows)
            _begin_generation(connection)
        return len(removed)

    def find_forgotten(self, given: Sequence[Episode]) -> list[bool]:
        """Of each whether it is kept out."""
        with self._database.reading() as connection:
            self._refresh(connection)
        return [self._is_kept_out(episode, None) for episode in given]

    def readmit(self, given: Sequence[Episode]) -> None:
        """Remove their tombstones."""
        with self._database.writing() as connection:
            for some in chunks(given):
                ids, digests = [str(episode.id) for episode in some], [encode(episode).digest for episode in some]
                connection.execute(delete(tombstones).where(or_(tombstones.c.episode_id.in_(ids), tombstones.c.digest.in_(digests))))
            _begin_generation(connection)

    def _follow(self, connection: Connection, episode: Episode, find: FindKept) -> bool:
        """Put `episode` in the place of the open one that it continues; False when there is nothing to change."""
        kept = find(connection, episode.id)
        if kept is None:
            raise StoreError(f"{self._database.where}: episode {episode.id} cannot be read: its body is gone; restore it from a backup")
        said = read_labels(connection, episode.id)
        following = follow_labelled(kept, said, episode, self._database.where)
        if following is not None:
            self._replace(connection, following, len(said))
        return following is not None

    def _replace(self, connection: Connection, following: Followed, n_labels: int) -> None:
        packer, episode, encoded = Packer(), following.episode, encode(following.episode)
        there = episodes.c.id == str(episode.id)
        seq, before = connection.execute(select(episodes.c.seq, episodes.c.blob_keys).where(there)).one()
        insert_new(connection, blobs, [{"key": key, "data": packer.pack(text)} for key, text in encoded.blobs.items()])
        connection.execute(update(episodes).where(there).values(to_row(seq, episode, encoded, packer)))
        connection.execute(update(bodies).where(bodies.c.seq == seq).values(body=packer.pack(encoded.body)))
        new = [{"episode_id": str(episode.id), "label": to_json(label)} for label in following.labels[n_labels:]]
        if new:
            connection.execute(insert(labels), new)
        gone = set(split_keys(before)) - set(encoded.keys)
        if gone:
            self._drop_unused(connection, gone)
            _begin_generation(connection)

    def _drop_unused(self, connection: Connection, candidates: set[bytes]) -> None:
        """Remove those blobs that no episode has."""
        if not candidates:
            return
        all_keys = select(episodes.c.blob_keys).execution_options(yield_per=1000)
        for rows in connection.scalars(all_keys).partitions():
            candidates.difference_update(key for joined in rows for key in split_keys(joined))
        for keys in chunks(candidates):
            connection.execute(delete(blobs).where(blobs.c.key.in_(keys)))

    def _refresh(self, connection: Connection) -> int:
        """The generation; where it is another than the last, what was known is known no more."""
        found = int(connection.scalar(select(generation.c.value)) or 0)
        if found != self._generation:
            stones = connection.execute(select(tombstones.c.episode_id, tombstones.c.digest)).all()
            with self._lock:
                self._known, self._generation = set(), found
                self._kept_out = frozenset(stone.episode_id for stone in stones), frozenset(stone.digest for stone in stones) - {b""}
        return found

    def _remember(self, keys: Iterable[bytes], seen: int) -> None:
        """Keys that are committed; unless something was forgotten since."""
        with self._lock:
            if self._generation == seen:
                if len(self._known) > MAX_KNOWN:
                    self._known = set()
                self._known.update(keys)

    def _is_kept_out(self, episode: Episode, encoded: Encoded | None) -> bool:
        ids, digests = self._kept_out
        return str(episode.id) in ids or (bool(digests) and (encoded or encode(episode)).digest in digests)


def read_labels(connection: Connection, episode_id: str) -> list[Label]:
    """What was said of an episode, oldest first; nothing where nobody has."""
    texts = select(labels.c.label).where(labels.c.episode_id == str(episode_id)).order_by(labels.c.number)
    return [from_json(text) for text in connection.scalars(texts)]


def _all_blobs(taken_apart: Sequence[Encoded]) -> dict[bytes, bytes]:
    return {key: text for encoded in taken_apart for key, text in encoded.blobs.items()}


def _find_ids(connection: Connection, ids: Sequence[str]) -> set[str]:
    return {found for some in chunks(ids) for found in connection.scalars(select(episodes.c.id).where(episodes.c.id.in_(some)))}


def _begin_generation(connection: Connection) -> None:
    connection.execute(update(generation).values(value=generation.c.value + 1))
