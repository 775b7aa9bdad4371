"""The one training loop. What differs between recipes is the stage it is given."""

from __future__ import annotations

import copy
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.modeling_utils import ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from counterpoint.training import checkpoint
from counterpoint.training.card import write_card
from counterpoint.training.compiling import compile_stage
from counterpoint.training.config import TrainConfig, as_json, differences
from counterpoint.training.convergence import sudden_rise
from counterpoint.training.machine import check_machine, flushing_denormals
from counterpoint.training.optimizer import make_optimizer
from counterpoint.training.order import Draws, Order
from counterpoint.training.sharding import like, load_whole, shard, split_optimizer, whole
from counterpoint.training.stage import Job, to_device
from counterpoint.types import Batch, Samples, UserError

_ADHERENCE = "validation/adherence"
_MOST_SKIPPED = 40
"""Steps in a row that a scaler may leave out: by then it scales by less than one."""


class Interrupted(Exception):  # noqa: N818 - not an error
    """The run was stopped by a signal after it had saved ``checkpoint``."""

    def __init__(self, checkpoint: Path) -> None:
        super().__init__(f"stopped; continue with --resume ({checkpoint})")


class _Fetch(Dataset):
    """Adapts :class:`Samples` to the loader: a whole batch at a time, with the ordinals that seed its noise."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __getitems__(self, pairs: list[tuple[int, int]]) -> tuple[list[int], Batch | UserError]:
        try:
            return [ordinal for ordinal, _ in pairs], self.samples.batch([index for _, index in pairs])
        except UserError as error:  # a loader's worker would bury it in its own traceback
            return [], error


class DivergenceError(UserError):
    """The loss or its gradient is not finite any more."""


Validate = Callable[[], dict[str, float]]
"""Measures what is being trained, with the averaged weights in place: name -> number."""


def train(job: Job, config: TrainConfig, *, resume: Path | bool = False, validate: Validate | None = None) -> Path:
    """Run a job to its last step and export the result to ``config.output_dir``.

    Several processes (torchrun, accelerate launch) share each step's samples.

    Args:
        job: the stage and its samples.
        config: all settings.
        resume: ``True`` continues from the newest whole checkpoint of the output folder, a path from that checkpoint.
        validate: called every ``validation_steps``; a sudden rise of what it calls ``adherence`` is reported.

    Returns:
        The output folder: the exported model with its card, ``train.json`` (settings) and ``log.jsonl``.

    Raises:
        CheckpointError: nothing to resume, a damaged checkpoint, or settings that would change the result.
        UserError: the output folder holds another run and ``resume`` is not set, there are no samples, or this machine
            lacks what the settings ask for.
        Interrupted: a signal arrived; everything up to the current step is saved.
        DivergenceError: the loss or its gradient is not finite; the newest checkpoint holds the last good state.
    """
    config = config.resolved()
    folder = resumable(config, resume, job.recipe)
    check_machine(config)
    if len(job.samples) == 0:
        raise UserError("there is nothing to learn from: the data set is empty")
    AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
    with flushing_denormals():
        return _Run(job, config, validate).start(folder)


def resumable(config: TrainConfig, resume: Path | bool, recipe: str = "") -> Path | None:
    """The checkpoint that a run would continue from, or ``None`` for a new run.

    Raises:
        CheckpointError: nothing to resume, a damaged checkpoint, or settings that would change the result.
        UserError: the output folder holds another run and ``resume`` is not set.
    """
    output = config.output_dir
    if not resume:
        if checkpoint.found(output):
            raise UserError(f"{output} already holds a run: continue it with --resume, or choose another output_dir")
        if (output / "config.json").exists():
            raise UserError(f"{output} already holds a model: choose another output_dir")
        return None
    if resume is not True and resume.resolve().parent != output.resolve() and checkpoint.found(output):
        raise UserError(f"{output} holds another run than {resume}: choose another output_dir")
    folder = checkpoint.newest(output, lambda message: print(message, file=sys.stderr)) if resume is True else resume
    checkpoint.verify(folder)
    changed = differences(json.loads((folder / "train.json").read_text()), config, recipe)
    if changed:
        raise checkpoint.CheckpointError(
            f"{folder} was made with other settings, the result would not be that of one run: {'; '.join(changed)}"
        )
    return folder


class _Run:
    def __init__(self, job: Job, config: TrainConfig, validate: Validate | None) -> None:
        self.job, self.config, self.stage, self.validate = job, config, job.stage, validate
        self.samples, self.settings = job.samples, as_json(config, job.recipe)
        self.fingerprint = checkpoint.fingerprint(job.samples)
        self.accelerator = Accelerator(
            cpu=not torch.accelerator.is_available(),  # or several processes would each believe to be alone
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=None if config.report_to == "none" else config.report_to,
            project_dir=config.output_dir,
        )
        trained = self.stage.trained_modules()
        for parameter in self.stage.parameters():
            parameter.requires_grad_(False)
        for module in trained.values():
            module.train()
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(self.stage.learns(name))
        if config.gradient_checkpointing:
            for network in self.stage.children():
                if isinstance(network, ModelMixin) and network._supports_gradient_checkpointing:
                    network.enable_gradient_checkpointing()
        if config.fsdp:
            self.unsplit = {name: copy.deepcopy(module).to("meta") for name, module in trained.items()}
            self.stage.to(self.accelerator.device)
            for module in trained.values():
                shard(module)
        self.parameters = [p for module in trained.values() for p in module.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.parameters, config)
        self.schedule = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
        )
        if config.torch_compile:
            compile_stage(self.stage)
        if config.fsdp:  # it synchronises by itself; on a CPU accelerate would wrap it a second time
            self.model, self.optimizer = self.stage, self.accelerator.prepare(optimizer)
        else:
            self.model, self.optimizer = self.accelerator.prepare(self.stage, optimizer)
        self.ema = EMAModel(self.parameters, decay=config.ema_decay) if config.use_ema else None
        self.step, self.skipped, self.stop = 0, 0, False
        self.seen: dict[str, torch.Tensor] = {}  # since the log's last line: (sum, of how many numbers), where they are

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def start(self, folder: Path | None) -> Path:
        output = self.config.output_dir
        if folder is not None:
            self._load(folder)
        output.mkdir(parents=True, exist_ok=True)
        if self.is_main:
            (output / "train.json").write_text(self.settings)
            self._trim_log()
        if self.config.report_to != "none":
            self.accelerator.init_trackers("counterpoint", config=json.loads(self.settings))
        with _signals(self):
            self._loop()
        with self._averaged():
            self._export(output)
        self.accelerator.end_training()
        return output

    def _export(self, output: Path) -> None:
        """Whole networks, by the first process."""
        if self.config.fsdp:
            for name, module in self.stage.trained_modules().items():
                state = whole(module.state_dict(), self.is_main)
                if self.is_main:
                    self.unsplit[name].load_state_dict(state, assign=True)
                    self.stage.set_submodule(name, self.unsplit[name])
        if self.is_main:
            self.stage.export(output)
            write_card(output, self.job, self.config, self.settings, self.accelerator.num_processes)
        self.accelerator.wait_for_everyone()

    def _loop(self) -> None:
        config, accelerator = self.config, self.accelerator
        order = Order(
            len(self.samples),
            config.seed,
            config.train_batch_size,
            config.gradient_accumulation_steps,
            self.step,
            config.max_train_steps,
            accelerator.process_index,
            accelerator.num_processes,
        )
        loader = DataLoader(
            _Fetch(self.samples),
            batch_sampler=order,
            num_workers=config.dataloader_num_workers,
            collate_fn=lambda batch: batch,
        )
        shown = self.is_main and sys.stderr.isatty()
        bar = tqdm(total=config.max_train_steps, initial=self.step, disable=not shown, unit="step")
        micro, since, began = 0, self.step, time.perf_counter()
        for ordinals, batch in loader:
            if isinstance(batch, UserError):
                raise batch
            draws = Draws(config.seed, ordinals, accelerator.device)
            with accelerator.accumulate(self.model):
                with accelerator.autocast():  # a network that is split is not wrapped in it
                    loss, extra = self.model(to_device(batch, accelerator.device), draws, self.step)
                # one process's trouble, or its signal, is everybody's: none must wait for one that has stopped
                heard = torch.stack([loss.detach().float(), loss.new_tensor(float(self.stop)).float()])
                value, stop = self.accelerator.reduce(heard, "mean").tolist()
                self._check_finite("loss", value)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = whole(accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm))
                    # a scaler leaves out a step that overflows and scales less from then on, but not for ever
                    self.skipped = 0 if math.isfinite(float(norm)) else self.skipped + 1
                    if self.skipped > (0 if accelerator.scaler is None else _MOST_SKIPPED):
                        self._check_finite("gradient's norm", float(norm))
                    extra["grad_norm"] = norm
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, number in {"loss": loss, **extra}.items():  # read when they are logged: to read is to wait
                one = whole(number.detach()).to(accelerator.device, torch.float32).reshape(())
                seen = torch.stack([one.nan_to_num(0.0, math.inf, -math.inf), (~one.isnan()).float()])
                self.seen[name] = self.seen[name] + seen if name in self.seen else seen
            micro += 1
            if micro % config.gradient_accumulation_steps:
                continue
            self.schedule.step()
            if self.ema:
                self.ema.step(self.parameters)
            self.step += 1
            bar.update()
            if self.step % config.logging_steps == 0 or self.step == config.max_train_steps:
                pace = (time.perf_counter() - began) / (self.step - since)
                means = {name: total / count for name, (total, count) in self._everybody().items() if count}
                self._log(means | {"lr": self.schedule.get_last_lr()[0], "seconds_per_step": pace})
                self.seen, since, began = {}, self.step, time.perf_counter()
            if self.validate and config.validation_steps and self.step % config.validation_steps == 0:
                with self._averaged():
                    self._log({f"validation/{name}": value for name, value in self.validate().items()})
                self._report_convergence()
                began = time.perf_counter()
            if stop or self.step % config.checkpointing_steps == 0 or self.step == config.max_train_steps:
                path = self._save()
                if stop:
                    raise Interrupted(path)
        bar.close()

    def _everybody(self) -> dict[str, tuple[float, float]]:
        """What was seen by all processes; all of them must ask together."""
        if not self.seen:
            return {}
        sums = torch.stack(list(self.seen.values()))
        return dict(zip(self.seen, map(tuple, self.accelerator.reduce(sums, "sum").tolist()), strict=True))

    def _check_finite(self, what: str, value: float) -> None:
        """Stop before a step would spoil the weights, and keep them."""
        if math.isfinite(value):
            return
        good = f"{self._save()} holds the last good state" if self.step else "nothing had been learnt"
        raise DivergenceError(
            f"the {what} is {value} at step {self.step}; {good}; start again with a smaller learning_rate"
        )

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the trained ones."""
        if not self.ema:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _save(self) -> Path:
        path = self.config.output_dir / f"checkpoint-{self.step}"
        main = self.is_main
        modules = {name: whole(module.state_dict(), main) for name, module in self.stage.trained_modules().items()}
        state: dict[str, Any] = {
            "optimizer": whole(self.optimizer.state_dict(), main),
            "schedule": self.schedule.state_dict(),
            "processes": self.accelerator.num_processes,
            "samples": self.fingerprint,
            "seen": self._everybody(),
        }
        if self.ema:
            state["ema"] = whole(self.ema.state_dict(), main)
        if self.accelerator.scaler:
            state["scaler"] = {**self.accelerator.scaler.state_dict(), "skipped": self.skipped}

        def write(folder: Path) -> None:
            for name, tensors in modules.items():
                contiguous = {key: value.contiguous() for key, value in tensors.items()}
                save_file(contiguous, folder / f"{name}.safetensors")
            torch.save(state, folder / "state.pt")
            (folder / "train.json").write_text(self.settings)

        if self.is_main:
            path = checkpoint.save(self.config.output_dir, self.step, write, self.config.checkpoints_total_limit)
        self.accelerator.wait_for_everyone()
        return path

    def _load(self, folder: Path) -> None:
        self.step = checkpoint.verify(folder)
        state = torch.load(folder / "state.pt", weights_only=True, map_location="cpu")
        before, now = state.get("processes", 1), self.accelerator.num_processes
        if before != now:
            raise checkpoint.CheckpointError(
                f"{folder} was made by {before} processes, here are {now}: steps would have other samples"
            )
        checkpoint.check_samples(folder, state.get("samples"), self.fingerprint)
        seen, device = state.get("seen", {}), self.accelerator.device  # of all processes: the others begin at nothing
        self.seen = {key: torch.tensor(seen[key] if self.is_main else (0.0, 0.0), device=device) for key in seen}
        for name, module in self.stage.trained_modules().items():
            load_whole(module, load_file(folder / f"{name}.safetensors"))
        self.optimizer.load_state_dict(split_optimizer(state["optimizer"], self.parameters))
        self.schedule.load_state_dict(state["schedule"])
        if self.accelerator.scaler is not None:
            self.skipped = state["scaler"].pop("skipped")
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.ema:
            pairs = zip(self.parameters, state["ema"]["shadow_params"], strict=True)
            self.ema.load_state_dict({**state["ema"], "shadow_params": [like(p, value) for p, value in pairs]})

    def _report_convergence(self) -> None:
        """Say at which step a ControlNet suddenly began to follow its control, once it has."""
        if not self.is_main:
            return
        lines = [json.loads(line) for line in (self.config.output_dir / "log.jsonl").read_text().splitlines()]
        measured = [(line["step"], line[_ADHERENCE]) for line in lines if _ADHERENCE in line]
        step = sudden_rise(measured)
        if step is not None and not any("sudden_convergence" in line for line in lines):
            self._log({"sudden_convergence": step})

    def _log(self, values: dict[str, float]) -> None:
        if not self.is_main:
            return
        record = {"step": self.step, **{name: round(value, 6) for name, value in values.items()}}
        with (self.config.output_dir / "log.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        if not sys.stderr.isatty():
            print(json.dumps(record), file=sys.stderr, flush=True)
        self.accelerator.log(values, step=self.step)

    def _trim_log(self) -> None:
        """Drop log lines of steps after the one that is resumed: they will be written again."""
        path = self.config.output_dir / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        path.write_text(
            "".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step)
        )


@contextmanager
def _signals(run: _Run) -> Iterator[None]:
    """Ctrl-C and SIGTERM finish the step, save and stop; a second Ctrl-C stops at once."""

    def ask(*_: object) -> None:
        if run.stop:
            raise KeyboardInterrupt
        run.stop = True

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
