"""lm-evaluation-harness over models of ours, on task files that are made here."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from atlas_blocks.recipes import build, checkpoint
from atlas_blocks.recipes.data import Tokenizer, train_tokenizer
from atlas_blocks.recipes.generate import generate
from atlas_blocks.recipes.model import LanguageModel

pytest.importorskip("lm_eval")
# What its parts say of themselves, as they are imported and as they end.
pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {
        "question": f"{i} and {i + 1} make ",
        "choices": [str(2 * i), str(2 * i + 1), str(2 * i + 2)[:2], "none of these"],
        "answer": i % 4,
    }
    for i in range(24)
]


def harness() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from atlas_blocks.recipes import harness
    return harness


def model(**changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    return build("atlas-mag-tiny", **changes).eval()


@torch.no_grad()
def scored(whole: LanguageModel, before: list[int], after: list[int]) -> tuple[float, bool]:
    """Of a single example, by itself."""
    logits = whole(torch.tensor([before + after])).logits[0].log_softmax(-1)
    scores = logits[len(before) - 1 : -1]
    aim = torch.tensor(after)
    return float(scores.gather(1, aim[:, None]).sum()), bool((scores.argmax(1) == aim).all())


def request(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "transformers"])
def test_a_local_task_gives_the_accuracy_of_a_loop(kind: str, tmp_path: Path) -> None:
    import lm_eval
    from lm_eval.tasks import TaskManager

    whole, saved = model(), tmp_path / "model.safetensors"
    checkpoint.save(saved, whole)
    if kind == "transformers":
        convert = pytest.importorskip("atlas_blocks.recipes.hugging_face.convert")
        convert.to_folder(saved, tmp_path / "folder")
        saved = tmp_path / "folder"
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    task = {
        "task": "made_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(tmp_path)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "made_here.yaml").write_text(yaml.safe_dump(task))

    harness()
    found = lm_eval.simple_evaluate(
        model="atlas",
        model_args=f"pretrained={saved},pack=256",
        tasks=["made_here"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    right = 0
    for q in QUESTIONS:
        # The harness gives a space at the end of a question to what comes after it.
        before = list(q["question"].rstrip().encode())
        scores = [scored(whole, before, list(f" {c}".encode()))[0] for c in q["choices"]]
        right += scores.index(max(scores)) == q["answer"]
    assert found["results"]["made_here"]["acc,none"] == right / len(QUESTIONS)
    assert 0 < right < len(QUESTIONS)


@pytest.mark.parametrize("pack", [8192, 60, 7])
def test_packed_requests_are_scored_as_alone(pack: int) -> None:
    whole = model()
    requests = [request(q["question"], c) for q in QUESTIONS[:5] for c in q["choices"]]
    requests += [request("", "text alone"), request("a", "b")]
    found = harness().AtlasLM(whole, pack=pack).loglikelihood(requests, disable_tqdm=True)
    for one, (score, greedy) in zip(requests, found, strict=True):
        text, after = one.args
        stripped = text.rstrip()
        before = list(stripped.encode()) or [10]
        true = scored(whole, before, list((text[len(stripped) :] + after).encode()))
        assert abs(score - true[0]) < 1e-3
        assert greedy == true[1]
    # What greedy search gives is known as such.
    more = generate(whole, torch.tensor([[97, 98]]), max_new_tokens=1, temperature=0)[0, 2:]
    lm = harness().AtlasLM(whole)
    assert lm._loglikelihood_tokens([(None, [97, 98], more.tolist())])[0][1]


def test_long_texts_carry_their_state_from_piece_to_piece() -> None:
    whole, text = model(), "what was said at the beginning counts to the end. " * 3
    true = scored(whole, [10], list(text.encode()))[0]
    for pack in (16, 1000):
        lm = harness().AtlasLM(whole, pack=pack)
        (found,) = lm.loglikelihood_rolling([request(text)], disable_tqdm=True)
        assert abs(found - true) < 1e-2


def test_texts_are_continued_until_a_stop_string() -> None:
    coder = train_tokenizer([["def f(x): return x " * 20]], 300)
    whole = model(vocab_size=coder.vocab_size)
    lm = harness().AtlasLM(whole, Tokenizer(coder.json), batch_size=2)
    settings = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    prompts = ["def f", "ret", "x"]
    found = lm.generate_until([request(p, settings) for p in prompts])
    for prompt, text in zip(prompts, found, strict=True):
        tokens = torch.tensor([coder.encode([prompt])[0].tolist()])
        new = generate(whole, tokens, max_new_tokens=6, temperature=0)[0, tokens.shape[1] :]
        kept = new.tolist()
        kept = kept[: kept.index(coder.end)] if coder.end in kept else kept
        assert text == coder.decode(kept).decode(errors="replace")
    assert lm.eot_token_id == coder.end
    stop = found[0][1:2]
    (cut,) = lm.generate_until([request("def f", settings | {"until": stop})])
    assert cut == found[0][: found[0].index(stop)]
