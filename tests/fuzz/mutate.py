"""Bad input made of good: bytes, trees of values and lines of text, spoilt in the ways that parsers get wrong.

Every choice comes from the random.Random that is handed in: a seed names an input, and hypothesis, which hands in one
of its own, shrinks it. A tree is what msgpack or JSON can say, with maps as lists of pairs so that a key may repeat.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeAlias

import msgpack


class Map(list[tuple[object, object]]):
    """A map of a tree: pairs, in this order, repeated keys repeatedly."""


@dataclass(frozen=True, slots=True)
class Raw:
    """A part of a tree that is written as these bytes, whatever they mean."""

    data: bytes


Tree: TypeAlias = object
Write: TypeAlias = Callable[[Tree, Random | None], bytes]

DEPTHS = (3, 60, 400, 600, 1_200, 6_000)
NUMBERS = (
    *(-1, 0, 1, 2, 3, 7, 8, 9, 10, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257),
    *(
        sign * 2**power + off
        for power in (15, 16, 31, 32, 33, 40, 60, 62, 63)
        for sign in (1, -1)
        for off in (-1, 0, 1)
    ),
    *(2**64 - 1, -(2**63), 10**9, 10**12),
)
_FLOATS = (0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e12, 1.1e12, 1e38, 1e308, 5e-324, math.nan, math.inf, -math.inf)
_TEXTS = (
    *(
        "",
        "a",
        "A",
        "é",
        "\0",
        "\n",
        "a\n",
        " ",
        "+",
        "#",
        "/",
        "..",
        "_agg-0",
        "$SYS",
        "true",
        "0",
        "-1",
        "1e5",
        "9" * 30,
    ),
    *(
        "fp32",
        "plain",
        "sgd",
        "adam",
        "mean",
        "none",
        "open",
        "root",
        "publisher",
        "aggregator",
        "float32",
        "kind",
        "v",
    ),
    *("x" * 63, "x" * 64, "x" * 128, "x" * 129, "x" * 513, "\u202e", "\ud7ff", "\U0001f4a9" * 3),
)


# -- bytes -------------------------------------------------------------------------------------------------------


def spoil(data: bytes, rng: Random, others: Sequence[bytes] = ()) -> bytes:
    """`data` with up to four changes: flipped bits, lies in length fields, what is cut, doubled or spliced in."""
    found = bytearray(data)
    for _ in range(1 + rng.randrange(4) * rng.randrange(2)):
        at = rng.randrange(len(found) + 1)
        match rng.randrange(10):
            case 0 | 1 | 2 if found:
                found[min(at, len(found) - 1)] ^= 1 << rng.randrange(8)
            case 3 if found:
                found[min(at, len(found) - 1)] = rng.choice(
                    (0, 1, 0x7F, 0x80, 0xC0, 0xC1, 0xC7, 0xD9, 0xDD, 0xDF, 0xFF)
                )
            case 4:
                found[at:at] = rng.randbytes(1 + rng.randrange(8))
            case 5:
                del found[at : at + 1 + rng.randrange(16)]
            case 6:
                del found[at:]
            case 7:
                piece = found[at : at + 1 + rng.randrange(64)]
                found[at:at] = piece * (1 + rng.randrange(3))
            case 8:
                form = rng.choice((">I", "<I", ">H", ">Q", "<Q"))
                number = rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form))
                found[at : at + struct.calcsize(form)] = struct.pack(form, number)
            case _:
                other = rng.choice(others) if others else data
                start = rng.randrange(len(other) + 1)
                found[at : at + rng.randrange(64)] = other[start : start + rng.randrange(64)]
    return bytes(found)


# -- trees -------------------------------------------------------------------------------------------------------


def read_msgpack(data: bytes) -> Tree:
    """The tree in good msgpack."""
    return msgpack.unpackb(data, object_pairs_hook=Map, strict_map_key=False)


def read_json(data: bytes) -> Tree:
    """The tree in good JSON."""
    return json.loads(data, object_pairs_hook=Map)


_pack = msgpack.Packer(use_bin_type=True).pack


def write_msgpack(tree: Tree, rng: Random | None = None) -> bytes:
    """The tree as msgpack: in its shortest form, or with `rng` here and there in a longer one."""
    parts: list[bytes] = []
    _write_msgpack(tree, parts, rng)
    return b"".join(parts)


def _write_msgpack(tree: Tree, parts: list[bytes], rng: Random | None) -> None:
    longer = rng is not None and rng.randrange(16) == 0
    match tree:
        case Raw():
            parts.append(tree.data)
        case Map():
            parts.append(_head(len(tree), 0x80, 0xDE, longer))
            for key, value in tree:
                _write_msgpack(key, parts, rng)
                _write_msgpack(value, parts, rng)
        case list():
            parts.append(_head(len(tree), 0x90, 0xDC, longer))
            for item in tree:
                _write_msgpack(item, parts, rng)
        case bool() | None:
            parts.append(_pack(tree))
        case int() if longer and 0 <= tree < 1 << 32:
            parts.append(b"\xce" + struct.pack(">I", tree))
        case int() if not -(2**63) <= tree < 2**64:
            parts.append(_pack(str(tree)))
        case str() if longer:
            data = tree.encode("utf-8", "surrogatepass")
            parts += [b"\xdb", struct.pack(">I", len(data)), data]
        case bytes() if longer:
            parts += [b"\xc6", struct.pack(">I", len(tree)), tree]
        case float() if longer:
            parts.append(msgpack.packb(tree, use_single_float=True) if abs(tree) < 1e38 else _pack(tree))
        case _:
            parts.append(_pack(tree))


def _head(count: int, fixed: int, wide: int, longer: bool) -> bytes:
    if count < 16 and not longer:
        return bytes([fixed | count])
    if count < 1 << 16:
        return bytes([wide]) + struct.pack(">H", count)
    return bytes([wide + 1]) + struct.pack(">I", count)


def write_json(tree: Tree, rng: Random | None = None) -> bytes:
    """The tree as JSON, or what looks like it."""
    match tree:
        case Raw():
            return tree.data
        case Map():
            return b"{" + b",".join(write_json(k, rng) + b":" + write_json(v, rng) for k, v in tree) + b"}"
        case list():
            return b"[" + b",".join(write_json(item, rng) for item in tree) + b"]"
        case bytes():
            return json.dumps(tree.hex()).encode()
        case _:
            return json.dumps(tree).encode()


def graft(tree: Tree, rng: Random, others: Sequence[Tree], write: Write = write_msgpack) -> Tree:
    """A copy of `tree` with one to three of its parts changed; parts of `others` may take their place."""
    holder = [_copy(tree)]
    for _ in range(1 + rng.randrange(3) * rng.randrange(2)):
        _change(holder, rng, others, write)
    return holder[0]


def _copy(tree: Tree) -> Tree:
    if type(tree) is Map:
        return Map([(key, _copy(value)) for key, value in tree])
    return [_copy(item) for item in tree] if type(tree) is list else tree


def _slots(tree: list[Tree]) -> list[tuple[list[Tree], int]]:
    """Every place of a tree: the list or map that holds it, and where."""
    found: list[tuple[list[Tree], int]] = []
    todo: list[list[Tree]] = [tree]
    while todo:
        inside = todo.pop()
        pairs = type(inside) is Map
        for at, item in enumerate(inside):
            found.append((inside, at))
            value = item[1] if pairs else item  # type: ignore[index]
            if isinstance(value, list):
                todo.append(value)
    return found


def _get(inside: list[Tree], at: int) -> Tree:
    return inside[at][1] if type(inside) is Map else inside[at]


def _set(inside: list[Tree], at: int, value: Tree) -> None:
    inside[at] = (inside[at][0], value) if type(inside) is Map else value


def _change(holder: list[Tree], rng: Random, others: Sequence[Tree], write: Write) -> None:
    slots = _slots(holder)
    inside, at = slots[rng.randrange(len(slots))]
    value = _get(inside, at)
    match rng.randrange(12):
        case 0 | 1 | 2:
            _set(inside, at, near(value, rng))
        case 3:
            _set(inside, at, odd(rng, write))
        case 4 if inside is not holder:
            inside.insert(at, inside[rng.randrange(len(inside))])
        case 5 if inside is not holder:
            del inside[at]
        case 6 if inside is not holder:
            other = rng.randrange(len(inside))
            inside[at], inside[other] = inside[other], inside[at]
        case 7 if type(inside) is Map:
            inside[at] = (_key(inside, rng), value)
        case 8 if type(inside) is Map:
            inside.insert(at, (_key(inside, rng), odd(rng, write)))
        case 9 if others:
            donor: list[Tree] = [others[rng.randrange(len(others))]]
            places = _slots(donor)
            _set(inside, at, _copy(_get(*places[rng.randrange(len(places))])))
        case 10 if type(inside) is list and inside is not holder:
            inside[at:at] = [value] * rng.choice((2, 15, 16, 65, 300))
        case _:
            _set(inside, at, near(value, rng))


def _key(inside: Map, rng: Random) -> Tree:
    found = inside[rng.randrange(len(inside))][0]
    return rng.choice((found, "extra", "v", "", 1, None, b"v", Raw(b"\x80"), f"{found}x"))


def near(value: Tree, rng: Random) -> Tree:
    """Something of nearly the same kind."""
    match value:
        case bool():
            return rng.choice((not value, int(value), str(value).lower(), None))
        case int():
            return rng.choice((value + 1, value - 1, -value, value * 2, float(value), str(value), rng.choice(NUMBERS)))
        case float():
            return rng.choice((-value, value * 2, value / 3, rng.choice(_FLOATS), 3, str(value)))
        case str():
            return rng.choice(
                (value.upper(), value[:-1], f"{value}{value}", f"{value}\n", value.encode(), rng.choice(_TEXTS))
            )
        case bytes():
            return rng.choice(
                (value[:-1], value + b"\0", value * 2, bytes(len(value)), spoil(value, rng), value.hex(), b"")
            )
        case list():
            return rng.choice((type(value)(), [value], Map([("v", value)]), None, type(value)(value * 2)))
        case _:
            return rng.choice((0, "", b"", False, [], Map()))


def odd(rng: Random, write: Write = write_msgpack) -> Tree:
    """Something that seldom belongs anywhere."""
    match rng.randrange(8):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(_FLOATS)
        case 2:
            return rng.choice(_TEXTS)
        case 3:
            return rng.choice(
                (None, True, False, b"", bytes(8), bytes(32), bytes(64), [], Map(), [None], Map([("v", 1)]))
            )
        case 4 if write is write_json:
            depth = rng.choice(DEPTHS)
            return Raw(
                rng.choice((b"[" * depth + b"]" * depth, b'{"a":' * depth, b"[" * depth, b"9" * depth, b"1e999"))
            )
        case 4:
            return Raw(rng.choice((b"\x91", b"\x81\xa1v")) * rng.choice(DEPTHS) + b"\xc0")
        case 5 if write is not write_json:
            return Raw(
                bomb(
                    rng.choice((b"\x80", b"\x90", b"\xc0", b"\xa0")),
                    rng.choice((20, 20, 20, 200, 200, 3_000, 3_000, 60_000)) >> rng.randrange(3),
                )
            )
        case 6 if write is not write_json:
            return Raw(
                rng.choice((b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"))
                + struct.pack(">I", rng.choice(NUMBERS) % 2**32)
                + rng.randbytes(rng.randrange(4))
            )
        case 7 if write is not write_json:
            return Raw(rng.choice((b"\xd4\x01x", b"\xc7\x03\x05abc", b"\xd6\xff" + bytes(4), b"\xc1", b"\xa1\xff")))
        case _:
            return rng.choice(NUMBERS)


def bomb(item: bytes, count: int) -> bytes:
    """A list of so many small things, which cost far more once they are decoded."""
    return b"\xdd" + struct.pack(">I", count) + item * count


# -- text --------------------------------------------------------------------------------------------------------

_VALUES = (
    *('""', "''", '"x"', "0", "1", "-1", "1.5", "nan", "inf", "-inf", "true", "false", "[]", "{}", "[[]]", "9" * 25),
    *("1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", '["a", 1]', "{ a = 1 }", '"""', "'''", '"\\u0000"', '"\\q"'),
    *("0x_1", "1__0", "+5", "1e400", "0b2", "[" * 400, "[" * 3_000 + "]" * 3_000, "{a=" * 300 + "1" + "}" * 300),
    *(
        '["mon-fri 18:00-07:00"]',
        '["25:00-26:00"]',
        '["sun"]',
        '"90d"',
        '"0d"',
        '"9999d"',
        '"0001-01-01"',
        '"9999-12-31"',
    ),
    *(
        '"Europe/Berlin"',
        '"../../etc/passwd"',
        '"/"',
        '"/dev/null"',
        '"localtime"',
        '"x" # y',
        "[1, 2",
        "{",
        '"é"',
        "\t",
    ),
)
_LINES = (
    *("[", "]", "=", "a", "a =", "= 1", "a.b.c = 1", '"" = 1', "[a.b]", "[[a]]", "[a]\n[a]", "#", "\r", "a = 1 a = 2"),
    *("[broker]", "[data.x]", '[data.""]', "[data.X]", "[[data]]", "[plan.gate]", "[training]", "[trust]", "v = 1"),
    *("[" + "a." * 300 + "a]", "a." * 300 + "a = 1", "\ufeff", "\0", "[policy]", "windows = 3", "until = nan"),
)


def edit(text: str, rng: Random, others: Sequence[str] = ()) -> str:
    """`text`, which is TOML, with one to four lines changed, lost, doubled, moved or taken from `others`."""
    lines = text.splitlines()
    for _ in range(1 + rng.randrange(4) * rng.randrange(2)):
        at = rng.randrange(len(lines)) if lines else 0
        match rng.randrange(10):
            case 0 | 1 | 2 if lines and "=" in lines[at]:
                lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(_VALUES)}"
            case 3 if lines:
                del lines[at]
            case 4 if lines:
                lines.insert(rng.randrange(len(lines)), lines[at])
            case 5 if lines:
                other = rng.randrange(len(lines))
                lines[at], lines[other] = lines[other], lines[at]
            case 6:
                lines.insert(at, rng.choice(_LINES))
            case 7 if others:
                lines[at:at] = [rng.choice(rng.choice(others).splitlines())]
            case 8 if lines:
                word = lines[at].strip("[] ").partition("=")[0].strip()
                lines[at] = lines[at].replace(word, rng.choice((f"{word}x", word.upper(), word[:-1], f'"{word}"')), 1)
            case _ if lines:
                place = rng.randrange(len(lines[at]) + 1)
                lines[at] = (
                    lines[at][:place]
                    + chr(rng.choice((0, 9, 34, 39, 44, 61, 91, 93, 123, 233, 0xDCFF, 0x1F4A9)))
                    + (lines[at][place + rng.randrange(2) :])
                )
            case _:
                lines.append(rng.choice(_LINES))
    return "\n".join(lines)
