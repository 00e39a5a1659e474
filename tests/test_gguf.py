"""GGUF files: the model, its tokenizer, quantising anew, and what cannot be read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from draftsieve import Compressor, Engine, Generation, Prompt, Quantization, SpecPC
from draftsieve.core.errors import MissingExtraError, ModelError, ModelNotFoundError
from draftsieve.core.models.loading import end_token_ids, load_model, load_tokenizer
from draftsieve.core.models.names import resolve
from draftsieve.core.prompt.encoder import PromptEncoder
from draftsieve.integrations._shared.options import EngineOptions
from draftsieve.retrievers.options import DraftOptions

from . import tiny_gguf

TEXTS = (
    "The year 1884, and  3 lamps\n\n12 ropes; ¼ of ² tins",
    "def main(argv):\n    return 12.5  # naïve café",
    "<|im_end|>東京<|im_start|>user\n",
    "a    b\n\n\n\nc   5",
)
IDS = torch.arange(3, 60).unsqueeze(0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("one") / "tiny.gguf")


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(IDS).logits
    return logits


def test_a_file_gives_the_model_that_was_written(file: Path) -> None:
    loaded = load_model(file, device="cpu", progress=False)
    assert torch.equal(_logits(loaded.model), _logits(tiny_gguf.model()))
    assert loaded.model.dtype == torch.float32
    assert end_token_ids(loaded.model).tolist() == [2, 0]
    for named in (load_model(str(file.parent)), load_model(file.parent, gguf_file=file.name)):
        assert torch.equal(_logits(named.model), _logits(loaded.model))


def test_adapters_take_one_file_of_a_folder(tmp_path: Path) -> None:
    """The folder has two, as many repositories do; without a name the error lists them."""
    for kind in ("F32", "Q8_0"):
        tiny_gguf.write(tmp_path / f"{kind}.gguf", kind)
    packed = _logits(load_model(tmp_path / "Q8_0.gguf", device="cpu", progress=False).model)
    name, quiet = str(tmp_path), {"device": "cpu"}
    engine = EngineOptions(
        model=name, draft=name, gguf_file="F32.gguf", draft_gguf_file="Q8_0.gguf", **quiet
    ).loaded
    assert engine.draft is not None
    assert torch.equal(_logits(engine.target), _logits(tiny_gguf.model()))
    assert torch.equal(_logits(engine.draft), packed)
    sieve = DraftOptions(model=name, gguf_file="Q8_0.gguf", **quiet).loaded
    assert torch.equal(_logits(sieve.model), packed)
    for options in (EngineOptions, DraftOptions):
        with pytest.raises(ModelError, match=r"F32\.gguf"):
            options(model=name, **quiet)


@pytest.mark.parametrize(("kind", "most"), [("F16", 1e-3), ("Q8_0", 0.02), ("Q4_1", 0.2)])
def test_packed_weights_are_unpacked(kind: str, most: float, tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", kind)
    exact, near = _logits(tiny_gguf.model()), _logits(load_model(file, progress=False).model)
    assert 0 < (exact - near).norm() / exact.norm() < most


def test_the_tokenizer_is_the_one_that_was_written(file: Path) -> None:
    for found in (load_model(file, progress=False).tokenizer, load_tokenizer(file)):
        theirs = tiny_gguf.tokenizer()
        assert len(found) == len(theirs)
        assert found.get_vocab() == theirs.get_vocab()
        assert found.special_tokens_map == theirs.special_tokens_map
        assert found.chat_template == theirs.chat_template
        for text in TEXTS:
            assert found(text).input_ids == theirs(text).input_ids
            assert found.decode(found(text).input_ids) == text


def test_a_prompt_has_the_ids_of_the_string_form_and_begins_once(file: Path) -> None:
    tokenizer = load_tokenizer(file)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who repaired the lamp in 1902?"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = PromptEncoder(tokenizer).encode(Prompt.from_messages(messages)).ids.tolist()
    assert ids == tokenizer(rendered, add_special_tokens=False).input_ids
    assert ids[:2].count(tokenizer.bos_token_id) == 1


def test_control_tokens_outside_the_byte_alphabet_stay_whole(tmp_path: Path) -> None:
    """transformers takes these for mistakes of llama.cpp and spells them byte by byte."""
    names = {0: "<｜end▁of▁text｜>", 1: "<｜User｜>"}
    file = tiny_gguf.write(tmp_path / "tiny.gguf", control=names)
    loaded = load_model(file, progress=False)
    found = loaded.tokenizer
    assert len(found) == loaded.model.config.vocab_size
    assert found("Hi<｜User｜>").input_ids[-1] == 1
    assert found.bos_token_id == 1
    assert "<|endoftext|>" not in found.get_vocab()
    control = Prompt.from_messages([{"role": "user", "content": "Is <｜User｜> here?"}])
    assert 1 not in PromptEncoder(found).encode(control).ids.tolist()


def test_all_tokens_that_end_a_turn_end_an_answer(tmp_path: Path) -> None:
    more = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.eom_token_id": 8}
    file = tiny_gguf.write(tmp_path / "tiny.gguf", fields=more, control={3: "<end_of_turn>"})
    assert end_token_ids(load_model(file, progress=False).model).tolist() == [2, 7, 8, 0, 3]


@pytest.mark.parametrize("bits", [4, 8])
def test_unpacked_weights_can_be_quantised_anew(bits: int, file: Path) -> None:
    weights = Quantization.model_validate({"bits": bits})
    small = load_model(file, quantization=weights, device="cpu", progress=False).model
    exact = tiny_gguf.model()
    assert small.get_memory_footprint() < exact.get_memory_footprint()  # type: ignore[no-untyped-call]
    error = (_logits(small) - _logits(exact)).norm() / _logits(exact).norm()
    assert 0 < error < (0.35 if bits == 4 else 0.1)
    assert end_token_ids(small).tolist() == [2, 0]


def test_a_loaded_model_can_be_saved_as_safetensors(file: Path, tmp_path: Path) -> None:
    loaded = load_model(file, progress=False)
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, progress=False)
    assert torch.equal(_logits(again.model), _logits(loaded.model))
    assert again.tokenizer(TEXTS[0]).input_ids == loaded.tokenizer(TEXTS[0]).input_ids
    assert end_token_ids(again.model).tolist() == [2, 0]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_llama_31s_position_scaling_is_read(tmp_path: Path) -> None:
    """transformers drops the tensor that holds it."""
    config = tiny_gguf.model().config.to_dict() | {"tie_word_embeddings": True}
    config["rope_parameters"] = {**LLAMA3, "rope_theta": 500_000.0}
    written = LlamaForCausalLM(LlamaConfig(**config)).eval()
    written.load_state_dict(tiny_gguf.model().state_dict())
    plain = 500_000.0 ** -(torch.arange(8) / 8)
    factors = plain / written.model.rotary_emb.inv_freq
    assert 1 < factors.max() <= 8
    file = tiny_gguf.write(tmp_path / "tiny.gguf", theta=500_000.0, rope_factors=factors)
    assert torch.allclose(_logits(load_model(file).model), _logits(written), atol=1e-5)
    odd = tiny_gguf.write(tmp_path / "odd.gguf", theta=500_000.0, rope_factors=factors + 0.5)
    with pytest.raises(ModelError, match="scales positions"):
        load_model(odd)


def test_engine_and_compressor_take_files(file: Path) -> None:
    engine = Engine.load(file, file.parent, draft_gguf_file=file.name, progress=False)
    short = Generation(max_new_tokens=4)
    method = SpecPC(ratio=0.5)
    answer = engine.answer("Who?", ["The lamp turns. The board built it."], generation=short)
    assert answer.usage.completion_tokens > 0
    compressor = Compressor.load(file, progress=False)
    texts = ["The lamp turns once in twelve seconds. The board built it."]
    assert compressor.compress("Who built?", texts, method).stats.compressed_passage_tokens > 0


def test_a_file_in_a_hub_repository(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "models--some--model"
    for revision, name in (("main", "1" * 40), ("v2", "2" * 40)):
        (home / "snapshots" / name).mkdir(parents=True)
        (home / "refs").mkdir(exist_ok=True)
        (home / "refs" / revision).write_text(name)
    (home / "snapshots" / ("1" * 40) / "tiny.gguf").symlink_to(file)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    exact = _logits(tiny_gguf.model())
    for name, inner in (("some/model", "tiny.gguf"), ("some/model/tiny.gguf", None)):
        loaded = load_model(name, gguf_file=inner, progress=False)
        assert torch.equal(_logits(loaded.model), exact)
    with pytest.raises(ModelNotFoundError, match=r"some/model/other\.gguf"):
        load_model("some/model/other.gguf", progress=False)


@pytest.mark.parametrize("shown", [True, False])
def test_bars_can_be_turned_off(shown: bool, file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_model(file, progress=shown)
    assert ("it/s" in capfd.readouterr().err) == shown


def test_several_files_in_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelNotFoundError, match=r"2 GGUF files: \['a.gguf', 'b.gguf'\]"):
        load_model(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"no 'c.gguf' in .*\['a.gguf', 'b.gguf'\]"):
        load_model(tmp_path, gguf_file="c.gguf")


@pytest.mark.parametrize("name", ["missing.gguf", "./missing.gguf", "a/b/c/missing.gguf"])
def test_a_missing_file_does_not_go_to_the_hub(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match=r"There is no model .*missing\.gguf"):
        resolve(name)


@pytest.mark.parametrize("end", [0, 3, 20, 300, 20_000, -1000])
def test_damaged_files_are_explained(end: int, file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(file.read_bytes()[:end])
    with pytest.raises(ModelError, match=r"broken\.gguf' is damaged or no GGUF file"):
        load_model(broken)
    broken.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ModelError, match=r"broken\.gguf' is damaged or no GGUF file"):
        load_model(broken)


def test_unknown_architectures_list_the_known_ones(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", architecture="rwkv7")
    with pytest.raises(ModelError, match=r"architecture 'rwkv7'.*'llama'.*'qwen2'"):
        load_model(file)


def test_parts_of_a_model_are_told_to_be_joined(tmp_path: Path) -> None:
    file = tiny_gguf.write(tmp_path / "tiny.gguf", fields={"split.count": 3})
    with pytest.raises(ModelError, match="one of 3 parts"):
        load_model(file)


def test_unknown_tensor_types_list_the_known_ones(file: Path, tmp_path: Path) -> None:
    name = b"output_norm.weight"
    data = bytearray(file.read_bytes())
    kind = data.index(name) + len(name) + 4 + 8  # its dimensions' number and the only one
    assert data[kind] == gguf.GGMLQuantizationType.F32
    for code, shown in ((199, "199"), (gguf.GGMLQuantizationType.I32, "I32")):
        data[kind] = code
        (tmp_path / "odd.gguf").write_bytes(data)
        with pytest.raises(ModelError, match=rf"type {shown}.*'Q4_0'.*'Q6_K'"):
            load_model(tmp_path / "odd.gguf")


def test_the_missing_package_is_named_with_its_command(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "draftsieve.core.models.gguf_file.find_spec",
        lambda name: None if name == "gguf" else found(name),
    )
    with pytest.raises(MissingExtraError, match=r'pip install "draftsieve\[gguf\]"'):
        load_model(file)
