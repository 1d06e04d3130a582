"""The shapes of models' parameters."""

from __future__ import annotations


def gpt2(vocabulary: int = 50257, context: int = 1024, layers: int = 12, width: int = 768) -> list[tuple[int, ...]]:
    """GPT-2, by default the 124M model; the output layer is the token embedding."""
    norm = [(width,), (width,)]
    attention = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    mlp = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *layers * [*norm, *attention, *norm, *mlp], *norm]


def llama(vocabulary: int, layers: int, width: int, hidden: int) -> list[tuple[int, ...]]:
    """A Llama without grouped queries: SmolLM2-1.7B with (49152, 24, 2048, 8192), 1,711,376,384 parameters."""
    block = [(width,), *4 * [(width, width)], (width,), (hidden, width), (hidden, width), (width, hidden)]
    return [(vocabulary, width), *layers * block, (width,)]
