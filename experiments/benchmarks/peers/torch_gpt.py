"""A GPT-2 training step in PyTorch: f32 or bf16 autocast, compiled or not.

`experiments.benchmarks.throughput` runs it with a Python that has torch and talks to it in lines.
The first line on stdin is a JSON object: sizes of the model, `dtype` and `compile`, the optimizer's
rates, the batch, and the `device`, `cpu` or `cuda`. The answer on stdout is a JSON object with the
loss of a first step. For each further line, a number of steps, it takes one more and answers with
the seconds that they took and the loss of the last. It ends with its input.

Knows torch only.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Attention and MLP, each behind its LayerNorm."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        for module in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
        for module in (self.out, self.down):
            nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        batch, length, width = x.shape
        split = (batch, length, self.heads, width // self.heads)
        q, k, v = (y.view(split).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """GPT-2 with a tied head."""

    def __init__(self, vocab_size: int, context: int, width: int, heads: int, layers: int):
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        nn.init.normal_(self.embed.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.blocks = nn.ModuleList(Block(width, heads, layers) for _ in range(layers))
        self.norm = nn.LayerNorm(width)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[B, T]` to `[B, T, V]`."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.embed.weight)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy in nats per token."""
        return functional.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())


def trainer(settings: dict[str, Any]) -> Any:
    """A function that trains for a number of steps and returns the last loss."""
    torch.manual_seed(0)
    torch.set_num_threads(settings["threads"])
    shape = [settings[name] for name in ("vocab_size", "context", "width", "heads", "layers")]
    device = torch.device(settings["device"])
    model = Gpt(*shape).to(device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = (settings["b1"], settings["b2"])
    optimizer = torch.optim.AdamW(
        groups, lr=settings["learning_rate"], betas=betas, eps=settings["eps"], fused=True
    )
    loss_of = torch.compile(model) if settings["compile"] else model
    inputs, targets = (
        torch.tensor(settings[name], device=device) for name in ("inputs", "targets")
    )

    def train(steps: int) -> float:
        loss = torch.zeros(())
        for _ in range(steps):
            narrow = settings["dtype"] == "bf16"
            autocast = torch.autocast(device.type, torch.bfloat16)
            with autocast if narrow else contextlib.nullcontext():
                loss = loss_of(inputs, targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"])
            optimizer.step()
        return loss.item()

    return train


def device_memory() -> dict[str, int]:
    """The most memory of a GPU that this process has had; nothing on CPU."""
    return {"peak_bytes": torch.cuda.max_memory_allocated()} if torch.cuda.is_available() else {}


def main() -> None:
    """Answers each line of stdin."""
    answer = lambda **values: print(json.dumps(values), flush=True)
    train = trainer(json.loads(sys.stdin.readline()))
    answer(torch=torch.__version__, loss=train(1), **device_memory())
    for line in sys.stdin:
        train(1)  # the first step after a pause does not count
        start = time.perf_counter()
        loss = train(int(line))
        answer(seconds=time.perf_counter() - start, loss=loss, **device_memory())


if __name__ == "__main__":
    main()
