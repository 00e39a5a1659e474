"""Trains one model of the pair, with checkpoints and resume.

Run `python -m examples.train_builtin.train --model draft --minutes 90 --out .work/draft`.
The run plans its curriculum and the decay of the learning rate by the share of `--minutes` (or of
`--tokens`) that is used up; `--resume` goes on from the checkpoint in `--out`. Several processes
share a run with `python -m torch.distributed.run --nproc-per-node 2 -m` before the module's name:
each takes its part of a step's tokens (and, with `--device cuda`, a GPU of its own), and the
gradients are averaged.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, distributed

from .batches import DEV_SEED, LONGEST, PHASES, TYPES, Batch, BatchSource, make_batch
from .distil import Teacher, distil_loss
from .export import export
from .model import PLAIN, SHAPES, Arithmetic, LeanLlama, link_loss, rope_tables

logger = logging.getLogger(__name__)
WARMUP_STEPS = 100
SMOOTHING = 0.95
COUNTERS = (
    "step",
    "tokens",
    "inherited_tokens",
    "seconds",
    "phase",
    "phase_step",
    "accuracy",
    "loss",
)


class Run:
    """Model, optimisers and counters of a training run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.device = own_device(options.device, self.world)
        if self.world > 1:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)  # where NCCL works
            distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.shape = SHAPES[options.model]
        torch.manual_seed(options.seed)
        self.model = LeanLlama(self.shape).to(self.device)
        named = list(self.model.named_parameters())
        matrices = [p for n, p in named if p.dim() == 2 and "embedding" not in n]
        others = [p for n, p in named if p.dim() != 2 or "embedding" in n]
        self.optimisers = [
            torch.optim.Muon(
                matrices,
                lr=options.rate,
                weight_decay=0.05,
                momentum=0.95,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(others, lr=options.rate, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step, self.tokens, self.seconds, self.phase, self.phase_step = 0, 0, 0.0, 0, 0
        self.inherited_tokens = 0  # read by the model this one was grown from
        self.accuracy, self.loss, self.link_loss = 0.0, 0.0, 0.0
        self.tables = {
            length: tuple(t.to(self.device) for t in rope_tables(self.shape, length))
            for phase in PHASES
            for length in phase.lengths
        }
        torch._dynamo.config.recompile_limit = 64  # one form per length and mode
        self.teacher = Teacher(options.teacher, self.device) if options.teacher else None
        self.arithmetic = Arithmetic.compiled() if options.compile else PLAIN

    def predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses and hits (picked,) of a batch, the loss of its links, and that to the teacher."""
        length = batch.ids.shape[1]
        cos, sin = self.tables[length]
        ids = torch.from_numpy(batch.ids).to(self.device)
        picked = torch.from_numpy(batch.picked).to(self.device)
        wanted = torch.from_numpy(batch.wanted).to(self.device)
        # compiling costs more than it gives for the short phases and for evaluation
        worth = torch.is_grad_enabled() and length >= 128
        with torch.autocast(self.device.type, torch.bfloat16):
            links = torch.from_numpy(batch.links).to(self.device) if self.link_weight else None
            arithmetic = self.arithmetic if worth else PLAIN
            logits, seen = self.model(ids, cos, sin, picked, arithmetic, links)
            taught = torch.zeros(())
            if self.teacher and torch.is_grad_enabled():
                asked = torch.from_numpy(answer_mask(batch)).to(self.device)
                answers = self.teacher.logits(ids, picked[asked], arithmetic)
                taught = distil_loss(logits[asked].float(), answers)
        logits = logits.float()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        return losses, logits.argmax(-1) == wanted, link_loss(seen, links), taught

    @property
    def progress(self) -> float:
        """Used-up share of the budget."""
        share = self.seconds / (60 * self.options.minutes) if self.options.minutes else 0.0
        return max(float(share), self.tokens / self.options.tokens if self.options.tokens else 0.0)

    @property
    def link_weight(self) -> float:
        """How much links count now; it falls linearly to nothing."""
        until = float(self.options.links_until)
        return float(self.options.links) * max(0.0, 1 - self.progress / until) if until else 0.0

    def set_rate(self) -> float:
        """Warm up, hold, decay linearly; a new length warms up again for 20 steps."""
        rate = float(self.options.rate) * min(1.0, (self.step + 1) / WARMUP_STEPS)
        rate *= min(1.0, max(0.01, (1 - self.progress) / float(self.options.decay)))
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        return rate

    def train_batch(self, batch: Batch) -> None:
        """One step."""
        started = time.perf_counter()
        self.set_rate()
        losses, hits, missed, taught = self.predict(batch)
        weight = torch.from_numpy(batch.weight).to(self.device)
        loss = (losses * weight).sum() / weight.sum()
        loss = loss + self.link_weight * missed + self.options.distil * taught
        loss.backward()  # type: ignore[no-untyped-call]
        answers = torch.from_numpy(answer_mask(batch)).to(self.device)
        right, lost, count, seconds = self.average(
            hits[answers].float().sum(),
            losses.detach()[answers].sum(),
            answers.float().sum(),
            torch.tensor(time.perf_counter() - started, device=self.device),
        )
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if count:
            keep = SMOOTHING if self.phase_step > 5 else 0.5
            self.accuracy = keep * self.accuracy + (1 - keep) * right / count
            self.loss = keep * self.loss + (1 - keep) * lost / count
        self.link_loss = SMOOTHING * self.link_loss + (1 - SMOOTHING) * float(missed.detach())
        self.step += 1
        self.phase_step += 1
        self.tokens += batch.ids.size * self.world
        self.seconds += seconds  # compiling a new length counts as well

    def average(self, *figures: Tensor) -> list[float]:
        """Average the gradients, and these scalars, over the processes of the run."""
        if self.world > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            parts = [g.flatten() for g in gradients]
            flat = torch.cat((*parts, torch.stack([f.float() for f in figures])))
            distributed.all_reduce(flat)
            flat /= self.world
            sizes = [g.numel() for g in gradients]
            *averaged, means = torch.split(flat, [*sizes, len(figures)])
            for gradient, mean in zip(gradients, averaged, strict=True):
                gradient.copy_(mean.view_as(gradient))
            figures = tuple(means)
        return [float(figure) for figure in figures]

    def next_phase(self) -> bool:
        """Whether the curriculum moves on now."""
        now = PHASES[self.phase]
        if self.options.stay or self.phase == len(PHASES) - 1 or self.phase_step < 30:
            return False
        if self.accuracy < now.accuracy and self.progress < now.until:
            return False
        self.phase, self.phase_step = self.phase + 1, 0
        self.accuracy = 0.0
        return True

    @torch.no_grad()
    def develop(self, batches: int = 4) -> dict[str, float]:
        """Share of answers that greedy decoding would give exactly, on held-out names."""
        right: dict[str, list[bool]] = defaultdict(list)
        for number in range(batches):
            batch = make_batch(
                number,
                DEV_SEED,
                self.phase,
                self.options.batch // 2,
                self.options.work,
                held_out=True,
            )
            hits = self.predict(batch)[1]
            exact = [True] * len(batch.types)
            for group, hit in zip(batch.group.tolist(), hits.tolist(), strict=True):
                if group >= 0 and not hit:
                    exact[group] = False
            for kind, ok in zip(batch.types.tolist(), exact, strict=True):
                right[TYPES[kind]].append(ok)
        return {kind: round(sum(oks) / len(oks), 3) for kind, oks in sorted(right.items())}

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        state = {
            "model": self.model.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "counters": {name: getattr(self, name) for name in COUNTERS},
        }
        path = self.options.out / "checkpoint.pt"
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.options.out / "checkpoint.pt", map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state.get("optimisers", ()), strict=False):
            optimiser.load_state_dict(saved)
        for name, value in state["counters"].items():
            setattr(self, name, value)


def own_device(name: str, world: int) -> torch.device:
    """The device of this process; of several processes on CUDA, each has its own."""
    device = torch.device(name)
    if device.type == "cuda" and world > 1:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def answer_mask(batch: Batch) -> NDArray[np.bool_]:
    """Picked positions that count for accuracy: answers; copied spans where nothing else is."""
    answers: NDArray[np.bool_] = batch.group >= 0
    if PHASES[batch.phase].copy_share == 1:
        return answers
    counted: NDArray[np.bool_] = answers & (batch.types[batch.group] != TYPES.index("copy"))
    return counted


def log_line(run: Run, rate: float, dev: dict[str, float] | None) -> None:
    """Append to `log.jsonl`."""
    line: dict[str, object] = {
        "step": run.step,
        "tokens": run.tokens,
        "seconds": round(run.seconds, 1),
        "phase": PHASES[run.phase].name,
        "rate": round(run.optimisers[0].param_groups[0]["lr"], 6),
        "answer_loss": round(run.loss, 4),
        "answer_accuracy": round(run.accuracy, 4),
        "link_loss": round(run.link_loss, 4),
        "tokens_per_second": round(rate),
    }
    if dev is not None:
        line["dev_exact"] = dev
    with (run.options.out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    logger.info("%s", line)


def train(options: argparse.Namespace) -> None:
    """Train until the budget is used up."""
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    if options.resume:
        run.load()
    if options.phase is not None:
        run.phase, run.phase_step = options.phase, 0
    tokens = options.batch // run.world
    source = BatchSource(options.work, options.seed + 1000 * run.rank, run.step, run.phase, tokens)
    last_log = last_save = last_dev = time.monotonic()
    logged_tokens = run.tokens
    for batch in source:
        if run.progress >= 1:
            break
        run.train_batch(batch)
        if run.next_phase():
            source.set_phase(run.phase)
        if run.rank:
            continue
        now = time.monotonic()
        if now - last_log > options.log_seconds:
            dev = None
            if now - last_dev > options.dev_seconds:
                dev, last_dev = run.develop(), now
            log_line(run, (run.tokens - logged_tokens) / (now - last_log), dev)
            last_log, logged_tokens = time.monotonic(), run.tokens
        if now - last_save > options.save_seconds:
            run.save()
            last_save = now
    source.close()
    if run.rank:
        return
    run.save()
    log_line(run, 0.0, run.develop())
    export(run.model, options.work / "tokenizer", options.out / "export", LONGEST)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    parser.add_argument("--work", type=Path, default=Path(".work"), help="has corpus/, tokenizer/")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint, log and export")
    parser.add_argument("--minutes", type=float, default=0.0, help="wall-clock budget")
    parser.add_argument("--tokens", type=float, default=0.0, help="token budget")
    parser.add_argument("--batch", type=int, default=8192, help="tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="share of the budget")
    parser.add_argument("--links", type=float, default=0.0, help="weight of the evidence loss")
    parser.add_argument("--links-until", type=float, default=0.5, help="share of the budget")
    parser.add_argument("--teacher", type=Path, help="exported target to distil the draft on")
    parser.add_argument("--distil", type=float, default=1.0, help="weight of the teacher's loss")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--phase", type=int, help="go to this phase at once")
    parser.add_argument("--stay", action="store_true", help="do not leave the phase")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument("--log-seconds", type=float, default=20)
    parser.add_argument("--dev-seconds", type=float, default=150)
    parser.add_argument("--save-seconds", type=float, default=120)
    options = parser.parse_args()
    if not options.minutes and not options.tokens:
        parser.error("give --minutes or --tokens, the budget of the whole run")
    return options


def main() -> None:
    """Train as the command line says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    train(options)


if __name__ == "__main__":
    main()
