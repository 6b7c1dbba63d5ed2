"""`DistillTrainer`: transformers' Trainer with our loss, our batches, our checkpoints and our log.

What differs from the base class: losses are divided by token counts of the whole optimiser step, over all
micro-batches and ranks; teachers may run online; each loss term is watched and logged; checkpoints are
safetensors and JSON (`checkpoint.py`), and one is left where the process is asked to end (`core.stopping`), within a
micro-batch. Which step's weights are kept, and whether training ends before its last, is a `Selection`'s to say. It
knows nothing of recipes' files or of the run folder's layout.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback

from kvdistill.arms.batches import Batch, BatchMaker, token_counts
from kvdistill.arms.distiller import Distiller, DistillOutput
from kvdistill.arms.order import ExampleNumbers, FixedOrder
from kvdistill.arms.shares import gradient_shares
from kvdistill.core.errors import Diverged
from kvdistill.core.files import append_json_line, keep_json_lines, read_json_lines, write_json_lines
from kvdistill.core.recipe import ArmRecipe, OptimiserRecipe, TrainRecipe
from kvdistill.core.runtime import Stopwatch
from kvdistill.core.stopping import ALWAYS, Stopped, give_in, is_asked, put_off
from kvdistill.fuse.routing_record import RoutingRecord
from kvdistill.losses import kv_weight_at
from kvdistill.stages.train.checkpoint import (
    BEST,
    Generators,
    drop_old_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    restore_generators,
    save_checkpoint,
)
from kvdistill.stages.train.selection import Selection

SCHEDULES = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}


def training_arguments(recipe: OptimiserRecipe, folder: Path, *, seed: int, cpu: bool) -> TrainingArguments:
    """The Trainer's arguments for a recipe's `train` section; everything is written under `folder`."""
    train = recipe if isinstance(recipe, TrainRecipe) else TrainRecipe(**recipe.model_dump())
    if "wandb" in train.report_to:  # it would write beside wherever the command was given
        os.environ["WANDB_DIR"] = str(folder)
    made = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=train.steps,
        per_device_train_batch_size=train.batch_size,
        gradient_accumulation_steps=train.accumulation,
        learning_rate=train.learning_rate,
        adam_beta1=train.adam_betas[0],
        adam_beta2=train.adam_betas[1],
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        lr_scheduler_type=SCHEDULES[train.schedule],
        lr_scheduler_kwargs={"min_lr_rate": train.min_lr_ratio} if train.schedule == "cosine" else None,
        warmup_steps=train.lr_warmup_steps,
        bf16=train.bf16,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a NaN stops the run (see compute_loss), it is not averaged away
        save_strategy="steps",
        save_steps=train.save_every,
        save_total_limit=train.keep_checkpoints,
        report_to=[name for name in train.report_to if name != "tensorboard"] or "none",  # see resume_or_start
        seed=seed,
        use_cpu=cpu,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=not cpu,
    )
    # one process trains on one GPU, the first it sees: with several, Trainer would split every batch among them
    made._n_gpu = min(1, made.n_gpu)
    return made


class DistillTrainer(Trainer):
    """Trains a `Distiller` over a fixed order of examples.

    order: example numbers for the whole training. run_teachers: gives a batch the targets of online teachers.
    tensorboard: folder for its event files (transformers' own place for them is among the checkpoints, which do not
    stay). on_step(step, trainer): called after every optimiser step (learning curves, progress); gives the validation
    NLL where `selection` has a point and this is the first rank.
    """

    def __init__(
        self,
        model: Distiller,
        args: TrainingArguments,
        batches: BatchMaker,
        order: Sequence[int],
        *,
        arm: ArmRecipe | None = None,
        run_teachers: Callable[[Batch], Batch] | None = None,
        log_file: Path,
        projector_lr_scale: float = 1.0,
        tensorboard: Path | None = None,
        on_step: Callable[[int, DistillTrainer], float | None] | None = None,
        clock: Stopwatch | None = None,
        selection: Selection | None = None,
    ) -> None:
        self._order = order
        self._arm = arm
        self._run_teachers = run_teachers
        self._log_file = log_file
        self._projector_lr_scale, self._tensorboard = projector_lr_scale, tensorboard
        self._sums: dict[str, list[float]] = {}
        self._shares: dict[str, dict[str, float | None]] | None = None
        self._routing = RoutingRecord(model.teachers, max(1, len(model.student_layers))) if model.teachers else None
        self._clock = clock or Stopwatch()
        self._selection = selection
        self.seen = torch.zeros(2, dtype=torch.float64)  # real tokens, loss tokens
        callbacks: list[TrainerCallback] = [_StepCallback(on_step, self)] if on_step else []
        super().__init__(
            model=model,
            args=args,
            train_dataset=ExampleNumbers(len(batches.examples)),
            data_collator=batches,  # type: ignore[arg-type]  # a Batch where it expects a dict
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # progress is ours to show
        self.loss_is_scaled_for_ga = True  # sums are divided by the counts of the whole step

    # -- data ---------------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return FixedOrder(self._order)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of one optimiser step, and the token counts its losses are divided by."""
        self._between_steps = self._progress_state(), Generators.now()
        batches: list[Any] = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is not None:
                batches.append(batch)
        if not batches:
            return batches, torch.ones(1)
        counts = torch.stack([token_counts(batch, self._arm) for batch in batches]).sum(0)
        real = torch.stack([(batch.segments_BT > 0).sum() for batch in batches]).sum()
        asked = counts.new_tensor([float(is_asked())])  # ranks must leave before the same step
        both = torch.cat([asked, real[None].to(counts), counts]).to(device=device, dtype=torch.float32)
        if self.args.world_size > 1:
            both = self.accelerator.gather(both[None]).sum(0)
            if both[0] > 0:
                raise Stopped(signal.SIGTERM)
        self.seen += both[1:3].double().cpu()
        return batches, both[2:].clamp_min(1.0)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The arguments' optimiser; no weight decay on biases and norms; projectors at their own rate."""
        if self.optimizer is None:
            distiller: Distiller = self.model  # type: ignore[assignment]
            decayed = set(self.get_decay_parameter_names(distiller))
            # their annotation names one kind of module, any will do
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, distiller)  # type: ignore[arg-type]
            groups: dict[tuple[bool, bool], list[Tensor]] = {}
            for name, parameter in distiller.named_parameters():
                if parameter.requires_grad:
                    groups.setdefault((name.startswith("aligners."), name in decayed), []).append(parameter)
            self.optimizer = kind(
                [
                    {
                        "params": parameters,
                        "lr": self.args.learning_rate * (self._projector_lr_scale if of_aligner else 1.0),
                        "weight_decay": self.args.weight_decay if decays else 0.0,
                    }
                    for (of_aligner, decays), parameters in groups.items()
                ],
                **options,
            )
        return self.optimizer

    # -- loss ---------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """Not asked of the batch: the ledger counts by closed form (`ledger.py`)."""
        return 0

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        """Forward and backward: they change nothing that a checkpoint holds, so they may be cut short."""
        with put_off() if self.args.world_size == 1 else nullcontext():
            return super().training_step(*args, **options)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch: Batch = inputs if self._run_teachers is None else self._run_teachers(inputs)
        out: DistillOutput = model(batch, counts=num_items_in_batch, **self._weights_now())
        self._watch(out)
        self._note_shares(out)
        if self._routing is not None and out.weights is not None:
            self._routing.add(out.weights, batch.mask_BT, batch.tasks)
        loss = out.loss * self.args.world_size  # ranks are averaged, counts are global
        return (loss, out) if return_outputs else loss

    def _weights_now(self) -> dict[str, float | bool]:
        """What the loss of this step is told: of latents everything begins where they do."""
        arm, step, steps = self._arm, self.state.global_step, self.args.max_steps
        if arm is None:
            return {"kv_weight": 0.0}
        start = arm.latent.start(steps) if arm.thinks else 0
        thinks = step >= start

        def weight(full: float) -> float:
            return kv_weight_at(step - start, steps - start, full, arm.loss.kv_warmup, arm.loss.kv_fade)

        kv_weight = weight(arm.loss.kv_weight) if arm.needs_kv and thinks else 0.0
        if not arm.thinks:
            return {"kv_weight": kv_weight}
        return {
            "kv_weight": kv_weight,
            "self_weight": weight(arm.latent.self_weight) if arm.learns_from_itself and thinks else 0.0,
            "thinks": thinks,
        }

    def _watch(self, out: DistillOutput) -> None:
        """Stop at the first loss that is not a number, naming the term; keep sums for the log."""
        values = torch.stack([torch.stack([raw, entered]).float() for raw, _, entered in out.terms.values()]).tolist()
        for (name, (_, weight, _)), (value, entered) in zip(out.terms.items(), values, strict=True):
            if not (math.isfinite(value) and math.isfinite(entered)):  # entered: with the router's weights
                broken = value if not math.isfinite(value) else entered
                raise Diverged(
                    f"loss term {name!r} became {broken} at step {self.state.global_step + 1}; "
                    "the last good checkpoint is kept",
                    place=str(self._log_file.parent),
                    fix="lower train.learning_rate or loss.kv_weight, or look at this term's teacher; "
                    "then run the changed recipe in a new run_dir",
                )
            sums = self._sums.setdefault(name, [0.0, 0.0, 0.0, self.state.global_step])
            sums[0] += value
            sums[1] = weight
            sums[2] += entered

    def _note_shares(self, out: DistillOutput) -> None:
        """What share of the gradient each term has, in the first micro-batch of a step that will be logged."""
        step = self.state.global_step + 1
        logged = step == 1 or step % int(self.args.logging_steps) == 0
        # through `parts` and not through parameters: nothing is added to a gradient, no rank waits for another
        if logged and self._shares is None and out.seen and out.loss.requires_grad and self.is_world_process_zero():
            self._shares = gradient_shares(out.parts, out.seen)

    # -- log ----------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One row in log.jsonl: the loss's mean over the window, each term's, raw and weighted, over those of its steps
        that have it, and the routing."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._last_logged)
            sums = self._sums_of_all_ranks()
            terms = {}
            for name, (raw, weight, weighted, before) in sums.items():  # those of latents begin inside a window
                its = max(1, self.state.global_step - int(before))
                terms[name] = {"raw": raw / its, "weight": weight, "weighted": weighted / its}
            # not the Trainer's own mean, which forgets the steps before a resume
            logs["loss"] = sum(weighted / steps for _, _, weighted, _ in sums.values())
            row: dict[str, Any] = {
                "step": self.state.global_step,
                "loss": logs["loss"],
                "lr": logs.get("learning_rate"),
                "grad_norm": logs.get("grad_norm"),
                "terms": terms,
                "tokens": int(self.seen[0]),
                "seconds": round(self._clock.wall_s(), 3),
            }
            if self._shares is not None:
                row["gradient"] = self._shares
                logs |= {f"{name}/share": found["share"] for name, found in self._shares.items() if found["share"]}
                self._shares = None
            if self._routing is not None:
                row["routing"] = self._routing.row()
            if self.is_world_process_zero():
                append_json_line(self._log_file, row)
            for name, term in terms.items():
                logs[f"{name}/raw"], logs[f"{name}/weighted"] = term["raw"], term["weighted"]
            self._sums = {}
            self._last_logged = self.state.global_step
        super().log(logs, start_time)

    _last_logged = 0
    _saved = 0  # the step of the newest checkpoint that we wrote
    has_unmeasured_step = False  # asked to end while `on_step` was at work: it is made up for on resuming

    def sort_log(self) -> None:
        """A point that was measured after its step was logged goes to its place, before that row; measured twice (we
        were interrupted when it was written), it stands there once."""
        if self.is_world_process_zero() and self._log_file.exists():
            rows = {(row["step"], "val" not in row): row for row in read_json_lines(self._log_file)}
            write_json_lines(self._log_file, [rows[key] for key in sorted(rows)])

    def _sums_of_all_ranks(self) -> dict[str, list[float]]:
        """Raw and weighted sums over ranks: each rank divides its own tokens by the counts of all. Behind them the
        step before the first that had the term."""
        if self.args.world_size == 1 or not self._sums:
            return self._sums
        mine = torch.tensor([[raw, weighted] for raw, _, weighted, _ in self._sums.values()], device=self.args.device)
        total = self.accelerator.gather(mine[None]).sum(0).tolist()
        return {
            name: [raw, own[1], weighted, own[3]]
            for (name, own), (raw, weighted) in zip(self._sums.items(), total, strict=True)
        }

    # -- which weights, and until when --------------------------------------------------------

    def judge(self, step: int, nll: float | None) -> None:
        """A point of the learning curve was measured: is it the best so far, and does training end here?"""
        if self._selection is None or not self._selection.is_point(step) or not self._has_begun(step):
            return
        if nll is not None:
            self._selection.add(step, nll, self.accelerator.unwrap_model(self.model))
        ends = torch.tensor([float(self._selection.is_over)], device=self.args.device)
        if self.args.world_size > 1:  # only the first rank measures
            ends = self.accelerator.gather(ends)
        if ends[0] > 0:
            self.control.should_training_stop = self.control.should_save = True

    def _has_begun(self, step: int) -> bool:
        """Whether what validation judges was trained by then: of a student that thinks, its latents."""
        return self._arm is None or not self._arm.thinks or step > self._arm.latent.start(self.args.max_steps)

    def _run_epoch(self, **options: Any) -> None:  # type: ignore[override]
        if not self.control.should_training_stop:  # a training that was over when it was interrupted
            super()._run_epoch(**options)

    # -- checkpoints --------------------------------------------------------------------------

    def resume_or_start(self) -> int:
        """Train to the end, from the newest good checkpoint if there is one. Returns the step it started from.

        Asked to end, it leaves a checkpoint of the last step that is done before Stopped goes on its way.
        """
        found = newest_checkpoint(self._checkpoint_root())
        start = int(found.name.rsplit("-", 1)[1]) if found else 0
        if self.is_world_process_zero():
            keep_json_lines(self._log_file, lambda row: row["step"] <= start)
        self._last_logged = start
        if self._tensorboard is not None and self.is_world_process_zero():
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(self._tensorboard), purge_step=start + 1)
            self.add_callback(TensorBoardCallback(tb_writer=writer))
        with put_off(ALWAYS):
            try:
                self.train(resume_from_checkpoint=str(found) if found else None)
            except Stopped:
                if self.state.global_step > max(start, self._saved):
                    self._write_checkpoint(*self._between_steps)
                raise
        if self.has_unmeasured_step:  # asked in the last step: its checkpoint is there
            give_in()
        return start

    def _checkpoint_root(self) -> Path:
        assert self.args.output_dir is not None  # `training_arguments` gives one
        return Path(self.args.output_dir)

    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser itself: accelerate wraps it."""
        assert self.optimizer is not None
        return self.optimizer.optimizer if hasattr(self.optimizer, "optimizer") else self.optimizer

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._write_checkpoint(self._progress_state(), Generators.now())

    def _progress_state(self) -> dict[str, Any]:
        """What a checkpoint holds of us: counts, and what the next row of the log has so far."""
        return {
            "seen": self.seen.tolist(),
            "sums": {name: list(values) for name, values in self._sums.items()},
            "last_logged": self._last_logged,
            "routing": self._routing.state() if self._routing is not None else None,
            "unmeasured": self.has_unmeasured_step,
            **({"selection": self._selection.state()} if self._selection is not None else {}),
        }

    def _write_checkpoint(self, progress: dict[str, Any], generators: Generators) -> None:
        """Of the last step that is done. progress, generators: as they were then."""
        if self.is_world_process_zero():
            root = self._checkpoint_root()
            unwrapped = self.accelerator.unwrap_model(self.model)
            self._refuse_broken_weights(unwrapped)
            save_checkpoint(
                root / f"checkpoint-{self.state.global_step}",
                unwrapped,
                self._plain_optimizer(),
                self.lr_scheduler,
                {**progress, "seconds": [self._clock.wall_s(), self._clock.cpu_s()]},
                json.dumps(dataclasses.asdict(self.state), default=str),
                generators,
                self._selection.weights if self._selection is not None else {},
            )
            drop_old_checkpoints(root, self.args.save_total_limit or 2)
        self._saved = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert self.model is not None
        state = load_checkpoint(Path(resume_from_checkpoint), self.model)
        self.seen = torch.tensor(state["seen"], dtype=torch.float64)
        self._last_logged = state["last_logged"]
        # checkpoints of versions before terms began inside a window hold three values
        self._sums = {name: [*values, self._last_logged][:4] for name, values in state["sums"].items()}
        self.has_unmeasured_step = state.get("unmeasured", False)
        self._clock.advance(*state["seconds"])
        if self._routing is not None and state["routing"] is not None:
            self._routing.restore(state["routing"])
        if self._selection is not None:
            self._selection.restore(state["selection"], Path(resume_from_checkpoint) / BEST)

    def _refuse_broken_weights(self, model: Any) -> None:
        """A gradient that is no number ruins weights under a loss that is one: no checkpoint of those."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
                raise Diverged(
                    f"weight {name!r} is no longer finite after step {self.state.global_step}; "
                    "the last good checkpoint is kept",
                    place=str(self._log_file.parent),
                    fix="lower train.learning_rate, then run the changed recipe in a new run_dir",
                )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            assert self.model is not None
            load_checkpoint(Path(checkpoint), self.model, self._plain_optimizer(), self.lr_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_generators(Path(checkpoint))


class _StepCallback(TrainerCallback):
    """Calls `on_step`, which may take minutes (a learning curve's point) and is cut short where one is asked to end."""

    def __init__(self, on_step: Callable[[int, DistillTrainer], float | None], trainer: DistillTrainer) -> None:
        self._on_step, self._trainer = on_step, trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._trainer.has_unmeasured_step:
            self._measure(state.global_step)
            self._trainer.sort_log()
        elif state.global_step:  # it may have been over when its checkpoint was written
            self._trainer.judge(state.global_step, None)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._measure(state.global_step)

    def _measure(self, step: int) -> None:
        self._trainer.has_unmeasured_step, nll = True, None
        try:
            with put_off(0.0):
                nll = self._on_step(step, self._trainer)
            self._trainer.has_unmeasured_step = False
        except Stopped:  # the step itself is done: it is logged, and its checkpoint says what is missing
            pass
        self._trainer.judge(step, nll)
