"""The table of merge methods: their parameters, defaults and bounds, as mergekit 0.1.5 has them.

It knows names, numbers and one line of documentation each. How a method is computed is
``merging/``; which of its parameters a search moves, and how, is ``genome.py``.
"""

from __future__ import annotations

from agentmerge.errors import RecipeError
from agentmerge.methods.added import MethodTable
from agentmerge.methods.kinds import Kind, Method, Parameter

__all__ = ["EPSILON_REACH", "METHODS", "Kind", "Method", "MethodTable", "Parameter", "method_named"]

#: The share of the largest epsilon that della's axis reaches. mergekit wants density plus and
#: minus epsilon inside (0, 1), ends excluded, also after densities are rounded to 12 digits.
EPSILON_REACH = 0.99

_WEIGHT = Parameter("weight", "How much of the model goes in.", None)
_TASK_WEIGHT = Parameter(
    "weight", "How much of the task vector goes in; to 1 where normalized.", None, high=1.5
)
_DENSITY = Parameter("density", "The share of the task vector's elements that is kept.", 1.0)
_GAMMA = Parameter(
    "gamma",
    "The share of elements, the largest, that is dropped as outliers; less where the density "
    "needs them.",
    0.01,
    high=0.1,
)
_EPSILON = Parameter(
    "epsilon",
    "How far the probability of keeping an element departs from the density: minus this for a "
    "row's smallest, plus this for its largest. The axis is the share of the largest legal value.",
    0.15,
    kind="share",
)


def _switch(name: str, doc: str, default: bool) -> Parameter:
    return Parameter(name, doc, float(default), kind="bool", searched=False)


def _normalize(default: bool, name: str = "normalize") -> Parameter:
    return _switch(name, "Divide by the sum of the weights, so that only ratios count.", default)


def _task_vectors(normalize: bool, rescale: bool | None) -> tuple[Parameter, ...]:
    scale = Parameter(
        "lambda", "What the merged task vector is multiplied by.", 1.0, high=2.0, searched=False
    )
    if rescale is None:
        return (_normalize(normalize), scale)
    again = _switch("rescale", "Bring what is kept back to the L1 norm it had.", rescale)
    return (_normalize(normalize), scale, again)


_RAM_EPSILON = Parameter(
    "epsilon",
    "What an element has to have moved by, in units of the weights, to count as changed.",
    1e-5,
    1e-8,
    1e-2,
    "log",
)

_DARE, _CRUMBS, _DELLA, _RAM = "2311.03099", "2312.06795", "2406.11617", "2601.13572"

_ROWS = (
    Method(
        "linear",
        "The weighted sum of the models.",
        (_WEIGHT,),
        (_normalize(True),),
        "ignored",
        "2203.05482",
    ),
    Method(
        "slerp",
        "Two models, along the arc between their directions.",
        (),
        (Parameter("t", "Where on the arc: 0 is the base, 1 the other model.", 0.5),),
        "ignored",
        "https://en.wikipedia.org/wiki/Slerp",
    ),
    Method(
        "task_arithmetic",
        "The base plus the weighted sum of the task vectors.",
        (_TASK_WEIGHT,),
        _task_vectors(False, None),
        "required",
        "2212.04089",
    ),
    Method(
        "ties",
        "Task vectors trimmed to their largest elements, summed where they agree in sign.",
        (_TASK_WEIGHT, _DENSITY),
        _task_vectors(True, False),
        "required",
        "2306.01708",
    ),
    Method(
        "dare_ties",
        "Task vectors with elements dropped at random, summed where they agree in sign.",
        (_TASK_WEIGHT, _DENSITY),
        _task_vectors(False, True),
        "required",
        _DARE,
        random=True,
    ),
    Method(
        "dare_linear",
        "Task vectors with elements dropped at random, summed.",
        (_TASK_WEIGHT, _DENSITY),
        _task_vectors(False, True),
        "required",
        _DARE,
        random=True,
    ),
    Method(
        "breadcrumbs",
        "Task vectors without their smallest elements and their largest outliers, summed.",
        (_TASK_WEIGHT, _DENSITY, _GAMMA),
        _task_vectors(False, False),
        "required",
        _CRUMBS,
    ),
    Method(
        "breadcrumbs_ties",
        "As breadcrumbs, summed where they agree in sign.",
        (_TASK_WEIGHT, _DENSITY, _GAMMA),
        _task_vectors(False, False),
        "required",
        _CRUMBS,
    ),
    Method(
        "della",
        "Elements dropped at random, a row's smallest most often, summed where signs agree.",
        (_TASK_WEIGHT, _DENSITY, _EPSILON),
        _task_vectors(True, True),
        "required",
        _DELLA,
        random=True,
    ),
    Method(
        "della_linear",
        "As della, without the agreement in sign.",
        (_TASK_WEIGHT, _DENSITY, _EPSILON),
        _task_vectors(False, True),
        "required",
        _DELLA,
        random=True,
    ),
    Method(
        "sce",
        "Elements that vary most between the models, weighted by their energy, signs agreed.",
        (),
        (Parameter("select_topk", "The share of elements kept, by their variance.", 1.0),),
        "required",
        "2408.07990",
        engine="mergekit",
    ),
    Method(
        "ram",
        "Task vectors: elements that one model changed, whole; the mean of what several did.",
        (),
        (_RAM_EPSILON,),
        "required",
        _RAM,
        engine="mergekit",
    ),
    Method(
        "ramplus_tl",
        "As ram; what one model changed counts more, the more of a tensor others changed too.",
        (),
        (
            Parameter("r", "What a unit of that ratio adds to the factor of 1.", 0.1),
            Parameter("alpha", "The ratio, shared to own elements, beyond which it ends.", 0.2),
            _RAM_EPSILON,
        ),
        "required",
        _RAM,
        engine="mergekit",
    ),
    Method(
        "nuslerp",
        "Two models or task vectors, along the arc between their directions.",
        (_WEIGHT,),
        (
            _switch("nuslerp_flatten", "Treat a tensor as one vector, not by rows.", True),
            _switch("nuslerp_row_wise", "Columns in place of rows, if not flattened.", False),
        ),
        "optional",
        "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
        engine="mergekit",
        least=2,
        most=2,
    ),
    Method(
        "multislerp",
        "The weighted mean of several models or task vectors on the sphere.",
        (_WEIGHT,),
        (
            _normalize(True, "normalize_weights"),
            Parameter(
                "eps",
                "What keeps divisions by lengths finite.",
                1e-8,
                1e-10,
                1e-2,
                "log",
                searched=False,
            ),
        ),
        "optional",
        "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
        engine="mergekit",
    ),
    Method(
        "karcher",
        "The Karcher mean of the models' directions, all with the same share.",
        (),
        (
            Parameter("max_iter", "The most steps towards the mean.", 10.0, 1.0, 20.0, "int"),
            Parameter("tol", "The step at which to stop.", 1e-5, 1e-8, 1e-2, "log"),
        ),
        "ignored",
        "2603.04972",
        engine="mergekit",
    ),
    Method(
        "model_stock",
        "From the base towards the mean of the models, by the angle between task vectors.",
        (),
        (Parameter("filter_wise", "One angle a row in place of one a tensor.", 0.0, kind="bool"),),
        "required",
        "2403.19522",
        engine="mergekit",
        least=2,
    ),
    Method(
        "arcee_fusion",
        "The base, with the elements of one model that matter most put in their place.",
        (),
        (),
        "required",
        "https://www.arcee.ai/blog/meet-mergekit-v0-1-arcee-fusion-expanded-model-support-"
        "multi-gpu-acceleration",
        engine="mergekit",
        most=1,
    ),
    Method(
        "nearswap",
        "The base, moved to one model where the two are nearer than t.",
        (),
        (
            Parameter(
                "t",
                "The distance, in units of the weights, within which the model replaces the "
                "base; beyond it its share falls as t over the distance.",
                None,
                1e-6,
                1e-1,
                "log",
            ),
        ),
        "required",
        "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
        engine="mergekit",
        most=1,
    ),
)

#: By name: these, and what others add.
METHODS = MethodTable({method.name: method for method in _ROWS})
LINEAR = METHODS["linear"]

#: What copies layers, in any order and number; no search moves its one parameter yet.
PASSTHROUGH = Method(
    "passthrough",
    "Each slice is one model's layers.",
    (
        Parameter(
            "scale",
            "What tensors are multiplied by; of a layer's output projections: how strongly it "
            "adds to what runs through the model.",
            1.0,
            -0.5,
            1.5,
        ),
    ),
    (),
    "ignored",
    "https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md",
    most=1,
)

#: What a recipe may name; a genome has one of ``METHODS``.
RECIPE_METHODS = METHODS.beside(PASSTHROUGH)

#: Methods in which only the ratio of weights matters once they are normalized, and in which a sum
#: of weights that cancels leaves nothing to divide by.
SUM_NORMALIZED = frozenset(
    {
        "linear",
        "task_arithmetic",
        "dare_linear",
        "breadcrumbs",
        "della_linear",
        "nuslerp",
        "multislerp",
    }
)


def divides_by_agreeing(method: Method) -> bool:
    """Whether the method can divide each element by the weights that agree in its sign."""
    return method.normalize_param is not None and method.name not in SUM_NORMALIZED


#: Parameters that mergekit accepts and that change nothing in the merged weights.
INERT_PARAMS = frozenset({"int8_mask"})

#: Parameters that are written as true and false.
SWITCHES = frozenset(
    parameter.name for method in _ROWS for parameter in method.shared if parameter.kind == "bool"
)


def method_named(name: str) -> Method:
    """The method called ``name``.

    Raises:
        RecipeError: unknown, with the known names.
    """
    name = METHODS.full_name(name)
    if name not in RECIPE_METHODS:
        raise RecipeError(
            f"merge_method {name!r} is not known; use one of {', '.join(sorted(RECIPE_METHODS))}"
        )
    return RECIPE_METHODS[name]
