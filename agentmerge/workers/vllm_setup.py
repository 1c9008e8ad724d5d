"""``python -m agentmerge.workers.vllm_setup``, as in version 0.1."""

from agentmerge.workers.vllm.install import main

if __name__ == "__main__":
    main()
