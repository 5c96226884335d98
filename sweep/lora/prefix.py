"""Prefix tuning: p trained embeddings before the tokens of every row, each trial's own.

Hu et al. 2021, arXiv 2106.09685, section 5.1 (prefix-embedding tuning); Lester et al. 2021, arXiv 2104.08691,
section 2: Pr(Y | [P; X]), which is PEFT's PROMPT_TUNING. A row is [its trial's p embeddings, its tokens, padding], so
that trials of different lengths share a pass; what padding holds is masked.

Shapes: K trials in the pack, G neighbouring trials of one length p, b rows a trial, R = K·b rows, T tokens a row,
P the longest p, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sweep.lora.methods import State, generator_for

PROMPT = "prompt_embeddings"  # PEFT's own name


@dataclass(frozen=True)
class Prefix:
    """The embeddings of neighbouring trials start … stop−1 of one length."""

    start: int
    stop: int
    value_GpH: nn.Parameter


def init_prefix(embedding: nn.Embedding, length: int, seed: int) -> State:
    """A trial's prefix at step 0: entries of the vocabulary's embedding, (p, H), drawn by the seed with replacement.

    That is Lester et al.'s "sampled vocabulary" and PEFT's SAMPLE_VOCAB. PEFT's default, RANDOM, draws from a standard
    normal distribution instead, whose vectors are far longer than those of most vocabularies.
    """
    ids_p = torch.randint(0, embedding.num_embeddings, (length,), generator=generator_for(seed, PROMPT))
    with torch.no_grad():
        return {PROMPT: embedding(ids_p.to(embedding.weight.device)).float().cpu().clone()}


def put_before_tokens(model: Any, prefixes: Sequence[Prefix], trials: int) -> list[RemovableHandle]:
    """Hooks on the model's backbone: it sees every row behind its trial's prefix.

    A language model gets the hidden states of the rows' own tokens back, (R, T, H), so that its logits stand where its
    tokens do. A classifier reads what it reads: where that is the first position, the first embedding of the prefix.
    """
    backbone: nn.Module = model.base_model
    names = list(inspect.signature(backbone.forward).parameters)
    longest = max(prefix.value_GpH.shape[1] for prefix in prefixes)
    lengths = [0] * trials
    for prefix in prefixes:
        lengths[prefix.start : prefix.stop] = [prefix.value_GpH.shape[1]] * (prefix.stop - prefix.start)
    lengths_K = torch.tensor(lengths, device=prefixes[0].value_GpH.device)

    def prepend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        ids_RT = given.pop("input_ids")
        given["inputs_embeds"] = _behind(prefixes, model.get_input_embeddings()(ids_RT), trials, longest)
        mask_RT = given.get("attention_mask")
        mask_RT = torch.ones_like(ids_RT) if mask_RT is None else mask_RT
        length_R1 = lengths_K.repeat_interleave(len(ids_RT) // trials)[:, None]
        place_1L = torch.arange(longest + ids_RT.shape[1], device=ids_RT.device)[None] - length_R1
        token_RL = mask_RT.gather(1, place_1L.clamp(0, ids_RT.shape[1] - 1)) * (place_1L < ids_RT.shape[1])
        given["attention_mask"] = torch.where(place_1L < 0, 1, token_RL)
        return (), given

    def take_tokens(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        hidden_RLH = output.last_hidden_state
        length_R1 = lengths_K.repeat_interleave(len(hidden_RLH) // trials)[:, None]
        place_RT = torch.arange(hidden_RLH.shape[1] - longest, device=hidden_RLH.device)[None] + length_R1
        output.last_hidden_state = hidden_RLH.gather(1, place_RT[..., None].expand(-1, -1, hidden_RLH.shape[2]))
        return output

    hooks = [backbone.register_forward_pre_hook(prepend, with_kwargs=True)]
    if model.get_output_embeddings() is not None:
        hooks.append(backbone.register_forward_hook(take_tokens))
    return hooks


def _behind(prefixes: Sequence[Prefix], tokens_RTH: Tensor, trials: int, longest: int) -> Tensor:
    """(R, P + T, H): every row's tokens behind its trial's prefix, with zeros to the end."""
    tokens_KbTH = tokens_RTH.view(trials, -1, *tokens_RTH.shape[1:])
    _, b, _, H = tokens_KbTH.shape
    parts, done = [], 0
    for prefix in [*prefixes, None]:
        stop = trials if prefix is None else prefix.start
        if stop > done:  # trials without a prefix
            parts.append(torch.cat([tokens_KbTH[done:stop], tokens_RTH.new_zeros(stop - done, b, longest, H)], 2))
        if prefix is not None:
            G, p, _ = prefix.value_GpH.shape
            value_GbpH = prefix.value_GpH.to(tokens_RTH.dtype)[:, None].expand(G, b, p, H)
            padding = tokens_RTH.new_zeros(G, b, longest - p, H)
            parts.append(torch.cat([value_GbpH, tokens_KbTH[prefix.start : prefix.stop], padding], 2))
            done = prefix.stop
    return torch.cat(parts).flatten(0, 1)


@torch.no_grad()
def prefix_refusal(model: Any) -> str | None:
    """Why no embeddings can stand before this model's tokens, or None: seen on a few tokens and their embeddings."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not isinstance(embedding, nn.Embedding) or model.base_model is model:
        return "the model reads no tokens through one table of embeddings"
    special = getattr(model.config, "pad_token_id", None)
    ids_RT = torch.tensor([i for i in range(13) if i != special][:12]).view(2, 6) % embedding.num_embeddings
    ids_RT = ids_RT.to(embedding.weight.device)
    mask_RT = torch.ones_like(ids_RT)
    mask_RT[1, 4:] = 0
    if special is not None:
        ids_RT[1, 4:] = special
    expected = model(input_ids=ids_RT, attention_mask=mask_RT).logits
    try:
        found = model(inputs_embeds=embedding(ids_RT), attention_mask=mask_RT).logits
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return "the model's forward takes no inputs_embeds"
    if expected.ndim == 3:
        expected, found = expected[mask_RT.bool()], found[mask_RT.bool()]
    tolerance = 1e-5 if expected.dtype == torch.float32 else 5e-3
    if torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        return None
    return (
        "from embeddings alone the model answers otherwise than from tokens, as decoders that classify at the last "
        "token do: behind a prefix they take padding for it, in PEFT too"
    )
