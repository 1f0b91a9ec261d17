"""Training runs of the command line: what can be known is checked before step 1, and what has
been learnt is not lost, whatever ends the run."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from atlas_blocks import check
from atlas_blocks.recipes import checkpoint, describe, display, files, registry, text, training
from atlas_blocks.recipes.checkpoint import Run
from atlas_blocks.recipes.model import LanguageModel


def begin(
    recipe: str,
    out: Path,
    settings: dict[str, Any],
    corpus: text.Corpus,
    device: torch.device,
) -> tuple[LanguageModel, Run]:
    """A new run of a recipe on bytes. settings: those of TrainingConfig.

    Raises ValueError for bad settings, a text too short for them or a place that cannot be written.
    """
    registry.config(recipe)
    config = training.TrainingConfig(**settings)
    _check_text(corpus, config)
    if out.exists():
        raise ValueError(f"out: {out} exists; --resume continues it, or name another file")
    torch.manual_seed(config.seed)
    model = registry.build(recipe, vocab_size=text.VOCAB_SIZE).to(device)
    _check_room(out, model)
    return model, Run(config, training.make_optimizer(model, config), 0, corpus.fingerprint)


def resume(
    recipe: str,
    out: Path,
    settings: dict[str, Any],
    given: Collection[str],
    corpus: text.Corpus,
    device: torch.device,
) -> tuple[LanguageModel, Run]:
    """The run saved at `out`, as it was set up, but for its number of steps where that is given.

    given: names of the settings that were asked for. Raises ValueError for one that differs, for
    another recipe or text, and as `begin`.
    """
    model = checkpoint.load(out, device)
    run = checkpoint.load_run(out, model)
    before = {"recipe": model.config.name, **run.config.to_dict()}
    wanted = registry.config(recipe).replace(vocab_size=text.VOCAB_SIZE)
    if registry.is_file(recipe) and wanted != model.config:
        check.fail("recipe", f"the config of the run in {out}", f"another in {recipe}")
    for name, value in ({"recipe": wanted.name} | {n: settings[n] for n in given}).items():
        if name != "steps" and value != before[name]:
            check.fail(name, f"{before[name]} (that of the run in {out})", value)
    if model.config.vocab_size != text.VOCAB_SIZE:
        vocabulary = f"a vocabulary of {model.config.vocab_size:,}"
        check.fail(f"checkpoint {out}", f"a model of {text.VOCAB_SIZE} bytes", vocabulary)
    if run.data and run.data != corpus.fingerprint:
        check.fail("data", f"{run.data}, that of the run in {out}", corpus.fingerprint)
    config = run.config
    if "steps" in given:
        if settings["steps"] < run.step:
            check.fail("steps", f"at least the {run.step} that {out} has done", settings["steps"])
        config = config.replace(steps=settings["steps"])
    _check_text(corpus, config)
    _check_room(out, model)
    return model, Run(config, run.optimizer, run.step, corpus.fingerprint)


def train(
    console: Console,
    out: Path,
    model: LanguageModel,
    run: Run,
    corpus: text.Corpus,
    save_every: int,
) -> bool:
    """Train to the end and print how well held-out text is predicted; False where Ctrl-C or
    SIGTERM came first. `out` holds the run after every `save_every` steps and at the end.

    Raises OSError where `out` cannot be written, and FloatingPointError at a loss that is not
    finite; both say where the run is saved.
    """
    _announce(console, model, run, corpus)
    name = model.config.name

    def save(step: int) -> None:
        _save(out, model, Run(run.config, run.optimizer, step, run.data))

    with display.TrainingView(console, {name: run.config.steps}) as view:
        try:
            result = training.train(
                model,
                corpus.train,
                run.config,
                optimizer=run.optimizer,
                start=run.step,
                on_step=view.callback(name),
                save=save,
                save_every=save_every,
            )
        except training.Diverged as error:
            save(error.step)
            batch = out.with_name(f"{out.name}.batch")
            with files.replacing(batch) as partial:
                save_file({"rows": error.rows}, partial)
            raise FloatingPointError(
                f"{error}; the run as it was before, after step {error.step}, is saved in {out}, "
                f"and the batch in {batch}"
            ) from error
    if result.interrupted:
        console.print(
            f"interrupted after step {result.step}; [bold]{out}[/] is whole and "
            "--resume continues it"
        )
        return False
    length = run.config.length
    read = length * text.window_count(corpus.held_out, length, training.HELD_OUT)
    with display.working(console, f"reading {read:,} held-out bytes"):
        bits = training.bits_per_byte(model, corpus.held_out, length=length)
    console.print(
        f"held out: [bold]{bits:.3f}[/] bits per byte, on {read:,} of {len(corpus.held_out):,} "
        f"bytes; saved [bold]{out}[/]"
    )
    return True


def _check_text(corpus: text.Corpus, config: training.TrainingConfig) -> None:
    wanted = config.length + 1
    for name, part in (("train on", corpus.train), ("hold out", corpus.held_out)):
        if len(part) < wanted:
            asked = f"text with at least {wanted} bytes to {name} for length {config.length}"
            check.fail("data", asked, f"{len(part)} in {corpus.source}")


def _check_room(out: Path, model: LanguageModel) -> None:
    """Room for the weights and AdamW's two averages, beside a file that is there already."""
    weights = sum(p.nbytes for p in model.parameters())
    files.check_writable("out", out, room=3 * weights + 2**20)


def _announce(console: Console, model: LanguageModel, run: Run, corpus: text.Corpus) -> None:
    name, config = model.config.name, run.config
    line = f"[bold cyan]{name}[/], {describe.human(model.parameter_count())} parameters"
    usual = registry.config(name) if registry.is_recipe(name) else model.config
    if usual.vocab_size != model.config.vocab_size:
        line += (
            f" with a vocabulary of {model.config.vocab_size} bytes instead of the recipe's "
            f"{usual.vocab_size:,} ({describe.human(registry.parameter_count(usual))})"
        )
    console.print(line)
    console.print(
        f"text: {corpus.source}, {describe.human(len(corpus.train), 'B')} to train on, "
        f"{describe.human(len(corpus.held_out), 'B')} held out"
    )
    if run.step == config.steps:
        console.print(
            f"all {run.step} steps were taken before; --steps with a larger number goes on"
        )
    elif run.step:
        console.print(
            f"from step {run.step} to {config.steps}, at the learning rates of {config.steps} steps"
        )


def _save(out: Path, model: LanguageModel, run: Run) -> None:
    """To `out`, or where that fails to the temporary folder, and OSError says so."""
    try:
        checkpoint.save(out, model, run)
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="atlas-blocks-")) / out.name
        try:
            checkpoint.save(elsewhere, model, run)
        except OSError as again:
            raise OSError(f"{error}, nor elsewhere: {again}") from error
        raise OSError(f"{error}; the run after step {run.step} is in {elsewhere}") from error
