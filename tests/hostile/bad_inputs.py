"""The bad inputs that must each give a typed rejection, a counter, a log line, no change of state, bounded memory and a
live process; and the tests that show it.

A name without brackets stands for all cases of that test. `Later` says why there is no test yet: what does not exist
cannot be attacked. tests/hostile/test_bad_inputs.py runs the list against what pytest collects.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Later:
    """There is nothing to attack yet."""

    why: str


UPDATES, UPLOADS = "tests/hostile/test_updates.py::", "tests/hostile/test_uploads.py::"
RELEASES, DOWNLOADS = "tests/hostile/test_releases.py::", "tests/hostile/test_downloads.py::"
PUBLISHING, READBACK = "tests/hostile/test_publishing.py::", "tests/hostile/test_readback.py::"
AGENT, BROKER = "tests/hostile/test_agent.py::", "tests/broker/test_identity.py::"
FUZZ = "tests/fuzz/test_fuzz.py::test_bad_input_is_refused"


def _bad(*cases: str) -> tuple[str, ...]:
    """Cases of test_bad_release, which the aggregator and the agents read from one table."""
    return tuple(f"{side}test_bad_release[{case}]" for case in cases for side in (RELEASES, AGENT))


def _rejected(*cases: str) -> tuple[str, ...]:
    return tuple(f"{UPDATES}test_rejected[{case}]" for case in cases)


def _refused(*cases: str) -> tuple[str, ...]:
    return tuple(f"{UPDATES}test_refused[{case}]" for case in cases)


def _offers(*cases: str) -> tuple[str, ...]:
    return tuple(f"{AGENT}test_bad_offer[{case}]" for case in cases)


def _junk(*names: str) -> tuple[str, ...]:
    """Junk where each kind of message belongs."""
    tests = (f"{UPDATES}test_junk", f"{UPDATES}test_junk_as_status", f"{RELEASES}test_junk")
    return tuple(f"{test}[{name}]" for name in names for test in tests)


LIST: dict[str, tuple[str, ...] | Later] = {
    # replay and order
    "replay of the same bytes": (
        f"{UPDATES}test_the_same_update_twice",
        f"{UPDATES}test_the_same_update_twice_at_once",
        f"{RELEASES}test_a_known_release_again",
        f"{AGENT}test_the_held_release_again",
        f"{UPLOADS}test_chunks_that_nobody_asked_for",
        f"{DOWNLOADS}test_repeated_chunks",
    ),
    "a second, different update for the same round": (
        f"{UPDATES}test_a_second_update",
        f"{UPLOADS}test_a_second_update_in_the_midst",
    ),
    "older round": (f"{UPDATES}test_a_round_that_is_over", *_offers("older_round", "older_sequence")),
    "future round": _rejected("of_a_future_round", "of_the_last_round_there_is"),
    "closed round": (f"{UPDATES}test_a_round_that_is_over", f"{UPLOADS}test_a_round_that_ends_in_the_midst"),
    "not selected": (f"{UPDATES}test_not_selected",),
    "other task": (
        *_rejected("of_another_task", "no_such_task"),
        *_bad("release_of_another_task"),
        f"{AGENT}test_bad_later_release[of_another_task]",
        *_offers("of_another_task"),
    ),
    # chunks, up and down
    "truncated chunk": (
        f"{UPLOADS}test_odd_chunk[truncated]",
        f"{DOWNLOADS}test_odd_chunks",
        f"{PUBLISHING}test_odd_chunks",
    ),
    "missing chunk": (
        f"{UPLOADS}test_a_chunk_that_never_comes",
        f"{DOWNLOADS}test_a_chunk_that_is_withdrawn",
        f"{PUBLISHING}test_withdrawn_chunks",
        "tests/unit/test_fetch.py::test_patience_counts_only_while_connected",
    ),
    "repeated chunk": (
        f"{UPLOADS}test_odd_chunk[repeated]",
        f"{UPLOADS}test_odd_chunk[repeated_and_different]",
        f"{DOWNLOADS}test_repeated_chunks",
        f"{PUBLISHING}test_reordered_and_repeated_chunks",
    ),
    "reordered chunks": (
        f"{UPLOADS}test_reordered_chunks",
        f"{UPLOADS}test_spoilt_body[two_in_each_others_place]",
        f"{DOWNLOADS}test_reordered_chunks",
        f"{PUBLISHING}test_reordered_and_repeated_chunks",
    ),
    "extra chunk": (f"{UPLOADS}test_odd_chunk[extra]",),
    "unasked chunk": (
        f"{UPLOADS}test_chunks_that_nobody_asked_for",
        f"{UPLOADS}test_odd_chunk[of_no_update]",
        f"{UPLOADS}test_another_device_sends_the_chunks",
        f"{DOWNLOADS}test_chunks_that_nobody_asked_for",
    ),
    # bit flips
    "bit flip in a head": _rejected("flipped_head"),
    "bit flip in an encapsulation": _rejected("flipped_encapsulation_signed"),
    "bit flip in a chunk": (
        f"{UPLOADS}test_spoilt_body[flipped_bit]",
        f"{DOWNLOADS}test_odd_chunks",
        f"{DOWNLOADS}test_a_signer_who_contradicts_himself",
        f"{PUBLISHING}test_odd_chunks",
        f"{PUBLISHING}test_chunks_that_are_no_weights[contradiction]",
    ),
    "bit flip in a body": _rejected("flipped_body", "flipped_body_signed", "flipped_tag_signed"),
    "bit flip in a signature": (*_rejected("flipped_signature"), *_offers("flipped_signature")),
    "bit flip in a receipt": (f"{AGENT}test_bad_receipt[flipped_payload]",),
    # who
    "unknown key id": (*_bad("manifest_by_a_stranger", "release_by_a_stranger"), *_offers("by_a_key_for_receipts")),
    "expired key id": _bad("manifest_by_a_retired_publisher"),
    "head device, certificate device and topic device differ": (
        *_rejected("certificate_of_another_device"),
        *_refused("another_name_in_the_context"),
        f"{UPLOADS}test_another_device_sends_the_chunks",
    ),
    "forged CA of the same name": (
        *_rejected("forged_ca_of_the_same_name"),
        f"{BROKER}test_forged_authority_of_the_same_name",
    ),
    "expired certificate": (
        *_rejected("certificate_that_ended_before_its_ca_began"),
        f"{BROKER}test_expired",
    ),
    "certificate that is not yet valid": (
        f"{UPDATES}test_a_certificate_of_tomorrow",
        f"{BROKER}test_not_yet_valid",
    ),
    "revoked certificate": (
        f"{UPDATES}test_denied",
        f"{UPDATES}test_denied_at_once",
        f"{UPLOADS}test_denied_in_the_midst",
    ),
    "server-only certificate": (*_rejected("certificate_for_a_server"), f"{BROKER}test_server_only"),
    "CN with + # /": (
        *_rejected("certificate_of_the_name_+", "certificate_of_the_name_#", "certificate_of_the_name_a/b"),
        f"{BROKER}test_wildcards_in_a_name",
    ),
    "a device named like a service": (
        *_rejected("certificate_named_like_a_service"),
        *_refused("a_service_in_the_context"),
        f"{BROKER}test_a_service_or_topic_word_as_a_name",
        f"{BROKER}test_no_device_is_named_like_a_service",
    ),
    "client-id hijack": (f"{BROKER}test_client_id_hijack",),
    # numbers
    "NaN": (
        *_rejected("nan", "metric_nan"),
        f"{RELEASES}test_bad_release[weights_nan]",
        f"{PUBLISHING}test_chunks_that_are_no_weights[nan]",
    ),
    "Inf": (*_rejected("infinity", "metric_infinite"), f"{RELEASES}test_bad_release[weights_infinite]"),
    "1e38": _rejected("1e38", "norm_above_the_clip"),
    "denormals": (f"{UPDATES}test_denormals",),
    "wrong dimension": _rejected("one_value_less", "one_value_more", "no_values", "dimension_that_lies"),
    "wrong dtype": (f"{RELEASES}test_bad_release[weights_of_another_dtype]",),
    "wrong name": (f"{RELEASES}test_bad_release[weights_of_another_name]",),
    "duplicate safetensors names": (f"{RELEASES}test_bad_release[weights_with_a_name_twice]", f"{FUZZ}[weights]"),
    "safetensors header of 2^60 bytes": (f"{RELEASES}test_bad_release[weights_header_of_2_60_bytes]",),
    # encodings
    "msgpack depth": (*_junk("deep"), *_refused("head_is_deep"), *_rejected("header_that_is_deep")),
    "msgpack map bomb": (
        *_junk("maps"),
        "tests/fuzz/test_fuzz.py::test_small_things_in_great_number_cost_little_memory",
    ),
    "msgpack duplicate keys": (*_junk("repeated_key"), *_refused("repeated_field")),
    "msgpack ext types": _junk("extension", "timestamp"),
    "msgpack trailing bytes": (*_refused("trailing_byte"), *_bad("trailing_byte", "manifest_with_a_trailing_byte")),
    "zstd bomb": Later("no codec with entropy coding exists; fp32 says its size by the dimension"),
    "length fields that lie": (
        *_junk("lying_bytes", "lying_list", "lying_map"),
        *_rejected("header_length_that_lies", "header_of_no_length", "size_that_lies"),
        f"{UPLOADS}test_bad_head",
        f"{DOWNLOADS}test_a_reference_that_lies",
        f"{DOWNLOADS}test_a_reference_that_contradicts_itself",
        f"{PUBLISHING}test_a_reference_that_lies",
    ),
    "chunk count 2^32": (
        f"{UPLOADS}test_bad_head[2_32_chunks]",
        f"{UPLOADS}test_odd_chunk[number_2_32]",
        f"{DOWNLOADS}test_a_reference_that_contradicts_itself[2_32_chunks]",
        f"{DOWNLOADS}test_bad_request[for_2_32]",
    ),
    "junk and empty payloads on every topic": (
        f"{RELEASES}test_junk",
        f"{UPDATES}test_junk",
        f"{UPDATES}test_junk_as_status",
        f"{UPDATES}test_no_status",
        f"{UPDATES}test_odd_topic",
        f"{UPLOADS}test_junk_as_a_chunk",
        f"{AGENT}test_junk",
        f"{AGENT}test_odd_topic",
        f"{DOWNLOADS}test_odd_chunks",
        f"{DOWNLOADS}test_bad_request",
        f"{DOWNLOADS}test_junk_as_presence",
        f"{READBACK}test_junk",
        f"{READBACK}test_bad_roots",
    ),
    "retained junk": (
        f"{READBACK}test_junk",
        f"{READBACK}test_bad_releases",
        f"{READBACK}test_bad_offers",
        f"{RELEASES}test_retained_junk",
        f"{UPLOADS}test_retained_junk_below_a_device",
        f"{AGENT}test_retained_junk",
    ),
    # graphs
    "graph with an unknown op": _bad("op_off_the_list", "python_as_op"),
    "graph with a forward reference": _bad("forward_reference", "own_reference"),
    "graph with a million nodes": _bad("a_million_rows", "too_many_rows"),
    "graph with zeros([1e12])": _bad("huge_shape"),
    # manifests and offers
    "manifest of a lower version": _bad("lower_version", "same_version_other_manifest"),
    "expired manifest": _bad("expired"),
    "manifest with the wrong role's key": _bad(
        "manifest_by_the_aggregator", "manifest_by_the_root", "manifest_by_the_aggregator_as_publisher"
    ),
    "manifest with an unknown field": _bad("manifest_with_an_unknown_field", "unknown_field"),
    "offer that lowers participation": _offers("lower_participation"),
    "offer that shortens a deadline": _offers("shorter_deadline"),
    # reports
    "examples 0": _rejected("no_examples"),
    "examples negative": _rejected("negative_examples"),
    "examples huge": (*_rejected("huge_examples"), f"{UPDATES}test_weight_of_a_boast"),
    # tokens
    "token reused": Later("join tokens come with the registrar"),
    "token expired": Later("join tokens come with the registrar"),
    "token with the wrong pin": Later("join tokens come with the registrar"),
    "token for another name": Later("join tokens come with the registrar"),
    # time and crashes
    "clock set back years on a device": ("tests/hostile/test_agent_clocks.py::test_a_device_whose_clock_is_set_back",),
    "clock set back years on the aggregator": (
        "tests/hostile/test_clocks.py::test_the_aggregators_clock_jumps",
        "tests/hostile/test_clocks.py::test_an_expired_release_under_an_old_clock",
    ),
    "kill -9 between any two steps": (
        "tests/sim/test_sim.py::test_schedules",
        "tests/broker/test_chaos.py::test_a_hundred_kills",
        "tests/broker/test_aggregator.py::test_killed_while_updates_arrive",
        "tests/broker/test_aggregator.py::test_killed_between_closing_and_publication",
        "tests/hostile/test_interrupted.py::test_a_download_over_a_killed_agent",
        "tests/hostile/test_interrupted.py::test_an_upload_over_a_killed_agent",
    ),
}
"""What is bad, in the words of the design, and where it is sent."""
