"""A completion for each record, asked of benchmarks/llmserver.py. BENCH_LLM: its options, JSON."""

import json
import os

from anton_components.vendor.openai.cognition import OpenAiCompletion

from anton import Table

options = json.loads(os.environ["BENCH_LLM"])
asked = Table("bench_in")
answers = Table("bench_out")
asked.on_new_records(
    OpenAiCompletion(answers, api_key="sk-bench", model="m", max_tokens=10, price={"input": "100", "output": "200"},
                     base_url=options["base_url"], **options.get("component", {})),
    name="complete", **options.get("handler", {}))
