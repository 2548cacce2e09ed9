"""The token store: what is written comes back, and a folder is complete or absent whatever kills its maker."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tuneloop.finetune.data.base import Place, TokenSequence
from tuneloop.finetune.data.token_store import TokenStore
from tuneloop.storage.errors import InvalidInput

PLACE = Place("a.jsonl", 1)
CHILD = """
import os, signal, sys
from pathlib import Path
from tuneloop.finetune.data.base import Place, TokenSequence
from tuneloop.finetune.data.token_store import TokenStore

def sequences():
    for i in range(2_000_000):
        yield TokenSequence(ids=[i], supervised=[True], place=Place("a", 1))
    os.kill(os.getpid(), signal.SIGKILL)

TokenStore.write(Path(sys.argv[1]), sequences())
"""


def sequence(*ids: int) -> TokenSequence:
    return TokenSequence(ids=ids, supervised=[i % 2 == 1 for i in ids], place=PLACE)


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    written = [sequence(1, 2, 3), sequence(7), sequence(4, 5)]
    TokenStore.write(tmp_path / "s", written, notes=lambda: {"a": 1})
    store = TokenStore.open(tmp_path / "s")
    assert len(store) == 3
    assert store.lengths.tolist() == [3, 1, 2]
    assert [store.ids(i).tolist() for i in range(3)] == [[1, 2, 3], [7], [4, 5]]
    assert store.ids(0).dtype == np.int32
    assert store.supervised(2).tolist() == [False, True]
    assert store.notes == {"a": 1}


def test_an_empty_store(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "s", [])
    assert len(store) == 0 and store.lengths.tolist() == []


def test_the_digest_is_of_ids_mask_and_borders(tmp_path: Path) -> None:
    def digest(name: str, *sequences: TokenSequence) -> str:
        return TokenStore.write(tmp_path / name, sequences).digest

    base = digest("a", sequence(1, 2), sequence(3))
    assert digest("b", sequence(1, 2), sequence(3)) == base
    assert digest("c", sequence(1), sequence(2, 3)) != base
    assert digest("d", TokenSequence(ids=[1, 2], supervised=[False] * 2, place=PLACE), sequence(3)) != base


def test_an_error_of_the_sequences_leaves_nothing(tmp_path: Path) -> None:
    def broken() -> Iterator[TokenSequence]:
        yield sequence(1)
        raise InvalidInput("line 2 is bad")

    with pytest.raises(InvalidInput, match="line 2"):
        TokenStore.write(tmp_path / "s", broken())
    assert list(tmp_path.iterdir()) == []


def test_the_first_maker_wins(tmp_path: Path) -> None:
    first = TokenStore.write(tmp_path / "s", [sequence(1)])
    assert TokenStore.write(tmp_path / "s", [sequence(1)]).digest == first.digest
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_linked_stores_share_their_bytes(tmp_path: Path) -> None:
    store = TokenStore.write(tmp_path / "cache" / "s", [sequence(1, 2)])
    linked = store.link_to(tmp_path / "run" / "train")
    assert linked.digest == store.digest and linked.ids(0).tolist() == [1, 2]
    assert (linked.folder / "ids.bin").samefile(store.folder / "ids.bin")


def test_no_store_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="prepare the run again"):
        TokenStore.open(tmp_path / "none")


def test_a_killed_maker_leaves_no_folder_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "s")], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "s").exists()
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    TokenStore.write(tmp_path / "s", [sequence(1)])
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
