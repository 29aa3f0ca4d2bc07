"""The program that plays a seat of an environment of `verifiers`: a conversation, with tools, inside this process.

The programs that come with `verifiers` run in a box of their own and need the tool `uv`. This one does what its plain
chat does: it asks for a message, calls the tools that the message names, and ends with the first message that names
none.
"""

from __future__ import annotations

import json
import sys
import types
from contextlib import AsyncExitStack
from typing import Any

ID = "keel_conversation"  # `verifiers` finds programs as modules of that name
Message = dict[str, Any]


def register() -> str:
    """Make the program known to `verifiers`, and give its name."""
    if ID not in sys.modules:
        module = types.ModuleType(ID)
        vars(module).update(__all__=["Conversation"], Conversation=_program())
        sys.modules[ID] = module
    return ID


def _program() -> type:
    """The program as a class of `verifiers`, which may not be installed where this file is imported."""
    from verifiers.v1.harness import Harness, HarnessConfig
    from verifiers.v1.runtimes import ProgramResult

    class Conversation(Harness[HarnessConfig]):
        """A conversation with tools, whose every message is asked for at the endpoint that `verifiers` gives it."""

        APPENDS_SYSTEM_PROMPT = True
        SUPPORTS_MCP = True
        SUPPORTS_RESUME = True
        SUPPORTS_TOOL_INTERCEPTION = True
        EXECUTES_CODE = False
        NEEDS_CONTAINER = False

        async def launch(
            self,
            ctx: Any,
            trace: Any,
            runtime: Any,
            endpoint: str,
            secret: str,
            mcp_urls: dict[str, str],
            data: Any,
            tool_interception_url: str | None = None,
        ) -> Any:
            """One stretch of the conversation, up to a message without tool calls."""
            servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
            messages = _opening(*self.resolve_prompt(data))
            await _converse(ctx.model, trace, endpoint, secret, servers, messages, tool_interception_url)
            return ProgramResult(exit_code=0, stdout="", stderr="")

    return Conversation


def _opening(system: str | None, prompt: Any) -> list[Message]:
    """The messages of a prompt, in the form of OpenAI."""
    from verifiers.v1.dialects.chat import message_to_wire

    said = [{"role": "system", "content": system}] if system else []
    if isinstance(prompt, str):
        return [*said, {"role": "user", "content": prompt}]
    return [*said, *(message_to_wire(message) for message in prompt or ())]


async def _converse(
    model: str, trace: Any, endpoint: str, secret: str, servers: Any, messages: list[Message], gate: str | None
) -> None:
    """Ask for messages and call their tools, up to one without calls or to a limit of the rollout."""
    import httpx
    from verifiers.v1.harnesses.utils.mcp import connect_mcp

    headers = {"Authorization": f"Bearer {secret}"}
    async with AsyncExitStack() as stack, httpx.AsyncClient(headers=headers, timeout=None) as client:
        tools, dispatch, connections = await connect_mcp({"mcpServers": servers}, stack)
        while True:
            body = {"model": model, "messages": messages, **({"tools": tools} if tools else {})}
            reply = await client.post(f"{endpoint}/chat/completions", json=body)
            if reply.status_code != 200:
                if trace.stop_condition is not None:
                    return  # a limit or a stop of the task refused the turn
                raise RuntimeError(f"the model's endpoint answered {reply.status_code}: {reply.text[:200]}")
            message = reply.json()["choices"][0]["message"]
            messages.append({key: value for key, value in message.items() if value is not None})
            if not message.get("tool_calls"):
                return
            for call in message["tool_calls"]:
                messages.append(await _result(call, client, dispatch, connections, gate))


async def _result(call: Message, client: Any, dispatch: Any, connections: Any, gate: str | None) -> Message:
    """What a tool says, or why it was not called."""
    from verifiers.v1.harnesses.utils.mcp import call_mcp

    name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
    if gate is not None:
        asked = {"tool_call_id": call["id"], "name": name, "arguments": arguments}
        decision = (await client.post(gate, json=asked)).raise_for_status().json()
        if decision["action"] == "stop":
            raise RuntimeError(decision["reason"])
        if decision["action"] == "deny":
            return decision["message"]
    if name in dispatch:
        content = await call_mcp(connections, dispatch, name, arguments)
    else:
        content = f"error: unknown tool {name!r}"
    return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}
