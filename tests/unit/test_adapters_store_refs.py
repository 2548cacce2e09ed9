"""References and the in-memory index: what resolves to what, and with which share."""

import contextlib
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuneloop.adapters import Adapter, AdapterRef, AdapterVersion, Alias, parse_ref
from tuneloop.adapters.index import AdapterIndex
from tuneloop.adapters.refs import check_alias, check_name
from tuneloop.adapters.weights import shares
from tuneloop.storage.errors import InvalidInput, NotFound

NOW = datetime(2026, 1, 2, tzinfo=UTC)


def adapter(name: str, digests: dict[int, str], aliases: dict[str, dict[int, float]], base: str = "base") -> Adapter:
    versions = tuple(
        AdapterVersion(
            name=name,
            version=number,
            base=base,
            digest=digest,
            path=Path("/nowhere") / digest,
            rank=8,
            alpha=16.0,
            targets=("q_proj",),
            use_dora=False,
            use_rslora=False,
            size_bytes=1,
            origin="upload",
            source=None,
            created_at=NOW,
        )
        for number, digest in digests.items()
    )
    return Adapter(
        name=name,
        base=base,
        pinned=False,
        created_at=NOW,
        versions=versions,
        aliases=tuple(Alias(adapter=name, alias=a, weights=w, updated_at=NOW) for a, w in aliases.items()),
    )


@pytest.mark.parametrize(
    ("text", "name", "selector", "version"),
    [
        ("support", "support", None, None),
        ("support@3", "support", "3", 3),
        ("support@prod", "support", "prod", None),
        ("org/name.v2@a-b_c", "org/name.v2", "a-b_c", None),
        ("ft:base:suffix:id", "ft:base:suffix:id", None, None),
    ],
)
def test_references_are_split(text: str, name: str, selector: str | None, version: int | None) -> None:
    ref = parse_ref(text)
    assert ref == AdapterRef(name, selector)
    assert ref.version == version
    assert str(ref) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", "@", "@3", "a@", "a@0", "a@03", "a@3x", "a@-1", "a@b@c", "a@9999999999", "a@१", "a@" + "b" * 65),
        *("/a", "a/", ".a", "a..b", "a//b", "a b", "a\n", "ä", "a" * 129),
    ],
)
def test_malformed_references_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        parse_ref(text)
    assert caught.value.param == "model"


@given(st.text())
def test_any_text_parses_to_itself_or_is_refused(text: str) -> None:
    with contextlib.suppress(InvalidInput):
        assert str(parse_ref(text)) == text


def test_names_and_aliases_never_look_like_each_other() -> None:
    assert check_name("a" * 128) == "a" * 128
    assert check_alias("prod") == "prod"
    for alias in ("3", "3a", "", "a@b", "a/b"):
        with pytest.raises(InvalidInput):
            check_alias(alias)


def test_the_index_resolves_names_versions_and_aliases() -> None:
    index = AdapterIndex()
    index.put(adapter("a", {1: "d1", 3: "d3"}, {"default": {3: 1.0}, "prod": {1: 1.0}}))
    assert index.resolve("a").version == 3
    assert index.resolve("a@default").version == 3
    assert index.resolve("a@prod").version == 1
    assert index.resolve("a@1").version == 1
    with pytest.raises(NotFound, match="no version 2; it has 1, 3"):
        index.resolve("a@2")
    with pytest.raises(NotFound, match="no alias 'canary'; it has default, prod"):
        index.resolve("a@canary")
    with pytest.raises(NotFound, match="no adapter 'b'"):
        index.resolve("b")
    with pytest.raises(InvalidInput):
        index.resolve("a@@")


def test_the_draw_follows_the_weights() -> None:
    index = AdapterIndex()
    index.put(adapter("a", {1: "d1", 2: "d2", 3: "d3"}, {"default": {3: 0.2, 1: 0.5, 2: 0.3}}))
    drawn = [index.resolve("a", draw=draw).version for draw in (0.0, 0.49, 0.5, 0.79, 0.8, 0.999999)]
    assert drawn == [1, 1, 2, 2, 3, 3]
    assert {index.resolve("a").version for _ in range(200)} == {1, 2, 3}


@given(
    st.dictionaries(st.integers(1, 50), st.floats(1e-6, 1e6), min_size=1, max_size=8),
    st.floats(0, 1, exclude_max=True),
)
def test_every_draw_lands_on_a_version_of_its_share(weights: dict[int, float], draw: float) -> None:
    scaled = shares(weights)
    assert sum(scaled.values()) == pytest.approx(1.0)
    index = AdapterIndex()
    index.put(adapter("a", {n: f"d{n}" for n in weights}, {"default": scaled}))
    landed = index.resolve("a", draw=draw).version
    below = sum(share for number, share in scaled.items() if number < landed)
    assert below - 1e-9 <= draw <= below + scaled[landed] + 1e-9


@pytest.mark.parametrize("weights", [{}, {1: 0.0}, {1: -1.0}, {1: float("nan")}, {1: float("inf")}, {1: 1.0, 2: 0.0}])
def test_weights_that_are_no_shares_are_refused(weights: dict[int, float]) -> None:
    with pytest.raises(InvalidInput) as caught:
        shares(weights)
    assert caught.value.param == "weights"


def test_the_index_tells_which_digests_a_change_released() -> None:
    index = AdapterIndex()
    assert index.put(adapter("a", {1: "d1"}, {"default": {1: 1.0}})) == ()
    assert index.put(adapter("a", {1: "d1", 2: "d2"}, {"default": {2: 1.0}})) == ("d1",)
    assert index.put(adapter("b", {1: "d2"}, {"default": {1: 1.0}})) == ()
    assert index.put(adapter("a", {1: "d1", 2: "d2"}, {"default": {1: 1.0}})) == ()  # b still has d2
    assert index.referenced("d2")
    index.check_integrity()
    assert index.remove("b") == ("d2",)
    assert not index.referenced("d2")
    assert set(index.remove("a")) == {"d1", "d2"}
    assert index.remove("a") == ()
    assert index.list() == []
    index.check_integrity()


def test_the_index_lists_by_name_and_base() -> None:
    index = AdapterIndex()
    index.put(adapter("b", {1: "d1"}, {"default": {1: 1.0}}, base="one"))
    index.put(adapter("a", {1: "d1"}, {"default": {1: 1.0}}, base="two"))
    assert [found.name for found in index.list()] == ["a", "b"]
    assert [found.name for found in index.list(base="one")] == ["b"]
    assert index.known("a")
    assert not index.known("a@1")
