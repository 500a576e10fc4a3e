"""Positions of several kinds (mrope), which vision-language models give the tokens of images: time, height, width.

The outer part of such a model makes the embeddings and positions of a row's images and its text. A prompt goes into
the part inside, from these to the last hidden states, and moves the positions that it is called with by its length.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..shared.decoder import around_embeddings, decoder_of

_STARTS, _ENDS = ("vision_start_token_id", "image_start_token_id"), ("vision_end_token_id", "image_end_token_id")


def prompted_part(model: nn.Module) -> nn.Module:
    """The part of a model that a prompt goes into: its decoder, or what in it is called with positions of images."""
    decoder = decoder_of(model)
    return (_positions_images(decoder) and around_embeddings(decoder)) or decoder


def _positions_images(module: nn.Module) -> bool:
    return hasattr(module, "get_rope_index")


def has_several_kinds(model: nn.Module) -> bool:
    """Whether positions of several kinds turn queries and keys somewhere in it."""
    return any(_positions_images(part) or getattr(part, "mrope_section", None) for part in model.modules())


def images_follow_text(model: nn.Module) -> bool:
    """Whether text before an image moves all positions of the image by its length, so that a prompt's are known.

    HunYuan's images have places of their own, whatever is before them. It is asked of the model's own function, with
    an image of 2 x 2 tokens.
    """
    owner = next(filter(_positions_images, model.modules()), None)
    if owner is None:
        return True  # positions of images come from the caller
    more = 3
    try:
        with without_earlier_positions(model):
            near, far = (_positions_of_an_image(owner, before) for before in (1, 1 + more))
    except (AttributeError, IndexError, RuntimeError, StopIteration, TypeError, ValueError):
        return False  # it wants something else to know of an image
    return torch.equal(near + more, far[..., more:])


def _positions_of_an_image(owner: nn.Module, before: int) -> Tensor:
    """Positions (3 or more, 1, S) of so many tokens, an image and a token."""
    config = owner.config
    start, end = (next((getattr(config, n) for n in names if hasattr(config, n)), None) for names in (_STARTS, _ENDS))
    image, side = config.image_token_id, 2 * config.vision_config.spatial_merge_size
    text = next(token for token in range(len({image, start, end}) + 1) if token not in (image, start, end))
    ids = [*[text] * before, *[start] * (start is not None), *[image] * 4, *[end] * (end is not None), text]
    input_ids = torch.tensor([ids])
    given = {
        "input_ids": input_ids,
        "mm_token_type_ids": (input_ids == image).int(),
        "image_grid_thw": torch.tensor([[1, side, side]]),
        "attention_mask": torch.ones_like(input_ids),
    }
    taken = inspect.signature(owner.get_rope_index).parameters
    return owner.get_rope_index(**{name: value for name, value in given.items() if name in taken})[0]


@contextmanager
def without_earlier_positions(model: nn.Module) -> Iterator[None]:
    """Within it, the model does not go on from the positions of earlier calls; after it, it knows of none since."""
    owners = [(module, dict(vars(module))) for module in model.modules() if hasattr(module, "rope_deltas")]
    for module, _ in owners:
        module.rope_deltas = None
    try:
        yield
    finally:
        for module, attributes in owners:
            vars(module).clear()
            vars(module).update(attributes)
