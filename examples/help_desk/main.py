"""Questions are answered from the articles that are most like them: embeddings find them, a model reads them.

    articles --> OpenAiEmbedding --> passages -------------------------+
    questions --> OpenAiEmbedding --> asked --> AnthropicCompletion <--+ --> answers

The numbers are a plain list here, so that any Postgres will do; for many articles make it a Vector(1536) with an index
(docs/context.md). Try it: anton dev (an echo answers). For real: set OPENAI_API_KEY and ANTHROPIC_API_KEY, then anton
work. Other servers of the same protocols: OPENAI_BASE_URL, ANTHROPIC_BASE_URL.
"""

import os

from anton_components.vendor.anthropic.cognition import AnthropicCompletion
from anton_components.vendor.openai.embedding import OpenAiEmbedding
from pydantic import BaseModel

from anton import Table, sql


class Text(BaseModel):
    id: int
    text: str


class Passage(BaseModel):
    id: int | None = None
    text: str
    embedding: list[float]


class Answer(BaseModel):
    id: int | None = None
    text: str
    completion: str


articles = Table("articles", Text)
questions = Table("questions", Text)
passages = Table("passages", Passage)
asked = Table("asked", Passage)
answers = Table("answers", Answer)

OPENAI = {"connection": "openai", "base_url": os.environ.get("OPENAI_BASE_URL")}

articles.on_new_records(OpenAiEmbedding(passages, **OPENAI), name="embed_articles")
questions.on_new_records(OpenAiEmbedding(asked, **OPENAI), name="embed_questions")

asked.on_new_records(AnthropicCompletion(
    answers, connection="anthropic", base_url=os.environ.get("ANTHROPIC_BASE_URL"), max_tokens=300,
    system="You answer from the articles alone. Where they do not say, you say so.",
    prompt="Articles:\n{articles}\n\nQuestion: {text}",
    context={"articles": sql("""
        select p.text from passages p
        order by (select sum(a * b) from unnest(p.embedding, {embedding}::float8[]) as both_of(a, b)) desc
        limit 2""")}))
