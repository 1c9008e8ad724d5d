"""``model+adapter``: the bits of peft's own merge, made once; what is refused, in which words."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentmerge.errors import ParentError, UserError
from agentmerge.parents import made
from agentmerge.parents.headers import content_fingerprint
from agentmerge.parents.plain import make_plain, survey
from agentmerge.parents.sources import find_parent
from tests.merging.merge_cases import edit_weights, load_all
from tests.parents.adapter_cases import CONFIGS, merged_by_peft, write_adapter

FamilyOf = Callable[..., dict[str, Path]]


def plain(name: str, **options: bool) -> Path:
    """The plain checkpoint of one parent, as a search makes it."""
    parent = find_parent(name, **options)
    assert survey([parent]).faults == []
    return make_plain([parent])[name]


#: A tied model with an embedding of its own is refused: see below.
KINDS = [(kind, False) for kind in CONFIGS]
KINDS += [(kind, True) for kind in CONFIGS if kind != "whole modules"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_the_same_bits_as_pefts_merge_in_float32(
    family_of: FamilyOf, tmp_path: Path, kind: str, dtype: torch.dtype, tied: bool
) -> None:
    base = family_of(tied, dtype)["base"]
    adapter = write_adapter(base, tmp_path / "adapter", kind)
    found, want = load_all(plain(f"{base}+{adapter}")), merged_by_peft(base, adapter, dtype)
    before = load_all(base)
    assert found.keys() == want.keys() == before.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    changed = [name for name in want if not torch.equal(found[name], before[name])]
    assert len(changed) >= 2, "an adapter that does nothing"
    assert {value.dtype for value in found.values()} == {dtype}


def test_a_sharded_model_with_an_adapter_is_made_once(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, base = load_all(own_family["base"]), own_family["base"]
    adapter = write_adapter(base, tmp_path / "adapter")
    want = merged_by_peft(base, adapter, torch.float32)
    names = sorted(weights)
    where = {}
    for index in (1, 2):
        file = f"model-{index:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in names[index - 1 :: 2]}, base / file)
        where |= dict.fromkeys(names[index - 1 :: 2], file)
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    first = plain(f"{base}+{adapter}")
    assert all(torch.equal(value, want[name]) for name, value in load_all(first).items())
    files = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    assert plain(f"{base}+{adapter}") == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == files


def test_what_it_is_does_not_depend_on_where_it_lies(
    own_family: dict[str, Path], tmp_path: Path
) -> None:
    base = own_family["base"]
    adapter = write_adapter(base, tmp_path / "adapter")
    first = plain(f"{base}+{adapter}")
    moved = own_family["base"].rename(tmp_path / "elsewhere")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(moved)
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    assert plain(f"{moved}+{adapter}") == first
    fingerprint = content_fingerprint(first)
    settings["lora_alpha"] = 3
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    other = plain(f"{moved}+{adapter}")
    assert other != first
    assert content_fingerprint(other) != fingerprint


def test_a_made_parent_that_was_changed_is_noticed(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "own-cache"))
    adapter = write_adapter(own_family["base"], tmp_path / "adapter")
    directory = plain(f"{own_family['base']}+{adapter}")
    edit_weights(directory, **{"model.norm.weight": torch.zeros(16)})
    with pytest.raises(ParentError, match="is not what agentmerge wrote there; delete it"):
        content_fingerprint(directory)


def test_a_made_parent_of_another_user_is_not_used(
    own_family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "own-cache"))
    name = f"{own_family['base']}+{write_adapter(own_family['base'], tmp_path / 'adapter')}"
    directory = plain(name)
    assert plain(name) == directory
    directory.chmod(0o777)
    with pytest.raises(UserError, match="everybody may write to it"):
        plain(name)


def test_the_adapters_chat_template_goes_with_it(
    own_family: dict[str, Path], tmp_path: Path
) -> None:
    a = own_family["a"]
    name = f"{a}+{write_adapter(a, tmp_path / 'adapter')}"
    assert "m.content" in (plain(name) / "chat_template.jinja").read_text()
    own = {"chat_template": [{"name": "default", "template": "{{ 'own' }}"}]}
    (tmp_path / "adapter" / "tokenizer_config.json").write_text(json.dumps(own))
    assert (plain(name) / "chat_template.jinja").read_text() == "{{ 'own' }}"


def settings(**changes: Any) -> Callable[[Path], None]:
    def change(adapter: Path) -> None:
        file = adapter / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def apply(adapter: Path) -> None:
        weights = load_file(adapter / "adapter_model.safetensors")
        change(weights)
        save_file(weights, adapter / "adapter_model.safetensors")

    return apply


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def renamed(weights: dict[str, torch.Tensor]) -> None:
    for side in "AB":
        weights[Q.replace("q_proj", f"x_proj.lora_{side}.weight")] = weights.pop(
            f"{Q}.lora_{side}.weight"
        )


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "prompt tuning": (
        settings(peft_type="PROMPT_TUNING"),
        "the adapter is of peft type 'PROMPT_TUNING', and only LORA, LOHA, LOKR, IA3, OFT are "
        "merged into a model",
    ),
    "replicated layers": (
        settings(layer_replication=[[0, 1]]),
        "the adapter uses layer_replication, which is not supported; merge it with peft yourself",
    ),
    "no tensors": (tensors(lambda w: w.clear()), "the adapter holds no tensor that LORA has"),
    "modules that are not there": (
        tensors(renamed),
        "1 modules of the adapter are not in the model, the first is "
        "model.layers.0.self_attn.x_proj",
    ),
    "half a pair": (
        tensors(lambda w: w.pop(f"{Q}.lora_B.weight")),
        "the adapter has only half of model.layers.0.self_attn.q_proj (A or B is missing)",
    ),
    "a shard of DeepSpeed": (
        tensors(lambda w: w.update({f"{Q}.lora_A.weight": torch.empty(0)})),
        "the adapter's model.layers.0.self_attn.q_proj is no pair of matrices; save it again",
    ),
    "another rank": (
        tensors(lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(3, 16)})),
        "the adapter's model.layers.0.self_attn.q_proj has ranks 3 and 4, and adapter_config.json "
        "says 4",
    ),
    "another base": (
        tensors(lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 24)})),
        "the adapter's model.layers.0.self_attn.q_proj is for a weight of shape [16, 24], and it "
        "is [16, 16] in the model",
    ),
    "other rows": (
        tensors(lambda w: w.update({"base_model.model.lm_head.weight": torch.ones(30, 16)})),
        "the adapter's lm_head has shape [30, 16], and [24, 16] in the model: it was trained with "
        "added tokens; resize_token_embeddings(30) of the model, peft's merge_and_unload and "
        "save_pretrained make a whole model of the two, and tokenizer_source: union merges that "
        "with the others",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(family_of: FamilyOf, tmp_path: Path, kind: str) -> None:
    spoil, sentence = REFUSED[kind]
    base = family_of(False)["base"]
    adapter = write_adapter(base, tmp_path / "adapter")
    spoil(adapter)
    name = f"{base}+{adapter}"
    assert survey([find_parent(name)]).faults == [f"{name}: {sentence}"]


def test_embedding_and_head_that_are_one_stay_one(family_of: FamilyOf, tmp_path: Path) -> None:
    base = family_of(True)["base"]
    adapter = write_adapter(base, tmp_path / "adapter", "whole modules")
    (fault,) = survey([find_parent(f"{base}+{adapter}")]).faults
    assert "the adapter changes embed_tokens by itself, and embedding and head are one" in fault


def test_an_adapter_that_was_trained_on_another_model_is_named(
    family_of: FamilyOf, tmp_path: Path
) -> None:
    family = family_of(False)
    name = f"{family['a']}+{write_adapter(family['base'], tmp_path / 'adapter')}"
    (note,) = survey([find_parent(name)]).notes
    assert note.endswith(
        f"was trained on {str(family['base'])!r}, and is applied to {str(family['a'])!r}"
    )


def test_adapters_that_are_not_whole(family_of: FamilyOf, tmp_path: Path) -> None:
    base = family_of(False)["base"]
    adapter = write_adapter(base, tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ParentError, match=r"no adapter_model\.safetensors; the adapter is not wh"):
        find_parent(f"{base}+{adapter}")
    with pytest.raises(ParentError, match=r"has no adapter_config\.json; name an adapter behind"):
        find_parent(f"{base}+{base}")


def test_pickled_weights_only_where_the_user_allows_them(
    own_family: dict[str, Path], tmp_path: Path
) -> None:
    base, a = own_family["base"], own_family["a"]
    adapter = write_adapter(base, tmp_path / "adapter")
    want = load_all(plain(f"{base}+{adapter}"))
    fingerprint = content_fingerprint(base)
    torch.save(load_all(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.save(weights, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ParentError, match=r"only pickled weights.*worker\.allow_pickle: true"):
        find_parent(str(base))
    with pytest.raises(ParentError, match=r"only pickled weights \(adapter_model\.bin\)"):
        find_parent(f"{a}+{adapter}")
    converted = plain(str(base), allow_pickle=True)
    assert content_fingerprint(converted) == fingerprint, "the same weights, so the same parent"
    found = load_all(plain(f"{base}+{adapter}", allow_pickle=True))
    assert all(torch.equal(found[name], want[name]) for name in want)
    seen = survey([find_parent(f"{base}+{adapter}", allow_pickle=True)])
    assert list(seen.made_bytes.values()) == [2 * sum(v.nbytes for v in want.values())]


def test_a_pickle_that_would_run_code_never_does(
    own_family: dict[str, Path], tmp_path: Path
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"x": Evil()}, own_family["a"] / "pytorch_model.bin")
    (own_family["a"] / "model.safetensors").unlink()
    (fault,) = survey([find_parent(str(own_family["a"]), allow_pickle=True)]).faults
    assert "holds more than tensors, and would run code when read" in fault
    assert not (tmp_path / "ran").exists()


def test_a_cache_that_cannot_be_written(
    family_of: FamilyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family_of(False)["base"]
    adapter = write_adapter(base, tmp_path / "adapter")
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set AGENTMERGE_CACHE to another directory"):
        plain(f"{base}+{adapter}")


def test_made_parents_are_discarded_unless_they_are_in_use(
    family_of: FamilyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AGENTMERGE_CACHE", str(tmp_path / "cache"))
    assert made.discard_made(dry_run=False) == (0, 0)
    base = family_of(False)["base"]
    directory = plain(f"{base}+{write_adapter(base, tmp_path / 'adapter')}")
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    left = directory.parent / f".{'0' * 24}-0123abcd"
    left.mkdir()  # what a killed process leaves behind
    assert made.discard_made(dry_run=True) == (1, 0)
    os.close(made._in_use.pop(directory))
    assert made.discard_made(dry_run=True) == (2, size)
    assert made.discard_made(dry_run=False) == (2, size)
    assert not directory.exists()
    assert plain(f"{base}+{tmp_path / 'adapter'}") == directory
