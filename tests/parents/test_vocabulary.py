"""Differing vocabularies: named where nobody says what to do, else aligned as mergekit does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
from safetensors.torch import save_file

from agentmerge.errors import ParentError, RecipeError
from agentmerge.merging.export import export_checkpoint
from agentmerge.parents.headers import read_config
from agentmerge.parents.layout import read_layout
from agentmerge.parents.plain import make_plain, survey
from agentmerge.parents.sources import Parent, find_parent
from agentmerge.recipe import Recipe
from benchmarks import architectures
from tests.evaluation import tiny
from tests.merging.merge_cases import edit_config, load_all

Family = dict[str, Path]
ROWS = len(tiny.TOKENS)
ROWS_OF_TINY = architectures.ROWS


def add(path: Path, tokens: list[str], padding: int = 0) -> None:
    """Give a model tokens and rows of its own, and rows that belong to no token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(path)
    weights = load_all(path)
    generator = torch.Generator().manual_seed(len(tokens))
    old = weights["model.embed_tokens.weight"]
    more = torch.randn(len(tokens) + padding, old.shape[1], generator=generator).to(old.dtype)
    weights["model.embed_tokens.weight"] = torch.cat([old, more])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, vocab_size=len(old) + len(more))


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """base; b with two tokens more; c with one of them and one of its own, in another order."""
    base = tiny.write_model(tmp_path / "base", 1)
    found = {"base": base}
    for name, seed in (("b", 2), ("c", 3)):
        found[name] = tiny.write_model(tmp_path / name, seed, near=base, template="{{ 't' }}")
    add(found["b"], ["<one>", "<two>"])
    add(found["c"], ["<three>", "<two>"])
    return found


def found_parents(family: Family) -> list[Parent]:
    return [find_parent(str(path)) for path in family.values()]


def plain(family: Family, source: str) -> Family:
    base = str(family["base"])
    made = make_plain(found_parents(family), base, source)
    return {name: made[str(path)] for name, path in family.items()}


def learn(path: Path, tokens: str) -> None:
    """Give a model letters more, as ordinary tokens of its vocabulary."""
    file = path / "tokenizer.json"
    body = json.loads(file.read_text())
    body["model"]["vocab"] |= {token: ROWS + i for i, token in enumerate(tokens)}
    file.write_text(json.dumps(body))
    weights = load_all(path)
    old = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([old, old[: len(tokens)]])
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    edit_config(path, vocab_size=len(old) + len(tokens))


def test_what_a_parent_becomes_is_no_matter_of_chance(tmp_path: Path) -> None:
    """A tokenizer lists its vocabulary in another order each time that it is read."""
    base = tiny.write_model(tmp_path / "base", 1)
    family = {"base": base, "b": tiny.write_model(tmp_path / "b", 2, near=base)}
    learn(family["b"], "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    for source in ("union", str(family["b"])):
        first, second = plain(family, source), plain(family, source)
        assert first == second
        assert first["base"] != family["base"]
    listed = [
        list(transformers.AutoTokenizer.from_pretrained(first["base"]).get_vocab())
        for _ in range(2)
    ]
    assert listed[0] != listed[1]  # else this test shows nothing


RECIPES = {
    "task_arithmetic": "merge_method: task_arithmetic\nbase_model: base\nmodels:\n"
    "- {model: b, parameters: {weight: 0.6}}\n- {model: c, parameters: {weight: 0.3}}",
    "linear": "merge_method: linear\nbase_model: base\nmodels:\n"
    "- {model: base, parameters: {weight: 0.2}}\n- {model: b, parameters: {weight: 0.5}}\n"
    "- {model: c, parameters: {weight: 0.3}}",
}


@pytest.mark.parametrize("method", RECIPES)
@pytest.mark.parametrize("source", ["base", "union", "c"])
def test_the_same_rows_as_mergekits(
    family: Family, tmp_path: Path, source: str, method: str
) -> None:
    asked = str(family[source]) if source == "c" else source
    paths = plain(family, asked)
    recipe = Recipe.parse(RECIPES[method]).canonical(2)
    out = tmp_path / "ours"
    export_checkpoint(
        recipe, paths, out, template_model=source[:1] if source == "c" else "base", base="base"
    )
    body = json.dumps(recipe.to_dict() | {"tokenizer_source": asked})
    for name, path in family.items():
        body = body.replace(f'"model": "{name}"', f'"model": "{path}"')
    body = body.replace('"base_model": "base"', f'"base_model": "{family["base"]}"')
    asked_of_mergekit = json.loads(body)
    if method == "linear":
        asked_of_mergekit["base_model"] = str(family["base"])
    theirs = tmp_path / "theirs"
    run_merge(MergeConfiguration.model_validate(asked_of_mergekit), str(theirs), MergeOptions())
    our_words, their_words = (
        transformers.AutoTokenizer.from_pretrained(path).get_vocab() for path in (out, theirs)
    )
    # mergekit's union goes through a set, so the order of what it adds varies from run to run.
    assert our_words == their_words if source != "union" else our_words.keys() == their_words.keys()
    mine, reference = load_all(out), load_all(theirs)
    assert mine.keys() == reference.keys()
    for name, value in reference.items():
        ours, wanted = mine[name], value
        if "embed" in name:
            ours = ours[[our_words[token] for token in our_words]]
            wanted = wanted[[their_words[token] for token in our_words]]
        assert torch.allclose(ours, wanted, atol=1e-6), name
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model.config.vocab_size == len(mine["model.embed_tokens.weight"])
    assert model.config.eos_token_id == our_words["</s>"]


def test_rows_that_belong_to_no_token_are_kept(family: Family) -> None:
    add(family["base"], [], padding=6)
    before = load_all(family["base"])["model.embed_tokens.weight"]
    for source, rows in (("base", ROWS + 6), ("union", ROWS + 6)):
        paths = plain(family, source)
        for name, path in paths.items():
            found = load_all(path)["model.embed_tokens.weight"]
            assert len(found) == rows, name
            words = transformers.AutoTokenizer.from_pretrained(path).get_vocab()
            empty = [row for row in range(rows) if row not in words.values()]
            assert torch.equal(found[empty], before[empty])
        assert read_layout(paths, "base").parameters


def test_a_parent_that_is_in_order_stays_where_it_is(family: Family) -> None:
    assert plain(family, "base")["base"] == family["base"]
    same = {"base": family["base"], "d": tiny.write_model(family["b"].parent / "d", 7)}
    assert plain(same, "union") == same


def test_each_keeps_its_chat_template_and_its_own_end(family: Family) -> None:
    edit_config(family["b"], eos_token_id=ROWS + 1)  # <two>
    paths = plain(family, "union")
    assert (paths["b"] / "chat_template.jinja").read_text() == "{{ 't' }}"
    assert not (plain(family, "union")["base"] / "chat_template.jinja").exists()
    words = transformers.AutoTokenizer.from_pretrained(paths["b"]).get_vocab()
    assert read_config(paths["b"])["eos_token_id"] == words["<two>"]


def test_without_a_policy_rows_that_differ_are_refused_or_named(family: Family) -> None:
    seen = survey(found_parents(family), str(family["base"]))
    with pytest.raises(ParentError, match=r"embedding rows .*; set tokenizer_source to align them"):
        read_layout(seen.checkpoints, str(family["base"]))
    assert seen.faults == [
        f"{family['b']}: only {family['b']} has the tokens '<one>', '<two>'",
        f"{family['c']}: only {family['c']} has the tokens '<three>', '<two>'",
    ]
    two = {name: family[name] for name in ("b", "c")}
    b, c = str(family["b"]), str(family["c"])
    (note,) = survey(found_parents(two)).notes
    assert note == (
        f"{c}: row {ROWS} of the vocabulary is token '<three>', and '<one>' in {b} (1 added tokens "
        "differ); their rows are merged as they are"
    )


def test_another_order_of_ordinary_tokens_is_a_fault(family: Family) -> None:
    other = tiny.write_model(family["b"].parent / "other", 5)
    file = other / "tokenizer.json"
    body = json.loads(file.read_text())
    words = body["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(body))
    base = str(family["base"])
    seen = survey([find_parent(base), find_parent(str(other))])
    assert seen.faults == [
        f"{other}: row {words['b']} of the vocabulary is token 'b', and 'a' in {base} (2 rows "
        "differ); set tokenizer_source to align them"
    ]
    assert survey([find_parent(base), find_parent(str(other))], base, "base").faults == []


def test_a_source_needs_every_parents_tokenizer(family: Family) -> None:
    for file in family["b"].glob("tokenizer*"):
        file.unlink()
    (fault,) = survey(found_parents(family), str(family["base"]), "union").faults
    assert "tokenizer_source needs every parent's tokenizer" in fault


def test_settings_of_single_tokens_are_not_dropped_in_silence() -> None:
    text = RECIPES["linear"] + "\ntokenizer: {source: union, pad_to_multiple_of: 8}"
    with pytest.raises(RecipeError, match=r"tokenizer\.pad_to_multiple_of is not supported"):
        Recipe.parse(text)
    assert (
        Recipe.parse(RECIPES["linear"] + "\ntokenizer: {source: base}").tokenizer_source == "base"
    )


@pytest.mark.parametrize("model_type", ["phi", "bert"])
def test_a_heads_bias_is_aligned_with_the_head(model_type: str, tmp_path: Path) -> None:
    family = architectures.write_family(model_type, tmp_path)
    tokens = ["<one>", "<two>"]
    model = architectures.opened(family["a"])
    model.resize_token_embeddings(ROWS_OF_TINY + len(tokens), mean_resizing=False)
    model.save_pretrained(family["a"])
    for path in family.values():
        tokenizer = tiny.tokenizer()
        tokenizer.add_tokens([f"<{n}>" for n in range(ROWS_OF_TINY - len(tokenizer))])
        tokenizer.add_tokens(tokens if path == family["a"] else [])
        tokenizer.save_pretrained(path)
    paths = plain(family, "union")
    rows = ROWS_OF_TINY + len(tokens)
    layout = read_layout(paths, "base")
    vocabulary = [t.name for t in layout.tensors if t.shape[0] == rows]
    assert len(vocabulary) == (3 if model_type == "phi" else 2)
    for name in vocabulary:
        before, after = load_all(family["base"])[name], load_all(paths["base"])[name]
        assert torch.equal(after[:ROWS_OF_TINY], before)
        assert torch.equal(after[ROWS_OF_TINY:], load_all(family["a"])[name][ROWS_OF_TINY:])


def test_rows_beyond_the_tokens_are_told_as_padding(family: Family) -> None:
    padded = family["b"].with_name("padded")
    shutil.copytree(family["b"], padded)
    add(padded, [], padding=2)
    (fault,) = survey(found_parents({"b": family["b"], "d": padded})).faults
    assert fault == (
        f"{padded}: its tokens are those of {family['b']}; the rows beyond them are padding"
    )


def test_an_adapter_alone_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ParentError) as caught:
        find_parent(str(tmp_path))
    assert str(caught.value) == (
        f"{tmp_path} is an adapter without its model; name both, as in org/base+{tmp_path}"
    )
