"""LlamaIndex tools as schemas for the core, and the core's tool calls as LlamaIndex's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ToolCallBlock
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.tools.types import BaseTool

from ...core.prompt.messages import call_arguments
from ...core.types import ToolCall
from .._shared.tools import new_call_id


def tool_schema(tool: BaseTool) -> dict[str, Any]:
    """Describe a tool to the core, under its own name and with its whole description."""
    function = {
        "name": tool.metadata.get_name(),
        "description": tool.metadata.description,
        "parameters": tool.metadata.get_parameters_dict(),
    }
    return {"type": "function", "function": function}


def call_blocks(calls: Sequence[ToolCall]) -> list[ToolCallBlock]:
    """Calls as blocks of a message, each with a fresh id."""
    return [
        ToolCallBlock(
            tool_call_id=new_call_id(),
            tool_name=call.name,
            tool_kwargs=dict(call.arguments),
        )
        for call in calls
    ]


def call_mapping(block: ToolCallBlock) -> dict[str, Any]:
    """A call of an earlier answer as chat templates take it."""
    arguments = call_arguments(block.tool_name, block.tool_kwargs)
    function = {"name": block.tool_name, "arguments": arguments}
    return {"id": block.tool_call_id, "type": "function", "function": function}


def selections(message: ChatMessage) -> list[ToolSelection]:
    """The calls of a message as agents and programs take them."""
    calls = [block for block in message.blocks if isinstance(block, ToolCallBlock)]
    return [
        ToolSelection(
            tool_id=call.tool_call_id or "",
            tool_name=call.tool_name,
            tool_kwargs=call_arguments(call.tool_name, call.tool_kwargs),
        )
        for call in calls
    ]
