"""Run one of the known client libraries against a server:  python clients.py NAME URL MODEL

Start it with the Python in which the library is installed. Each client holds a conversation of several turns, in which the model's
first answer is sent back, and uses streaming if it supports it. An exception ends the program with exit code 1.
"""

import sys
from typing import Any


def langchain(url: str, model: str) -> list[str]:
    from langchain_openai import ChatOpenAI, OpenAI

    chat: Any = ChatOpenAI(model=model, base_url=url, api_key="none", max_tokens=4)
    first = chat.invoke("Hello")
    texts = OpenAI(model=model, base_url=url, api_key="none", max_tokens=3).generate(["a"] * 20).generations
    assert len(texts) == 20
    return [chat.invoke([("user", "Hello"), first, ("user", "More")]).content, "".join(part.content for part in chat.stream("Hello"))]


def pydantic_ai(url: str, model: str) -> list[str]:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    chat: Any = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    agent: Any = Agent(chat, model_settings={"max_tokens": 4}, system_prompt="Be kind.")
    first = agent.run_sync("Hello")
    return [first.output, agent.run_sync("More", message_history=first.all_messages()).output]


def instructor(url: str, model: str) -> list[str]:
    import instructor as library
    import openai

    client: Any = library.from_openai(openai.OpenAI(base_url=url, api_key="none"))
    messages = [{"role": "user", "content": "Hello"}]
    answer = client.chat.completions.create(model=model, response_model=None, messages=messages, max_tokens=4)
    return [answer.choices[0].message.content]


def llama_index(url: str, model: str) -> list[str]:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    chat: Any = OpenAILike(model=model, api_base=url, api_key="none", is_chat_model=True, max_tokens=4)
    hello = ChatMessage(role="user", content="Hello")
    first = chat.chat([hello])
    return [chat.chat([hello, first.message, hello]).message.content, "".join(part.delta for part in chat.stream_complete("Hello"))]


def haystack(url: str, model: str) -> list[str]:
    from haystack.components.generators.chat import OpenAIChatGenerator
    from haystack.dataclasses import ChatMessage
    from haystack.utils import Secret

    key = Secret.from_token("none")
    chat: Any = OpenAIChatGenerator(model=model, api_base_url=url, api_key=key, generation_kwargs={"max_tokens": 4})
    hello = ChatMessage.from_user("Hello")
    first = chat.run([hello])["replies"][0]
    return [first.text, chat.run([hello, first, hello])["replies"][0].text]


if __name__ == "__main__":
    name, url, model = sys.argv[1:]
    answers = globals()[name](url, model)
    assert all(isinstance(text, str) and text for text in answers), answers
