"""Workers share the cores: BLAS uses one thread while there are workers."""

import threadpoolctl

from mquant.weights.matrix import Workers


def _threads() -> list[int]:
    libraries = threadpoolctl.threadpool_info()
    return [each["num_threads"] for each in libraries if each["user_api"] == "blas"]


def test_blas_uses_one_thread_while_there_are_workers() -> None:
    with threadpoolctl.threadpool_limits(2, "blas"):
        with Workers(3):
            assert set(_threads()) == {1}
        assert set(_threads()) == {2}
