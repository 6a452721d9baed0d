"""Masks for both directions: of an encoder that is not there, and of one that is."""

from __future__ import annotations

import pytest
from transformers import masking_utils

import toys
from adept_fx.capture import capture
from adept_fx.errors import UnsupportedModelError
from toys import Encoding, EncodingItself, toy


def test_the_mask_of_an_encoder_that_is_not_there_is_none() -> None:
    source = capture(toy(Encoding).model, positions=True)
    assert [call.key for call in source.masks] == ["full_attention"]


def test_a_decoder_that_masks_its_own_tokens_both_ways_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="EncodingItself attends in both directions"):
        capture(toy(EncodingItself).model, positions=True)
    assert toys.create_bidirectional_mask is masking_utils.create_bidirectional_mask
