"""Folders in sentence-transformers' form, against plain passes of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from draftsieve.core.errors import ModelError, ModelNotFoundError
from draftsieve.core.models.encoder import load_encoder
from draftsieve.core.models.shared import clear_loaded_models, shared_encoder

from .adapters_fixtures import TEXTS
from .embedders import write, write_encoder

SHORT = ["the ferry", "Tickets are sold at the harbour office .", "lamp"]


def states(folder: Path, text: str) -> torch.Tensor:
    """(tokens, hidden) of one text alone."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]


NAIVE = {
    "mean_tokens": lambda rows: rows.mean(0),
    "cls_token": lambda rows: rows[0],
    "max_tokens": lambda rows: rows.max(0).values,
    "lasttoken": lambda rows: rows[-1],
}


@pytest.mark.parametrize("how", NAIVE)
def test_pooling_is_what_the_folder_says(tmp_path: Path, how: str) -> None:
    folder = write_encoder(tmp_path, pooling={f"pooling_mode_{how}": True})
    expected = torch.stack([NAIVE[how](states(folder, text)) for text in SHORT])
    found = load_encoder(folder)(SHORT)  # a batch with padding
    assert torch.allclose(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5)


def test_several_poolings_stand_side_by_side(tmp_path: Path) -> None:
    both = {"pooling_mode_cls_token": True, "pooling_mode_max_tokens": True}
    folder = write_encoder(tmp_path, pooling=both)
    rows = states(folder, SHORT[1])
    expected = torch.cat([rows[0], rows.max(0).values])
    assert torch.allclose(load_encoder(folder)(SHORT)[1], expected / expected.norm(), atol=1e-5)
    newer = write_encoder(tmp_path / "newer", pooling={"pooling_mode": "cls"})
    first = states(newer, SHORT[0])[0]
    assert torch.allclose(load_encoder(newer)(SHORT)[0], first / first.norm(), atol=1e-5)


def test_a_plain_encoder_is_pooled_by_the_mean(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path, inner="0_Transformer")
    plain = load_encoder(folder / "0_Transformer")(SHORT)
    assert torch.equal(plain, load_encoder(folder)(SHORT))


def test_more_texts_than_a_batch_keep_their_order(tmp_path: Path) -> None:
    encoder = load_encoder(write_encoder(tmp_path))
    texts = [" ".join(TEXTS[n % 3].split()[: 1 + n % 11]) for n in range(150)]
    alone = torch.stack([encoder([text])[0] for text in texts])
    assert torch.allclose(encoder(texts), alone, atol=1e-5)
    assert encoder([]).numel() == 0


def test_prompts_length_and_case(tmp_path: Path) -> None:
    plain = load_encoder(write_encoder(tmp_path / "plain"))
    asks = {"query": "ask : ", "document": "find : "}
    prompted = load_encoder(write_encoder(tmp_path / "asks", prompts=asks))
    assert torch.equal(prompted.embed_query("the ferry"), plain.embed_query("ask : the ferry"))
    assert torch.equal(prompted.embed_documents(SHORT), plain(["find : " + t for t in SHORT]))
    folder = write_encoder(tmp_path / "usual", prompts={"other": "find : "})
    write(
        folder / "config_sentence_transformers.json",
        {"prompts": {"other": "find : "}, "default_prompt_name": "other"},
    )
    assert torch.equal(load_encoder(folder)(SHORT), prompted(SHORT))
    cut = load_encoder(write_encoder(tmp_path / "cut", length=4))  # two words and the ends
    assert torch.equal(cut(["the ferry"])[0], cut(["the ferry leaves at seven"])[0])
    assert torch.equal(cut(["the ferry"]), plain(["the ferry"]))
    lower = load_encoder(write_encoder(tmp_path / "lower", lower=True))
    assert torch.equal(lower(["The FERRY"]), plain(["the ferry"]))


def test_texts_spell_no_control_tokens(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    encoder, tokenizer = load_encoder(folder), AutoTokenizer.from_pretrained(folder)
    spelled = torch.stack([states(folder, "the [ SEP ] ferry").mean(0)])
    expected = spelled / spelled.norm()
    assert len(tokenizer("the [SEP] ferry").input_ids) == 5  # unguarded it is one
    assert torch.allclose(encoder(["the [SEP] ferry"]), expected, atol=1e-5)
    assert encoder(["the \ud800 ferry"]).isfinite().all()


def test_a_folder_is_loaded_once_a_process(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    one = shared_encoder(str(folder))
    assert shared_encoder(folder / "." / "") is one
    clear_loaded_models()
    assert shared_encoder(folder) is not one


def test_missing_and_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="There is no model"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ModelNotFoundError, match="no complete model"):
        load_encoder(tmp_path)
    weights = write_encoder(tmp_path / "a") / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError):
        load_encoder(weights.parent)
    weights.unlink()
    pickled = weights.parent / "pytorch_model.bin"
    torch.save({"embeddings.word_embeddings.weight": torch.zeros(2)}, pickled)
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_encoder(weights.parent)


def broken(tmp_path: Path, name: str, text: str) -> Path:
    folder = write_encoder(tmp_path / "broken")
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("modules.json", "[", "modules.json' is damaged"),
        ("modules.json", '[{"path": ""}]', "no list of modules"),
        ("1_Pooling/config.json", "{}", r"asks for the pooling \[\]; known are cls, max, mean"),
        ("1_Pooling/config.json", '{"pooling_mode_weightedmean_tokens": true}', "weightedmean"),
        ("config.json", "{}", "broken"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, text: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        load_encoder(broken(tmp_path, name, text))


def test_parts_that_are_not_known_are_refused(tmp_path: Path) -> None:
    dense = write_encoder(tmp_path / "dense", modules=("Transformer", "Pooling", "Dense"))
    with pytest.raises(ModelError, match=r"Transformer, Pooling, Dense; read are .*function"):
        load_encoder(dense)
    missing = write_encoder(tmp_path / "missing")
    (missing / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"which modules\.json names"):
        load_encoder(missing)
    aside = {"pooling_mode_mean_tokens": True, "include_prompt": False}
    prompted = write_encoder(tmp_path / "aside", pooling=aside, prompts={"query": "ask : "})
    with pytest.raises(ModelError, match="with those of the prompt"):
        load_encoder(prompted)
    with pytest.raises(ModelError, match="is a file"):
        load_encoder(broken(tmp_path, "x.gguf", "GGUF") / "x.gguf")


def test_lost_weights_are_told(tmp_path: Path) -> None:
    folder = write_encoder(tmp_path)
    model: Any = AutoModel.from_pretrained(folder)
    kept = {k: v for k, v in model.state_dict().items() if "attention.self" not in k}
    model.save_pretrained(folder, state_dict=kept)
    with pytest.raises(ModelError, match=r"lack 6 tensors, such as 'encoder\.layer"):
        load_encoder(folder)
