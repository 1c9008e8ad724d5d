"""Every causal model class of the installed transformers, tiny: is it merged right, or refused?

python -m benchmarks.architectures             # writes docs/architectures.md
python -m benchmarks.architectures llama phi   # prints the rows of some types

For each type of ``AutoModelForCausalLM``: a base and two experts with random weights are saved, and
surveyed as ``agentmerge check`` does. What is not refused is merged by the ``hf`` worker and
exported; every tensor of the export is compared with a plain float64 sum over the files' tensors,
and the live model's logits with those of transformers' own ``from_pretrained`` of the export.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from agentmerge.config import TasksConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import AgentmergeError, ParentError
from agentmerge.evaluation.tasks import TaskSet
from agentmerge.merging.export import export_checkpoint
from agentmerge.parents.layout import read_layout
from agentmerge.parents.plain import make_plain, survey
from agentmerge.parents.sources import find_parent
from agentmerge.recipe import Recipe
from agentmerge.workers.hf import HfWorker

PAGE = Path(__file__).parents[1] / "docs" / "architectures.md"
ROWS = 64  # of the vocabulary
WEIGHTS = {"base": 0.2, "a": 0.5, "b": 0.3}

#: Ends of config keys -> a size that makes a tiny model; the first that fits.
SIZES: tuple[tuple[str, int], ...] = (
    ("vocab_size", ROWS),
    ("vocab_size_per_layer_input", ROWS),
    ("num_key_value_heads", 2),
    ("num_global_key_value_heads", 2),
    ("num_attention_heads", 4),
    ("num_heads", 4),
    ("attention_heads", 4),
    ("n_head", 4),
    ("n_heads", 4),
    ("head_dim", 8),
    ("qk_nope_head_dim", 8),
    ("qk_rope_head_dim", 8),
    ("lora_rank", 8),
    ("hidden_size_per_layer_input", 8),
    ("hidden_size", 32),
    ("d_model", 32),
    ("n_embd", 32),
    ("intermediate_size", 48),
    ("ffn_dim", 48),
    ("d_ff", 48),
    ("dff", 48),
    ("n_inner", 48),
    ("num_hidden_layers", 2),
    ("num_layers", 2),
    ("n_layer", 2),
    ("n_layers", 2),
    ("encoder_layers", 2),
    ("decoder_layers", 2),
    ("num_experts", 4),
    ("num_local_experts", 4),
    ("n_routed_experts", 4),
    ("num_experts_per_tok", 2),
    ("n_group", 1),
    ("topk_group", 1),
    ("n_positions", 64),
    ("n_ctx", 64),
    ("max_position_embeddings", 64),
    ("sliding_window", 16),
    ("image_size", 28),
    ("patch_size", 14),
)
#: Latent attention has as many heads for keys as for queries.
_LATENT = {"num_key_value_heads": 4, "qk_head_dim": 16}
#: model type -> what else makes it tiny.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _LATENT,
    "axk2": _LATENT,
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            }
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _LATENT | {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "deepseek_v3": _LATENT,
    "deepseek_v32": _LATENT,
    "dots1": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm4_moe_lite": _LATENT,
    "glm_moe_dsa": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _LATENT
    | {"layer_types": ["linear_attention", "full_attention"], "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": _LATENT,
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "minicpm3": _LATENT,
    "ministral": {"head_dim": 8},
    "nemotron_h": {"n_groups": 2},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "xlm": {"emb_dim": 32, "n_words": ROWS},
    "xmod": {"default_language": "en_XX"},
    "youtu": _LATENT,
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "n_mamba_heads": 2,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
    "zaya": {"num_experts_per_tok": 1},
}


#: model type -> why there is no tiny one of it.
NOT_TINY = {
    "gemma3n": "its vision tower needs the timm package",
    "gemma4_assistant": "drafts for another model, whose states it needs",
    "gemma4_unified_assistant": "drafts for another model, whose states it needs",
    "musicgen": "makes sound from another model's states",
    "musicgen_melody": "makes sound from another model's states",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What became of a type. verdict: merged, refused, wrong or not tried."""

    model_type: str
    architecture: str
    verdict: str
    detail: str


def tiny_config(model_type: str) -> Any:
    """The type's default config with small sizes."""
    return _shrunk(transformers.CONFIG_MAPPING[model_type], model_type)


def _shrunk(kind: Any, model_type: str) -> Any:
    default = kind()
    inner = {
        key: _shrunk(type(value), value.model_type).to_dict()
        for key, value in vars(default).items()
        if isinstance(value, transformers.PreTrainedConfig)
    }
    sizes: dict[str, Any] = {}
    body = default.to_dict()
    for key, value in body.items():
        if key in inner or isinstance(value, bool) or not isinstance(value, int | None):
            continue
        for ending, size in SIZES:
            if key == ending or key.endswith("_" + ending):
                sizes[key] = None if value is None else size
                break
    for key in ("layer_types", "mlp_layer_types", "layers_block_type"):
        kinds = body.get(key)
        if isinstance(kinds, list) and len(kinds) > 2:
            other = next((kind for kind in kinds if kind != kinds[0]), kinds[0])
            sizes[key] = [kinds[0], other]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes |= {key: value for key, value in ids.items() if kind.base_config_key == "" or key in body}
    return kind(**(inner | sizes | OVERRIDES.get(model_type, {})))


def write_family(model_type: str, root: Path) -> dict[str, Path]:
    """A base and two experts of one type, random, as transformers saves them."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_config(tiny_config(model_type)).float().eval()
    paths = {}
    for index, name in enumerate(WEIGHTS):
        model = copy.deepcopy(base)
        torch.manual_seed(index + 1)
        for _, value in _weights(model):
            value.data += 0.1 * torch.randn_like(value)
        for module in model.modules():  # as training leaves it: a padding row gets no gradient
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0
        model.tie_weights()
        model.save_pretrained(root / name)
        _tokenizer().save_pretrained(root / name)
        paths[name] = root / name
    return paths


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    saved = model.state_dict().keys()
    yield from model.named_parameters()
    for name, value in model.named_buffers():
        # Zaya's class sets one of these anew whenever it loads them.
        fixed = name.endswith("balancing_biases")
        if name in saved and value.is_floating_point() and not fixed:
            yield name, value


def _tokenizer() -> Any:
    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*specials, *map(chr, range(33, 33 + ROWS - len(specials)))]
    words = models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>")
    backend = Tokenizer(words)
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    )  # fmt: skip


def examine(model_type: str, root: Path) -> Row:
    """What agentmerge makes of a family of this type."""
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    paths = write_family(model_type, root)
    return Row(model_type, str(architecture), *judge(paths, root / "export"))


def judge(paths: Mapping[str, Path], out: Path) -> tuple[str, str]:
    """(verdict, detail) of a family: refused by check and why, merged, or what is wrong."""
    try:
        faults = check_faults(paths)
    except AgentmergeError as error:
        faults = str(error).splitlines()
    if faults:
        return "refused", _plain(faults[0], paths)
    parents = {name: find_parent(str(path)) for name, path in paths.items()}
    made = make_plain(parents.values(), str(paths["base"]))
    paths = {name: made[parent.name] for name, parent in parents.items()}
    layout = read_layout(paths, "base")
    recipe = Recipe.parse(
        "merge_method: linear\nparameters: {normalize: false}\nmodels:\n"
        + "".join(f"- {{model: {n}, parameters: {{weight: {w}}}}}\n" for n, w in WEIGHTS.items())
    ).canonical(layout.num_layers)
    wrong = [*_wrong_tensors(paths, recipe, out), *_wrong_logits(paths, recipe, out)]
    if wrong:
        return "wrong", wrong[0]
    return "merged", f"{len(layout.tensors)} tensors"


def _plain(fault: str, paths: Mapping[str, Path]) -> str:
    """A fault without the folder that only this run has."""
    for path in paths.values():
        fault = fault.replace(f"{path}: ", "").replace(str(path), path.name)
    return fault


def check_faults(paths: Mapping[str, Path]) -> list[str]:
    """What ``agentmerge check`` says against a search on these models with the hf worker."""
    paths = {str(path): path for path in paths.values()}
    first = next(iter(paths))
    seen = survey([find_parent(name) for name in paths], first)
    if seen.faults:
        return list(seen.faults)
    try:
        layout = read_layout(seen.checkpoints, first)
    except ParentError as error:
        return str(error).splitlines()
    return HfWorker.preflight(_spec(paths), layout)[0]


def _spec(paths: Mapping[str, Path]) -> WorkerSpec:
    parents = tuple((name, str(path)) for name, path in paths.items())
    first = next(iter(paths))
    options = {"base": first, "max_length": 32}
    tasks = TasksConfig(tasks=[{"name": "none", "metric": "acc"}])
    return WorkerSpec("hf", parents, first, tasks, "float32", 2, options=options)


def _wrong_tensors(paths: Mapping[str, Path], recipe: Recipe, out: Path) -> Iterator[str]:
    export_checkpoint(recipe, paths, out, template_model="base", base="base")
    stored = {name: load(path) for name, path in paths.items()}
    made = load(out)
    layout = read_layout(paths, "base")
    if missing := stored["base"].keys() - made.keys() - set(_derived(layout, stored["base"])):
        yield f"{sorted(missing)[0]} is not in the export"
    for name, tensor in made.items():
        want = sum(w * stored[model][name].double() for model, w in WEIGHTS.items())
        if name in layout.carried:
            want = stored["base"][name].double()
        if not torch.allclose(tensor.double(), want, rtol=1e-5, atol=1e-6):
            yield f"{name} is not the weighted sum"


def _derived(layout: Any, stored: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name in stored if name not in layout.by_name and name not in layout.carried}


def _wrong_logits(paths: Mapping[str, Path], recipe: Recipe, out: Path) -> Iterator[str]:
    worker = HfWorker(_spec(paths), TaskSet((), ()))
    worker.load(recipe)
    ids = torch.arange(4, 20).reshape(2, 8)
    other_program = opened(out)
    with torch.no_grad():
        live = worker._model(ids, use_cache=False).logits
        alone = other_program(ids, use_cache=False).logits
        layers = read_layout(paths, "base").num_layers
        worker.load(Recipe.of_model("a", layers).canonical(layers))
        other = worker._model(ids, use_cache=False).logits
    if not torch.allclose(live, alone, rtol=1e-4, atol=1e-5):
        yield f"logits differ by {float((live - alone).abs().max()):.2g}"
    if torch.equal(live, other):
        yield "the merge has the logits of a parent"
    worker.close()


def opened(path: Path) -> Any:
    """A model as anyone opens it."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()


def load(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by name."""
    return {k: v for file in path.glob("*.safetensors") for k, v in load_file(file).items()}


def survey_types(types: Sequence[str]) -> Iterator[Row]:
    """A row a type."""
    for model_type in types:
        with tempfile.TemporaryDirectory() as scratch:
            name = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
            if model_type in NOT_TINY:
                yield Row(model_type, name, "not tried", NOT_TINY[model_type])
                continue
            yield examine(model_type, Path(scratch))


def page(rows: Sequence[Row]) -> str:
    """The text of docs/architectures.md."""
    counts = Counter(row.verdict for row in rows)
    parts = [_HEAD.format(release=transformers.__version__, total=len(rows), **_counted(counts))]
    parts += ["## Merged", "", "| type | class | tensors of a tiny one |", "|---|---|---|"]
    parts += [
        f"| `{row.model_type}` | `{row.architecture}` | {row.detail} |"
        for row in rows
        if row.verdict == "merged"
    ]
    parts += ["", "## Refused", "", "| type | class | what `check` says |", "|---|---|---|"]
    parts += [
        f"| `{row.model_type}` | `{row.architecture}` | {row.detail} |"
        for row in rows
        if row.verdict == "refused"
    ]
    parts += ["", "## Not tried", "", "| type | class | why |", "|---|---|---|"]
    parts += [
        f"| `{row.model_type}` | `{row.architecture}` | {row.detail} |"
        for row in rows
        if row.verdict == "not tried"
    ]
    return "\n".join(parts) + "\n"


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: counts.get(key, 0) for name, key in _VERDICTS.items()}


_VERDICTS = {"merged": "merged", "refused": "refused", "untried": "not tried"}
_HEAD = """# Architectures

Every type that transformers {release} has a causal model class for ({total}), as a family of a base
and two experts with random weights, tiny: {merged} merged, {refused} refused, {untried} not tried.
Made by `python -m benchmarks.architectures`.

Merged: every tensor of the export is the weighted sum of the files' tensors, and the `hf` worker's
live model gives the logits of transformers' own `from_pretrained` of the export. Experts that
transformers fuses into one tensor are merged expert by expert, as the files have them. Refused:
`agentmerge check` says so before anything is loaded. What a file saves besides weights (a router's
correction, a layer's scale) is merged like a weight, as mergekit does; causal masks, rotary
frequencies and position numbers in old files are not merged, their class computes them.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("types", nargs="*", help="model types; all, and the page, without")
    asked = parser.parse_args().types
    if strangers := sorted(set(asked) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        parser.error(f"transformers has no causal model class for {', '.join(strangers)}")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows = []
    for row in survey_types(asked or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)):
        print(row.model_type, row.architecture, row.verdict, row.detail, sep="\t", flush=True)
        rows.append(row)
    if not asked:
        PAGE.write_text(page(rows))


if __name__ == "__main__":
    main()
