"""Invented names and random values, with a held-out split by a stable hash.

Every proper name is built from *roots* (two or three syllables). A root belongs to the
training or to the held-out half for ever, decided by a hash of its letters.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from hashlib import blake2b
from pathlib import Path

KINDS = ("person", "project", "company", "device", "place")
HELD_OUT_SHARE = 10  # one root in ten is never seen in training

ValueMaker = Callable[[random.Random, bool], str]


@cache
def words(name: str) -> list[str]:
    """A list from `words.txt`; an underscore stands for a space."""
    text = Path(__file__).with_name("words.txt").read_text(encoding="utf-8")
    lists = dict(line.split(": ") for line in text.splitlines())
    return [word.replace("_", " ") for word in lists[name].split()]


def is_held_out(root: str) -> bool:
    """Whether a root belongs to the held-out half; stable over runs and machines."""
    digest = blake2b(root.lower().encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def make_root(rng: random.Random, held_out: bool) -> str:
    """A capitalised invented word of the asked half."""
    while True:
        root = rng.choice(words("onsets")) + rng.choice(words("vowels"))
        if rng.random() < 0.5:
            root += rng.choice(words("middles")) + rng.choice("aeiou")
        root += rng.choice(words("ends"))
        if 4 <= len(root) <= 10 and is_held_out(root) == held_out:
            return root.capitalize()


def make_person(rng: random.Random, held_out: bool) -> str:
    """First name and surname."""
    return f"{make_root(rng, held_out)} {make_root(rng, held_out)}"


def make_company(rng: random.Random, held_out: bool) -> str:
    """For example `Tarnwick Labs`."""
    return f"{make_root(rng, held_out)} {rng.choice(words('companies'))}"


def make_name(kind: str, rng: random.Random, held_out: bool) -> str:
    """A name of one of `KINDS`."""
    if kind == "person":
        return make_person(rng, held_out)
    if kind == "company":
        return make_company(rng, held_out)
    root = make_root(rng, held_out)
    if kind == "project":
        return f"{rng.choice(words('projects'))} {root}"
    if kind == "place":
        return f"{root} {rng.choice(words('places'))}"
    if rng.random() < 0.5:
        return f"{root} {rng.choice(words('devices'))}"
    return f"{root} {rng.randrange(2, 100)}"


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("0123456789") for _ in range(count))


def _letters(rng: random.Random, count: int) -> str:
    return "".join(rng.choice("ABCDEFGHKLMNPQRSTVWXZ") for _ in range(count))


def _fill(pattern: str, rng: random.Random) -> str:
    """`L` becomes a letter, `D` a digit; the rest stays."""
    return "".join(
        _letters(rng, 1) if c == "L" else _digits(rng, 1) if c == "D" else c for c in pattern
    )


def _code(rng: random.Random, held_out: bool) -> str:
    patterns = ("LL-DDD-LL", "DD-DDD-DD", "L-DDDD", "LLDDD", "LL-DDDD", "DDDDDD", "LDD-DDL")
    return _fill(rng.choice(patterns), rng)


def _phone(rng: random.Random, held_out: bool) -> str:
    return _fill(rng.choice(("DDD-DDDD", "DD-DDD-DD", "0DDD DDDD", "DDDDDD", "DDD DD DD")), rng)


def _date(rng: random.Random, held_out: bool) -> str:
    return f"{rng.randrange(1, 29)} {rng.choice(words('months'))} {rng.randrange(1920, 2060)}"


def _room(rng: random.Random, held_out: bool) -> str:
    return rng.choice(("Room {}", "Room {}", "Studio {}", "Cabin {}", "Room {}")).format(
        _fill(rng.choice(("DDD", "L-DDD", "LDD", "DD")), rng)
    )


def _email(rng: random.Random, held_out: bool) -> str:
    user = make_root(rng, held_out).lower()
    return f"{user}@{make_root(rng, held_out).lower()}.{rng.choice(words('domains'))}"


def _url(rng: random.Random, held_out: bool) -> str:
    host = f"{make_root(rng, held_out).lower()}.{rng.choice(words('domains'))}"
    page = f"{_letters(rng, 1).lower()}{_digits(rng, 2)}"
    return rng.choice((f"www.{host}", f"https://{host}", f"{host}/{page}"))


def _address(rng: random.Random, held_out: bool) -> str:
    return f"{rng.randrange(1, 200)} {make_root(rng, held_out)} {rng.choice(words('streets'))}"


def _amount(rng: random.Random) -> str:
    number = rng.randrange(10, 10 ** rng.randrange(2, 6))
    return f"{number:,}"


def _money(rng: random.Random, held_out: bool) -> str:
    return (
        f"{rng.randrange(1, 990) * 10 ** rng.randrange(1, 4):,} {rng.choice(words('currencies'))}"
    )


def _with_unit(*units: str) -> ValueMaker:
    def make(rng: random.Random, held_out: bool) -> str:
        decimal = f"{rng.randrange(1, 99)}.{rng.randrange(1, 10)}"
        number = _amount(rng) if rng.random() < 0.7 else decimal
        return f"{number} {rng.choice(units)}"

    return make


def _from(name: str) -> ValueMaker:
    return lambda rng, held_out: rng.choice(words(name))


VALUE_MAKERS: dict[str, ValueMaker] = {
    "code": _code,
    "phone": _phone,
    "date": _date,
    "room": _room,
    "email": _email,
    "url": _url,
    "address": _address,
    "money": _money,
    "count": lambda rng, held_out: _amount(rng),
    "weight": _with_unit("kg", "grams", "tonnes"),
    "length": _with_unit("metres", "feet"),
    "area": _with_unit("square metres", "square feet"),
    "power": _with_unit("watts", "volts", "kilowatts"),
    "time": lambda rng, held_out: f"{rng.randrange(6, 24)}:{rng.randrange(0, 12) * 5:02d}",
    "city": make_root,
    "person": make_person,
    "company": make_company,
    "hobby": _from("hobbies"),
    "animal": _from("animals"),
    "colour": _from("colours"),
}
ENTITY_TYPES = ("person", "company")  # value types that are themselves entities: two-hop chains
