"""Exports: the bits that were scored, loadable by plain transformers, whole or not at all."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from agentmerge.errors import CandidateFailed, ParentError, RecipeRejected, UserError
from agentmerge.merging import export
from agentmerge.merging.digests import digest
from agentmerge.merging.export import export_checkpoint
from agentmerge.merging.family import Family
from agentmerge.parents import writing
from agentmerge.parents.headers import read_headers
from agentmerge.recipe import Recipe
from tests.merging.merge_cases import LAYERS, METHODS, edit_config, load_all, recipes

FamilyOf = Callable[..., dict[str, Path]]


def canonical(text: str) -> Recipe:
    return Recipe.parse(text).canonical(LAYERS)


@pytest.mark.parametrize("kind", ["smooth", "slices"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_are_those_that_the_search_merged(
    family_of: FamilyOf, tmp_path: Path, tied: bool, dtype: torch.dtype, method: str, kind: str
) -> None:
    paths = family_of(tied=tied, dtype=dtype)
    recipe = canonical(recipes(method)[kind] + "\nmerge_seed: 4")
    merged = dict(Family.open(paths, base="base").merge(recipe))
    out = tmp_path / "out"
    done = export_checkpoint(
        recipe, paths, out, template_model="a", base="base", shard_size_bytes=4000
    )
    written = load_all(out)
    assert written.keys() == merged.keys()
    assert all(torch.equal(written[name], merged[name]) for name in merged)
    assert ("lm_head.weight" in written) == (not tied)
    assert (done.path, done.digest, done.tensors) == (out, digest(merged.items()), len(merged))
    assert done.size_bytes == sum(t.numel() * t.element_size() for t in merged.values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size_bytes", [5000, 10**9])
def test_plain_transformers_loads_it(
    family_of: FamilyOf, tmp_path: Path, tied: bool, shard_size_bytes: int
) -> None:
    paths = family_of(tied=tied, dtype=torch.bfloat16)
    recipe = canonical(recipes("ties")["smooth"])
    out = tmp_path / "out"
    export_checkpoint(
        recipe,
        paths,
        out,
        template_model="a",
        base="base",
        shard_size_bytes=shard_size_bytes,
        card="# ours\n",
    )
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    merged = dict(Family.open(paths, base="base").merge(recipe))
    live = {name: p.detach() for name, p in model.named_parameters() if name in merged}
    assert digest(live.items()) == digest(merged.items())
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert (out / "generation_config.json").is_file()
    assert (out / "README.md").read_text() == "# ours\n"
    again = Recipe.parse(out / "mergekit_config.yml").canonical(LAYERS)
    assert again.hash() == recipe.hash()
    assert (len(list(out.glob("*.safetensors"))) == 1) == (shard_size_bytes == 10**9)
    assert sorted(tmp_path.iterdir()) == [out]


def test_shards_keep_to_their_size_and_the_index_is_right(
    family_of: FamilyOf, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export_checkpoint(
        canonical(recipes("linear")["smooth"]),
        family_of(tied=False),
        out,
        template_model="b",
        shard_size_bytes=4000,
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    headers = read_headers(out)
    assert index["weight_map"] == {name: header.file.name for name, header in headers.items()}
    sizes = [h.end - h.start for h in headers.values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    for file in out.glob("*.safetensors"):
        assert sum(h.end - h.start for h in headers.values() if h.file == file) <= 4000
    assert not (out / "tokenizer.json").exists()  # b has none
    assert "merge_method: linear" in (out / "README.md").read_text()


def test_mixed_dtypes_stay_as_they_are(own_family: dict[str, Path], tmp_path: Path) -> None:
    for path in own_family.values():
        weights = {
            name: tensor if "norm" in name else tensor.bfloat16()
            for name, tensor in load_all(path).items()
        }
        save_file(weights, path / "model.safetensors")
    recipe = canonical(recipes("linear")["smooth"])
    merged = dict(Family.open(own_family).merge(recipe))
    export_checkpoint(recipe, own_family, tmp_path / "out", template_model="a")
    written = load_all(tmp_path / "out")
    assert {t.dtype for t in written.values()} == {torch.float32, torch.bfloat16}
    assert digest(written.items()) == digest(merged.items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_config_says_the_dtype_and_the_tying(
    own_family: dict[str, Path], tmp_path: Path, key: str | None
) -> None:
    for path in own_family.values():
        edit_config(path, dtype=..., tie_word_embeddings=...)
        if key:
            edit_config(path, **{key: "float32"})
    recipe = canonical(recipes("linear")["smooth"])
    out = tmp_path / "out"
    export_checkpoint(recipe, own_family, out, template_model="a", dtype="float16")
    config = json.loads((out / "config.json").read_text())
    assert config[key or "torch_dtype"] == "float16"
    assert config["tie_word_embeddings"] is False
    assert {header.dtype for header in read_headers(out).values()} == {"float16"}
    assert Recipe.parse(out / "mergekit_config.yml").out_dtype == "float16"


def test_a_template_in_the_recipe_is_written(family_of: FamilyOf, tmp_path: Path) -> None:
    recipe = canonical(recipes("linear")["smooth"] + "\nchat_template: '{{ messages }}'")
    export_checkpoint(recipe, family_of(), tmp_path / "out", template_model="a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == "{{ messages }}"
    named = canonical(recipes("linear")["smooth"] + "\nchat_template: chatml")
    export_checkpoint(named, family_of(), tmp_path / "two", template_model="a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "two")
    assert "<|im_start|>" in tokenizer.chat_template
    unknown = canonical(recipes("linear")["smooth"] + "\nchat_template: chatmll")
    with pytest.raises(UserError, match="'chatmll' is no template that mergekit has; use one of"):
        export_checkpoint(unknown, family_of(), tmp_path / "three", template_model="a")
    assert not (tmp_path / "three").exists()


def test_a_directory_that_holds_something_is_left_alone(
    family_of: FamilyOf, tmp_path: Path
) -> None:
    recipe = canonical(recipes("linear")["smooth"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="already there; name a new or an empty directory"):
        export_checkpoint(recipe, family_of(), out, template_model="a")
    with pytest.raises(UserError, match="already there"):
        export_checkpoint(recipe, family_of(), out / "mine.txt", template_model="a")
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    export_checkpoint(recipe, family_of(), out, template_model="a")
    assert (out / "model.safetensors").is_file()


def test_a_failed_export_leaves_nothing(
    family_of: FamilyOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, out = family_of(), tmp_path / "deep" / "out"
    too_large = "merge_method: linear\nparameters: {normalize: false}\n"
    too_large += "models: [{model: a, parameters: {weight: 1.0e+39}}]"
    with pytest.raises(CandidateFailed, match="not finite"):
        export_checkpoint(canonical(too_large), paths, out, template_model="a")
    nobody = canonical(too_large.replace("model: a", "model: nobody"))
    with pytest.raises(RecipeRejected, match="'nobody'"):
        export_checkpoint(nobody, paths, out, template_model="a")
    with pytest.raises(UserError, match="template model 'c' is not one of"):
        export_checkpoint(canonical(too_large), paths, out, template_model="c")
    with pytest.raises(ParentError):
        export_checkpoint(canonical(too_large), paths | {"c": tmp_path}, out, template_model="a")
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"needs 0.00 GB and 0.00 GB are free"):
        export_checkpoint(canonical(recipes("linear")["smooth"]), paths, out, template_model="a")
    assert list((tmp_path / "deep").iterdir()) == []


def test_memory_is_that_of_a_few_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three parents of 40 layers, 64 MB each; a tensor has 1.6 MB. All in memory were 256 MB."""
    paths = {}
    for index, name in enumerate(("base", "a", "b")):
        weights = {
            f"model.layers.{layer}.w.weight": torch.full((400_000,), float(index))
            for layer in range(40)
        }
        paths[name] = tmp_path / name
        paths[name].mkdir()
        save_file(weights, paths[name] / "model.safetensors")
        config = {"num_hidden_layers": 40, "model_type": "odd", "architectures": ["Odd"]}
        (paths[name] / "config.json").write_text(json.dumps(config))
        del weights
    seen: list[int] = []
    merge_one = export.merged_tensor

    def watched(*arguments: object) -> torch.Tensor:
        result = merge_one(*arguments)  # type: ignore[arg-type]
        ctypes.CDLL(None).malloc_trim(0)  # what is freed is not counted, wherever the heap has it
        status = Path("/proc/self/status").read_text()
        seen.append(int(status.split("RssAnon:")[1].split()[0]) * 1024)
        return result

    monkeypatch.setattr(export, "merged_tensor", watched)
    recipe = Recipe.parse(recipes("ties")["smooth"]).canonical(40)
    export_checkpoint(recipe, paths, tmp_path / "out", template_model="a", base="base")
    assert len(seen) == 40
    assert max(seen) - seen[0] < 64_000_000  # torch's allocator keeps what other tests freed
