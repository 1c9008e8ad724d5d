"""What a model's text may look like, and what becomes of it."""

import json
import subprocess
import sys

import pytest

from agentmerge.agents.schemas import (
    MAX_CANDIDATES,
    Bounds,
    ControllerReply,
    CriticReply,
    ProposerReply,
    clean_text,
    json_schema,
    parse_reply,
    percent,
)
from agentmerge.contracts.advice import Guidance, StructuralMove
from agentmerge.errors import ModelReplyError

BOUNDS = Bounds(dimensions=3, sigma_low=0.05, sigma_high=0.2)
GOOD = '{"thought": "t", "mean_genome": [10, 20, 30]}'


def genome(text):
    return f'{{"thought": "t", "mean_genome": {text}}}'


ACCEPTED = {
    "bare": GOOD,
    "whitespace": f"\n\n  {GOOD}\n",
    "fenced": f"```json\n{GOOD}\n```",
    "fenced without a language": f"Sure!\n```\n{GOOD}\n```\nDone.",
    "amid prose": f"I think {{weights}} matter. {GOOD} Good luck {{}}!",
    "after thinking": f"<think>maybe {genome('[1, 1, 1]')}? no.</think>\n{GOOD}",
    "thinking opened in the prompt": f"hm {genome('[1, 1, 1]')} no</think>{GOOD}",
    "a draft first": f"Draft: {genome('[1, 1, 1]')}. Final: {GOOD}",
    "another object last": f'{GOOD} {{"confidence": 1}}',
    "thinking tags inside a value": GOOD.replace('"t"', '"a </think> b"'),
    "extra keys": GOOD[:-1] + ', "model": "/etc/passwd", "run": "rm -rf /"}',
    "null forecast": GOOD[:-1] + ', "expected_score": null}',
    "floats": genome("[10.0, 20.0, 30.0]"),
    "a tool call in words": f'<tool_call>{{"name": "x", "arguments": {{}}}}</tool_call>{GOOD}',
    "lone surrogate": GOOD.replace('"t"', '"a\\ud800b"'),
}

REFUSED = {
    "empty": ("", "empty"),
    "blank": (" \n\t", "empty"),
    "prose": ("I would widen the step.", "no complete JSON object"),
    "refusal": ("I'm sorry, but I can't help with that.", "no complete JSON object"),
    "a list": ("[10, 20, 30]", "no complete JSON object"),
    "cut off": (GOOD[:-8], "no complete JSON object"),
    "still thinking": (f"<think>perhaps {GOOD} but", "no complete JSON object"),
    "wrong shape": ('{"answer": 42}', "required"),
    "too short": (genome("[10, 20]"), "has 2 numbers; give exactly 3"),
    "too long": (genome("[10, 20, 30, 40]"), "has 4 numbers; give exactly 3"),
    "NaN": (genome("[10, NaN, 30]"), "number 1 is nan"),
    "infinite": (genome("[10, 20, Infinity]"), "number 2 is inf"),
    "overflow": (genome("[1e999, 20, 30]"), "number 0 is inf"),
    "huge integer": (genome(f"[{'9' * 400}, 20, 30]"), "mean_genome.0"),
    "integer of 5000 digits": (genome(f"[{'9' * 5000}, 20, 30]"), "no complete JSON object"),
    "above": (genome("[10, 140, 30]"), "number 1 is 140"),
    "below": (genome("[10, -3, 30]"), "number 1 is -3"),
    "words": (genome('["high", 20, 30]'), "mean_genome.0"),
    "numbers as text": (genome('["10", "20", "30"]'), "mean_genome.0"),
    "booleans": (genome("[true, false, true]"), "mean_genome.0"),
    "null": (genome("[null, 20, 30]"), "mean_genome.0"),
    "nested": (genome("[[10, 20, 30]]"), "mean_genome.0"),
    "fractions of one": (genome("[0.1, 0.29, 1]"), "fractions"),
    "bad candidate": (GOOD[:-1] + ', "candidates": [[1, 2]]}', "candidates"),
    "forecast not finite": (GOOD[:-1] + ', "expected_score": NaN}', "expected_score"),
    "thought is a list": (GOOD.replace('"t"', "[1]"), "thought"),
    "single quotes": ("{'thought': 't', 'mean_genome': [1, 2, 3]}", "no complete JSON object"),
    "a megabyte of prose": ("word " * 200_000, "1000000 characters"),
    "deep nesting": ('{"a":' * 30_000, "no complete JSON object"),
    "braces": ("{" * 100_000, "no complete JSON object"),
}


@pytest.mark.parametrize("text", ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(text):
    reply = parse_reply(text, ProposerReply, BOUNDS)
    assert reply.mean_genome == [10, 20, 30]
    reply.thought.encode()


@pytest.mark.parametrize(("text", "sentence"), REFUSED.values(), ids=REFUSED)
def test_refused_with_a_sentence_for_the_model(text, sentence):
    with pytest.raises(ModelReplyError) as refused:
        parse_reply(text, ProposerReply, BOUNDS)
    message = str(refused.value)
    assert sentence in message
    assert len(message) < 300
    assert "\n" not in message


def test_a_hair_beyond_the_bounds_is_clipped():
    assert parse_reply(genome("[-0.4, 100.3, 50]"), ProposerReply, BOUNDS).mean_genome == [
        0,
        100,
        50,
    ]


def test_all_zeros_and_ones_are_integers():
    assert parse_reply(genome("[0, 1, 0]"), ProposerReply, BOUNDS).mean_genome == [0, 1, 0]


def test_candidates_are_bounded_in_number():
    many = GOOD[:-1] + f', "candidates": {json.dumps([[1, 2, 3]] * 50)}}}'
    assert len(parse_reply(many, ProposerReply, BOUNDS).candidates) == MAX_CANDIDATES


@pytest.mark.parametrize("sigma", [0.0, 0.3, -0.1, "NaN", "1e400", '"small"', "null"])
def test_controller_refuses_a_step_outside_its_bounds(sigma):
    with pytest.raises(ModelReplyError, match="sigma"):
        parse_reply(f'{{"thought": "t", "sigma": {sigma}}}', ControllerReply, BOUNDS)


@pytest.mark.parametrize("sigma", [0.05, 0.1, 0.2])
def test_controller_step(sigma):
    assert (
        parse_reply(f'{{"thought": "", "sigma": {sigma}}}', ControllerReply, BOUNDS).sigma == sigma
    )


def test_critic_text_is_bounded_and_printable():
    noise = json.dumps(
        {"summary": "red\x1b[31m\u0000\u202e " + "x" * 5_000, "findings": ["y"] * 50}
    )
    reply = parse_reply(noise, CriticReply, BOUNDS)
    assert len(reply.summary) == 1_000
    assert reply.summary.isprintable()
    assert len(reply.findings) == 8


def test_critic_must_say_something():
    with pytest.raises(ModelReplyError, match="summary"):
        parse_reply('{"summary": " \\u0007 "}', CriticReply, BOUNDS)


@pytest.mark.parametrize("reply", [ProposerReply, CriticReply, ControllerReply])
def test_json_schema_is_plain_and_strict(reply):
    schema = json_schema(reply, BOUNDS)
    assert json.loads(json.dumps(schema)) == schema
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(schema["properties"]) == set(reply.model_fields)


def test_guidance_round_trips_through_json():
    full = Guidance(
        mean=(0.1, 0.2),
        candidates=((0.0, 1.0), (0.5, 0.5)),
        sigma=0.1,
        operator_weights=(("llm_evo", 0.7), ("cma_es", 0.3)),
        structural_move=StructuralMove("drop_model", "north", "useless"),
        forecasts=(0.5, None),
        critique="c",
        thought="t",
        source="model",
        expected_score=0.9,
    )
    for guidance in (full, Guidance()):
        assert Guidance.from_json(json.loads(json.dumps(guidance.to_json()))) == guidance


def test_rounding_not_truncation():
    assert [percent(v) for v in (0.29, 0.57, 0.58, 0.0, 1.0, -0.2, 1.2)] == [
        29,
        57,
        58,
        0,
        100,
        0,
        100,
    ]


def test_clean_text_keeps_words():
    assert clean_text("é 中 → ok\nnext", 100) == "é 中 → ok\nnext"


def test_light_imports():
    code = (
        "import sys, agentmerge.agents.schemas, agentmerge.agents.prompts, "
        "agentmerge.agents.models, agentmerge.agents.proposer, agentmerge.testing.scripted\n"
        "heavy = {'langchain', 'langchain_core', 'langgraph', 'openai', 'torch', 'mergekit'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
