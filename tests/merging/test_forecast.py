"""The forecast of memory: what limits there are, which placement is taken, and what is said."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentmerge.errors import UserError
from agentmerge.merging.memory import host_limit, resident_bytes
from agentmerge.merging.placement import (
    Demand,
    MemoryForecast,
    MemoryPlan,
    Placement,
    bytes_per_token,
    gradient_bytes_per_token,
    layout_bytes,
    plan_memory,
)
from agentmerge.parents.layout import Layout, TensorSpec

GB = 1_000_000_000


def layout_of(model_gb: float = 1.0, tensors: int = 10, parents: int = 4) -> Layout:
    """Models of bfloat16 tensors of equal size."""
    each = int(model_gb * GB / tensors / 2)
    specs = [TensorSpec(f"t{i}.weight", (each,), "bfloat16", None, False) for i in range(tensors)]
    return Layout(tuple(specs), 1, "bfloat16", False, tuple("abcdefgh"[:parents]))


def of(plan: MemoryPlan, placement: Placement) -> MemoryForecast:
    return next(f for f in plan.forecasts if f.placement == placement)


def system(root: Path, available_kb: int, groups: str, **files: str) -> tuple[Path, Path]:
    """A /proc and a /sys/fs/cgroup; in names, ``__`` is a slash."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal: 99 kB\nMemAvailable: {available_kb} kB\nHugePages_Total: 0\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(groups)
    (root / "cg").mkdir()
    for name, text in files.items():
        file = root / "cg" / name.replace("__", "/").replace("memory_", "memory.")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root / "proc", root / "cg"


class TestLimits:
    def test_what_the_machine_has_available(self, tmp_path: Path) -> None:
        limit = host_limit(*system(tmp_path, 1000, "0::/\n"))
        assert (limit.size_bytes, limit.source) == (1_024_000, "available on this machine")

    def test_cgroup_2_of_this_group_and_those_above(self, tmp_path: Path) -> None:
        stat = "anon 5\ninactive_file 300\nactive_file 200\n"
        limit = host_limit(
            *system(
                tmp_path,
                10**9,
                "0::/slice/job\n",
                slice__job__memory_max="max\n",
                slice__job__memory_current="900\n",
                slice__memory_max="2000\n",
                slice__memory_current="1500\n",
                slice__memory_stat=stat,
            )
        )
        assert limit.size_bytes == 2000 - 1500 + 500  # the page cache is given up when needed
        assert limit.source == "left by the control group"

    def test_cgroup_1_in_a_container(self, tmp_path: Path) -> None:
        """The path is the host's; what is mounted is the container's own group."""
        limit = host_limit(
            *system(
                tmp_path,
                10**9,
                "9:name=systemd:/x\n4:cpu,memory:/docker/abc\n",
                memory__memory_limit_in_bytes="5000",
                memory__memory_usage_in_bytes="7000",
            )
        )
        assert limit.size_bytes == 0

    def test_cgroup_1_without_a_limit(self, tmp_path: Path) -> None:
        limit = host_limit(
            *system(
                tmp_path,
                1000,
                "4:memory:/job\n",
                memory__job__memory_limit_in_bytes="9223372036854771712",
                memory__job__memory_usage_in_bytes="7000",
            )
        )
        assert limit.source == "available on this machine"

    def test_the_address_space(self) -> None:
        code = (
            "import resource\n"
            "from agentmerge.merging.memory import host_limit\n"
            "resource.setrlimit(resource.RLIMIT_AS, (10**9, 10**9))\n"
            "limit = host_limit()\n"
            "assert 5 * 10**8 < limit.size_bytes < 10**9, limit\n"
            "print(limit.source)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "left by the address space limit (ulimit -v)\n", done.stderr

    def test_this_machine(self) -> None:
        assert 10**6 < resident_bytes() < 10**11
        assert host_limit().size_bytes > 10**6


class TestForecast:
    def test_what_a_worker_needs(self) -> None:
        plan = plan_memory(layout_of(), method="linear")
        resident, stream = of(plan, "device").host, of(plan, "stream").host
        assert (resident.parents, resident.live) == (4 * GB, GB)
        assert (stream.parents, stream.live) == (0, GB)
        # a merged tensor of 0.1 GB, and where parents are streamed one of each of the four
        assert resident.scratch == pytest.approx(0.1 * GB, rel=0.05)
        assert stream.scratch == pytest.approx(0.5 * GB, rel=0.02)
        assert stream.total == stream.live + stream.scratch + stream.runtime
        assert 10**8 < stream.runtime < 4 * GB

    def test_dtype_and_method_count(self) -> None:
        assert layout_bytes(layout_of(), "float32") == 2 * GB
        wide = plan_memory(layout_of(), dtype="float32", method="linear")
        assert of(wide, "device").host.live == 2 * GB
        assert of(wide, "device").host.parents == 4 * GB
        scratch = [
            of(plan_memory(layout_of(), method=method), "device").host.scratch
            for method in ("linear", "ties", "della", "multislerp")
        ]
        assert scratch == sorted(set(scratch))

    def test_the_host_is_the_device_on_a_cpu(self) -> None:
        plan = plan_memory(layout_of(0.01), asked="host")
        assert [f.placement for f in plan.forecasts] == ["device", "stream"]
        assert plan.placement == "device"

    def test_what_scoring_adds_to_each_token(self) -> None:
        config = {
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
            "vocab_size": 100,
        }
        cache = 2 * 2 * 2 * 16 * 2
        assert bytes_per_token(config, "bfloat16") == cache + 100 * (2 + 4)
        assert bytes_per_token({}, "bfloat16") == 0

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    @pytest.mark.parametrize("inner", [448, 896])
    def test_what_a_gradient_keeps_of_each_token(self, dtype: str, inner: int) -> None:
        """Against what autograd saves, parameters aside."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = {
            "hidden_size": 256,
            "intermediate_size": inner,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 1000,
        }
        config = LlamaConfig(**shape, dtype=dtype, attn_implementation="sdpa")
        model = LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage()._cdata not in own:
                kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        tokens = torch.zeros((2, 64), dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(tokens, use_cache=False).logits.float().log_softmax(-1)
            logits[..., 0].sum()
        saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / tokens.numel()
        assert 0.9 * saved < gradient_bytes_per_token(shape, dtype) < 1.2 * saved

    def test_a_gradient_of_8_billion_parameters(self) -> None:
        shape = {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128_256,
        }
        each = gradient_bytes_per_token(shape, "bfloat16")
        assert 64 * 256 * each == pytest.approx(127 * GB, rel=0.02)
        plan = plan_memory(layout_of(0.001), gradient_token_bytes=each, memory_gb=30)
        free = 30 * GB - 1.1 * of(plan, "device").host.total
        limit = min(plan.host.size_bytes, 30 * GB)
        assert plan.tokens_of_a_gradient == int((limit - 30 * GB + free) / each)
        assert plan_memory(layout_of(0.001)).tokens_of_a_gradient is None


class TestChoice:
    def limited(self, models: float, runtimes: int = 1, **settings: Any) -> MemoryPlan:
        """The plan where so many models fit besides interpreter and libraries."""
        layout = layout_of(0.1)
        runtime = of(plan_memory(layout), "stream").host.runtime / GB
        memory_gb = 0.1 * models + runtime * runtimes
        return plan_memory(layout, method="linear", memory_gb=memory_gb, **settings)

    def test_resident_where_it_fits_with_a_tenth_to_spare(self) -> None:
        assert self.limited(6).placement == "device"
        plan = self.limited(5.3)  # less than 1.1 times what is needed
        assert plan.placement == "stream"
        assert "allowed by worker.memory_gb" in plan.reason
        assert plan.compromise.startswith("parents: stream; resident needs ")

    def test_nothing_fits(self) -> None:
        plan = self.limited(1)
        assert plan.chosen is None
        with pytest.raises(UserError, match=r"even with the parents streamed .* worker.count"):
            _ = plan.placement
        assert "raise worker.memory_gb" in plan.reason

    def test_what_was_asked_for_is_taken_or_refused(self) -> None:
        assert self.limited(6, asked="stream").placement == "stream"
        refused = self.limited(2, asked="device")
        assert refused.chosen is None
        assert refused.reason.startswith("worker.placement: device needs ")
        impossible = plan_memory(layout_of(), demand=Demand(("stream",)), asked="device")
        assert "not possible with this kind of worker" in impossible.reason

    def test_every_worker_has_a_family_of_its_own(self) -> None:
        # three workers, and this process
        assert self.limited(3 * 6, 4, workers=3).placement == "device"
        assert self.limited(2 * 6, 4, workers=3).placement == "stream"
        assert self.limited(4, 4, workers=3).chosen is None

    def test_a_user_can_lower_the_limit_and_not_raise_it(self) -> None:
        plan = plan_memory(layout_of(), memory_gb=1e6)
        assert plan.host.source != "worker.memory_gb"

    def test_as_json(self) -> None:
        body = json.loads(json.dumps(self.limited(2).to_dict()))
        assert body["chosen"] == "stream"
        assert [row["placement"] for row in body["forecasts"]] == ["device", "stream"]
        assert body["forecasts"][1]["host"]["total"] > 10**8


def test_an_empty_layout_needs_nothing() -> None:
    plan = plan_memory(replace(layout_of(), tensors=()))
    assert of(plan, "device").host.parents == 0
