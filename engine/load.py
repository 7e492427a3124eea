"""What an engine does and has done, in numbers: one snapshot for `GetLoad`, metrics and the log."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Histogram:
    """Seconds.  `counts[i]` observations were at most `bounds[i]`, and above the bound before; one more count
    is of those above them all.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


@dataclass(frozen=True, slots=True)
class ConversationCounts:
    """Of the conversations in memory."""

    running: int  # their turn is computed or committed
    waiting: int  # their turn waits
    attached: int  # no turn, but a stream
    idle: int


@dataclass(frozen=True, slots=True)
class Tier:
    """KV memory.  `total` = `in_use` + `idle` + `free`."""

    total_tokens: int
    in_use_tokens: int  # of running turns
    idle_tokens: int  # kept for later turns, given up when room is needed
    free_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine does now, and what it has done since it started.  No content, no ids."""

    uptime_s: float
    running_turns: int
    waiting_turns: int  # in the queue, or suspended
    suspended_turns: int  # those of them that had begun to run
    conversations: ConversationCounts
    device: Tier
    host: Tier  # all zero if there is no host tier
    # Since the start:
    accepted_turns: int
    finished_turns: dict[str, int]  # by name of FinishReason
    failed_turns: dict[str, int]  # after they were accepted, by `errors.reason_of`
    refused_turns: dict[str, int]  # by `errors.reason_of`
    reattached_streams: int
    suspensions: int  # of turns whose memory others needed; one turn may have several
    prompt_tokens: int  # as in `Usage`, of all turns that came to their first token or were appended
    cached_device_tokens: int
    cached_host_tokens: int
    recomputed_tokens: int
    new_tokens: int
    evicted_tokens: int
    restart_tokens: int
    rewritten_tokens: int
    cut_tokens: int
    never_computed_tokens: int
    completion_tokens: int
    computed_tokens: int  # positions that went through the model, for whatever reason
    steps: int
    step_s: float  # all of them together
    reload_s: float  # as in `Timing`, of all turns that came to their first token
    recompute_s: float
    evicted_blocks: int  # KV given up on all tiers
    stored_blocks: int  # copied to the host
    loaded_blocks: int  # and back
    failed_copies: int
    queue_s: Histogram
    ttft_s: Histogram
    inter_token_s: Histogram
    total_s: Histogram
