"""For tests, ours and those of people who write plug-ins: test data by factory, and one conformance check per kind of plug-in.

A `check_<kind>()` is a plain function, or a coroutine for what is asynchronous. It returns when all is well, and raises AssertionError
saying what is not.
"""

from loraloop.testing.applier import check_applier
from loraloop.testing.environment import check_environment
from loraloop.testing.episodes import make_episode, make_odd_episodes, make_records
from loraloop.testing.importer import check_importer
from loraloop.testing.learn_model import check_learn_model
from loraloop.testing.store import check_store

__all__ = [
    "check_applier",
    "check_environment",
    "check_importer",
    "check_learn_model",
    "check_store",
    "make_episode",
    "make_odd_episodes",
    "make_records",
]
