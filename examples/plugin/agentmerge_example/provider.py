"""A model provider: a function from the name behind the colon to a LangChain chat model."""

from __future__ import annotations

import json
import re
from typing import Any

from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult


def rulebook(model: str, **options: Any) -> BaseChatModel:
    """options: base_url, temperature, max_tokens and timeout, as far as the user set them."""
    return Rulebook(mood=model)


class Rulebook(BaseChatModel):
    """Stays where the search is best. Stands in for a client of a server of your own."""

    mood: str

    @property
    def _llm_type(self) -> str:
        return "rulebook"

    def _generate(
        self, messages: list[BaseMessage], stop: Any = None, run_manager: Any = None, **_: Any
    ) -> ChatResult:
        asked = "\n".join(message.text for message in messages)
        genomes = re.findall(r"\| ([\d, ]+) \| \d+ \w+$", asked, re.MULTILINE)
        reply: dict[str, Any]
        if '"mean_genome"' in asked:
            best = [int(value) for value in re.findall(r"\d+", genomes[-1])]
            reply = {"thought": f"{self.mood}: stay", "mean_genome": best}
        elif '"summary"' in asked:
            reply = {"summary": f"{self.mood}: {len(genomes)} rows"}
        else:
            reply = {"thought": self.mood, "sigma": 0.1}
        return ChatResult(generations=[ChatGeneration(message=AIMessage(json.dumps(reply)))])
