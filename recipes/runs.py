"""Training runs of the command line: what can be known is checked before step 1, and what has
been learnt is not lost, whatever ends the run.

    OUT/step-00000200.safetensors   checkpoints: everything that the run goes on from
    OUT/step-00000200.dcp           the same of a run in several processes, see `distributed`
    OUT/log.jsonl, OUT/tensorboard  see `logs`
    OUT/data                        the shards, where the data was not prepared before
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from atlas_blocks import check
from atlas_blocks.recipes import checkpoint, describe, display, files, logs, registry, training
from atlas_blocks.recipes.checkpoint import Run
from atlas_blocks.recipes.data import Packed, Shards
from atlas_blocks.recipes.data.shards import is_prepared
from atlas_blocks.recipes.data.sources import needed
from atlas_blocks.recipes.losses import HELD_OUT, mean_loss
from atlas_blocks.recipes.model import LanguageModel, LanguageModelConfig
from atlas_blocks.recipes.run_data import DATA, DataOptions, opened, shards_of_run, told
from atlas_blocks.recipes.training import TrainingConfig, TrainingState

if TYPE_CHECKING:
    from atlas_blocks.recipes.distributed.parallel import Parallel

CHECKPOINTS, FOLDERS = "step-*.safetensors", "step-*.dcp"


@dataclasses.dataclass(frozen=True)
class Keeping:
    """How a run is kept and watched; what it learns does not depend on it. project: of Weights &
    Biases, or ""."""

    out: Path
    save_every: int = 200
    keep: int = 3
    validate_every: int = 500
    project: str = ""

    def __post_init__(self) -> None:
        for field in ("save_every", "keep", "validate_every"):
            check.at_least(field.replace("_", "-"), getattr(self, field), 1)


@dataclasses.dataclass
class Training:
    """A run, begun or about to go on."""

    model: LanguageModel
    config: TrainingConfig
    optimizer: torch.optim.Optimizer
    state: TrainingState
    shards: Shards
    parallel: Parallel | None = None

    @property
    def leads(self) -> bool:
        """Whether this process speaks for all of the run."""
        return self.parallel is None or self.parallel.leads

    def save(self, path: Path) -> None:
        """Everything that it goes on from. Over several ranks `path` is a folder."""
        device = next(self.model.parameters()).device
        run = Run(
            self.config,
            self.optimizer,
            self.state.step,
            self.shards.fingerprint,
            self.shards.tokenizer.json or "",
            self.state.record(),
            self.state.tensors(device),
        )
        if self.parallel is None:
            checkpoint.save(path, self.model, run)
        else:
            from atlas_blocks.recipes.distributed import folders

            folders.save(path, self.model, run, self.parallel)


def newest(place: Path) -> Path:
    """The checkpoint at `place`: a file, or the last one of a run's folder.

    Raises ValueError where there is none.
    """
    if place.is_dir():
        found = sorted(place.glob(CHECKPOINTS))
        if not found:
            ranks = sorted(place.glob(FOLDERS))
            got = f"{ranks[-1].name} alone (train --resume makes a file of it)" if ranks else "none"
            check.fail("checkpoint", f"a file {CHECKPOINTS} in {place}", got)
        return found[-1]
    return place


def holds_run(out: Path) -> bool:
    """Whether there is anything to resume."""
    return any(True for form in (CHECKPOINTS, FOLDERS) for _ in out.glob(form))


# --- before step 1 ----------------------------------------------------------------------------


def begin(
    console: Console,
    recipe: str,
    keeping: Keeping,
    settings: dict[str, Any],
    options: DataOptions,
    given: Collection[str],
    device: torch.device,
    parallel: Parallel | None = None,
) -> Training:
    """A new run of a recipe, or of a config's file. settings: those of TrainingConfig. given: names
    of the settings and data options that were asked for.

    parallel: the ranks that it is divided over; each calls, with the same arguments.

    Raises ValueError for bad settings, data that does not fit them or the model, or a place that
    cannot be written.
    """
    out, config = keeping.out, TrainingConfig(**settings)
    wanted, data = registry.config(recipe), opened(options, given, None)
    if holds_run(out):
        raise ValueError(f"out: {out} holds a run; --resume continues it, or name another folder")
    _check_machine(keeping, config, device, parallel)
    if parallel is not None:
        parallel.layout.check(wanted, config)

    def shards_of() -> Shards:
        # What a run that was killed prepared is of use where all of it is as it would be now.
        return shards_of_run(console, data, options, ("tokenizer", "field", "held_out"), out)

    shards = shards_of() if parallel is None else parallel.first(shards_of)
    wanted = _fitted(recipe, wanted, shards)
    _check(keeping, wanted, config, shards)
    torch.manual_seed(config.seed)
    model = wanted.build().to(device)
    if parallel is not None:
        parallel.shard(model)
    optimizer = training.make_optimizer(model, config)
    return Training(model, config, optimizer, TrainingState(), shards, parallel)


def resume(
    console: Console,
    recipe: str,
    keeping: Keeping,
    settings: dict[str, Any],
    options: DataOptions,
    given: Collection[str],
    device: torch.device,
    parallel: Parallel | None = None,
) -> Training:
    """The run whose newest checkpoint is in the folder `out`, as it was set up, but for its number
    of steps where that is given.

    Raises ValueError for a setting that is given and differs, for another recipe or other data,
    and as `begin`.
    """
    out, wanted = keeping.out, registry.config(recipe)
    if not holds_run(out):
        check.fail("out", "the folder of a run to resume", out)
    model, run = _newest_run(out, device, parallel)
    before = run.config.to_dict()
    if wanted.name != model.config.name:
        check.fail("recipe", f"{model.config.name} (that of the run in {out})", wanted.name)
    for name in sorted(set(settings) & set(given)):
        if name != "steps" and settings[name] != before[name]:
            check.fail(name, f"{before[name]} (that of the run in {out})", settings[name])
    config = run.config
    if "steps" in given:
        if settings["steps"] < run.step:
            check.fail("steps", f"at least the {run.step} that {out} has done", settings["steps"])
        config = config.replace(steps=settings["steps"])
    _check_machine(keeping, config, device, parallel)
    if not (options.path or is_prepared(out / DATA)):
        check.fail("data", f"{run.data}, that of the run, which is not in {out}", "none")
    data = opened(options, given, out / DATA)

    def shards_of() -> Shards:
        return shards_of_run(console, data, options, given, out)

    shards = shards_of() if parallel is None else parallel.first(shards_of)
    if run.data != shards.fingerprint:
        check.fail("data", f"{run.data}, that of the run in {out}", shards.fingerprint)
    if registry.is_file(recipe) and wanted != model.config:
        check.fail("recipe", f"the config of the run in {out}", f"another in {recipe}")
    _check(keeping, model.config, config, shards)
    state = TrainingState.restored(model, run.step, run.record, run.tensors)
    return Training(model, config, run.optimizer, state, shards, parallel)


def _newest_run(
    out: Path, device: torch.device, parallel: Parallel | None
) -> tuple[LanguageModel, Run]:
    """The last checkpoint in a folder that holds a run, whatever number of processes wrote it.

    One process goes on from a file, several from a folder: what is the other is first made into it.
    """
    steps = {form: {p.stem: p for p in out.glob(form)} for form in (CHECKPOINTS, FOLDERS)}
    last = max(name for found in steps.values() for name in found)
    file, folder = out / f"{last}{Path(CHECKPOINTS).suffix}", out / f"{last}{Path(FOLDERS).suffix}"
    if parallel is None:
        if not file.exists():
            from atlas_blocks.recipes.distributed import folders

            folders.to_file(folder, file)
        model = checkpoint.load(file, device)
        return model, checkpoint.load_run(file, model)
    from atlas_blocks.recipes.distributed import folders

    if not folder.exists():
        parallel.at_first(lambda: folders.from_file(file, folder))
    return folders.load(folder, device, parallel)


def _check_machine(
    keeping: Keeping, config: TrainingConfig, device: torch.device, parallel: Parallel | None
) -> None:
    """Raise ValueError where the folder cannot be written, a library is missing, or nothing can be
    compiled: before data are prepared, which may take an hour."""
    files.check_folder("out", keeping.out)
    if keeping.project:
        needed("wandb", "wandb", "wandb")
    if not config.compile or not (parallel is None or parallel.layout.compiles):
        return
    try:
        torch.compile(torch.exp)(torch.ones(64, device=device))
    except Exception as error:  # whatever its backend stumbles over, for want of a compiler
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"compile: nothing can be compiled here (--no-compile trains without): {lines[0]}"
        ) from error


def _fitted(recipe: str, config: LanguageModelConfig, shards: Shards) -> LanguageModelConfig:
    """A recipe takes the vocabulary of the data; a file says its own."""
    if registry.is_file(recipe):
        return config
    return config.replace(vocab_size=shards.tokenizer.vocab_size)


def _check(
    keeping: Keeping, model: LanguageModelConfig, config: TrainingConfig, shards: Shards
) -> None:
    if shards.tokenizer.vocab_size > model.vocab_size:
        vocabulary = f"a vocabulary of {shards.tokenizer.vocab_size:,} in {shards.source['name']}"
        check.fail("data", f"tokens below the model's {model.vocab_size:,}", vocabulary)
    if config.carry and describe.state_grows(model):
        check.fail("carry", "a model whose state does not grow with the text", model.name)
    lanes = config.batch * config.accumulate if config.carry else 1
    for part, least, what in (
        (shards.train, lanes * config.length, "train on"),
        (shards.held_out, config.length, "hold out"),
    ):
        if part.predictions < least:
            wanted = f"at least {least:,} predicted tokens to {what}"
            check.fail("data", wanted, f"{part.predictions:,} in {shards.source['name']}")
    # Weights and AdamW's two averages, in every checkpoint that is kept and the one to come.
    weights = 4 * registry.parameter_count(model)
    room = (keeping.keep + 1) * (3 * weights + 2**20)
    files.check_folder("out", keeping.out, room=room)


def _batches(shards: Shards, config: TrainingConfig) -> Packed:
    return Packed(
        shards.train,
        config.batch,
        config.length,
        config.accumulate,
        config.seed,
        config.carry,
    )


class HeldOut:
    """Held-out crops, the same of every run.

    tokens: predictions that are read; size: bytes of text that they stand for.
    """

    def __init__(self, shards: Shards, config: TrainingConfig) -> None:
        one = Packed(shards.held_out, 1, config.length)
        batch = min(config.batch, one.crops)
        self.packed = dataclasses.replace(one, batch=batch, carry=config.carry)
        crops = max(batch, HELD_OUT // config.length)
        self.steps = min(self.packed.steps, crops // batch)
        targets = (b.targets.flatten().tolist() for s in range(self.steps) for b in self.packed(s))
        texts = [(len(t), len(shards.tokenizer.decode(t))) for t in targets]
        self.tokens, self.size = (sum(counts) for counts in zip(*texts, strict=True))

    def __call__(self, model: LanguageModel) -> tuple[float, float]:
        """Nats per token, and bits per byte of the text."""
        nats = mean_loss(model, map(self.packed, range(self.steps)))
        return nats, nats * self.tokens / math.log(2) / max(1, self.size)


# --- the run ----------------------------------------------------------------------------------


def train(console: Console, keeping: Keeping, run: Training) -> bool:
    """Train to the end and print how well held-out text is predicted; False where Ctrl-C or
    SIGTERM came first. The folder holds the run after every `save_every` steps and at the end.

    Raises OSError where it cannot be written, and FloatingPointError where the run diverges; both
    say where the run is saved.
    """
    _announce(console, run)
    out, config, name = keeping.out, run.config, run.model.config.name
    parallel, batches = run.parallel, _batches(run.shards, config)
    if run.leads:
        for partial in out.glob(f"{CHECKPOINTS}.*.partial"):
            partial.unlink()
        for partial in out.glob(f"{FOLDERS}.partial*"):
            shutil.rmtree(partial)
    held_out = HeldOut(run.shards, config)
    view = display.TrainingView(console, {name: config.steps})
    show = view.callback(name)
    log = logs.Log(out, run.state.step, project=keeping.project) if run.leads else None
    if not logs.has_tensorboard():
        console.print("no TensorBoard logs: not installed (pip install 'atlas-blocks[train]')")

    def on_step(at: training.Progress) -> None:
        show(at)
        if log is None:
            return
        log.write(
            at.step,
            loss=at.loss,
            lr=at.lr,
            grad_norm=at.grad_norm,
            tokens=at.step * config.tokens,
            tokens_per_second=at.tokens_per_second,
            skipped=at.skipped,
            **({} if at.balance is None else {"balance": at.balance}),
        )

    def validate(step: int) -> None:
        nats, bits = held_out(run.model)
        if log is None:
            return
        log.write(step, held_out_loss=nats, held_out_bits_per_byte=bits)
        console.print(f"{name} {step}/{config.steps}  held out {bits:.3f} bits per byte")

    def save(step: int) -> None:
        _save(keeping, run)

    with log or contextlib.nullcontext(), view:
        try:
            result = training.train(
                run.model,
                batches if parallel is None else parallel.batches(batches),
                config,
                optimizer=run.optimizer,
                state=run.state,
                on_step=on_step,
                save=save,
                save_every=keeping.save_every,
                validate=validate,
                validate_every=keeping.validate_every,
                parallel=parallel,
            )
        except training.Diverged as error:
            _save(keeping, run)
            batch = out / f"bad-step-{error.step + 1:08d}.safetensors"
            tensors = {
                f"{i}.{field}": tensor.contiguous()
                for i, one in enumerate(batches(error.step) if parallel else error.batches)
                for field, tensor in vars(one).items()
                if tensor is not None
            }
            if run.leads:
                with files.replacing(batch) as partial:
                    save_file(tensors, partial)
            raise FloatingPointError(
                f"{error}; the run as it was before, after step {error.step}, is saved in {out}, "
                f"and the batch in {batch}"
            ) from error
    if parallel is not None:
        parallel.at_first(lambda: _as_file(keeping, run.state.step))
    if result.interrupted:
        console.print(
            f"interrupted after step {result.step}; [bold]{out}[/] is whole and "
            "--resume continues it"
        )
        return False
    console.print(
        f"held out: on {held_out.tokens:,} of {run.shards.held_out.token_count:,} tokens, "
        f"{held_out.size:,} bytes of text; "
        f"saved [bold]{newest(out)}[/]"
    )
    return True


def _announce(console: Console, run: Training) -> None:
    model, config, step = run.model, run.config, run.state.step
    name, size = model.config.name, model.config.vocab_size
    line = f"[bold cyan]{name}[/], {describe.human(model.parameter_count())} parameters"
    usual = registry.config(name) if registry.is_recipe(name) else model.config
    if usual.vocab_size != size:
        line += (
            f" with a vocabulary of {size:,} instead of the recipe's "
            f"{usual.vocab_size:,} ({describe.human(registry.parameter_count(usual))})"
        )
    console.print(line)
    console.print(f"text: {told(run.shards)}")
    layout = run.parallel and run.parallel.layout
    if layout is not None:
        console.print(f"over {layout.data * layout.sequence * layout.tensor} processes: {layout}")
    if config.compile and layout is not None and not layout.compiles:
        console.print("nothing is compiled, for --tensor or --sequence")
    elif config.compile and step < config.steps:
        console.print("every block is compiled in the first steps: up to minutes (--no-compile)")
    if step == config.steps:
        console.print(f"all {step} steps were taken before; --steps with a larger number goes on")
    elif step:
        console.print(
            f"from step {step} to {config.steps}, at the learning rates of {config.steps} steps"
        )


def _save(keeping: Keeping, run: Training) -> None:
    """To the run's folder, of which the newest are kept; or where that fails to the temporary
    folder, and OSError says so."""
    form = CHECKPOINTS if run.parallel is None else FOLDERS
    path = keeping.out / form.replace("*", f"{run.state.step:08d}")
    try:
        run.save(path)
    except OSError as error:
        if run.parallel is not None:  # whose ranks may have no other folder in common
            raise
        elsewhere = Path(tempfile.mkdtemp(prefix="atlas-blocks-")) / path.name
        try:
            run.save(elsewhere)
        except OSError as again:
            shutil.rmtree(elsewhere.parent)
            raise OSError(f"{error}, nor elsewhere: {again}") from error
        raise OSError(f"{error}; the run after step {run.state.step} is in {elsewhere}") from error
    if run.leads:
        _keep_newest(keeping)


def _as_file(keeping: Keeping, step: int) -> None:
    """What several processes have saved after this step as a single file too, for what reads
    models."""
    from atlas_blocks.recipes.distributed import folders

    folder, file = (keeping.out / f.replace("*", f"{step:08d}") for f in (FOLDERS, CHECKPOINTS))
    if folder.exists() and not file.exists():
        folders.to_file(folder, file)
        _keep_newest(keeping)


def _keep_newest(keeping: Keeping) -> None:
    for old in sorted(keeping.out.glob(CHECKPOINTS))[: -keeping.keep]:
        old.unlink()
    if old_folders := sorted(keeping.out.glob(FOLDERS))[: -keeping.keep]:
        from atlas_blocks.recipes.distributed import folders

        for old in old_folders:
            folders.remove(old)
