"""mergekit-evolve on a local Ray whose one device is a name, in an environment of its own.

    python drive_mergekit.py CONFIG --storage-path OUT ...

Everything after the name is its own command line. What is changed is the device: Ray is told of one
GPU that is not there, lm-eval's Hugging Face model is asked for the CPU where it would take "cuda",
and ``torch.cpu`` has the ``empty_cache`` that ``torch.cuda`` has. In its favour one thing more:
prompts begin with the tokenizer's own first token, as the family was trained and as lm-eval has it
today. lm-eval 0.4.4, which it can be imported with, leaves that out.
"""

from __future__ import annotations

from typing import Any


def put_on_cpu() -> None:
    """In each of Ray's processes, before it imports mergekit."""
    import torch
    from lm_eval.models.huggingface import HFLM

    made = HFLM.__init__

    def on_cpu(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **{**kwargs, "device": "cpu", "add_bos_token": True})

    HFLM.__init__ = on_cpu
    if not hasattr(torch.cpu, "empty_cache"):
        torch.cpu.empty_cache = lambda: None


if __name__ == "__main__":
    import ray

    ray.init(
        num_cpus=2,
        num_gpus=1,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": "drive_mergekit.put_on_cpu"},
    )
    from mergekit.scripts.evolve import main

    main()
