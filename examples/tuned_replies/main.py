"""A model that learns each week from the replies that people rated well, and answers with what it has learnt.

    prompts --> OpenAiCompletion(model="alias:replies") --> completions        rated --> OpenAiFineTune, weekly

Try it: anton dev (an echo answers, nothing is tuned). For real: set OPENAI_API_KEY, then anton work. Another server of
the same protocol: OPENAI_BASE_URL.
"""

import os

from anton_components.vendor.openai.cognition import OpenAiCompletion
from anton_components.vendor.openai.tuning import OpenAiFineTune
from pydantic import BaseModel

from anton import Table, cron, sql


class Rated(BaseModel):
    id: int | None = None
    prompt: str
    reply: str
    rating: int


prompts = Table("prompts")
completions = Table("completions")
rated = Table("rated", Rated)

OPENAI = {"connection": "openai", "base_url": os.environ.get("OPENAI_BASE_URL")}

replies = OpenAiFineTune("replies", least=2, system="Be brief.", **OPENAI, examples=sql(
    "select prompt, reply as completion from rated where rating > 0 order by id"))
prompts.on_new_records(OpenAiCompletion(completions, model="alias:replies", memo=False, **OPENAI))


@cron.weekly
def rebuild_model():
    replies.run()
