"""OpenAI's API over HTTP: answers that do not depend on each other, streams, sessions, refusals."""

import json
import random
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from serving_client import Client, serving, serving_process

from atlas_blocks.recipes import TrainingConfig, build, checkpoint, generate
from atlas_blocks.recipes.data import Tokenizer, train_tokenizer
from atlas_blocks.recipes.serving.service import Options, Service
from atlas_blocks.recipes.serving.sessions import Session
from atlas_blocks.recipes.training import make_optimizer

NAME, PIECE = "atlas-mag-tiny", 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build(NAME, depth=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sessions")


@pytest.fixture(scope="module")
def client(model, folder):
    options = Options(max_batch=8, piece=PIECE, prefix_cache=8, sessions=folder)
    with serving(Service(model, Tokenizer(), options)) as found:
        yield found


def alone(model, prompt: list[int], max_tokens: int, seed: int, **options) -> list[int]:
    found = generate(
        model,
        torch.tensor([prompt]),
        max_new_tokens=max_tokens,
        seed=seed,
        piece=PIECE,
        **options,
    )
    return found[0, len(prompt) :].tolist()


def test_of_64_requests_half_cut_off_the_others_get_what_they_get_alone(model, client):
    generator = random.Random(0)
    requests = []
    for number in range(64):
        requests.append(
            {
                "prompt": [generator.randrange(256) for _ in range(generator.randrange(1, 150))],
                "max_tokens": generator.randrange(5, 40),
                "seed": number,
                "temperature": (0.0, 1.0)[number % 2],
                "top_p": (1.0, 0.9)[number % 3 == 0],
            }
        )
    cut = set(generator.sample(range(64), 32))

    def ask(number: int) -> list[int] | None:
        if number not in cut:
            return client.complete(**requests[number])["token_ids"]
        # Without an end of its own: only the client's leaving can end it.
        fields = requests[number] | {"max_tokens": 10**9}
        if number % 4:
            with client.asking("POST", "/v1/completions", fields | {"stream": True}) as response:
                for _ in range(3 * (number % 7)):
                    response.readline()
        else:  # gone before there is anything
            with client.sending("POST", "/v1/completions", fields):
                pass
        return None

    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    for number, tokens in enumerate(found):
        if number not in cut:
            assert tokens == alone(model, **requests[number]), number
    client.idle()


def test_a_stream_is_the_answer_in_parts(client):
    fields = {"prompt": "The é of 日本", "max_tokens": 30, "seed": 3, "n": 2}
    _, whole = client("POST", "/v1/completions", fields)
    choices = [dict(text="", ids=[]) for _ in range(2)]
    events = list(
        client.stream(
            "/v1/completions",
            **fields,
            return_token_ids=True,
            stream_options={"include_usage": True},
        )
    )
    for event in events[:-1]:
        (part,) = event["choices"]
        choices[part["index"]]["text"] += part["text"]
        choices[part["index"]]["ids"] += part["token_ids"]
        choices[part["index"]]["reason"] = part["finish_reason"]
    for choice, true in zip(choices, whole["choices"], strict=True):
        assert choice["text"] == true["text"]
        assert choice["reason"] == true["finish_reason"] == "length"
        assert bytes(choice["ids"]).decode(errors="replace") == true["text"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": {"cached_tokens": whole["usage"]["prompt_tokens"]}
    }
    assert whole["usage"]["completion_tokens"] == 60
    assert choices[0]["ids"] != choices[1]["ids"]
    # The second is what its own seed gives.
    assert client.complete(**fields | {"n": 1, "seed": 4})["token_ids"] == choices[1]["ids"]


def test_chat_is_the_completion_of_its_template(client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    options = {"max_tokens": 12, "seed": 5}
    _, body = client("POST", "/v1/chat/completions", {"messages": messages, **options})
    (choice,) = body["choices"]
    assert body["object"] == "chat.completion"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == client.complete(prompt=text, **options)["text"]
    parts = [[{"type": "text", "text": half}] for half in ("Hel", "lo")]
    messages[1]["content"] = parts[0] + parts[1]
    events = list(client.stream("/v1/chat/completions", messages=messages, **options))
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(d.get("content", "") for d in deltas) == choice["message"]["content"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_several_prompts_are_answered_in_their_order(model, client):
    prompts = [[1, 2, 3], [4] * 9, [5, 6]]
    _, body = client(
        "POST",
        "/v1/completions",
        {"prompt": prompts, "n": 2, "max_tokens": 6, "seed": 11, "return_token_ids": True},
    )
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    for i, choice in enumerate(body["choices"]):
        assert choice["token_ids"] == alone(model, prompts[i // 2], 6, 11 + i)
    texts = client("POST", "/v1/completions", {"prompt": ["ab", "c"], "max_tokens": 1})[1]
    assert texts["usage"]["prompt_tokens"] == 3


def test_stops_end_an_answer(client):
    fields = {"prompt": "a", "max_tokens": 40, "seed": 1}
    plain = client.complete(**fields)
    text, ids = plain["text"], plain["token_ids"]
    at = next(i for i in range(5, len(text)) if text[i].isascii() and text.index(text[i]) == i)
    stopped = client.complete(**fields, stop=["never there", text[at]])
    assert (stopped["text"], stopped["finish_reason"]) == (text[:at], "stop")
    by_token = client.complete(**fields, stop_token_ids=[ids[9]])
    assert by_token["token_ids"] == ids[: ids.index(ids[9])]
    assert by_token["finish_reason"] == "stop"
    assert plain["finish_reason"] == "length"


def test_models_and_health(client):
    assert client("GET", "/v1/models")[1]["data"][0]["id"] == NAME
    assert client.complete(model=NAME, prompt="a", max_tokens=1)["finish_reason"] == "length"
    assert client.idle()["status"] == "ok"
    status, document = client("GET", "/openapi.json")
    assert status == 200
    assert "$ref" not in json.dumps(
        document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    )


def test_the_checkpoints_tokenizer_is_used(tmp_path):
    """By the command, as by generate's: texts to its tokens and back, and its end is an end."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([["the cat sat on the mat, é 日本 " * 3]], 290)
    model = build(NAME, depth=1, vocab_size=tokenizer.vocab_size)
    config = TrainingConfig(steps=1)
    run = checkpoint.Run(config, make_optimizer(model, config), 0, tokenizer=tokenizer.json)
    checkpoint.save(tmp_path / "model", model, run)
    prompt = "the cat sat"
    tokens = tokenizer.encode([prompt])[0].tolist()
    assert len(tokens) < len(prompt)
    with serving_process(tmp_path / "model") as (found, _):
        for seed in range(3):
            choice = found.complete(prompt=prompt, max_tokens=60, seed=seed)
            true = alone(model, tokens, 60, seed, stop_ids=[tokenizer.end])
            end = true.index(tokenizer.end) if tokenizer.end in true else len(true)
            assert choice["token_ids"] == true[:end]
            assert choice["text"].encode() == tokenizer.decode(true[:end])
            assert choice["finish_reason"] == ("stop" if end < 60 else "length")
        fields = {"prompt": prompt, "max_tokens": 5}
        usage = found("POST", "/v1/completions", fields)[1]["usage"]
        assert usage["prompt_tokens"] == len(tokens)


# --- sessions ---------------------------------------------------------------------------------


def test_a_session_goes_on_where_it_ended(client, folder):
    """In parts, as in one; a question that is not kept changes nothing."""
    greedy = {"temperature": 0, "max_tokens": 8}
    whole = client.complete(prompt="Once upon a time, there", session="whole", **greedy)
    client.complete(prompt="Once upon", session="parts", max_tokens=0)
    client.complete(prompt=" a time, ", session="parts", max_tokens=0)
    file = (folder / "parts.safetensors").read_bytes()
    first = client.complete(prompt="there", session="parts", save_session=False, **greedy)
    assert first["token_ids"] == whole["token_ids"]
    assert (folder / "parts.safetensors").read_bytes() == file
    half = client.complete(prompt="there", session="parts", **greedy | {"max_tokens": 3})
    rest = client.complete(prompt="", session="parts", **greedy | {"max_tokens": 5})
    assert half["token_ids"] + rest["token_ids"] == whole["token_ids"]
    names = [one["id"] for one in client("GET", "/v1/sessions")[1]["data"]]
    assert {"parts", "whole"} <= set(names)
    found = Session.load(folder / "parts.safetensors")
    assert int(found.tokens) == len("Once upon a time, there") + 8
    assert client("DELETE", "/v1/sessions/parts")[0] == 200
    assert not (folder / "parts.safetensors").exists()
    assert client("DELETE", "/v1/sessions/parts")[0] == 404


def test_a_chat_in_a_session_gets_the_new_messages_alone(client):
    options = {"session": "talk", "max_tokens": 5, "temperature": 0}
    ask = {"messages": [{"role": "user", "content": "Hello"}], **options}
    _, first = client("POST", "/v1/chat/completions", ask)
    _, second = client("POST", "/v1/chat/completions", ask)
    assert second["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"] + 1  # a line break


def test_a_session_is_one_requests_at_a_time(client, folder):
    client.complete(prompt="a", session="one", max_tokens=0)
    file = (folder / "one.safetensors").read_bytes()
    fields = {"prompt": "b", "session": "one", "max_tokens": 10**9, "stream": True}
    with client.asking("POST", "/v1/completions", fields) as response:
        response.readline()
        status, body = client("POST", "/v1/completions", fields)
        assert (status, body["error"]["param"]) == (409, "session")
        assert client("DELETE", "/v1/sessions/one")[0] == 409
        # Who changes nothing need not wait.
        client.complete(prompt="c", session="one", save_session=False, max_tokens=1)
    client.idle()
    # Nothing is kept of an answer that nobody waited for.
    assert (folder / "one.safetensors").read_bytes() == file
    assert client.complete(prompt="b", session="one", max_tokens=1)["finish_reason"] == "length"


@pytest.mark.slow(compile_nodes=False)
def test_20000_tokens_are_taken_up_in_another_process(model, tmp_path):
    checkpoint.save(tmp_path / "model.safetensors", model)
    generator = random.Random(1)
    book = [generator.randrange(256) for _ in range(20_000)]
    questions = [
        {"prompt": "x", "session": "book", "save_session": False, "max_tokens": 20, **how}
        for how in ({"temperature": 0}, {"temperature": 1.0, "seed": 7})
    ]
    folder = tmp_path / "sessions"
    with serving(Service(model, Tokenizer(), Options(sessions=folder))) as first:
        first.complete(prompt=book, session="book", max_tokens=0)
        expected = [first.complete(**question)["token_ids"] for question in questions]
        without = first.complete(prompt="x", max_tokens=20, temperature=0)["token_ids"]
    place = tmp_path / "model.safetensors"
    with serving_process(place, "--sessions", folder) as (second, _):
        found = [second.complete(**question)["token_ids"] for question in questions]
    assert found == expected
    assert without not in expected


def test_a_session_of_another_model_is_refused(model, tmp_path):
    torch.manual_seed(1)
    other = build(NAME, depth=1)
    for served, status in ((model, 200), (other, 400)):
        with serving(Service(served, Tokenizer(), Options(sessions=tmp_path))) as found:
            answer = found("POST", "/v1/completions", {"prompt": "a", "session": "s"})
            assert answer[0] == status
    assert answer[1]["error"]["message"].startswith("session: expected a state of the model")
    (tmp_path / "s.safetensors").write_bytes(b"no")
    with serving(Service(model, Tokenizer(), Options(sessions=tmp_path))) as found:
        status, body = found("POST", "/v1/completions", {"prompt": "a", "session": "s"})
        assert (status, body["error"]["param"]) == (400, "session")
        status, body = found("POST", "/v1/completions", {"prompt": "a", "session": "s"})
        assert status == 400  # and not in use


# --- refusals ---------------------------------------------------------------------------------

USER = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        (b"{", 400, "body: expected JSON"),
        (b"[]", 400, "body: expected an object, got []"),
        (b'{"prompt": "\\ud800"}', 400, "body: not valid Unicode"),
        (b'{"prompt": "a", "stream": "\\ud800"}', 400, 'stream: must be a valid boolean, got "?"'),
        (b'{"prompt": "a", "\\ud800": 1}', 400, "body: "),
        ({}, 400, "prompt: is missing"),
        ({"prompt": ""}, 400, "prompt: must have at least one token"),
        ({"prompt": []}, 400, "prompt: must have at least one token"),
        ({"prompt": 3}, 400, "prompt: must be a text"),
        ({"prompt": ["a", 1]}, 400, "prompt: must be a text"),
        ({"prompt": [1, 256]}, 400, "prompt: tokens must be in [0, 255]"),
        ({"prompt": "a", "max_tokens": -1}, 400, "max_tokens: must be greater"),
        ({"prompt": "a", "max_tokens": "9"}, 400, 'max_tokens: must be a valid integer, got "9"'),
        ({"prompt": "a", "temperature": -0.1}, 400, "temperature: must be greater"),
        ({"prompt": "a", "temperature": float("nan")}, 400, "temperature: must be"),
        ({"prompt": "a", "top_p": 1.1}, 400, "top_p: must be less"),
        ({"prompt": "a", "repetition_penalty": 0}, 400, "repetition_penalty: must be"),
        ({"prompt": "a", "n": 0}, 400, "n: must be"),
        ({"prompt": "a", "n": 9}, 400, "n: at most 8, got 9"),
        ({"prompt": "a", "seed": -1}, 400, "seed: must be"),
        ({"prompt": "a", "stop": ""}, 400, "stop: must be strings that are not empty"),
        ({"prompt": "a", "stop": 3}, 400, "stop: must be a valid list"),
        ({"prompt": "a", "stop_token_ids": [-1]}, 400, "stop_token_ids: must be tokens"),
        ({"prompt": "a", "stream": "yes"}, 400, "stream: must be a valid boolean"),
        ({"prompt": "a", "stream_options": {"x": 1}}, 400, "stream_options.x: there is no such"),
        ({"prompt": "a", "logprobs": 2}, 400, "logprobs: it is not served, got 2"),
        ({"prompt": "a", "echo": True}, 400, "echo: it is not served"),
        ({"prompt": "a", "frequency_penalty": 0.5}, 400, "frequency_penalty: it is not served"),
        ({"prompt": "a", "temprature": 1}, 400, "temprature: there is no such field"),
        ({"prompt": "a", "model": "gpt-4"}, 404, "model: 'gpt-4' is not served"),
        ({"prompt": "a", "session": "../a"}, 400, "session: expected up to 100 letters"),
        ({"prompt": "a", "session": "x", "n": 2}, 400, "n: must be 1 where the session is saved"),
        ({"prompt": ["a", "b"], "session": "x"}, 400, "prompt: one, with a session, got 2"),
        ({"prompt": "a", "save_session": True}, 400, "save_session: needs a session"),
        ({"prompt": "a", "session": "x", "save_session": False}, 404, "session: there is none"),
        ({"messages": []}, 400, "messages: "),
        ({"messages": "a"}, 400, "messages: must be a valid list"),
        ({"messages": [{"role": "bot", "content": "a"}]}, 400, "messages[0].role: must be"),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content: is missing"),
        ({"messages": USER, "tools": [{}]}, 400, "tools: it is not served"),
        ({"messages": USER, "prompt": "a"}, 400, "prompt: there is no such field"),
    ],
)
def test_bad_requests_are_named(client: Client, fields, status, message):
    chat = isinstance(fields, dict) and "messages" in fields
    answer = client("POST", "/v1/chat/completions" if chat else "/v1/completions", fields)
    error = answer[1]["error"]
    assert (answer[0], error["type"]) == (status, "invalid_request_error")
    assert error["message"].startswith(message)
    assert "\n" not in error["message"]
    assert error["param"] in (None, message.partition(":")[0].partition(".")[0].partition("[")[0])
    client.idle()


def test_what_asks_for_nothing_is_no_refusal(client):
    idle = {"frequency_penalty": 0.0, "logprobs": None, "best_of": 1, "user": "me", "echo": False}
    assert client.complete(prompt="a", max_tokens=1, **idle)["finish_reason"] == "length"
    # After the refusals above, no session is held.
    assert client.complete(prompt="a", session="x", max_tokens=1)["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405)],
)
def test_other_paths_are_refused_in_the_same_shape(client, method, path, status):
    answer = client(method, path)
    assert answer[0] == status
    assert path in answer[1]["error"]["message"]


def test_without_a_folder_there_are_no_sessions(model):
    with serving(Service(model, Tokenizer())) as found:
        for method, path in (("GET", "/v1/sessions"), ("DELETE", "/v1/sessions/a")):
            assert found(method, path)[0] == 400
        status, body = found("POST", "/v1/completions", {"prompt": "a", "session": "a"})
        assert status == 400
        assert "--sessions" in body["error"]["message"]


def test_a_failure_of_the_model_is_a_500(model, client, monkeypatch, caplog):
    def fails(*arguments, **options):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(model, "forward", fails)
        status, body = client("POST", "/v1/completions", {"prompt": "never seen before"})
        assert (status, body["error"]["type"]) == (500, "server_error")
        with client.asking(
            "POST", "/v1/completions", {"prompt": "never seen before", "stream": True}
        ) as response:
            assert b"out of memory" in response.read()
    assert client.complete(prompt="a", max_tokens=1)["finish_reason"] == "length"


# --- the command ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-batch", 0, "max-batch: expected an int >= 1"),
        ("--piece", 0, "piece: expected"),
        ("--prefix-cache", -1, "prefix-cache: expected"),
        ("--threads", 0, "threads: expected"),
        ("--port", 70000, "port: expected"),
        ("--chat-template", "/no/such/file", "chat-template: cannot read"),
        ("--device", "nowhere", "device: cannot use"),
    ],
)
def test_bad_options_are_named(run, tmp_path, model, option, value, message):
    checkpoint.save(tmp_path / "model", model)
    code, _, err = run("serve", tmp_path / "model", option, value)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("library", ["uvicorn", "fastapi"])
def test_a_library_that_is_missing_is_named(run, tmp_path, model, monkeypatch, library):
    checkpoint.save(tmp_path / "model", model)
    for name in [n for n in sys.modules if n.startswith("atlas_blocks.recipes.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    code, _, err = run("serve", tmp_path / "model")
    assert code == 2
    assert f"expected the library {library}, got none (pip install 'atlas-blocks[serve]')" in err


def test_a_port_that_is_taken_is_named(run, tmp_path, model, client):
    checkpoint.save(tmp_path / "model", model)
    code, _, err = run("serve", tmp_path / "model", "--port", client.port)
    assert code == 1
    assert f"cannot listen at 127.0.0.1:{client.port}" in err


@pytest.mark.parametrize("host", ["no such host", "a..b", "192.0.2.1", "::2"])
def test_a_host_that_is_not_this_machine_is_named(run, tmp_path, model, host):
    checkpoint.save(tmp_path / "model", model)
    code, _, err = run("serve", tmp_path / "model", "--host", host)
    assert code == 2
    assert err == f"atlas-blocks: host: expected an address of this machine, got {host}\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -15)])
def test_who_is_answered_is_told_that_the_server_stops(tmp_path, model, number, code):
    checkpoint.save(tmp_path / "model", model)
    endless = {"prompt": "a", "max_tokens": 10**9, "stream": True}
    with serving_process(tmp_path / "model") as (found, process):
        with found.asking("POST", "/v1/completions", endless) as response:
            response.readline()
            process.send_signal(number)
            *_, last, _ = response.read().split(b"\n\n")
        assert b'"error": {"message": "the server is stopping"' in last
        assert process.wait() == code


@pytest.mark.slow
def test_memory_is_flat_over_1000_requests(model, tmp_path):
    checkpoint.save(tmp_path / "model", model)
    generator = random.Random(0)

    def ask(number: int) -> None:
        prompt = [generator.randrange(256) for _ in range(generator.randrange(1, 100))]
        fields = {"prompt": prompt, "max_tokens": generator.randrange(1, 12)}
        if number % 5 == 0:  # and goes away
            fields |= {"stream": True, "max_tokens": 10**9}
            with client.asking("POST", "/v1/completions", fields) as response:
                response.readline()
        elif number % 5 == 1:
            client.complete(**fields, session=f"s{number % 3}", save_session=False)
        else:
            client.complete(**fields)

    options = ("--prefix-cache", 4, "--sessions", tmp_path / "sessions")
    with serving_process(tmp_path / "model", *options) as (client, process):
        for name in ("s0", "s1", "s2"):
            client.complete(prompt="a", session=name, max_tokens=0)

        def resident() -> float:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
            return pages * 4096 / 2**20

        sizes = []
        with ThreadPoolExecutor(8) as pool:
            for _ in range(5):
                list(pool.map(ask, range(250)))
                client.idle()
                sizes.append(resident())
    # The first 250 fill the cache and the allocator.
    assert sizes[-1] - sizes[0] < 10, sizes
