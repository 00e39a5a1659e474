"""Puts the measured tables into the model card and thins the learning curve.

Run `python -m examples.train_builtin.card` after `evaluate.py`. In the card, the text between
`<!-- NAME -->` and `<!-- end -->` is replaced by the table of that name.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
KEPT_LINES = 60  # of each model's log
SHOWN_LINES = 12


def percent(cell: dict[str, Any]) -> str:
    """Share with its interval."""
    low, high = 100 * cell["low"], 100 * cell["high"]
    return f"{100 * cell['exact']:.1f} % [{low:.1f}, {high:.1f}]"


def accuracy_table(results: dict[str, Any]) -> str:
    """One row a cell, one column a model."""
    models = results["models"]
    names = [name for name in ("target", "draft") if name in models]
    lines = ["| cell | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for cell in models[names[0]]:
        shown = [models[name].get(cell) for name in names]
        lines.append(f"| {cell} | " + " | ".join(percent(c) if c else "-" for c in shown) + " |")
        for key, label in (
            ("shares_only_name", "question shares only the name"),
            ("shares_more", "question shares more"),
            ("name_first", "fact names entity, then value"),
            ("value_first", "fact names value, then entity"),
        ):
            if all(c and key in c for c in shown) and "no passages" not in cell:
                parts = " | ".join(percent(c[key]) for c in shown if c)
                lines.append(f"| – {label} | {parts} |")
    return "\n".join(lines)


def thin(log: Path, model: str) -> list[dict[str, Any]]:
    """Evenly spaced lines of a log, without what a restart from a checkpoint took back."""
    lines: list[dict[str, Any]] = []
    for text in reversed(log.read_text(encoding="utf-8").splitlines()):
        line = json.loads(text, parse_constant=lambda _: None)
        if not lines or line["tokens"] < lines[-1]["tokens"]:
            lines.append(line)
    lines.reverse()
    step = max(1, len(lines) // KEPT_LINES)
    kept = [line for i, line in enumerate(lines) if i % step == 0 or "dev_exact" in line]
    if kept[-1] is not lines[-1]:
        kept.append(lines[-1])
    return [{"model": model, **line} for line in kept]


def curve_table(curve: list[dict[str, Any]]) -> str:
    """A few lines of the learning curves."""
    lines = [
        "| model | tokens | minutes | phase | answer loss | answer accuracy | dev one-fact exact |",
        "|---|---|---|---|---|---|---|",
    ]
    for model in ("draft", "target"):
        own = [c for c in curve if c["model"] == model and "dev_exact" in c and c["answer_loss"]]
        step = max(1, len(own) // SHOWN_LINES)
        for line in [*own[:-1:step], *own[-1:]]:
            dev = line["dev_exact"].get("one-fact", "-")
            lines.append(
                f"| {model} | {line['tokens'] / 1e6:.1f}M | {line['seconds'] / 60:.0f} "
                f"| {line['phase']} | {line['answer_loss']:.2f} | {line['answer_accuracy']:.3f} "
                f"| {dev} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".work"))
    parser.add_argument("--card", type=Path, default=Path("core/builtin/MODEL_CARD.md"))
    options = parser.parse_args()
    curve = []
    for model in ("draft", "target"):
        curve += thin(options.work / model / "log.jsonl", model)
    path = HERE / "learning_curve.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in curve), encoding="utf-8")
    results = json.loads((HERE / "results.json").read_text(encoding="utf-8"))
    text = options.card.read_text(encoding="utf-8")
    for name, table in (("accuracy", accuracy_table(results)), ("curve", curve_table(curve))):
        start, rest = text.split(f"<!-- {name} -->\n")
        _, end = rest.split("<!-- end -->", 1)
        text = f"{start}<!-- {name} -->\n{table}\n<!-- end -->{end}"
    options.card.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
