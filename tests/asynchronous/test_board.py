"""The board of several processes: two of its ends, a store that both share, and a real transfer between them."""

import math
import threading
from types import SimpleNamespace

import jax
import jax.experimental.transfer
import jax.numpy as jnp
import numpy as np
import pytest

from lsgd_jax.asynchronous import board
from lsgd_jax.asynchronous.board import Post, SharedBoard
from lsgd_jax.errors import UsageError

LIKE = {"w": jax.ShapeDtypeStruct((1, 1, 3), jnp.float32)}


class Store:
    """What the board needs of JAX's coordination service."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def key_value_increment(self, key, by):
        with self._changed:
            self._values[key] = self._values.get(key, 0) + by
            return self._values[key]

    def key_value_dir_get(self, prefix):
        with self._changed:
            return [(key, value) for key, value in self._values.items() if key.startswith(prefix)]

    def key_value_delete(self, key):
        with self._changed:
            del self._values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            self._changed.wait_for(lambda: key in self._values, milliseconds / 1000)
            return self._values[key]

    def requests(self):
        return [key for key, _ in self.key_value_dir_get("") if "/requests/" in key and not key.endswith("/count")]


@pytest.fixture
def ends(monkeypatch):
    store, ends = Store(), []
    for process in range(2):
        state = SimpleNamespace(client=store, process_id=process, coordinator_address="127.0.0.1:1")
        monkeypatch.setattr(board, "global_state", state)
        monkeypatch.setattr(SharedBoard, "_numbers", iter([7]))
        ends.append(SharedBoard([0, 0, 1], LIKE))
    yield store, ends
    for end in ends:
        end.close()
    assert store.requests() == [f"lsgd_jax/board/7/requests/{process}/{n}" for process, n in ((0, 3), (1, 1))]


def params(value):
    return {"w": jnp.full((1, 1, 3), value, jnp.float32)}


def test_the_other_end_sees_posts_and_takes_the_newest_parameters(ends):
    _, (first, second) = ends
    assert second.read() == ({}, {})
    first.write(1, 4, Post(1, 4, 0.1 + 0.2, True, params(1.5)))
    first.write(0, 2, Post(1, 2, math.inf, False, params(0.0)))
    first.write(1, 5, None)  # A step without a post.
    posts, steps = second.read()
    assert posts == {0: Post(1, 2, math.inf, False, None), 1: Post(1, 4, 0.1 + 0.2, True, None)}
    assert steps == {0: 2, 1: 5}
    device = jax.devices()[1]
    taken, _ = second.take(1, posts[1], device)
    np.testing.assert_array_equal(taken["w"], params(1.5)["w"])
    assert taken["w"].devices() == {device}
    first.write(1, 6, Post(1, 6, 0.2, True, params(2.5)))
    np.testing.assert_array_equal(second.take(1, posts[1], device)[0]["w"], params(2.5)["w"])


def test_where_arrays_can_not_be_sent_it_is_one_sentence(monkeypatch):
    def missing(*_):
        raise NotImplementedError("not on this platform")

    state = SimpleNamespace(client=Store(), process_id=0, coordinator_address="127.0.0.1:1")
    monkeypatch.setattr(board, "global_state", state)
    monkeypatch.setattr(jax.experimental.transfer, "start_transfer_server", missing)
    with pytest.raises(UsageError, match=r"can't send arrays between processes .*not on this platform.*: use joined\."):
        SharedBoard([0, 1], LIKE)
