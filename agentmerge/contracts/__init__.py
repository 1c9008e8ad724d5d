"""What crosses from one room to another, and what each room promises: strategies, workers, spaces,
advice, calls of models, events, trackers. Nothing here computes.

The one door of a plugin: ``from agentmerge.contracts import ...`` has all that one of any group
needs, and loads no torch, LangGraph or chat model (docs/plugins.md).
"""

from agentmerge.config import GenomeConfig, SearchConfig, TasksConfig
from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.contracts.calls import ModelProvider
from agentmerge.contracts.method import MergeKernel
from agentmerge.contracts.scorer import Scorer
from agentmerge.contracts.space import Axis, Space, SpaceForm
from agentmerge.contracts.strategy import (
    Bound,
    Evidence,
    Items,
    Observation,
    Proposal,
    RngFor,
    Strategy,
    default_population,
    fittest,
    improved,
    next_generation,
    rng_factory,
)
from agentmerge.contracts.tracker import Tracker
from agentmerge.contracts.worker import (
    Build,
    Differentiator,
    EngineInfo,
    Fingerprint,
    Gradient,
    Host,
    Hosted,
    ItemRef,
    ItemResult,
    Loss,
    TensorSlope,
    Worker,
    WorkerSpec,
)
from agentmerge.errors import CandidateFailed, RunFailed, UserError, WorkerLost
from agentmerge.methods import Method, Parameter
from agentmerge.plugins import load as load_plugin
from agentmerge.recipe import Recipe, Setting, Slice, Source

__all__ = [
    "Axis",
    "Bound",
    "Build",
    "CandidateFailed",
    "Differentiator",
    "EngineInfo",
    "Evidence",
    "Fingerprint",
    "GenomeConfig",
    "Gradient",
    "Guidance",
    "Host",
    "Hosted",
    "ItemRef",
    "ItemResult",
    "Items",
    "Loss",
    "MergeKernel",
    "Method",
    "ModelProvider",
    "Observation",
    "Parameter",
    "Proposal",
    "Recipe",
    "RngFor",
    "RunFailed",
    "Scorer",
    "SearchConfig",
    "Setting",
    "Slice",
    "Source",
    "Space",
    "SpaceForm",
    "Strategy",
    "StructuralMove",
    "TasksConfig",
    "TensorSlope",
    "Tracker",
    "UserError",
    "Worker",
    "WorkerLost",
    "WorkerSpec",
    "default_population",
    "fittest",
    "improved",
    "load_plugin",
    "next_generation",
    "rng_factory",
]
