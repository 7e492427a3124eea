"""When a reply ends, as far as ids tell.  Stop strings are the detokenizer's business."""

from engine.types import FinishReason, SamplingParams


def stop_ids(params: SamplingParams, eos_ids: frozenset[int]) -> frozenset[int]:
    """The tokens that end a reply."""
    return (frozenset() if params.ignore_eos else eos_ids).union(params.stop_token_ids or ())


def stop_reason(
    token_id: int, num_generated: int, params: SamplingParams, eos_ids: frozenset[int]
) -> FinishReason | None:
    """Why a reply of `num_generated` tokens that ends in `token_id` is over; None if it goes on."""
    if token_id in stop_ids(params, eos_ids):
        return FinishReason.STOP_TOKEN
    if params.max_tokens is not None and num_generated >= params.max_tokens:
        return FinishReason.LENGTH
    return None
