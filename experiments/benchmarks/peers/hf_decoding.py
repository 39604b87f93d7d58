"""Greedy decoding with Hugging Face's GPT-2 from random weights, for `decoding.py`.

Started with the format and the number of prompts. Answers each line of stdin, a number of tokens,
by the seconds that `generate` took for them. Imports nothing of lmjax: it may run in an environment
that has torch and transformers but no JAX.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> None:
    """Answers lines."""
    number_format, rows = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    if number_format == "bf16":
        model = model.to(torch.bfloat16)
    prompt = torch.randint(0, 50000, (rows, 32))
    mask = torch.ones_like(prompt)

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens}
        model.generate(prompt, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths)
        return time.perf_counter() - start

    with torch.inference_mode():
        for line in sys.stdin:
            tokens = int(line)
            # What reading the prompt takes is taken off.
            print(json.dumps({"seconds": seconds(tokens + 1) - seconds(1)}), flush=True)


if __name__ == "__main__":
    main()
