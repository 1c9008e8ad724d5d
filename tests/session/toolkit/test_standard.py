"""Each tool passes LangChain's own suites."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from langchain_core.tools import BaseTool
from langchain_tests.integration_tests import ToolsIntegrationTests
from langchain_tests.unit_tests import ToolsUnitTests

EXAMPLES: dict[str, dict[str, Any]] = {
    "merge_and_evaluate": {"recipe": "[50, 40, 30, 20]"},
    "list_candidates": {"count": 3},
    "compare": {"a": "north", "b": "south"},
    "inspect_parents": {},
    "failing_items": {"candidate": "north"},
}


class _One:
    """The parameters of both suites for one tool."""

    name: ClassVar[str]
    tools: ClassVar[dict[str, BaseTool]]

    @pytest.fixture(autouse=True)
    def _tools(self, toolkit, ask):
        type(self).tools = {tool.name: tool for tool in toolkit.get_tools()}
        assert ask("inspect_parents")[0] == "success"  # scores the parents that compare needs

    @property
    def tool_constructor(self) -> BaseTool:
        return self.tools[self.name]

    @property
    def tool_invoke_params_example(self) -> dict[str, Any]:
        return EXAMPLES[self.name]


class TestMergeUnit(_One, ToolsUnitTests):
    name = "merge_and_evaluate"


class TestMergeIntegration(_One, ToolsIntegrationTests):
    name = "merge_and_evaluate"


class TestListUnit(_One, ToolsUnitTests):
    name = "list_candidates"


class TestListIntegration(_One, ToolsIntegrationTests):
    name = "list_candidates"


class TestCompareUnit(_One, ToolsUnitTests):
    name = "compare"


class TestCompareIntegration(_One, ToolsIntegrationTests):
    name = "compare"


class TestInspectUnit(_One, ToolsUnitTests):
    name = "inspect_parents"


class TestInspectIntegration(_One, ToolsIntegrationTests):
    name = "inspect_parents"


class TestFailingUnit(_One, ToolsUnitTests):
    name = "failing_items"


class TestFailingIntegration(_One, ToolsIntegrationTests):
    name = "failing_items"


def test_every_tool_is_tried(toolkit) -> None:
    assert {tool.name for tool in toolkit.get_tools()} == EXAMPLES.keys()
