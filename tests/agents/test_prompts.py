"""Prompts fail when they are loaded, not in generation 7."""

import pytest

from agentmerge.agents.prompts import VARIABLES, load_prompts, prompt_hash
from agentmerge.agents.view import variables
from agentmerge.errors import PromptError
from agentmerge.recipe.names import public_names
from agentmerge.system.bundled import bundled

CRITIC = "Judge.\n---\n{{history}} {{best_score}}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "critic.md").write_text(CRITIC)
    return tmp_path


def test_our_own_prompts_load_and_use_what_their_role_has():
    prompts = load_prompts()
    assert VARIABLES.keys() == {"critic", "controller", "proposer", "curator"}
    for role in VARIABLES:
        prompt = getattr(prompts, role)
        assert prompt.path == bundled("prompts") / f"{role}.md"
        assert [
            m["role"] for m in prompt.render(**dict.fromkeys(VARIABLES[role].allowed, "v"))
        ] == [
            "system",
            "user",
        ]


def test_override_replaces_file_by_file(folder):
    ours, theirs = load_prompts(), load_prompts(folder)
    assert theirs.critic.path == folder / "critic.md"
    assert theirs.critic.sha != ours.critic.sha
    assert theirs.proposer == ours.proposer


def test_render_fills_each_variable_once(folder):
    system, user = load_prompts(folder).critic.render(history="{{best_score}}", best_score="0.9")
    assert system == {"role": "system", "content": "Judge."}
    assert user == {"role": "user", "content": "{{best_score}} 0.9"}


def test_a_prompt_without_a_dividing_line_is_one_message(folder):
    (folder / "critic.md").write_text("Judge {{ history }}")
    assert load_prompts(folder).critic.render(history="h") == [
        {"role": "user", "content": "Judge h"}
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{histroy}}", ["critic.md", "{{histroy}}", "did you mean {{history}}"]),
        ("{{history}} {{zzz}}", ["critic.md", "{{zzz}}", "use one of", "best_score"]),
        ("no variables", ["critic.md", "{{history}} is missing"]),
        ("", ["critic.md", "{{history}} is missing"]),
        ("{{history}} {{best score}}", ["critic.md", "without a variable name"]),
        ("{{history}} {{critique}}", ["critic.md", "{{critique}}"]),
    ],
)
def test_a_bad_variable_names_file_and_variable(folder, text, words):
    (folder / "critic.md").write_text(text)
    with pytest.raises(PromptError) as refused:
        load_prompts(folder)
    for word in words:
        assert word in str(refused.value)
    assert refused.value.exit_code == 2


def test_json_braces_are_no_variables(folder):
    (folder / "critic.md").write_text('{"a": {"b": {{history}}}}')
    assert load_prompts(folder).critic.render(history="1")[0]["content"] == '{"a": {"b": 1}}'


def test_a_missing_value_is_an_error(folder):
    with pytest.raises(PromptError, match="best_score"):
        load_prompts(folder).critic.render(history="h")


def test_a_misspelt_file_is_noticed(folder):
    (folder / "propser.md").write_text("{{history}}")
    (folder / "README.md").write_text("notes")
    with pytest.raises(PromptError, match=r"propser\.md .* proposer\.md"):
        load_prompts(folder)


def test_folders_that_help_nobody(tmp_path):
    with pytest.raises(PromptError, match="does not exist"):
        load_prompts(tmp_path / "none")
    with pytest.raises(PromptError, match=r"has none of critic\.md"):
        load_prompts(tmp_path)


def test_a_file_that_is_no_text(folder):
    (folder / "critic.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match=r"critic\.md"):
        load_prompts(folder)


def test_prompt_hash_tells_prompts_apart():
    one = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompt_hash(one) == prompt_hash([dict(message) for message in one])
    assert prompt_hash(one) != prompt_hash([{"role": "user", "content": "ab"}])
    assert prompt_hash(one) != prompt_hash(one[::-1])


def test_no_folder_of_this_machine_is_told_to_a_provider(make_view, entries, observe):
    path = "/models/expert-sort"
    named = [
        observe(0, 1, (0.0, 2 / 3, 0.0, 2 / 3), 0.30, "parent", path),
        observe(2, 0, (0.9, 0.1, 0.9, 0.1), None, failure=f"slice 0 names {path!r} twice"),
    ]
    found = variables(make_view([*entries[:1], named[0], *entries[2:], named[1]]))
    assert path not in "\n".join(found.values())
    assert "slice 0 names 'expert-sort' twice" in found["failures"]
    assert "expert-sort" in found["rivals"]
    assert public_names(["/a/x/model", "/a/y/model", "org/model", "/b/z+/c/lora"]) == {
        "/a/x/model": "x/model",
        "/a/y/model": "y/model",
        "org/model": "org/model",
        "/b/z+/c/lora": "z+lora",
    }
