"""A LangChain agent that searches for a merge with agentmerge's tools alone.

    python examples/tools_agent.py config.yml openai:gpt-4o

Any chat model that can call tools will do; what it tries is kept in runs/ as the run "tools".
"""

import sys

from langchain.agents import create_agent

from agentmerge import MergeToolkit
from agentmerge.agents.models import resolve_model

TASK = """\
Find the best merge of these models. Look at the parents first. Then try recipes, compare the good
ones, and change one thing at a time. Stop when two tries in a row bring nothing, or when no
evaluations are left, and say which candidate is best and why."""


def main(config: str, model: str) -> None:
    with MergeToolkit(config) as toolkit:
        agent = create_agent(resolve_model(model), toolkit.get_tools())
        said = agent.invoke({"messages": [("user", TASK)]}, {"recursion_limit": 200})
    print(said["messages"][-1].text)
    print("Its best recipe: agentmerge best tools")


if __name__ == "__main__":
    main(*sys.argv[1:])
