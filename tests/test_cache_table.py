"""How far methods on the cache stray from the full one: what is measured, and the report of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftsieve.core.config import SpecKV
from draftsieve.core.errors import ConfigError
from draftsieve.core.evaluation.cache_table import cache_table
from draftsieve.core.evaluation.intervals import ratio_of_means
from draftsieve.core.evaluation.likelihood import divergence, read_answer
from draftsieve.core.evaluation.methods import find_methods
from draftsieve.core.evaluation.records import Record
from draftsieve.core.evaluation.runner import measure
from draftsieve.core.evaluation.tasks import make_item
from draftsieve.core.kv_cache.greedy import greedy
from draftsieve.integrations import cli

from .adapters_fixtures import tiny_model, tiny_tokenizer
from .test_real_run import bench, record


def test_a_method_is_measured_on_what_the_full_cache_would_have_said() -> None:
    """The same divergence as from plain passes over the whole prompt and the evicted cache."""
    item = make_item("one-key", 300, 0, bench().draft.count_tokens)
    methods = find_methods(["none", "snapkv", "speckv:scorer=snapkv,reduction=mean"])
    none, most, mean = measure(bench(), item, [(method, 0.2) for method in methods])
    assert none.own_divergence == 0
    assert most.own_divergence is not None
    assert most.own_divergence > 0

    case = bench().open(item)
    ids = bench().encoder.encode(item.prompt()).ids
    said = greedy(bench().target, ids, 5)
    full = read_answer(bench().target, ids, said)
    assert torch.equal(full.expected.argmax(-1), said)
    for found, method in ((most, SpecKV(ratio=0.2, scorer="snapkv")), (mean, None)):
        method = method or SpecKV(ratio=0.2, scorer="snapkv", reduction="mean")
        pipeline, options = bench().pipeline, [bench().generation]
        start = pipeline.begin(pipeline.prepare([case.prompt], method, options, "raise", None))
        assert start is not None
        expected = divergence(full, read_answer(bench().target, start, said))
        assert found.own_divergence == pytest.approx(expected, rel=1e-3)
    assert most.own_divergence != mean.own_divergence


def test_methods_that_shorten_prompts_have_no_such_figure() -> None:
    item = make_item("one-key", 300, 0, bench().draft.count_tokens)
    (found,) = measure(bench(), item, [(find_methods(["head"])[0], 0.2)])
    assert found.divergence is not None
    assert found.own_divergence is None


def test_options_of_speckv_are_checked() -> None:
    with pytest.raises(ConfigError, match="speckv:window=3 holds no options of SpecKV"):
        find_methods(["speckv:window=3"])


def rows() -> list[Record]:
    found = []
    for item, size in (("a", 1.0), ("b", 3.0)):
        found += [
            record(item, "none", 1.0, log_likelihood=-1.0, divergence=0.0, own_divergence=0.0),
            record(
                item, "snapkv", 0.5, log_likelihood=-2.0, divergence=0.5, own_divergence=2 * size
            ),
            record(item, "speckv", 0.5, log_likelihood=-1.5, divergence=0.5, own_divergence=size),
            record(item, "head", 0.5, log_likelihood=-1.5, divergence=0.5),
        ]
    return found


def test_the_table_compares_with_the_reference() -> None:
    plain = cache_table(rows(), "none").splitlines()
    assert "times" not in plain[0]
    assert "| speckv | 0.5 | 50 | 2.000 [1.000, 3.000] | 0.500 [0.500, 0.500] | -0.500" in plain[-1]
    paired = cache_table(rows(), "snapkv").splitlines()
    assert "KL, own answer | minus snapkv | times snapkv" in paired[0]
    assert "-2.000 [-3.000, -1.000] | 0.50 [0.50, 0.50]" in paired[-1]
    assert "+0.500 [+0.500, +0.500]" in paired[-1]  # log-likelihood minus snapkv
    assert "head" not in "".join(paired)


def test_there_is_no_table_without_such_methods() -> None:
    assert cache_table([r for r in rows() if r.method in ("none", "head")], "none") == ""
    assert cache_table([replace(r, own_divergence=None) for r in rows()], "none") == ""


def test_the_ratio_of_means_is_weighted_by_size() -> None:
    ratio, low, high = ratio_of_means([1.0, 1.0], [1.0, 3.0])
    assert ratio == 0.5
    assert (low, high) == pytest.approx((1 / 3, 1.0))
    with pytest.raises(ValueError, match="above 0"):
        ratio_of_means([1.0], [0.0])


def test_the_command_quantises_the_draft_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes")
    for name, hidden in (("target", 64), ("draft", 32)):
        tiny_model(hidden, 1).save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
    options = ["--target", str(tmp_path / "target"), "--draft", str(tmp_path / "draft")]
    options += ["--length", "300", "--items", "1", "--tasks", "one-key", "--max-new-tokens", "3"]
    options += ["--methods", "none", "--no-progress"]
    weights = []
    for name, more in (("plain", []), ("int8", ["--draft-quantization", "int8"])):
        assert cli.main(["eval", *options, *more, "--out", str(tmp_path / name)]) == 0
        weights.append(json.loads((tmp_path / name / "run.json").read_text())["weights"])
    assert weights[0]["target"] == weights[1]["target"]
    assert weights[0]["draft"] != weights[1]["draft"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["eval", "--draft-quantization", "int3"])
    assert "'int3' is none of nf4, int8, torchao" in capsys.readouterr().err
